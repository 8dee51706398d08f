"""Models that are loaded; `codistill.model.loading` loads them.

A `Policy` is a causal language model whose forward pass ends in log-probabilities, not in logits.
`shard` spreads its weights over the processes with FSDP2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import (
    AttentionInterface,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from codistill.attention import packed_attention
from codistill.batch import TokenBatch
from codistill.config import require
from codistill.config.machinery import Checkpointing, TrainingConfig
from codistill.distributed import is_first
from codistill.failures import first_alone
from codistill.model.lora import merged_weights, own_weights, plain_name
from codistill.model.shards import Weights
from codistill.texts import StopStrings
from codistill_kernels import linear_logps, linear_policy_loss
from codistill_kernels.integrations.transformers import linear_head

AttentionName = Literal["sdpa", "flash"]
IMPLEMENTATIONS = {"sdpa": "codistill_packed", "flash": "flash_attention_2"}
PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_varlen_forward",
}
"""Operators whose results selective checkpointing keeps: dear to compute again."""
AttentionInterface.register(IMPLEMENTATIONS["sdpa"], packed_attention)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS_OF_HEAD = 16384  # copied to fp32 at once: 0.2 GiB of a 7B model's; chosen, untested


def quiet_transformers() -> None:
    """No progress bars, no warnings: the run has its own display."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Policy(nn.Module):
    """pi(token | prompt, tokens before) of a causal language model, on packed sequences.

    Raises:
        ValueError: what the model does to its logits is none of what the kernels compute.
        NotImplementedError: its layers are not where they are in Llama, Qwen or Gemma.
    """

    def __init__(
        self, lm: PreTrainedModel, *, vocab_size: int, attention: AttentionName = "sdpa"
    ) -> None:
        super().__init__()
        linear_head(lm)  # refuses now what it would refuse in the first step
        if not hasattr(lm.base_model, "layers"):  # as `shard` needs them
            raise NotImplementedError(f"{type(lm).__name__} has no decoder layers named layers")
        self.lm, self.vocab_size = lm, vocab_size
        self.use_attention(attention)

    @property
    def device(self) -> torch.device:
        """Where it computes, which is not where its weights are with training.offload = all."""
        weight = next(self.parameters())
        if isinstance(weight, DTensor) and weight.device_mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return weight.device

    def use_attention(self, attention: AttentionName) -> None:
        self.attention = attention
        self.lm.set_attn_implementation(IMPLEMENTATIONS[attention])

    def forward(self, batch: TokenBatch, temperature: float) -> Tensor:
        """Log-probability of each completion token, [N] fp32 nats, at the given temperature."""
        return linear_logps(
            self.hidden_states(batch),
            token_ids=batch.token_ids,
            temperature=temperature,
            vocab_size=self.vocab_size,
            **linear_head(self.lm),
        )

    def policy_loss(
        self, batch: TokenBatch, temperature: float, **terms: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and statistics of `linear_policy_loss`, in one pass over the head."""
        return linear_policy_loss(
            self.hidden_states(batch),
            token_ids=batch.token_ids,
            cu_seqlens=batch.cu_seqlens,
            temperature=temperature,
            vocab_size=self.vocab_size,
            **linear_head(self.lm),
            **terms,
        )

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """[N, H] at the position that predicts each completion token."""
        packing = batch.packing
        within: dict[str, Any] = {"packing": packing}
        if self.attention == "flash":
            ends, longest = packing.cu_seqlens, packing.longest
            within = dict(
                cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest
            )
        output = self.lm.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **within
        )
        return output.last_hidden_state[0].index_select(0, batch.positions)

    def head_inputs(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states [N, H], and the head as `linear_head` has it, whole until the policy runs
        again."""
        return self.hidden_states(batch), linear_head(self.lm)

    @property
    def has_bias(self) -> bool:
        """Whether the head adds a bias to the logits."""
        return self.lm.get_output_embeddings().bias is not None

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[list[int]],
        uniforms: np.ndarray,
        temperature: float,
        end_token_ids: tuple[int, ...] = (),
        stop: StopStrings | None = None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens after each prompt, from softmax(logits / temperature), and their log-probabilities
        (nats), with a KV cache; the most probable tokens at temperature 0.

        uniforms: [S, T] in [0, 1); token t of row s is the inverse distribution function of
        uniforms[s, t]. T tokens each, fewer where `end_token_ids` or stop strings have ended all
        rows. Without both there are T forward passes, whatever is sampled: each is a collective.
        """
        width = max(map(len, prompts))
        device = self.device
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        draws = torch.tensor(uniforms, dtype=torch.float64, device=device)
        ends = torch.tensor(end_token_ids, dtype=torch.int64, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        watches = [] if stop is None else [stop.watch() for _ in prompts]
        cache, tokens, logps = None, [], []
        with self.unpacked():
            for draw in draws.T:
                output = self.lm.base_model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                ids, logp = drawn(self.logits(output.last_hidden_state[:, -1]), draw, temperature)
                tokens.append(ids)
                logps.append(logp)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                positions = positions[:, -1:] + 1
                ended |= torch.isin(ids[:, 0], ends)
                if watches:
                    drawn_ids = zip(watches, ids[:, 0].tolist(), strict=True)
                    stopped = [watch.add(token) for watch, token in drawn_ids]
                    ended |= torch.tensor(stopped, device=device)
                if (end_token_ids or watches) and ended.all():
                    break
        return torch.cat(tokens, dim=1).tolist(), torch.cat(logps, dim=1).tolist()

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """For generation: rows padded on the left, a KV cache, no dropout."""
        training = self.training
        self.eval()  # in training, gradient checkpointing would switch the cache off
        self.lm.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.use_attention(self.attention)
            self.train(training)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[S, H] -> [S, V] fp32, never rounded to the dtype of the forward pass, as in training."""
        head = linear_head(self.lm)
        parts = head["lm_head_weight"][: self.vocab_size].split(ROWS_OF_HEAD)
        logits = torch.cat([hidden_states.float() @ part.float().T for part in parts], dim=1)
        if head["bias"] is not None:
            logits = logits + head["bias"][: self.vocab_size].float()
        logits = head["logit_scale"] * logits
        softcap = head["softcap"]
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    def reduce_head(self, wanted: bool) -> None:
        """Whether the next backward pass sums the gradient of embedding and head over processes.

        Else it is kept, and added to: once per step is enough.
        """
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(wanted, recurse=False)

    def release(self) -> None:
        """Give back the weights that a forward pass has gathered and keeps: embedding and head."""
        if isinstance(self, FSDPModule):
            self.reshard()

    def full_weights(self) -> Weights:
        """All weights, adapters merged into them: every process must iterate."""
        self.release()  # what a forward pass leaves behind is rounded to its dtype
        shapes = {plain_name(name): tuple(weight.shape) for name, weight in own_weights(self.lm)}
        return Weights(shapes, merged_weights(self.lm, self.device))


def drawn(logits: Tensor, draw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The token [S, 1] that each draw [S] in [0, 1) stands for, and its log-probability [S, 1]."""
    logits = logits.double()
    if temperature == 0:
        ids = logits.argmax(dim=1, keepdim=True)
        return ids, logits.log_softmax(dim=1).gather(1, ids)
    logps = (logits / temperature).log_softmax(dim=1)
    reached = logps.exp().cumsum(dim=1)
    # Rounding may leave the last sum below a draw.
    ids = torch.searchsorted(reached, draw[:, None].contiguous(), right=True)
    ids = ids.clamp(max=logits.shape[1] - 1)
    return ids, logps.gather(1, ids)


def shard(
    policy: Policy,
    *,
    dtype: torch.dtype,
    head_dtype: torch.dtype,
    offload: OffloadPolicy,
    mesh: DeviceMesh | None,
) -> Policy:
    """Shard with FSDP2, over all processes or as `mesh` has it (`distributed.shard_mesh`): fp32
    weights, layers run in `dtype`, the embedding, the last norm and the head in `head_dtype`.

    Gradients are summed over the processes, replicas included, and not averaged: the losses divide
    by a global count.
    """
    layers = policy.lm.base_model.layers
    for layer in layers:
        # A norm in float32 of bfloat16 would round again, or be refused: it depends on the model.
        leaves = head_dtype if layer is layers[-1] else None
        precision = MixedPrecisionPolicy(dtype, torch.float32, leaves)
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload)
    # Inputs stay as they are: those of `policy_loss` are log-probabilities and counts.
    whole = MixedPrecisionPolicy(head_dtype, torch.float32, cast_forward_inputs=False)
    # Head and embedding stay gathered: `head_inputs` returns them.
    fully_shard(
        policy, mesh=mesh, mp_policy=whole, reshard_after_forward=False, offload_policy=offload
    )
    for method in ("sample", "head_inputs", "policy_loss"):
        register_fsdp_forward_method(policy, method)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    return policy


def chosen_attention(
    lm: PreTrainedModel, name: str, device: torch.device, dtype: torch.dtype
) -> AttentionName:
    """The implementation that `training.attention` stands for: flash where flash-attn is installed,
    the device is a GPU, the forward pass in bfloat16 and the model made for it."""
    has_flash = device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()
    has_flash = has_flash and lm._supports_flash_attn
    expected = (
        "sdpa or auto: flash needs a GPU, training.dtype bfloat16, flash-attn installed and a "
        f"model that transformers runs with it, found {type(lm).__name__} on {device.type}"
    )
    require(name != "flash" or has_flash, "training.attention", name, expected)
    return "flash" if has_flash and name != "sdpa" else "sdpa"


def prepare(
    lm: PreTrainedModel,
    options: TrainingConfig,
    vocab_size: int,
    device: torch.device,
    mesh: DeviceMesh | None = None,
) -> Policy:
    """A sharded policy of a model on the device, or of one without memory, ready to train.

    mesh: as in `shard`.
    """
    dtype = DTYPES[options.dtype]
    drop_dropout(lm)
    checkpoint_activations(lm, options.gradient_checkpointing)
    attention = chosen_attention(lm, options.attention, device, dtype)
    policy = Policy(lm, vocab_size=vocab_size, attention=attention)
    head_dtype = dtype if options.head_dtype == "same" else torch.float32
    # Copies to and from pinned memory do not wait for each other; there is none without a GPU.
    host = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    offload = host if options.offload == "all" else OffloadPolicy()
    return shard(policy.train(), dtype=dtype, head_dtype=head_dtype, offload=offload, mesh=mesh)


def checkpoint_activations(lm: PreTrainedModel, which: Checkpointing) -> None:
    """Let the backward pass compute again what `training.gradient_checkpointing` names."""
    options: dict[str, Any] = {"use_reentrant": False}
    match which:
        case "none":
            return
        case "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
        case "full":
            pass
        case _:
            assert_never(which)
    lm.gradient_checkpointing_enable(options)


def keep_products(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """What selective checkpointing does with the result of an operator."""
    kept = operator.name() in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def drop_dropout(lm: PreTrainedModel) -> None:
    """Switch dropout off: the policy that is trained is the one that was sampled and scored."""
    for module in lm.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def freeze(policy: Policy) -> Policy:
    """A model that is only asked: no gradients, no optimizer."""
    return policy.eval().requires_grad_(False)


def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save as a Hugging Face model. Collective: every process must call; the first one writes."""
    first = is_first()
    weights = {name: weight.cpu() for name, weight in policy.full_weights() if first}

    def write() -> None:
        policy.lm.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

    first_alone(write)
