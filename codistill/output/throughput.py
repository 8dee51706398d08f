"""How much of a GPU's arithmetic the training of a model uses."""

import torch
from torch import nn

from codistill.model.shape import expert_share, expert_weights

# Dense bf16 FLOP/s of the tensor cores, from NVIDIA's data sheets (SXM where there are several).
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s that the device is made for; None on a CPU and on a GPU that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def training_flops(model: nn.Module) -> float:
    """Operations per token of a forward and backward pass: 6 for each weight that multiplies, 4 for
    one that is frozen, as it needs no gradient of its own.

    The embedding only looks up, unless it is the head too, and a token goes through a share of the
    experts of a mixture. Attention is not counted, nor what gradient checkpointing computes again.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    share, experts = expert_share(model), set(expert_weights(model))
    return sum(
        (6 if weight.requires_grad else 4) * weight.numel() * (share if weight in experts else 1)
        for weight in model.parameters()
        if weight is head or weight is not embedding
    )
