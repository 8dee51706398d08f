"""Log-probabilities of given tokens from logits that the caller holds."""

import torch
from torch import Tensor

from codistill_kernels import _backends, _native
from codistill_kernels._autograd import first_order_only, refuse_transforms
from codistill_kernels._checks import (
    nan_where_outside,
    overlaps_itself,
    require,
    require_device,
    require_float,
    require_in_vocabulary,
    require_scaling,
    require_token_ids,
)
from codistill_kernels._linear import softmax_torch
from codistill_kernels._linear.head import compute_dtype
from codistill_kernels._linear.logps import logps_and_entropy, row_coefficients
from codistill_kernels._ops import custom_op, fake_of

ROWS = 256  # at once in the torch backend, which makes them fp32; chosen, untested

# --- custom ops --------------------------------------------------------------------------------


@custom_op()
def logits_statistics(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    has_entropy: bool,
    backend: str,
) -> Tensor:
    """[4, N] max m, rest of sum exp(z - m), sum exp(z - m) (z - m) if has_entropy, and the token's
    logit, from logits [N, V] (`_linear.chunks`)."""
    chosen = _backends.choose(backend, logits.device, logits.dtype)
    if chosen != "torch" and logits.stride(1) != 1:
        logits = logits.contiguous()
    if chosen == "cpu":
        out = temperature.new_empty((4, len(logits)))
        _native.call("logits_statistics", logits, vocab_size, token_ids, temperature, softcap, out)
        return out
    if chosen == "triton":
        from codistill_kernels._linear.softmax_triton import logit_statistics

        token = (token_ids, temperature, softcap)
        return logit_statistics(logits, *token, vocab_size, has_entropy)
    out = temperature.new_empty((4, len(logits)))
    for rows in row_slices(len(logits)):
        raw = logits[rows, :vocab_size].to(temperature.dtype)
        scaled = softmax_torch.scale(raw, temperature[rows], softcap)
        out[:, rows] = softmax_torch.statistics(scaled, token_ids[rows])
    return out


@fake_of(logits_statistics)
def _(logits, token_ids, temperature, softcap, vocab_size, has_entropy, backend):
    return temperature.new_empty((4, logits.shape[0]))


@custom_op(mutates=("out",))
def write_logits_gradients(
    out: Tensor,
    logits: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    coefficients: Tensor,
    lse_parts: Tensor,
    backend: str,
) -> None:
    """out [N, V] = gradient of the logits, in whose place it is written where logits is None."""
    logits = out if logits is None else logits
    chosen = _backends.choose(backend, logits.device, logits.dtype)
    if chosen != "torch":
        # Kernels take contiguous rows: others are copied, and the result is copied back.
        in_rows = logits if logits.stride(1) == 1 else logits.contiguous()
        result = out if out.stride(1) == 1 else torch.empty_like(in_rows)
        per_row = (coefficients.contiguous(), lse_parts.contiguous())
        if chosen == "cpu":
            token = (token_ids, temperature, softcap)
            _native.call("logits_gradients", result, in_rows, vocab_size, *token, *per_row)
        else:
            from codistill_kernels._linear.softmax_triton import logit_gradients

            token = (token_ids.contiguous(), temperature.contiguous(), softcap)
            logit_gradients(in_rows, result, None, *token, vocab_size, 0, *per_row)
        if result is not out:
            out.copy_(result)
        return
    for rows in row_slices(len(logits)):
        dlogits = softmax_torch.gradients(
            logits[rows, :vocab_size].to(temperature.dtype),
            token_ids[rows],
            temperature[rows],
            softcap,
            coefficients[:, rows],
            lse_parts[:, rows],
        )
        # Select, not multiply: a row without a gradient may hold NaN.
        active = coefficients[:, rows].ne(0).any(dim=0)[:, None]
        out[rows, :vocab_size] = torch.where(active, dlogits, 0.0)
        out[rows, vocab_size:] = 0


@fake_of(write_logits_gradients)
def _(
    out,
    logits,
    token_ids,
    temperature,
    softcap,
    vocab_size,
    coefficients,
    lse_parts,
    backend,
):
    return None


def row_slices(rows: int) -> list[slice]:
    return [slice(first, first + ROWS) for first in range(0, rows, ROWS)]


# --- autograd ----------------------------------------------------------------------------------


class SelectiveLogps(torch.autograd.Function):
    """logits [N, V], ... -> logps [N], entropy [N]."""

    @staticmethod
    def forward(ctx, logits, token_ids, temperature, active, options):
        softcap, vocab_size, has_entropy, _, backend = options
        numbers = (softcap, vocab_size, has_entropy)
        statistics = logits_statistics(logits, token_ids, temperature, *numbers, backend)
        logps, entropy, lse_parts = logps_and_entropy(statistics, active, group=None)
        ctx.save_for_backward(logits, token_ids, temperature, active, lse_parts)
        ctx.options = options
        return logps, entropy

    @staticmethod
    @first_order_only("selective_logps")
    def backward(ctx, dlogps, dentropy):
        logits, token_ids, temperature, active, lse_parts = ctx.saved_tensors
        softcap, vocab_size, _, inplace_backward, backend = ctx.options
        coefficients = row_coefficients(dlogps, dentropy, active)
        # Detached: the same memory, without its place in the graph.
        out = logits.detach() if inplace_backward else torch.empty_like(logits)
        write_logits_gradients(
            out,
            None if inplace_backward else logits,
            token_ids,
            temperature,
            softcap,
            vocab_size,
            coefficients,
            lse_parts,
            backend,
        )
        return out, *[None] * 4


# --- checks ------------------------------------------------------------------------------------


def check_inputs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    vocab_size: int | None,
    ignore_index: int,
) -> int:
    """The size of the vocabulary, checked with all else."""
    require(logits.ndim >= 1, "logits", "[..., V]", tuple(logits.shape))
    require_float("logits", logits)
    require(logits.shape[-1] > 0, "logits", "[..., V] with V > 0", tuple(logits.shape))
    columns = logits.shape[-1]
    vocab_size = columns if vocab_size is None else vocab_size
    require(0 < vocab_size <= columns, "vocab_size", f"in 1 .. {columns}", vocab_size)
    require_token_ids(token_ids, tuple(logits.shape[:-1]))
    require_device("token_ids", token_ids, "logits", logits)
    require_in_vocabulary(token_ids, token_ids != ignore_index, vocab_size)
    require_scaling(temperature, softcap, tuple(token_ids.shape))
    return vocab_size


# --- public function ---------------------------------------------------------------------------


def selective_logps(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each given token from logits, which are read once and not copied.

    z = softcap * tanh(logits / softcap) / temperature   (without softcap: logits / temperature)
    logps[n] = z[n, token_ids[n]] - logsumexp_v z[n, v]
    entropy[n] = -sum_v p[n, v] log p[n, v]              (p = softmax of z over the vocabulary)

    Args:
        logits: [..., V], fp32, bf16, fp16 or fp64. Differentiable.
        token_ids: [...] int64, in [0, vocab_size) or `ignore_index`. Checked on the CPU and outside
            torch.compile; elsewhere an id outside gives NaN, of its row's gradient too.
        temperature: divides the logits, > 0: a number, or a tensor [...] of one per token.
        softcap: > 0; soft limit of the logits, before the temperature.
        vocab_size: columns from here on are outside the softmax. None: all count.
        ignore_index: these tokens get log-probability 0, entropy 0 and no gradient, whatever their
            logits hold.
        return_entropy: also return the entropy, differentiable like the log-probabilities.
        inplace_backward: the backward pass overwrites the logits with their gradient, which saves
            the memory of a second [..., V]. For logits that nothing else reads after; once only.
            Refused for logits whose elements share memory (expanded ones).
        backend: "auto", "triton", "cpu" (C++) or "torch". auto: triton on a GPU, cpu on the CPU.

    Returns:
        [...] fp32, nats, <= 0; with `return_entropy` (logps, entropy). fp64 for fp64 logits.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value. The message names it.
        RuntimeError: a second derivative, forward-mode differentiation or torch.func.

    Definition: codistill_kernels.reference.selective_logps. Source: as `linear_logps`.
    """
    vocab_size = check_inputs(logits, token_ids, temperature, softcap, vocab_size, ignore_index)
    if inplace_backward:
        expected = "one whose elements each have memory of their own where inplace_backward"
        require(not overlaps_itself(logits), "logits", expected, f"strides {logits.stride()}")
    refuse_transforms("selective_logps", logits)
    dtype, ids = compute_dtype(logits), token_ids.reshape(-1)
    per_token = torch.as_tensor(temperature, dtype=dtype, device=logits.device).detach()
    active = ids != ignore_index
    per_token = per_token.expand(token_ids.shape).reshape(-1)
    per_token = nan_where_outside(per_token, ids, active, vocab_size)
    logps, entropy = SelectiveLogps.apply(
        logits.reshape(-1, logits.shape[-1]),
        torch.where(active, ids, -1),
        per_token.contiguous(),
        active,
        (softcap or 0.0, vocab_size, return_entropy, inplace_backward, backend),
    )
    logps, entropy = logps.view(token_ids.shape), entropy.view(token_ids.shape)
    return (logps, entropy) if return_entropy else logps
