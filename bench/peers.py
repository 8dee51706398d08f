"""Other libraries' implementations, each called as its documentation or its own trainer does.

Imports are inside the functions, so that none of the libraries need be installed.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.batch import Batch
from bench.eager import EPSILON, JSD_WEIGHT, clipped_loss

TRL_VOCAB_CHUNK = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl/trainer/utils.py, 1.16


# --- per-token log-probabilities ---------------------------------------------------------------


def trl_logps(batch: Batch) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # As TRL calls it: on a GPU without the masked tokens, on a CPU with them.
    compact = batch.hidden_states.is_cuda
    keep = batch.mask if compact else slice(None)
    logps, *_ = ChunkedLogProbFunction.apply(
        batch.hidden_states[keep],
        batch.weight,
        None,
        batch.token_ids[keep],
        1.0,
        TRL_VOCAB_CHUNK,
        None,
        1.0,
        (),
    )
    if compact:
        return logps.new_zeros(len(batch.mask)).masked_scatter(batch.mask, logps)
    return logps.masked_fill(~batch.mask, 0)


def liger_scaled_cross_entropy(batch: Batch) -> Tensor:
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger

    function = liger.LigerFusedLinearScaledCrossEntropyFunction
    return -function.apply(batch.hidden_states, batch.weight, batch.targets)


def liger_cross_entropy(batch: Batch, reduction: str = "none") -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    # accum_dtype: the head's gradient is summed in fp32, as ours is.
    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=torch.float32)
    result = loss(batch.weight, batch.hidden_states, batch.targets)
    return -result if reduction == "none" else result


def cce(batch: Batch, reduction: str = "none") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # filter_eps=None: small gradients are not skipped. Random weights give a flat softmax, on which
    # the default would skip nearly all of them.
    on_gpu = batch.hidden_states.is_cuda
    result = linear_cross_entropy(
        batch.hidden_states,
        batch.weight,
        batch.targets,
        reduction=reduction,
        filter_eps=None,
        impl="cce" if on_gpu else "torch_compile",
    )
    return -result if reduction == "none" else result


def verl_logps(batch: Batch) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logps, _ = linear_cross_entropy(batch.hidden_states, batch.weight, batch.token_ids, 1.0, "none")
    return logps


def torch_logps(batch: Batch) -> Tensor:
    return -F.linear_cross_entropy(
        batch.hidden_states, batch.weight, batch.targets, reduction="none"
    )


# --- losses ------------------------------------------------------------------------------------


def loss_of(logps):
    """The eager clipped loss on top of a peer's log-probabilities."""

    @functools.wraps(logps)
    def loss(batch: Batch) -> Tensor:
        return clipped_loss(logps(batch), batch.token_advantages, batch)

    return loss


@functools.cache
def liger_grpo_loss(tokens_per_sequence: int):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        loss_type="dr_grpo",
        max_completion_length=tokens_per_sequence,
    )


def liger_grpo(batch: Batch) -> Tensor:
    size = batch.by_sequence
    loss, _ = liger_grpo_loss(size[1])(
        batch.hidden_states.view(*size, -1),
        batch.weight,
        batch.token_ids.view(size),
        batch.mask.view(size).float(),
        batch.advantages,
        old_per_token_logps=batch.old_logps.view(size),
    )
    return loss


def torch_chunked_cross_entropy(batch: Batch) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(batch.hidden_states, batch.weight, batch.targets, options=options)


def quack_cross_entropy(batch: Batch) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(batch.hidden_states, batch.weight, batch.targets)


# --- divergences -------------------------------------------------------------------------------


def trl_divergence(batch: Batch) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    # As TRL's DistillationTrainer calls it: on a GPU without the masked tokens, on a CPU with them.
    compact = batch.hidden_states.is_cuda
    keep = batch.mask if compact else slice(None)
    (student, student_weight), (teacher, teacher_weight) = batch.models
    values, _ = ChunkedDivergenceFunction.apply(
        student[keep], student_weight, None, teacher[keep], teacher_weight, None, JSD_WEIGHT
    )
    if not compact:
        values = values.masked_fill(~batch.mask, 0)
    return values.sum() / batch.mask.sum()


@functools.cache
def liger_jsd_loss():
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Without the cross entropy that Liger adds by default.
    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=JSD_WEIGHT)


def liger_divergence(batch: Batch) -> Tensor:
    student, teacher = batch.models
    return liger_jsd_loss()(*student, *teacher, batch.targets)


# --- from logits -------------------------------------------------------------------------------


def trl_selective(batch: Batch) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(batch.logits, batch.token_ids)
