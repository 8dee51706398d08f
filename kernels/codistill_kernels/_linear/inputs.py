"""Checked arguments of the operations on a linear head."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._autograd import refuse_transforms
from codistill_kernels._checks import (
    nan_where_outside,
    require,
    require_device,
    require_float,
    require_in_vocabulary,
    require_logit_scale,
    require_mask,
    require_scaling,
    require_shape,
    require_token_ids,
)
from codistill_kernels._linear.head import compute_dtype
from codistill_kernels._shards import Shard, local_head, nan_where_apart, require_plain
from codistill_kernels._tokens import TokenShape


@dataclass(frozen=True)
class LinearInputs:
    """Checked arguments of an op over a linear head, flat."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
    """hidden_states [N, H], weight, bias, token_ids (column here; -1 if not active), temperature"""
    active: Tensor
    """[N] bool"""
    vocab: int
    """Rows of weight and bias that belong to the vocabulary."""
    shard: Shard
    """Where they are in the whole head."""
    softcap: float
    """0: none. For raw logits: logit_scale is in it and in the temperature."""

    def needs(self) -> list[bool]:
        """Whether hidden_states, weight and bias get a gradient."""
        has_gradient = torch.is_grad_enabled()
        return [has_gradient and t is not None and t.requires_grad for t in self.tensors[:3]]

    def cut(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """`tensors`, where weight and bias are cut to the vocabulary."""
        hidden_states, weight, bias, *tokens = self.tensors
        return (hidden_states, *cut(weight, bias, self.vocab), *tokens)


def cut(weight: Tensor, bias: Tensor | None, vocab: int) -> tuple[Tensor, Tensor | None]:
    """The first `vocab` rows of both."""
    # As they are where nothing is cut: autograd copies the gradient of a slice, even of all.
    if vocab == len(weight):
        return weight, bias
    return weight[:vocab], None if bias is None else bias[:vocab]


def prepare_rows(
    operation: str,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    workspace_mib: int | None,
    **options,
) -> tuple[TokenShape, LinearInputs]:
    """`prepare` for an operation on tokens [N] or [B, T] under a mask, with a workspace."""
    require_plain("hidden_states", hidden_states)
    require_plain("token_ids", token_ids)
    shape = TokenShape.of("token_ids", token_ids)
    hidden_states = shape.flat_states("hidden_states", hidden_states)
    token_ids, mask, temperature = shape.flat(
        token_ids=token_ids, mask=mask, temperature=temperature
    )
    require_workspace(workspace_mib)
    refuse_transforms(operation, hidden_states, lm_head_weight, bias)
    require_mask(mask, len(hidden_states), "hidden_states", hidden_states)
    keep = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    head = dict(bias=bias, temperature=temperature, **options)
    return shape, prepare(hidden_states, lm_head_weight, token_ids, keep, **head)


def prepare(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    active: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
) -> LinearInputs:
    """Check the arguments of an operation on a linear head, and make them flat.

    active: [...] bool, tokens that count; only their ids and hidden states need make sense.
    """
    lm_head_weight, bias, shard = local_head(lm_head_weight, bias, group)
    check_inputs(hidden_states, lm_head_weight, token_ids, bias, temperature, softcap)
    require_logit_scale(logit_scale)
    flat_ids, active = token_ids.reshape(-1), active.reshape(-1)
    # c tanh(s a / c) / T of raw logits a is c' tanh(a / c') / T' with c' = c / s and T' = T / s.
    per_token = temperatures(temperature, token_ids.shape, hidden_states, logit_scale).reshape(-1)
    if shard.group is not None:  # before what one process alone may refuse
        per_token = nan_where_apart(per_token, torch.where(active, flat_ids, -1), shard)
    vocab_size = shard.all_rows if vocab_size is None else vocab_size
    expected = f"in 1 .. {shard.all_rows}"
    require(0 < vocab_size <= shard.all_rows, "vocab_size", expected, vocab_size)
    require_in_vocabulary(flat_ids, active, vocab_size)
    rows = min(max(vocab_size - shard.first_row, 0), lm_head_weight.shape[0])
    tensors = (
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        lm_head_weight,
        bias,
        torch.where(active, flat_ids - shard.first_row, -1),
        nan_where_outside(per_token, flat_ids, active, vocab_size),
    )
    return LinearInputs(tensors, active, rows, shard, (softcap or 0.0) / logit_scale)


def temperatures(
    temperature: float | Tensor,
    shape: tuple[int, ...],
    hidden_states: Tensor,
    logit_scale: float = 1.0,
) -> Tensor:
    """[...] one temperature per token, over logit_scale, detached, in the dtype of the softmax."""
    dtype = compute_dtype(hidden_states)
    if not isinstance(temperature, Tensor):  # never by way of the process's default dtype
        scaled = temperature / logit_scale
        return torch.full(shape, scaled, dtype=dtype, device=hidden_states.device)
    scaled = temperature.detach().to(hidden_states.device, dtype)
    return (scaled if logit_scale == 1 else scaled / logit_scale).expand(shape)


def require_workspace(workspace_mib: int | None) -> None:
    is_valid = workspace_mib is None or (isinstance(workspace_mib, int) and workspace_mib > 0)
    require(is_valid, "workspace_mib", "a whole number > 0, or None", workspace_mib)


def check_inputs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> None:
    """Check shapes, dtypes, devices and values; weight [V, H] and bias [V] are the local parts."""
    tensors: dict[str, object] = dict(hidden_states=hidden_states, lm_head_weight=lm_head_weight)
    tensors |= dict(token_ids=token_ids) | ({} if bias is None else dict(bias=bias))
    tensors |= dict(temperature=temperature) if isinstance(temperature, Tensor) else {}
    for name, tensor in tensors.items():
        require_plain(name, tensor)
    require(hidden_states.ndim >= 1, "hidden_states", "[..., H]", tuple(hidden_states.shape))
    require_float("hidden_states", hidden_states)
    require_float("lm_head_weight", lm_head_weight)
    vocab, hidden = lm_head_weight.shape
    require(hidden > 0, "lm_head_weight", "[V, H] with H > 0", tuple(lm_head_weight.shape))
    require_shape("lm_head_weight", lm_head_weight, (vocab, hidden_states.shape[-1]), "[V, H]")
    require_token_ids(token_ids, tuple(hidden_states.shape[:-1]))
    if bias is not None:
        require_float("bias", bias)
        require_shape("bias", bias, (vocab,), "[V]")
    for name, tensor in tensors.items():
        if name != "temperature":  # which is moved
            assert isinstance(tensor, Tensor)
            require_device(name, tensor, "hidden_states", hidden_states)
    require_scaling(temperature, softcap, tuple(token_ids.shape))
