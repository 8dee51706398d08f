"""Causal language models of transformers (and PEFT) on these kernels.

    with logps_instead_of_logits(model, temperature=0.9, return_entropy=True):
        logps, entropy = model(input_ids, attention_mask=attention_mask, labels=labels)

or, for the losses that start from hidden states, `linear_policy_loss(hidden_states,
**linear_head(model), ...)`.
"""

from contextlib import ExitStack
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor, nn

from codistill_kernels._checks import require
from codistill_kernels.integrations._shared import autocast_operands, replace, require_version
from codistill_kernels.linear_logps import linear_logps

# Names that configurations give to the softcap of the logits, and to the factor before it.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVIDED_BY_SCALING = "logits_scaling"  # Granite, MiniCPM3; HyperCLOVA X multiplies by it


class Logps(NamedTuple):
    """What a model returns while `logps_instead_of_logits` is in force."""

    logps: Tensor
    """[B, T - 1] fp32, nats, for labels[:, 1:]; 0 where the label is -100. Differentiable."""
    entropy: Tensor | None
    """[B, T - 1] fp32, nats, likewise; None unless requested."""


def logps_instead_of_logits(
    model: nn.Module, *, temperature: float = 1.0, return_entropy: bool = False
) -> ExitStack:
    """Make model(..., labels=labels) return log-probabilities of the labels, without logits.

    logps[b, t] = log softmax(logits[b, t] / temperature)[labels[b, t + 1]]

    labels: [B, T] int64, next-token labels as in transformers, usually input_ids; positions whose
    label is -100 are not multiplied with the head. Without labels the model works as before, and so
    does `generate`. The log-probabilities are computed in the forward pass of the head's own
    module, so its hooks (those of FSDP2 and ZeRO-3 gather the weight) run.

    Args:
        model: a causal language model of transformers, its PeftModel, or either in a wrapper with a
            `.module` (DDP). Patch before or after wrapping and sharding.
        temperature: divides the logits, > 0; must equal the sampler's.
        return_entropy: also return the entropy of each next-token distribution, differentiable.

    Returns:
        The patch, which makes model(...) return `Logps`. Leaving its `with` block or calling its
        `.close()` restores the model.

    Raises:
        ImportError: this version of transformers is not supported.
        ValueError: as in `linear_head`, here or when the model is called.

    Logits are fp32 sums that are never rounded; autocast only chooses the dtype of the operands.
    Results of a bf16 model therefore differ from those of its own logits, which are rounded.
    """
    require_version("transformers", "5")
    causal_lm = causal_lm_of(model)
    head = causal_lm.get_output_embeddings()
    linear_head(causal_lm)  # refuses a head now rather than at the first call
    forward, head_forward = causal_lm.forward, head.forward

    @wraps(forward)
    def logps_forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return forward(*args, **kwargs)
        hidden_states = causal_lm.base_model(*args, **kwargs | {"use_cache": False})[0]
        return Logps(*head(hidden_states[:, :-1], labels[:, 1:]))

    @wraps(head_forward)
    def logps_of_head(hidden_states: Tensor, token_ids: Tensor | None = None) -> Any:
        if token_ids is None:
            return head_forward(hidden_states)
        arguments = linear_head(causal_lm)
        hidden_states, arguments["lm_head_weight"] = autocast_operands(
            hidden_states, arguments["lm_head_weight"]
        )
        logps, entropy = linear_logps(
            hidden_states,
            token_ids=token_ids,
            temperature=temperature,
            return_entropy=True,
            **arguments,
        )
        return logps, entropy if return_entropy else None

    patch = ExitStack()
    replace(patch, causal_lm, "forward", logps_forward)
    replace(patch, head, "forward", logps_of_head)
    return patch


def linear_head(model: nn.Module) -> dict[str, Any]:
    """A model's head as arguments of every `linear_*` function.

    {"lm_head_weight": [V, H], "bias": [V] or None, "softcap": float or None, "logit_scale": float}

    A LoRA adapter of the head becomes part of the weight, W + scaling B A, and gets its gradient.
    This takes [V, H] more memory, and fp32 products if the adapter is fp32. Under FSDP2 call it
    where the head is unsharded, as in the model's forward pass, or pass the DTensor's
    `.full_tensor()` yourself.

    Args:
        model: as in `logps_instead_of_logits`.

    Raises:
        ValueError: the head is quantized, is another layer than nn.Linear or has another adapter
            than LoRA, or the model changes its logits in another way. The message names it.
    """
    causal_lm = causal_lm_of(model)
    weight, bias = weight_and_bias(causal_lm.get_output_embeddings())
    return dict(lm_head_weight=weight, bias=bias, **scaling(causal_lm.config))


def causal_lm_of(model: nn.Module) -> Any:
    """The transformers model inside DDP's and PEFT's wrappers."""
    while hasattr(model, "module"):
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    expected = "a causal language model of transformers"
    require(hasattr(model, "get_output_embeddings"), "model", expected, type(model).__name__)
    return model


def scaling(config: Any) -> dict[str, float | None]:
    """softcap and logit_scale of a model's configuration."""
    config = config.get_text_config()
    kind = config.model_type
    # Encoder-decoders may add a bias of their own; the others cut or mask the vocabulary.
    other = config.is_encoder_decoder or kind == "chameleon"
    other = other or getattr(config, "unpadded_vocab_size", None) is not None
    require(not other, "model", "one that only scales and softcaps its logits", kind)
    softcaps = [getattr(config, name, None) for name in SOFTCAPS]
    scales = [getattr(config, name, None) for name in SCALES]
    divisor = getattr(config, DIVIDED_BY_SCALING, None)
    if divisor is not None:
        scales.append(divisor if kind.startswith("hyperclovax") else 1 / divisor)
    return dict(
        softcap=next((value for value in softcaps if value is not None), None),
        logit_scale=next((value for value in scales if value is not None), 1.0),
    )


def weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear layer inside PEFT's wrappers, with adapters added."""
    if hasattr(head, "modules_to_save"):  # PEFT's wrapper of a layer that is trained whole
        name = head.active_adapters[0]
        is_saved = not head.disable_adapters and name in head.modules_to_save
        head = head.modules_to_save[name] if is_saved else head.original_module
    if hasattr(head, "base_layer"):
        return with_lora(head)
    name = f"{type(head).__module__}.{type(head).__name__}"
    # Quantized layers, and those that another library adapts, override forward.
    is_linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    require(is_linear, "lm_head", "an nn.Linear, with LoRA at most", name)
    is_plain = head.weight.is_floating_point() and head.weight.element_size() > 1
    require(is_plain, "lm_head", "not quantized", head.weight.dtype)
    return head.weight, head.bias


def with_lora(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The base layer's weight plus scaling B A of every active adapter, and its bias."""
    from peft.tuners.lora import Linear

    name = f"{type(layer).__module__}.{type(layer).__name__}"
    require(isinstance(layer, Linear), "lm_head", "an nn.Linear, with LoRA at most", name)
    weight, bias = weight_and_bias(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        require(not (layer.disable_adapters and layer.merged), "lm_head", "unmerged", "merged")
        return weight, bias
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        dropout = layer.lora_dropout[adapter]
        is_plain = adapter not in layer.lora_variant and layer.lora_B[adapter].bias is None
        require(is_plain, "lm_head", "adapted by plain LoRA", f"another variant: {adapter}")
        has_dropout = layer.training and getattr(dropout, "p", 0) > 0
        require(not has_dropout, "lm_head's LoRA", "without dropout", dropout)
        weight = weight + layer.get_delta_weight(adapter)
    return weight, bias
