"""Any loss that is a sum over tokens, straight from hidden states, in one pass over the logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._autograd import first_order_only
from codistill_kernels._checks import require, require_normalizer
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.inputs import LinearInputs, prepare_rows
from codistill_kernels._linear.passes import gradients_by_chunks
from codistill_kernels._linear.planning import make_chunks, plan_of_call
from codistill_kernels._scaling import divisor, with_gradients
from codistill_kernels.linear_logps import LinearLogps, Options

TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

# --- the caller's function ---------------------------------------------------------------------


def evaluate(
    fn: TokenLoss, logps: Tensor, entropy: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses [R] of fn, detached, and their slopes by logps and entropy (None: fn ignores it)."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (logps, entropy)]
        losses = fn(leaves[0], leaves[1], rows)
        require_losses(losses, rows)
        require_no_other_gradient(losses, leaves)
        if not losses.requires_grad:  # they depend on neither
            return losses.detach(), torch.zeros_like(logps), None
        slopes = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    dlogps, dentropy = slopes
    return losses.detach(), torch.zeros_like(logps) if dlogps is None else dlogps, dentropy


def require_losses(losses: Tensor, rows: Tensor) -> None:
    expected = f"[R] = ({len(rows)},) losses, one for each of `rows`"
    require(isinstance(losses, Tensor), "fn's result", expected, type(losses).__name__)
    require(losses.shape == rows.shape, "fn's result", expected, tuple(losses.shape))


def require_no_other_gradient(losses: Tensor, leaves: list[Tensor]) -> None:
    seen, ahead = set(), [losses.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            what = f"a tensor {tuple(variable.shape)} that requires one"
            raise ValueError(f"fn must use no gradient but that of logps and entropy, got {what}")
        ahead += [following for following, _ in node.next_functions]


class WithSlopes(torch.autograd.Function):
    """A loss whose slopes by logps and entropy are known already."""

    @staticmethod
    def forward(ctx, logps, entropy, loss, dlogps, dentropy, anchor):
        ctx.save_for_backward(dlogps, dentropy, anchor)
        return loss.clone()

    @staticmethod
    @first_order_only("linear_token_loss")
    def backward(ctx, dloss):
        dlogps, dentropy, _ = ctx.saved_tensors
        return dloss * dlogps, None if dentropy is None else dloss * dentropy, *[None] * 4


# --- the ways through the logits ---------------------------------------------------------------


def by_autograd(
    inputs: LinearInputs, fn: TokenLoss, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], 0 where masked, logps and entropy [N]; autograd goes through fn."""
    keep, rows = inputs.active, options.rows
    logps, entropy = LinearLogps.apply(*inputs.tensors, keep, options)
    if rows is None:  # torch.compile knows no number of rows: fn gets all
        every = torch.arange(keep.shape[0], device=keep.device)
        # 0 times an infinite slope of fn at a masked row's 0 is NaN; LinearLogps looks at no
        # gradient of such a row.
        return torch.where(keep, fn(logps, entropy, every), 0.0), logps, entropy
    losses = fn(logps[rows], entropy[rows], rows)
    require_losses(losses, rows)
    return losses.new_zeros(keep.shape).index_put((rows,), losses), logps, entropy


def by_log_probabilities(
    inputs: LinearInputs, fn: TokenLoss, rows: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, logps and entropy [N]."""
    logps, entropy = LinearLogps.apply(*inputs.tensors, inputs.active, options)
    with torch.no_grad():
        losses, dlogps, dentropy = evaluate(fn, logps[rows], entropy[rows], rows)
        parts = [
            None if slope is None else torch.zeros_like(logps).index_copy_(0, rows, slope)
            for slope in (dlogps, dentropy)
        ]
    loss = WithSlopes.apply(logps, entropy, losses.sum(), *parts, logps[:0].clone())
    return loss, logps, entropy


def by_chunks(
    inputs: LinearInputs,
    fn: TokenLoss,
    rows: Tensor,
    options: Options,
    needs: list[bool],
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, logps and entropy [N]; gradients are made now."""
    cut = inputs.cut()
    hidden_states, weight, bias, token_ids, temperature = cut
    total = temperature.new_zeros(())

    def slopes(part: Tensor, logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        losses, dlogps, dentropy = evaluate(fn, logps, entropy, part)
        total.add_(losses.sum())
        return dlogps, dentropy

    with torch.no_grad():
        head = Head(weight, bias, temperature, options.softcap)
        chunks = make_chunks(hidden_states, head, token_ids, options.backend)
        logps, entropy, gradients = gradients_by_chunks(
            chunks, rows, most, slopes, needs, options.group
        )
    group = options.group if options.reduce_hidden_gradient else None
    loss = with_gradients(cut[:3], total, gradients, 1.0, group)
    return loss, logps, entropy


# --- public function ---------------------------------------------------------------------------


def linear_token_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    fn: TokenLoss,
    mask: Tensor | None = None,
    *,
    normalizer: float | Tensor = 1.0,
    reduction: Literal["sum", "none"] = "sum",
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_gradient: bool = True,
    workspace_mib: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of your own, of each token's log-probability and entropy, without the [N, V] logits.

    loss = (1/normalizer) sum over unmasked tokens n of fn(logps[n], entropy[n], n)

    Tokens are flat, [N], or rows of sequences, [B, T], with hidden states [B, T, H]. What fn takes
    is flat either way: its `rows` number the tokens of x.reshape(-1).

    On a CPU 6 N H V operations: fn is called once where the logits fit into the workspace, else on
    chunks of tokens while theirs are there. On a GPU fn is called once: 6 N H V where the
    exponentials of the logits fit into the workspace and fn does not use the entropy, else 8.

    Args:
        hidden_states, lm_head_weight, token_ids, mask: as in `linear_policy_loss`.
        fn: (logps [R], entropy [R], rows [R] int64) -> losses [R]: of the tokens with numbers
            `rows`, by which it takes its own [N] tensors. A loss depends on its own token alone.
            It may differentiate nothing but logps and entropy: tensors of its own are detached.
        normalizer: a number or a scalar tensor, >= 0; 0 only where nothing is left to divide.
        reduction: "sum", or "none": the losses [N] themselves, 0 where masked, not normalized; then
            logits that do not fit into the workspace are computed twice on a CPU.
        bias, temperature, softcap, logit_scale, vocab_size, group, reduce_hidden_gradient: as in
            `linear_logps`.
        workspace_mib, backend: as in `linear_policy_loss`.

    Returns:
        (loss, {"logps": [N], "entropy": [N], "tokens": scalar}), the last three detached ([B, T]
        where [N], for tokens [B, T], the losses of "none" too). Under torch.compile fn is traced,
        called on all tokens (0 and 0 where masked, whatever it gives there counts for nothing), and
        logits are computed twice.

    Raises:
        ValueError: an argument, or what fn returns, is wrong. The message names it.

    Definition: codistill_kernels.reference.linear_token_loss.
    """
    require_normalizer(normalizer)
    require(callable(fn), "fn", "a function of (logps, entropy, rows)", type(fn).__name__)
    require(reduction in ("sum", "none"), "reduction", "sum or none", repr(reduction))
    shape, inputs = prepare_rows(
        "linear_token_loss",
        hidden_states,
        lm_head_weight,
        token_ids,
        mask,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        group=group,
        workspace_mib=workspace_mib,
    )
    keep, needs = inputs.active, inputs.needs()
    options = Options(
        inputs.vocab,
        inputs.softcap,
        inputs.shard.group,
        backend,
        any(needs),
        has_entropy=True,
        workspace_mib=workspace_mib,
        reduce_hidden_gradient=reduce_hidden_gradient,
    )
    if torch.compiler.is_compiling():
        loss, logps, entropy = by_autograd(inputs, fn, options)
    else:
        rows = keep.nonzero().squeeze(1)
        kind, plan = plan_of_call(inputs, len(rows), workspace_mib, backend, True, needs)
        # fn may differentiate the entropy: raw logits are kept where they fit.
        options = replace(options, rows=rows, has_entropy_gradient=plan.way == "kept")
        if reduction == "none":
            loss, logps, entropy = by_autograd(inputs, fn, options)
        # Chunks of exponentials, as on a GPU, have no gradient of an entropy nor of a bias.
        elif plan.way == "chunks" and kind.HOLDS_LOGITS and any(needs):
            loss, logps, entropy = by_chunks(inputs, fn, rows, options, needs, plan.rows)
        else:
            loss, logps, entropy = by_log_probabilities(inputs, fn, rows, options)
    if reduction == "sum":
        loss = loss.sum()
        loss = loss / divisor(loss, normalizer)
    tokens = keep.sum().to(logps.dtype)
    statistics = dict(logps=logps.detach(), entropy=entropy.detach(), tokens=tokens)
    return shape.restored(loss, statistics)
