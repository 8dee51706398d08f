"""The clipped importance-ratio loss straight from hidden states, in one pass over the logits.

    chunk of rows -> logits -> log-probabilities -> loss coefficients -> gradients of both factors

The gradients come from the logits that the forward pass has in hand: 6 N H V operations, where a
recomputing backward pass needs 8. Rows without a gradient (masked, clipped, advantage 0) are left
out of the two gradient products, exactly.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._checks import can_look, require, require_mask
from codistill_kernels._linear_torch import (
    Gradients,
    Head,
    chunk_logits,
    chunk_statistics,
    compute_dtype,
    convert_once,
    normalizers,
)
from codistill_kernels.linear_logps import merge_shards, prepare
from codistill_kernels.policy_loss import (
    PolicyLoss,
    check_inputs,
    policy_loss,
    token_gradients,
)

BUFFERS = 3  # [R, V] tensors alive at once in a chunk: logits, their exponentials, their gradient


# --- custom op ---------------------------------------------------------------------------------


@torch.library.custom_op("codistill::linear_policy_gradients", mutates_args=())
def linear_policy_gradients(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    old_logps: Tensor | None,
    weighted_advantages: Tensor,
    mask: Tensor,
    bounds: list[float],
    chunk_rows: int,
    group_name: str,
    needs: list[bool],
    kind: str = "clip",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps [N], and the gradients of -sum of the surrogate: empty tensors where not needed.

    weighted_advantages: importance weight times advantage; the weight is not negative. kind and
    bounds: those of the loss, token-level.
    """
    loss = PolicyLoss(kind, *bounds)
    group = dist.distributed_c10d._resolve_process_group(group_name) if group_name else None
    dtype = compute_dtype(hidden_states)
    head = convert_once(Head(lm_head_weight, bias, temperature, softcap), dtype)
    gradients = Gradients(hidden_states, head, needs)
    logps = torch.zeros(len(token_ids), dtype=dtype, device=token_ids.device)
    for rows in mask.nonzero().squeeze(1).split(chunk_rows):
        logits, slope = chunk_logits(hidden_states[rows], head, rows, dtype)
        statistics = chunk_statistics(logits, token_ids[rows])
        if group is not None:
            statistics = merge_shards(statistics, group)
        softmax = normalizers(statistics)
        maximum, log_sum, _ = softmax
        chunk_logps = (statistics[3] - maximum) - log_sum
        logps[rows] = chunk_logps
        old = chunk_logps if old_logps is None else old_logps[rows]
        g = token_gradients(chunk_logps - old, weighted_advantages[rows], loss)
        kept = g.ne(0).nonzero().squeeze(1)
        if not any(needs) or not len(kept):
            continue
        if len(kept) < len(rows):  # exact: the others would add zeros
            rows, logits, slope, g = rows[kept], logits[kept], slope[kept], g[kept]
            softmax = softmax[:, kept]
        coefficients = torch.stack((-g, -g, torch.zeros_like(g)))
        gradients.add(rows, logits, slope, token_ids[rows], coefficients, softmax)
    return logps, *gradients.results()


@linear_policy_gradients.register_fake
def _(
    hidden_states,
    lm_head_weight,
    bias,
    token_ids,
    temperature,
    softcap,
    old_logps,
    weighted_advantages,
    mask,
    bounds,
    chunk_rows,
    group_name,
    needs,
    kind="clip",
):
    shapes = (hidden_states.shape, lm_head_weight.shape, lm_head_weight.shape[:1])
    return temperature.new_empty(len(token_ids)), *(
        temperature.new_empty(shape if need else 0)
        for shape, need in zip(shapes, needs, strict=True)
    )


# --- autograd ----------------------------------------------------------------------------------


class WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already, up to a factor."""

    @staticmethod
    def forward(ctx, hidden_states, lm_head_weight, bias, loss, gradients, normalizer, group):
        ctx.save_for_backward(*gradients)
        ctx.normalizer, ctx.group = normalizer, group
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_states, lm_head_weight, bias)]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        factor = dloss / ctx.normalizer
        scaled = [
            (gradient * factor) if need else None
            for gradient, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        if scaled[0] is not None and ctx.group is not None:
            dist.all_reduce(scaled[0], group=ctx.group)
        return *(
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(scaled, ctx.dtypes, strict=True)
        ), *[None] * 4


# --- public function ---------------------------------------------------------------------------


def linear_policy_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    loss: PolicyLoss = PolicyLoss(),  # noqa: B008  (frozen)
    normalizer: float | Tensor,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    workspace_mib: int = 256,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `linear_logps`, in one pass: 6 N H V operations, no [N, V] logits.

    Args:
        hidden_states: [N, H], fp32, bf16, fp16 or fp64. Differentiable.
        lm_head_weight: [V, H]. Differentiable; its gradient is summed in fp32 and rounded once.
        token_ids: [N] int64. Only those under the mask need be in the vocabulary.
        old_logps, advantages, mask, loss, normalizer, importance_weights, cu_seqlens: as in
            `policy_loss`. Importance weights are >= 0.
        bias, temperature, softcap, vocab_size, group: as in `linear_logps`.
        workspace_mib: bound of the logits held at once (MiB); more rows a pass, fewer passes over
            the weight. Does not grow with N.
        backend: "auto" or "torch"; there is no other implementation yet.

    Returns:
        (loss, statistics) as `policy_loss`. Gradients are made here, for the inputs that require
        one, and only scaled in the backward pass; under torch.no_grad none is made.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names it.
        NotImplementedError: the loss is sequence-level.

    Rows without a gradient (masked, clipped, advantage 0) are left out of both gradient products.
    Source: Eq. 5 and Eq. 10. Definition: reference.policy_loss of reference.linear_logps.
    """
    require(hidden_states.ndim == 2, "hidden_states", "[N, H]", tuple(hidden_states.shape))
    require(workspace_mib > 0, "workspace_mib", "> 0", workspace_mib)
    require(backend in ("auto", "torch"), "backend", "'auto' or 'torch'", repr(backend))
    require_mask(mask, len(hidden_states))
    if loss.is_sequence_level:
        raise NotImplementedError(f"linear_policy_loss with kind {loss.kind!r}")
    if importance_weights is not None and can_look(importance_weights):
        counted = importance_weights if mask is None else importance_weights[mask]
        wrong = counted[~(counted >= 0)]
        require(not len(wrong), "importance_weights", ">= 0", wrong[:3].tolist())
    keep = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    inputs = prepare(
        hidden_states,
        lm_head_weight,
        token_ids,
        keep,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        group=group,
    )
    differentiable = inputs.tensors[:3]
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in differentiable
    ]
    terms = dict(importance_weights=importance_weights, cu_seqlens=cu_seqlens)
    check_inputs(
        inputs.tensors[4], old_logps, advantages, keep, normalizer, importance_weights, cu_seqlens
    )
    with torch.no_grad():
        logps, *gradients = linear_policy_gradients(
            *inputs.tensors,
            softcap or 0.0,
            old_logps,
            weighted_advantages(inputs.tensors[4], advantages, keep, **terms),
            keep,
            loss.bounds(),
            # Of the whole shard, cut or not: all processes must make the same chunks.
            rows_within(workspace_mib, lm_head_weight, inputs.tensors[4]),
            "" if group is None else group.group_name,
            needs,
            loss.kind,
        )
        value, statistics = policy_loss(
            logps, old_logps, advantages, keep, loss=loss, normalizer=normalizer, **terms
        )
    if any(needs):
        value = WithGradients.apply(*differentiable, value, gradients, normalizer, group)
    return value, statistics


def weighted_advantages(
    like: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Importance weight times advantage of each token, [N]; 0 behind the mask."""
    if cu_seqlens is not None:
        advantages = advantages.repeat_interleave(cu_seqlens.diff(), output_size=len(mask))
    if importance_weights is not None:
        advantages = advantages * importance_weights
    return torch.where(mask, advantages.to(like.dtype), 0.0)


def rows_within(workspace_mib: int, weight: Tensor, like: Tensor) -> int:
    """Rows a chunk may have."""
    return max(1, workspace_mib * 2**20 // (BUFFERS * like.element_size() * max(1, len(weight))))
