"""One model in training: a sharded policy, its optimizer, its learning-rate schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from codistill.batch import TokenBatch
from codistill.config.schema import OptimizerConfig
from codistill.model import Policy
from codistill.output.metrics import StepMetrics
from codistill_kernels import PolicyLoss, kl_penalty, policy_loss


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass trains on: S rollouts, N tokens."""

    tokens: TokenBatch
    old_logps: Tensor
    """[N] under the policy that wrote the rollouts: in codistill the small model's, for both."""
    advantages: Tensor
    """[S]"""
    mask: Tensor
    """[N] bool: the tokens in the loss."""
    weights: Tensor | None = None
    """[S] what each token of a rollout counts; None: 1."""
    importance_weights: Tensor | None = None
    """[N] correction for an engine that is not the trainer; None: 1."""
    penalties: tuple["Penalty", ...] = ()


@dataclass(frozen=True)
class Penalty:
    """coefficient * KL(model in training || another one), subtracted from the objective (Eq. 2)."""

    name: str
    coefficient: float
    estimator: str
    """One of `kl_penalty`."""
    logps: Tensor
    """[N] of the other model."""


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
        inner_epochs: int = 1,
    ) -> None:
        """total_steps: of the run, each with `inner_epochs` optimizer steps."""
        self.name, self.policy, self.loss = name, policy, loss
        self.inner_epochs = inner_epochs
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: learning_rate_factor(n, total_steps * inner_epochs, config)
        )

    def backward(
        self,
        micro_batches: Iterable[MicroBatch],
        metrics: StepMetrics,
        *,
        normalizer: float,
        temperature: float,
    ) -> None:
        """Add the gradient of the loss: a sum over tokens, divided by `normalizer`, which counts
        all processes.

        Every process must bring the same number of micro-batches: each is a collective.
        """
        for micro_batch in micro_batches:
            loss = self.micro_loss(micro_batch, metrics, normalizer, temperature)
            loss.backward()
            metrics.total(f"loss/{self.name}", loss.detach() / self.inner_epochs)

    def micro_loss(
        self, batch: MicroBatch, metrics: StepMetrics, normalizer: float, temperature: float
    ) -> Tensor:
        logps = self.policy(batch.tokens, temperature)
        advantages, cu_seqlens = batch.advantages, batch.tokens.cu_seqlens
        # Every surrogate is positively homogeneous in the advantage: a weight may go there.
        loss, stats = policy_loss(
            logps,
            batch.old_logps,
            advantages if batch.weights is None else advantages * batch.weights,
            batch.mask,
            loss=self.loss,
            normalizer=normalizer,
            importance_weights=batch.importance_weights,
            cu_seqlens=cu_seqlens,
        )
        self.record(stats, metrics)
        for penalty in batch.penalties:
            kl, kl_stats = kl_penalty(
                logps,
                penalty.logps,
                batch.mask,
                estimator=penalty.estimator,
                normalizer=normalizer,
                weights=batch.weights,
                cu_seqlens=None if batch.weights is None else cu_seqlens,
            )
            loss = loss + penalty.coefficient * kl
            tokens = kl_stats["tokens"]
            metrics.mean(f"kl/{self.name}_{penalty.name}", kl_stats["kl"] * tokens, tokens)
        return loss

    def step(self, metrics: StepMetrics) -> None:
        """Clip the gradient, change the weights, drop the gradient.

        Raises:
            FloatingPointError: the gradient is not finite. The weights are as before.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient of the {self.name} model is {norm.item()}")
        metrics.maximum(f"grad_norm/{self.name}", norm)
        metrics.maximum(f"learning_rate/{self.name}", self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def record(self, stats: dict[str, Tensor], metrics: StepMetrics) -> None:
        prefix, tokens = f"ratio/{self.name}", stats["tokens"]
        total = stats["ratio_mean"] * tokens
        low, high = stats["clip_fraction_low"], stats["clip_fraction_high"]
        metrics.mean(f"{prefix}_mean", total, tokens)
        squared = total.square() / (tokens * stats["ess"]).clamp(min=1e-30)
        metrics.mean(f"{prefix}_squared", squared, tokens)
        metrics.mean(f"{prefix}_clip_fraction", (low + high) * tokens, tokens)
        metrics.mean(f"{prefix}_kl", stats["approx_kl"] * tokens, tokens)
        metrics.maximum(f"{prefix}_max", stats["ratio_max"])


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak learning rate in `step`, from 0: linear warm-up, then the schedule."""
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
