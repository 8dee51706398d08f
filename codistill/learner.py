"""One model in training: a sharded policy, its optimizer, its learning-rate schedule."""

import math
from collections.abc import Sequence
from typing import assert_never

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from codistill import distributed
from codistill.batch import TokenBatch
from codistill.config.machinery import OptimizerConfig
from codistill.model.policy import Policy
from codistill.objective import Objective
from codistill.output.metrics import StepMetrics
from codistill.output.throughput import training_flops
from codistill_kernels import PolicyLoss, kl_penalty, policy_loss

HOST = torch.device("cpu")


class Learner:
    """Maximizes the clipped surrogate of Eq. 2 and 5 (its own rollouts) or Eq. 10 (those of the
    small model)."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        loss: PolicyLoss,
        config: OptimizerConfig,
        *,
        learning_rate: float,
        total_steps: int,
        optimizer_steps: int = 1,
        states_on_host: bool = False,
    ) -> None:
        """total_steps: of the run, each with so many optimizer steps. states_on_host: the
        optimizer's states are in the host's memory between its steps."""
        self.name, self.policy, self.loss = name, policy, loss
        self.optimizer_steps = optimizer_steps
        self.states_on_host = states_on_host
        self.skipped_in_a_row = 0
        self.flops_per_token = training_flops(policy.lm)
        self.max_grad_norm = config.max_grad_norm
        self.parameters = [weight for weight in policy.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: learning_rate_factor(n, total_steps * optimizer_steps, config)
        )

    def backward(
        self,
        batches: Sequence[TokenBatch],
        objective: Objective,
        metrics: StepMetrics,
        *,
        temperature: float,
    ) -> None:
        """Add the gradient of the loss, minus the objective. Collective: each batch is one.

        Raises:
            RuntimeError: on all processes, if they bring different numbers of batches.
        """
        count, device = len(batches), objective.mask.device
        most, least = distributed.largest(count, device), -distributed.largest(-count, device)
        if most != least:
            raise RuntimeError(f"between {least:.0f} and {most:.0f} batches: expected equally many")
        for number, batch in enumerate(batches, start=1):
            self.policy.reduce_head(number == count)
            loss = self.loss_of(batch, objective, metrics, temperature)
            loss.backward()
            metrics.total(f"loss/{self.name}", loss.detach() / self.optimizer_steps)

    def loss_of(
        self, batch: TokenBatch, objective: Objective, metrics: StepMetrics, temperature: float
    ) -> Tensor:
        """The part of the loss that the tokens of a batch make."""
        terms = objective.terms(batch)
        if not objective.penalties:  # in one pass over the head
            loss, stats = self.policy.policy_loss(batch, temperature, loss=self.loss, **terms)
            self.record(stats, metrics)
            return loss
        logps = self.policy(batch, temperature)
        loss, stats = policy_loss(logps, loss=self.loss, cu_seqlens=batch.cu_seqlens, **terms)
        self.record(stats, metrics)
        for penalty in objective.penalties:
            kl, kl_stats = kl_penalty(logps, **objective.penalty_terms(penalty, batch))
            loss = loss + penalty.coefficient * kl
            tokens = kl_stats["tokens"]
            metrics.mean(f"kl/{self.name}_{penalty.name}", kl_stats["kl"] * tokens, tokens)
        return loss

    def step(self, metrics: StepMetrics) -> None:
        """Clip the gradient, change the weights, drop the gradient.

        A gradient that is not finite is dropped alone: weights, optimizer state and schedule stay
        as they are, and `skipped_in_a_row` counts it.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_finite = bool(torch.isfinite(norm))  # on all processes alike
        metrics.maximum(f"learning_rate/{self.name}", self.schedule.get_last_lr()[0])
        metrics.total(f"skipped/{self.name}", (not is_finite) / dist.get_world_size())
        if is_finite:
            metrics.maximum(f"grad_norm/{self.name}", norm)
            if self.states_on_host:
                move_states(self.optimizer, self.policy.device)
            self.optimizer.step()
            self.release_states()
            self.schedule.step()
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        self.optimizer.zero_grad()

    def release_states(self) -> None:
        """Bring the optimizer's states to where they are between its steps."""
        if self.states_on_host:
            move_states(self.optimizer, HOST)

    def record(self, stats: dict[str, Tensor], metrics: StepMetrics) -> None:
        prefix, tokens = f"ratio/{self.name}", stats["tokens"]
        low, high = stats["clip_fraction_low"], stats["clip_fraction_high"]
        metrics.mean(f"{prefix}_mean", stats["ratio_mean"] * tokens, tokens)
        metrics.mean(f"{prefix}_square_mean", stats["ratio_square_mean"] * tokens, tokens)
        metrics.mean(f"{prefix}_clip_fraction", (low + high) * tokens, tokens)
        metrics.mean(f"{prefix}_kl", stats["approx_kl"] * tokens, tokens)
        metrics.maximum(f"{prefix}_max", stats["ratio_max"])


def move_states(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move the states of all weights; what is there already is not copied.

    Counts of steps stay on the host, where AdamW has them. Copies from a GPU go to pinned memory,
    which torch keeps for the next ones, and are there on return.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if value.ndim > 0:
                state[name] = value.to(device, non_blocking=True)
    if device == HOST and torch.cuda.is_available():
        torch.cuda.synchronize()


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak learning rate in `step`, from 0: linear warm-up, then the schedule."""
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    match config.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case _:
            assert_never(config.schedule)
