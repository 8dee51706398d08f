"""The importance-ratio losses straight from hidden states, in one pass over the logits.

    chunk of rows -> logits -> log-probabilities -> closed slopes -> gradients of both factors

The gradients come from the logits that the forward pass has in hand: 6 N H V operations, where a
recomputing backward pass needs 8. Rows without a gradient (masked, clipped, advantage 0) are left
out of the two gradient products, exactly.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from codistill_kernels._linear.chunks import Chunks
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.inputs import LinearInputs, prepare_rows
from codistill_kernels._linear.logps import as_coefficients, log_probabilities
from codistill_kernels._linear.passes import gradients_by_chunks, recomputed_gradients
from codistill_kernels._linear.planning import (
    chunks_for,
    make_chunks,
    plan_for,
    plan_of_call,
    workspace_bytes,
)
from codistill_kernels._ops import custom_op, fake_of
from codistill_kernels._scaling import divisor, with_gradients
from codistill_kernels._sequences import to_tokens
from codistill_kernels.linear_logps import LinearLogps, Options
from codistill_kernels.policy_loss import (
    PolicyLoss,
    check_inputs,
    policy_loss,
    token_gradients,
)

# --- custom op ---------------------------------------------------------------------------------


@custom_op()
def linear_policy_gradients(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    old_logps: Tensor | None,
    advantages: Tensor,
    importance_weights: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kind: str,
    settings: list[float],
    shard_rows: int,
    workspace_mib: int | None,
    group_name: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps and entropy [N], and the gradients of the loss times its normalizer.

    kind and settings describe the loss (`PolicyLoss.settings`). shard_rows: rows of the largest
    shard of the weight, not cut to the vocabulary, by which all processes make the same chunks. An
    empty tensor stands for each gradient that is not needed.
    """
    loss = PolicyLoss.from_settings(kind, settings)
    group = dist.distributed_c10d._resolve_process_group(group_name) if group_name else None
    head = Head(lm_head_weight, bias, temperature, softcap)
    terms = Terms(old_logps, advantages, importance_weights, mask, cu_seqlens, loss)
    chunks = chunks_for(hidden_states, shard_rows, backend)
    is_shard = group is not None
    device = hidden_states.device
    workspace = workspace_bytes(workspace_mib, device, shard_rows, is_shard=is_shard)
    # A chunk holds raw logits, or exponentials.
    is_exact = chunks.HOLDS_LOGITS or chunks.takes_logits(softcap, loss.entropy_bonus != 0, needs)
    plan = plan_for(chunks, hidden_states, lm_head_weight, shard_rows, workspace, is_exact)
    arguments = (hidden_states, head, token_ids, terms, group, needs, backend)
    if plan.way == "columns" or takes_two_passes(chunks, softcap, loss, needs):
        return two_passes(*arguments, workspace)
    return single_pass(*arguments, plan.rows)


@fake_of(linear_policy_gradients)
def _(
    hidden_states,
    lm_head_weight,
    bias,
    token_ids,
    temperature,
    softcap,
    old_logps,
    advantages,
    importance_weights,
    mask,
    cu_seqlens,
    kind,
    settings,
    shard_rows,
    workspace_mib,
    group_name,
    needs,
    backend,
):
    shapes = (hidden_states.shape, lm_head_weight.shape, lm_head_weight.shape[:1])
    tokens = token_ids.shape[0]
    return (
        temperature.new_empty(tokens),
        temperature.new_empty(tokens),
        *(
            temperature.new_empty(shape if need else 0)
            for shape, need in zip(shapes, needs, strict=True)
        ),
    )


def takes_two_passes(
    kind: type[Chunks], softcap: float, loss: PolicyLoss, needs: list[bool]
) -> bool:
    """Whether all log-probabilities must come before the first gradient.

    So it is where a token's gradient depends on other tokens, where there is no gradient, and where
    it takes logits that these chunks do not hold.
    """
    takes_logits = kind.takes_logits(softcap, loss.entropy_bonus != 0, needs)
    is_left = takes_logits and not kind.HOLDS_LOGITS
    return loss.needs_sequences or not any(needs) or is_left


@dataclass(frozen=True)
class Terms:
    """What the loss takes besides log-probabilities."""

    old_logps: Tensor | None
    advantages: Tensor
    """[N], or [S] with cu_seqlens"""
    importance_weights: Tensor | None
    mask: Tensor
    cu_seqlens: Tensor | None
    loss: PolicyLoss

    def gradients(self, logps: Tensor) -> tuple[Tensor, Tensor | None]:
        """d loss / d logps and d loss / d entropy [N], the latter None where it is 0."""
        by_logps = token_gradients(
            logps,
            self.old_logps,
            self.advantages,
            self.loss,
            weights=self.importance_weights,
            keep=self.mask,
            cu_seqlens=self.cu_seqlens,
        )
        bonus = self.loss.entropy_bonus
        return by_logps, torch.where(self.mask, -bonus, torch.zeros_like(logps)) if bonus else None

    def policy_loss(
        self, logps: Tensor, entropy: Tensor, normalizer: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(
            logps,
            self.old_logps,
            self.advantages,
            self.mask,
            loss=self.loss,
            normalizer=normalizer,
            importance_weights=self.importance_weights,
            entropy=entropy,
            cu_seqlens=self.cu_seqlens,
        )

    def by_token(self) -> "Terms":
        """The same with advantages of tokens, for losses whose tokens do not depend on others."""
        if self.cu_seqlens is None:
            return self
        advantages = to_tokens(self.advantages, self.cu_seqlens, len(self.mask))
        return replace(self, advantages=advantages, cu_seqlens=None)

    def of_rows(self, rows: Tensor) -> "Terms":
        """The terms of some tokens, where there are no sequences."""
        assert self.cu_seqlens is None
        old, weights = (
            None if t is None else t[rows] for t in (self.old_logps, self.importance_weights)
        )
        return Terms(old, self.advantages[rows], weights, self.mask[rows], None, self.loss)


def single_pass(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    terms: Terms,
    group: dist.ProcessGroup | None,
    needs: list[bool],
    backend: str,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients from the very logits that gave the log-probabilities, `most` rows at a time."""
    chunks = make_chunks(hidden_states, head, token_ids, backend)
    by_token = terms.by_token()

    def slopes(rows: Tensor, logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        return by_token.of_rows(rows).gradients(logps)

    rows = terms.mask.nonzero().squeeze(1)
    logps, entropy, gradients = gradients_by_chunks(chunks, rows, most, slopes, needs, group)
    return logps, entropy, *gradients


def two_passes(
    hidden_states: Tensor,
    head: Head,
    token_ids: Tensor,
    terms: Terms,
    group: dist.ProcessGroup | None,
    needs: list[bool],
    backend: str,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All log-probabilities first, then the gradients from recomputed logits: 8 N H V.

    Serves what `takes_two_passes` says, and a workspace of so few rows that preparing the weight
    for each chunk would cost more.
    """
    rows = terms.mask.nonzero().squeeze(1)
    chunks = make_chunks(hidden_states[rows], head.of_rows(rows), token_ids[rows], backend)
    logps = torch.zeros_like(head.temperature)
    lse_parts = logps.new_zeros((3, len(logps)))
    statistics = chunks.statistics(has_entropy=True)
    logps[rows], lse_parts[:, rows] = log_probabilities(statistics, group)
    gradients = recomputed_gradients(
        hidden_states,
        head,
        token_ids,
        as_coefficients(*terms.gradients(logps)),
        lse_parts,
        group is None,
        needs,
        backend,
        len(head.weight),
        logps.dtype,
        workspace,
    )
    return logps, lse_parts[1] - lse_parts[2], *gradients


def by_gradients(
    inputs: LinearInputs,
    terms: Terms,
    normalizer: float | Tensor,
    workspace_mib: int | None,
    backend: str,
    reduce_hidden_gradient: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, its gradients made with it, and its statistics."""
    needs, group, loss = inputs.needs(), inputs.shard.group, terms.loss
    with torch.no_grad():
        logps, entropy, *gradients = linear_policy_gradients(
            *inputs.cut(),
            inputs.softcap,
            terms.old_logps,
            terms.advantages,
            terms.importance_weights,
            terms.mask,
            terms.cu_seqlens,
            loss.kind,
            loss.settings(),
            inputs.shard.most_rows,
            workspace_mib,
            "" if group is None else group.group_name,
            needs,
            backend,
        )
        value, statistics = terms.policy_loss(logps, entropy, normalizer)
    if any(needs):
        scale_by = divisor(value, normalizer)
        reduced = group if reduce_hidden_gradient else None
        value = with_gradients(inputs.cut()[:3], value, gradients, scale_by, reduced)
    return value, statistics


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
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_gradient: bool = True,
    workspace_mib: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `linear_logps`, in one pass: 6 N H V operations, no [N, V] logits.

    The entropy, in the statistics, and the gradient of an entropy bonus come from the same pass.
    Losses of sequences take two passes, 8 N H V, unless what is kept of all logits fits into the
    workspace.

    Tokens are flat, or rows of sequences, [B, T], as in `policy_loss`; hidden states [B, T, H].

    Args:
        hidden_states: [N, H], fp32, bf16, fp16 or fp64. Differentiable.
        lm_head_weight: [V, H], or a DTensor as in `linear_logps`. Differentiable; its gradient is
            summed in fp32 and rounded once.
        token_ids: [N] int64. Only those under the mask need be in the vocabulary.
        old_logps, advantages, mask, loss, normalizer, importance_weights, cu_seqlens: as in
            `policy_loss`.
        bias, temperature, softcap, logit_scale, vocab_size, group, reduce_hidden_gradient: as in
            `linear_logps`.
        workspace_mib: bound of the logits held at once (MiB); more rows per pass, fewer passes over
            the weight. At least 64 tokens' logits, or 256 vocabulary rows' in two passes. None: on
            a CPU 128, or what 256 tokens' logits take; on a GPU 2560, or half of what is free.
        backend: as in `linear_logps`.

    Returns:
        (loss, statistics) as `policy_loss`. Gradients are made for the inputs that require one:
        of chunks of tokens here, and only scaled in the backward pass, else there; under
        torch.no_grad none is made. A loss by chunks holds an fp32 gradient of the head until its
        backward pass: several that wait for theirs hold one each.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The message names it.

    Rows without a gradient (masked, clipped, advantage 0) are left out of both gradient products.
    Source: Eq. 5 and Eq. 10. Definition: reference.policy_loss of reference.linear_logps.
    """
    tokens, inputs = prepare_rows(
        "linear_policy_loss",
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
    old_logps, importance_weights = tokens.flat(
        old_logps=old_logps, importance_weights=importance_weights
    )
    advantages, cu_seqlens = tokens.sequences("advantages", advantages, cu_seqlens)
    numbers = (old_logps, advantages, inputs.active, normalizer, importance_weights, cu_seqlens)
    check_inputs(loss, inputs.tensors[4], *numbers)
    terms = Terms(old_logps, advantages, importance_weights, inputs.active, cu_seqlens, loss)
    has_bonus, needs = loss.entropy_bonus != 0, inputs.needs()
    if torch.compiler.is_compiling():
        rows, in_chunks = None, True  # one op, whatever it does inside
    else:
        rows = inputs.active.nonzero().squeeze(1)
        kind, plan = plan_of_call(inputs, len(rows), workspace_mib, backend, has_bonus, needs)
        in_chunks = plan.way == "chunks" and not takes_two_passes(kind, inputs.softcap, loss, needs)
    if in_chunks:
        options = (workspace_mib, backend, reduce_hidden_gradient)
        return tokens.restored(*by_gradients(inputs, terms, normalizer, *options))
    logps, entropy = LinearLogps.apply(
        *inputs.tensors,
        inputs.active,
        Options(
            inputs.vocab,
            inputs.softcap,
            inputs.shard.group,
            backend,
            has_gradient=any(needs),
            has_entropy=True,
            has_entropy_gradient=has_bonus,
            workspace_mib=workspace_mib,
            rows=rows,
            reduce_hidden_gradient=reduce_hidden_gradient,
        ),
    )
    return tokens.restored(*terms.policy_loss(logps, entropy, normalizer))
