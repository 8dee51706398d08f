"""The training loop. `Trainer.step` is the algorithm, from top to bottom."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from codistill.config import Config, ModelConfig
from codistill.data import Problem, draw
from codistill.evaluation import evaluate
from codistill.learner import Learner, MicroBatch
from codistill.metrics import StepMetrics
from codistill.model import end_token_ids, load_policy
from codistill.rewards import Grader
from codistill.rollout import (
    EngineSpec,
    HFEngine,
    Sampling,
    SyncError,
    make_engine,
    prompt_seeds,
)
from codistill.rollout_rewards import RolloutRewards
from codistill.scoring import Rollouts, Scored, rollout_logps, score
from codistill.user_rewards import RewardFunction
from codistill_kernels import PolicyLoss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOAT32_GAP_LIMIT = 1e-4  # nats; vLLM and the trainer differ by 2e-6 to 1e-5 in float32


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its models."""

    tokenizer: Any
    problems: list[Problem]
    held_out: list[Problem]
    reward_functions: list[RewardFunction] = field(default_factory=list)


class Trainer:
    """Both models and the engine of the small one."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        device: torch.device,
        grader: Grader,
    ) -> None:
        self.config, self.inputs, self.device, self.grader = config, inputs, device, grader
        self.rewards = RolloutRewards(config.reward, grader, inputs.reward_functions, device)
        self.dtype = DTYPES[config.training.dtype]
        self.total_steps = config.training.steps or math.ceil(
            config.training.epochs * len(inputs.problems) / config.rollout.prompts_per_step
        )
        # The engine comes first: vLLM measures free memory while it starts.
        self.engine = make_engine(config.rollout.engine, self.engine_spec(config.small))
        self.small = self.make_learner("small", config.small)
        self.large = self.make_learner("large", config.large)

    def engine_spec(self, model: ModelConfig) -> EngineSpec:
        rollout = self.config.rollout
        return EngineSpec(
            path=model.path,
            vocab_size=len(self.inputs.tokenizer),
            end_token_ids=end_token_ids(self.config.small.path, self.inputs.tokenizer),
            max_model_tokens=rollout.max_prompt_tokens + rollout.max_completion_tokens,
            dtype=self.dtype,
            device=self.device,
            kv_cache_gib=rollout.kv_cache_gib,
        )

    def make_learner(self, name: str, model: ModelConfig) -> Learner:
        policy = load_policy(
            model.path,
            vocab_size=len(self.inputs.tokenizer),
            dtype=self.dtype,
            device=self.device,
            checkpointing=self.config.training.gradient_checkpointing,
        )
        loss = PolicyLoss(
            epsilon_low=self.config.loss.epsilon_low, epsilon_high=self.config.loss.epsilon_high
        )
        return Learner(
            name,
            policy,
            loss,
            self.config.optimizer,
            learning_rate=model.learning_rate,
            total_steps=self.total_steps,
        )

    def step(self, step: int) -> tuple[dict[str, float], Rollouts, Scored]:
        """Step `step`, from 1: generate, score, train both models, sync the engine.

        Raises:
            SyncError: the engine's log-probabilities are not the trainer's; nothing was trained.
            FloatingPointError: a gradient is not finite.
        """
        metrics = StepMetrics(self.device)
        with metrics.timer("time/step"):
            with metrics.timer("time/rollout"):
                rollouts = self.generate(step, metrics)
            with metrics.timer("time/score"):
                scored = self.score(rollouts, metrics)
            with metrics.timer("time/update_small"):
                self.update(self.small, rollouts, scored, scored.scores.small_advantages, metrics)
            with metrics.timer("time/update_large"):
                self.update(self.large, rollouts, scored, scored.scores.large_advantages, metrics)
            with metrics.timer("time/sync"):
                self.sync()
        return finish(metrics.reduce()), rollouts, scored

    def generate(self, step: int, metrics: StepMetrics) -> Rollouts:
        """M graded completions of each of this process's prompts by the small model."""
        rollout, seed = self.config.rollout, self.config.seed
        indices = draw(len(self.inputs.problems), rollout.prompts_per_step, step - 1, seed)
        share = indices[dist.get_rank() :: dist.get_world_size()]
        problems = [self.inputs.problems[i] for i in share]
        completions = self.engine.generate(
            [problem.prompt_ids for problem in problems],
            prompt_seeds(seed, step, share),
            Sampling(rollout.num_generations, rollout.temperature, rollout.max_completion_tokens),
        )
        problems = [problem for problem in problems for _ in range(rollout.num_generations)]
        texts = [
            self.inputs.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            for completion in completions
        ]
        token_ids = [completion.token_ids for completion in completions]
        rewards = self.rewards(problems, texts, token_ids, metrics)
        rollouts = Rollouts(problems, completions, texts, *rewards)
        lengths = torch.tensor([len(tokens) for tokens in token_ids])
        truncated = torch.tensor([completion.truncated for completion in completions])
        solved = rollouts.accuracy.bool().view(-1, rollout.num_generations).any(dim=1)
        metrics.mean_of("reward/zero_fraction", (~solved).float())
        metrics.mean_of("rollout/mean_tokens", lengths)
        metrics.mean_of("rollout/truncated_fraction", truncated.float())
        metrics.total("rollout/tokens", lengths.sum())
        return rollouts

    def score(self, rollouts: Rollouts, metrics: StepMetrics) -> Scored:
        """Log-probabilities of both models, effective reward, down-sampling, advantages."""
        options = dict(
            temperature=self.config.rollout.temperature,
            batch_size=self.config.training.micro_batch_size,
            device=self.device,
        )
        small_logps = rollout_logps(self.small.policy, rollouts, **options)
        self.check_gap(rollouts, torch.cat(small_logps), metrics)
        large_logps = rollout_logps(self.large.policy, rollouts, **options)
        scored = score(self.config, rollouts, small_logps, large_logps)
        metrics.mean_of("reward/kd", scored.scores.kd_rewards)
        metrics.mean_of("reward/effective", scored.scores.effective_rewards)
        metrics.mean_of("reward/kept_accuracy", rollouts.accuracy[scored.scores.kept])
        return scored

    def check_gap(self, rollouts: Rollouts, small_logps: Tensor, metrics: StepMetrics) -> None:
        engine_logps = [logp for completion in rollouts.completions for logp in completion.logps]
        gap = (torch.tensor(engine_logps, device=self.device) - small_logps).abs()
        metrics.mean_of("rollout/logp_gap_mean", gap)
        metrics.maximum("rollout/logp_gap_max", gap.max())
        limit = self.config.rollout.logp_gap_limit
        if limit is None:
            limit = FLOAT32_GAP_LIMIT if self.dtype == torch.float32 else math.inf
        largest = gap.max()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)  # all processes stop, or none
        if not largest.item() <= limit:  # a NaN stops too
            raise SyncError(
                f"{self.engine.name} and the trainer differ by {largest.item():.2e} nats on a "
                f"token's log-probability, more than rollout.logp_gap_limit = {limit:.0e}"
            )

    def update(
        self,
        learner: Learner,
        rollouts: Rollouts,
        scored: Scored,
        advantages: Tensor,
        metrics: StepMetrics,
    ) -> None:
        """One optimizer step on the kept rollouts; the ratio is over the small model's policy."""
        rollout = self.config.rollout
        # 1/prompts * 1/G * 1/N of Eq. 5 and Eq. 10, prompts counted over all processes.
        kept = rollout.prompts_per_step * self.config.downsample.keep
        learner.backward(
            self.micro_batches(rollouts, scored, advantages),
            metrics,
            normalizer=kept * rollout.max_completion_tokens,
            temperature=rollout.temperature,
        )
        learner.step(metrics)

    def micro_batches(
        self, rollouts: Rollouts, scored: Scored, advantages: Tensor
    ) -> Iterator[MicroBatch]:
        size = self.config.training.micro_batch_size
        for rows, part in zip(scored.scores.kept.split(size), advantages.split(size), strict=True):
            chosen = rows.tolist()
            yield MicroBatch(
                tokens=rollouts.batch(chosen, self.device),
                old_logps=torch.cat([scored.small_logps[row] for row in chosen]),
                advantages=part,
            )

    def sync(self) -> None:
        self.engine.sync(self.small.policy.full_weights())

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out accuracy of the small model and, at both ends of the run, of the large one."""
        accuracy = {"step": step, "small": self.evaluate_with(self.engine)}
        if self.config.evaluation.large and step in (0, self.total_steps):
            # Seldom, so a plain engine that lives for this evaluation only is enough.
            engine = HFEngine(self.engine_spec(self.config.large))
            engine.sync(self.large.policy.full_weights())
            accuracy["large"] = self.evaluate_with(engine)
        return accuracy

    def evaluate_with(self, engine: Any) -> float:
        return evaluate(
            engine,
            self.grader,
            self.inputs.tokenizer,
            self.inputs.held_out,
            temperature=self.config.evaluation.temperature,
            max_tokens=self.config.rollout.max_completion_tokens,
            seed=self.config.seed,
            device=self.device,
        )


def finish(numbers: dict[str, float]) -> dict[str, float]:
    """Add what is a function of reduced numbers; drop what was only needed for that."""
    for name in ("small", "large"):
        squared = numbers.pop(f"ratio/{name}_squared")
        numbers[f"ratio/{name}_ess"] = numbers[f"ratio/{name}_mean"] ** 2 / squared
    numbers["tokens_per_second"] = numbers.pop("rollout/tokens") / numbers["time/step"]
    return numbers
