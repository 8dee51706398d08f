"""Log-probabilities of given tokens from hidden states, without the [N, V] logits."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._autograd import refuse_transforms
from codistill_kernels._checks import require
from codistill_kernels._linear.chunks import Kept
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.inputs import cut, prepare, require_workspace
from codistill_kernels._linear.logps import logps_and_entropy, row_coefficients
from codistill_kernels._linear.passes import recomputed_gradients
from codistill_kernels._linear.planning import keep_logits, make_chunks, workspace_bytes
from codistill_kernels._ops import custom_op, fake_of
from codistill_kernels._shards import require_plain

# --- custom ops --------------------------------------------------------------------------------


@custom_op()
def linear_statistics(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    has_entropy: bool,
    backend: str,
) -> Tensor:
    """[4, N] max m, rest of sum exp(z - m), sum exp(z - m) (z - m) if has_entropy, and the token's
    logit, over these vocabulary rows (`_linear.chunks`)."""
    head = Head(lm_head_weight, bias, temperature, softcap)
    return make_chunks(hidden_states, head, token_ids, backend).statistics(has_entropy)


@fake_of(linear_statistics)
def _(hidden_states, lm_head_weight, bias, token_ids, temperature, softcap, has_entropy, backend):
    return temperature.new_empty((4, hidden_states.shape[0]))


@custom_op()
def linear_gradients(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    coefficients: Tensor,
    lse_parts: Tensor,
    is_whole: bool,
    head_rows: int,
    needs: list[bool],
    workspace_mib: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden_states (in the compute dtype), weight and bias (in their own dtypes).

    Takes coefficients and lse_parts [3, N]; is_whole: the weight is the whole vocabulary. The
    gradients of weight and bias have head_rows rows, zeros from V on. An empty tensor stands for
    each gradient that is not needed.
    """
    head = Head(lm_head_weight, bias, temperature, softcap)
    dx, dw, db = recomputed_gradients(
        hidden_states,
        head,
        token_ids,
        coefficients,
        lse_parts,
        is_whole,
        needs,
        backend,
        head_rows,
        lm_head_weight.dtype,
        workspace_bytes(workspace_mib, hidden_states.device, lm_head_weight.shape[0]),
    )
    return dx, dw, db if bias is None else db.to(bias.dtype)


@fake_of(linear_gradients)
def _(
    hidden_states,
    lm_head_weight,
    bias,
    token_ids,
    temperature,
    softcap,
    coefficients,
    lse_parts,
    is_whole,
    head_rows,
    needs,
    workspace_mib,
    backend,
):
    db = coefficients if bias is None else bias
    return (
        coefficients.new_empty(hidden_states.shape if needs[0] else 0),
        lm_head_weight.new_empty((head_rows, lm_head_weight.shape[1]) if needs[1] else 0),
        db.new_empty(head_rows if needs[2] else 0),
    )


# --- autograd ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How `LinearLogps` runs."""

    vocab: int
    """Rows of weight and bias that count."""
    softcap: float
    group: dist.ProcessGroup | None
    backend: str
    has_gradient: bool
    """Whether a backward pass can follow."""
    has_entropy: bool = False
    """Whether the entropy is wanted; else it is undefined."""
    has_entropy_gradient: bool = False
    """Whether it is sure to have a gradient."""
    workspace_mib: int | None = None
    rows: Tensor | None = None
    """[K] int64, the active tokens, where they are known."""
    reduce_hidden_gradient: bool = True
    """Whether the gradient of hidden_states is summed over the group here."""


class LinearLogps(torch.autograd.Function):
    """(hidden_states [N, H], weight [V, H], bias [V] or None, ...) -> logps [N], entropy [N]."""

    @staticmethod
    def forward(ctx, hidden_states, lm_head_weight, bias, token_ids, temperature, active, options):
        weight, bias_part = cut(lm_head_weight, bias, options.vocab)
        inputs = (hidden_states, weight, bias_part, token_ids, temperature)
        ctx.kept = None
        if torch.compiler.is_compiling():
            has_entropy = options.has_entropy
            statistics = linear_statistics(*inputs, options.softcap, has_entropy, options.backend)
        else:
            # A gradient that is not there comes as None: zeros would have to be looked at.
            ctx.set_materialize_grads(False)
            statistics, ctx.kept = statistics_of_active(
                inputs, active, options, len(lm_head_weight), ctx.needs_input_grad[:3]
            )
        logps, entropy, lse_parts = logps_and_entropy(statistics, active, options.group)
        whole = (hidden_states, lm_head_weight, bias, token_ids, temperature)
        ctx.save_for_backward(*whole, active, lse_parts)
        ctx.options = options
        return logps, entropy

    @staticmethod
    def backward(ctx, dlogps, dentropy):
        hidden_states, lm_head_weight, bias, *tokens, active, lse_parts = ctx.saved_tensors
        needs, group = list(ctx.needs_input_grad[:3]), ctx.options.group
        # What is kept is used up, also by a pass that fails: a second pass computes logits again.
        kept, ctx.kept = ctx.kept, None
        head_rows = len(lm_head_weight)
        lm_head_weight, bias = cut(lm_head_weight, bias, ctx.options.vocab)
        zero = torch.zeros_like(lse_parts[0])
        coefficients = row_coefficients(
            zero if dlogps is None else dlogps, zero if dentropy is None else dentropy, active
        )
        serves = kept is not None and (dentropy is None or kept.has_entropy_gradient)
        if serves and not torch.is_grad_enabled():
            # With shards the sum of their gradients is rounded, not each of them.
            dx_dtype = hidden_states.dtype if group is None else torch.float32
            gradients = kept.gradients(coefficients, lse_parts, needs, hidden_states, dx_dtype)
        else:
            kept = None  # before as much is allocated again
            gradients = linear_gradients(
                hidden_states,
                lm_head_weight,
                bias,
                *tokens,
                ctx.options.softcap,
                coefficients,
                lse_parts,
                group is None,
                head_rows,
                needs,
                ctx.options.workspace_mib,
                ctx.options.backend,
            )
        kept = None
        dx, dw, db = (g if need else None for g, need in zip(gradients, needs, strict=True))
        if dx is not None:
            if group is not None and ctx.options.reduce_hidden_gradient:
                dist.all_reduce(dx, group=group)
            dx = dx.to(hidden_states.dtype)
        return dx, dw, db, *[None] * 4


def statistics_of_active(
    inputs: tuple, active: Tensor, options: Options, head_rows: int, needs: tuple[bool, ...]
) -> tuple[Tensor, Kept | None]:
    """Statistics [4, N], zeros where not active, and what is kept of the logits.

    Something is kept for the backward pass where the backend can keep it and the memory allows.
    """
    hidden_states, weight, bias, token_ids, temperature = inputs
    rows = active.nonzero().squeeze(1) if options.rows is None else options.rows
    is_all = len(rows) == len(active)
    if not is_all:
        hidden_states, token_ids, temperature = (
            t[rows] for t in (hidden_states, token_ids, temperature)
        )
    compact = (hidden_states, weight, bias, token_ids, temperature)
    head = Head(weight, bias, temperature, options.softcap)
    kept = None
    if options.has_gradient and any(needs):
        device, is_shard = hidden_states.device, options.group is not None
        mib = options.workspace_mib
        workspace = workspace_bytes(mib, device, len(weight), is_shard=is_shard)
        kept = keep_logits(
            hidden_states,
            head,
            token_ids,
            rows,
            head_rows,
            has_entropy=options.has_entropy,
            has_entropy_gradient=options.has_entropy_gradient,
            needs=needs,
            backend=options.backend,
            workspace=workspace,
        )
    if kept is not None:
        statistics = kept.statistics
    else:
        has_entropy = options.has_entropy
        statistics = linear_statistics(*compact, options.softcap, has_entropy, options.backend)
    if is_all:
        return statistics, kept
    full = statistics.new_zeros((4, len(active)))
    full[:, rows] = statistics
    return full, kept


# --- public function ---------------------------------------------------------------------------


def linear_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_gradient: bool = True,
    workspace_mib: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each given token, without holding the [N, V] logits.

    a = hidden_states @ lm_head_weight.T + bias
    z = softcap * tanh(logit_scale * a / softcap) / temperature
    (without softcap: logit_scale * a / temperature)
    logps[n] = z[n, token_ids[n]] - logsumexp_v z[n, v]
    entropy[n] = -sum_v p[n, v] log p[n, v]              (p = softmax of z over the vocabulary)

    Args:
        hidden_states: [..., H], fp32, bf16, fp16 or fp64. Differentiable.
        lm_head_weight: [V, H], same device, any of these dtypes. Differentiable; its gradient is
            summed in fp32 and rounded once. A DTensor (and so the bias) on a mesh of one dimension:
            Replicate: each process brings tokens of its own, and the gradient, which is Partial, is
            the sum over processes; with the same tokens everywhere pass .to_local() instead.
            Shard(0): as `group`, the mesh's processes, with shards as by torch.chunk; all bring the
            same tokens. FSDP shards its head too, but there tokens differ: unshard() it first, or
            .full_tensor(grad_placements=[Partial()]), whose gradient is summed over processes.
        token_ids: [...], int64, in [0, vocab_size) or `ignore_index`. On a GPU and under
            torch.compile, where values are not looked at, an id outside gives NaN.
        bias: [V], added to the logits. Differentiable.
        temperature: divides the logits, > 0: a number, or a tensor [...] of one per token. No
            gradient flows into it.
        softcap: > 0; soft limit of the logits, before the temperature.
        logit_scale: > 0, a number; multiplies the logits before the softcap (Cohere; 1 over
            Granite's logits_scaling).
        vocab_size: only the first `vocab_size` rows of the weight take part in the softmax.
        ignore_index: such tokens get log-probability 0, entropy 0 and no gradient, whatever their
            hidden states hold.
        return_entropy: also return the entropy, differentiable like the log-probabilities.
        group: processes that each hold V rows of the weight (and of the bias), all as many, in rank
            order; ids and vocab_size then count over all of them. All bring the same tokens, and
            each gets the whole result, and in the backward pass the whole gradient of
            hidden_states.
        reduce_hidden_gradient: False: the gradient of hidden_states is that through this process's
            rows alone, for a caller that sums it over `group` itself, as a reduce-scatter behind
            Megatron's sequence parallelism does.
        workspace_mib: bound of the logits held at once, or of their exponentials until the backward
            pass (MiB). None: 128 on a CPU, on a GPU 2560 or half of what is free: give a number
            where bits must not depend on that.
        backend: "auto", "triton", "cpu" (C++) or "torch". auto: triton on a GPU, cpu on the CPU.

    Returns:
        [...] fp32, nats, <= 0; with `return_entropy` (logps, entropy). fp64 for fp64 hidden states.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or processes that share a
            head bring other tokens or unequal shards (under torch.compile all results are NaN
            then). The message names it.

    Logits are fp32 sums, never rounded. Memory besides the inputs and the gradients: the forward
    pass holds a tile of logits per thread (cpu), a slab of 128 MiB (triton) or a chunk of 256 rows
    (torch); the backward pass computes them again, the workspace at a time. Where they fit into the
    workspace, the exponentials of all logits are kept for the backward pass instead, 6 N H V
    operations, not 8: by triton in the dtype of the inputs, unless the entropy or a bias has a
    gradient; by cpu in bf16 for bf16 inputs, else, and with those gradients or a softcap, the
    logits in fp32.
    Definition: codistill_kernels.reference.linear_logps. Source: online softmax, Milakov &
    Gimelshein 2018 (arXiv:1805.02867).
    """
    require_workspace(workspace_mib)
    refuse_transforms("linear_logps", hidden_states, lm_head_weight, bias)
    require_plain("token_ids", token_ids)
    require(isinstance(ignore_index, int), "ignore_index", "an int", ignore_index)
    inputs = prepare(
        hidden_states,
        lm_head_weight,
        token_ids,
        token_ids != ignore_index,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        group=group,
    )
    options = Options(
        inputs.vocab,
        inputs.softcap,
        inputs.shard.group,
        backend,
        torch.is_grad_enabled(),
        return_entropy,
        workspace_mib=workspace_mib,
        reduce_hidden_gradient=reduce_hidden_gradient,
    )
    logps, entropy = LinearLogps.apply(*inputs.tensors, inputs.active, options)
    shape = token_ids.shape
    if len(shape) != 1:
        logps, entropy = logps.view(shape), entropy.view(shape)
    return (logps, entropy) if return_entropy else logps
