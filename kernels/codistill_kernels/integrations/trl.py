"""TRL's trainers on these kernels: call `patch_trl()` once, before or after making a trainer.

Log-probabilities and entropies of every trainer that uses TRL's fused head (GRPO, RLOO, DPO, KTO)
then come from `linear_logps`. If GRPO's loss is a sum of losses of single tokens, its gradient
comes from `linear_token_loss`, in one pass over the logits. TRL's own code computes the value of
the loss and every metric from these log-probabilities.
"""

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from codistill_kernels.integrations._shared import autocast_operands, replace, require_version
from codistill_kernels.linear_logps import linear_logps
from codistill_kernels.linear_token_loss import linear_token_loss

# --- the loss ----------------------------------------------------------------------------------

LOSSES_OF_TOKENS = {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"}


class TokenLoss:
    """A GRPOTrainer's loss as a sum over the tokens of its completion mask.

    The formulas are those of TRL's `_compute_loss` for token-level importance ratios, without the
    auxiliary loss of experts, which does not depend on the head.
    """

    def __init__(self, trainer: Any, inputs: dict[str, Tensor]) -> None:
        self.trainer = trainer
        self.shown = inputs["completion_mask"].bool()
        """[B, T] bool, True for the N tokens that have logits; all tensors below are [N]."""
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages
        is_corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        self.mask = self.of_tokens(mask.bool())
        self.advantages = self.of_tokens(advantages)
        self.old_logps = self.of_tokens(inputs.get("old_per_token_logps"))
        self.weights = self.of_tokens(inputs["importance_sampling_ratio"] if is_corrected else None)
        self.reference_logps = self.of_tokens(
            inputs["ref_per_token_logps"] if trainer.beta else None
        )
        self.counts = self.of_tokens(counts_of_tokens(trainer, mask, inputs))
        self.entropy_coef = entropy_coef(trainer)
        accumulated = trainer.current_gradient_accumulation_steps
        self.entropy_count = mask.sum().clamp(min=1.0) * accumulated
        self.result: Tensor | None = None
        """The loss, from the model's forward pass on."""

    def of_tokens(self, values: Tensor | None) -> Any:
        """Values that broadcast to [B, T], for the N tokens."""
        return None if values is None else values.expand(self.shown.shape)[self.shown]

    def __call__(self, logps: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        """Losses [R] of the tokens `rows`, for `linear_token_loss`; all inputs are [R]."""
        old_logps = logps.detach() if self.old_logps is None else self.old_logps[rows]
        ratio = (logps - old_logps).exp()
        losses = self.surrogates(ratio, logps, self.advantages[rows])
        if self.weights is not None:
            losses = losses * self.weights[rows]
        if self.reference_logps is not None:
            gap = self.reference_logps[rows] - logps
            kl = gap.exp() - gap - 1
            kl = kl * ratio if self.trainer.args.use_bias_correction_kl else kl
            losses = losses + self.trainer.beta * kl
        losses = losses / self.counts[rows]
        if self.entropy_coef:  # a gradient of the entropy takes time even if it is 0
            losses = losses - self.entropy_coef * entropy / self.entropy_count
        return torch.where(self.mask[rows], losses, 0.0)

    def surrogates(self, ratio: Tensor, logps: Tensor, advantages: Tensor) -> Tensor:
        """The part of the losses that depends on the ratio, before weights and penalties."""
        trainer, settings = self.trainer, self.trainer.args
        if trainer.loss_type == "cispo":
            return -ratio.clamp(max=trainer.epsilon_high).detach() * advantages * logps
        if trainer.loss_type == "sapo":
            positive, negative = settings.sapo_temperature_pos, settings.sapo_temperature_neg
            temperature = torch.where(advantages > 0, positive, negative)
            return -(temperature * (ratio - 1)).sigmoid() * 4 / temperature * advantages
        clipped = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
        bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
        return -torch.min(bounded * advantages, clipped * advantages)

    def fits(self, hidden_states: Tensor) -> bool:
        """Whether these hidden states [N, H] can be those of its tokens."""
        return (
            self.result is None
            and len(hidden_states) == len(self.mask)
            and hidden_states.device == self.mask.device
            and not torch.compiler.is_compiling()
        )


def is_loss_of_tokens(trainer: Any) -> bool:
    """Whether the trainer is training and its loss is a sum of losses of single tokens. The number
    of tokens may be a divisor."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from trl import GRPOTrainer

    name = "_get_per_token_logps_and_entropies"  # a subclass's may change what the loss sees
    return (
        trainer.loss_type in LOSSES_OF_TOKENS
        and trainer.importance_sampling_level == "token"
        and trainer.top_entropy_quantile == 1.0
        and trainer.off_policy_mask_threshold is None
        and trainer.model.training
        and torch.is_grad_enabled()
        and getattr(type(trainer), name) is getattr(GRPOTrainer, name)
        and not is_deepspeed_zero3_enabled()
    )


def counts_of_tokens(trainer: Any, mask: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """[B, 1] or [1, 1]: the divisor of each token's loss."""
    sequences, accumulated = len(mask), trainer.current_gradient_accumulation_steps
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1.0)
    if trainer.loss_type in ("grpo", "sapo"):
        counts = lengths * sequences
    elif trainer.loss_type == "bnpo":
        counts = mask.sum().clamp(min=1.0)
    elif trainer.loss_type == "dr_grpo":
        counts = torch.full_like(lengths, sequences * trainer.max_completion_length)
    elif trainer.loss_type == "luspo":
        counts = torch.full_like(lengths, sequences)
    else:  # cispo, dapo: the count is for a generation batch, which is several optimizer steps
        counts = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        counts = counts / trainer.args.steps_per_generation
    return (counts * accumulated).view(-1, 1)


def entropy_coef(trainer: Any) -> float:
    """Weight of the entropy bonus in this step; 0 without a bonus."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    is_adaptive = trainer.use_adaptive_entropy
    if is_adaptive and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return trainer.entropy_coef


# --- the head ----------------------------------------------------------------------------------

OUTPUTS = {"log_probs", "entropy"}  # the outputs of TRL's fused head that `linear_logps` has
WAITING: ContextVar[TokenLoss | None] = ContextVar("WAITING", default=None)
"""The loss whose forward pass comes next."""


class FusedHead:
    """Takes the place of TRL's `_ChunkedLogProbFunction`, and calls it for outputs that the kernels
    do not have."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities and entropies [N], and None for each of the other outputs."""
        if not OUTPUTS.issuperset(outputs) or logit_scale <= 0:
            options = (temperature, chunk_size, softcap, logit_scale, outputs)
            return self.original.apply(hidden_states, weight, bias, token_ids, *options)
        hidden_states, operand = autocast_operands(hidden_states, weight)
        arguments: dict[str, Any] = dict(
            bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
        )
        loss = WAITING.get()
        if loss is not None and loss.fits(hidden_states):
            loss.result, statistics = linear_token_loss(
                hidden_states, operand, token_ids, loss, **arguments
            )
            logps, entropy = Connected.apply(
                loss.result, statistics["logps"], statistics["entropy"]
            )
        else:
            logps, entropy = linear_logps(
                hidden_states, operand, token_ids, return_entropy=True, **arguments
            )
            gather_in_backward(logps, weight, bias)
        return logps, entropy if "entropy" in outputs else None, None, None, None


class Connected(torch.autograd.Function):
    """Log-probabilities and entropies that send no gradient back: the loss has it already.

    They still have a graph, through which DDP and FSDP2 find the model's parameters.
    """

    @staticmethod
    def forward(ctx, loss, logps, entropy):
        return logps.clone(), entropy.clone()

    @staticmethod
    def backward(ctx, dlogps, dentropy):
        return torch.zeros((), dtype=dlogps.dtype, device=dlogps.device), None, None


def gather_in_backward(logps: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Under ZeRO-3 the head is whole only within TRL's context: enter it for the backward pass."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from trl.trainer import utils

    if not is_deepspeed_zero3_enabled() or logps.grad_fn is None:
        return
    entered = ExitStack()

    def enter(_gradients: Any) -> None:
        entered.enter_context(utils.maybe_gather_lm_head_ctx(weight, bias))

    logps.grad_fn.register_prehook(enter)
    logps.grad_fn.register_hook(lambda *_: entered.close())


# --- the patch ---------------------------------------------------------------------------------


def patch_trl() -> ExitStack:
    """Make TRL's trainers compute log-probabilities, and GRPO its gradient, by these kernels.

    GRPO takes one pass over the logits for loss types grpo, bnpo, dr_grpo, dapo, cispo, sapo and
    luspo with token-level importance ratios; delta, KL with and without bias correction, entropy
    bonus, importance sampling correction and tool masks are included. In all other cases
    (sequence-level ratios, vespo, top-entropy quantile, off-policy mask, DeepSpeed ZeRO-3) and in
    every other trainer, TRL computes its loss from the log-probabilities of `linear_logps`. TRL's
    own head serves outputs that `linear_logps` does not have (SFT's is_top1, DPO's mean_logits and
    log_sum_sq_probs) and a logit scale <= 0.

    Returns:
        The patch. Leaving its `with` block or calling its `.close()` restores TRL. If TRL is
        patched already, the returned patch does nothing.

    Raises:
        ImportError: TRL is not installed, or is not 1.16, whose names it replaces.

    As in TRL, autocast chooses the dtype of the head's operands; logits are fp32 sums that are
    never rounded. Only completion tokens get logits, on a CPU too.
    """
    require_version("trl", "1.16")
    from trl import GRPOTrainer
    from trl.trainer import utils

    patch = ExitStack()
    if isinstance(utils._ChunkedLogProbFunction, FusedHead):
        return patch
    replace(patch, utils, "_ChunkedLogProbFunction", FusedHead(utils._ChunkedLogProbFunction))
    replace(patch, utils, "_use_triton", takes_valid_tokens(utils._use_triton))
    replace(patch, GRPOTrainer, "_compute_loss", with_token_loss(GRPOTrainer._compute_loss))
    return patch


def takes_valid_tokens(original: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """TRL's `_use_triton`, which decides whether the fused head gets valid tokens alone or also
    prompts and padding: True on a CPU too."""
    return lambda device: device.type == "cpu" or original(device)


def with_token_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """GRPOTrainer._compute_loss with TRL's value, metrics and state, and our gradient."""

    @wraps(original)
    def compute_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not is_loss_of_tokens(trainer):
            return original(trainer, model, inputs)
        loss = TokenLoss(trainer, inputs)
        previous = WAITING.set(loss)
        try:
            value = original(trainer, model, inputs)
        finally:
            WAITING.reset(previous)
        return value if loss.result is None else value + (loss.result - loss.result.detach())

    return compute_loss
