"""The training loop. `Trainer.step` is the algorithm, from top to bottom."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from codistill.config import Config
from codistill.data import Problem, draw
from codistill.evaluation import evaluate
from codistill.learner import Learner, MicroBatch
from codistill.metrics import StepMetrics
from codistill.model import Policy, end_token_ids, freeze, load_policy
from codistill.rewards import Grader, format_reward
from codistill.rollout import (
    EngineSpec,
    HFEngine,
    Sampling,
    SyncError,
    make_engine,
    prompt_seeds,
)
from codistill.scoring import Rollouts, Scored, rollout_logps, score
from codistill_kernels import PolicyLoss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOAT32_GAP_LIMIT = 1e-4  # nats; vLLM and the trainer differ by 2e-6 to 1e-5 in float32


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its models."""

    tokenizer: Any
    problems: list[Problem]
    held_out: list[Problem]


class Trainer:
    """The models of a run, and the engine of the one that writes the rollouts.

    codistill and kdrl: the small model writes, the large one scores; grpo: one model does it all.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        device: torch.device,
        grader: Grader,
    ) -> None:
        self.config, self.inputs, self.device, self.grader = config, inputs, device, grader
        self.dtype = DTYPES[config.training.dtype]
        self.total_steps = config.training.steps or math.ceil(
            config.training.epochs * len(inputs.problems) / config.rollout.prompts_per_step
        )
        # The engine comes first: vLLM measures free memory while it starts.
        self.engine = make_engine(config.rollout.engine, self.engine_spec(config.writer))
        self.learners = {name: self.make_learner(name) for name in config.trained}
        self.policies = {name: learner.policy for name, learner in self.learners.items()}
        for name in config.loaded:
            if name not in self.policies:
                self.policies[name] = freeze(self.load_policy(name))

    def engine_spec(self, name: str) -> EngineSpec:
        """Of the model of this name."""
        rollout, writer = self.config.rollout, self.config.writer
        return EngineSpec(
            path=self.config.model(name).path,
            vocab_size=len(self.inputs.tokenizer),
            end_token_ids=end_token_ids(
                f"{writer}.path", self.config.model(writer).path, self.inputs.tokenizer
            ),
            max_model_tokens=rollout.max_prompt_tokens + rollout.max_completion_tokens,
            dtype=self.dtype,
            device=self.device,
            kv_cache_gib=rollout.kv_cache_gib,
        )

    def load_policy(self, name: str) -> Policy:
        return load_policy(
            self.config.model(name).path,
            vocab_size=len(self.inputs.tokenizer),
            dtype=self.dtype,
            device=self.device,
            checkpointing=self.config.training.gradient_checkpointing,
        )

    def make_learner(self, name: str) -> Learner:
        loss = PolicyLoss(
            epsilon_low=self.config.loss.epsilon_low, epsilon_high=self.config.loss.epsilon_high
        )
        return Learner(
            name,
            self.load_policy(name),
            loss,
            self.config.optimizer,
            learning_rate=self.config.model(name).learning_rate,
            total_steps=self.total_steps,
        )

    def step(self, step: int) -> tuple[dict[str, float], Rollouts, Scored]:
        """Step `step`, from 1: generate, score, train, sync the engine.

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
            for name, learner in self.learners.items():
                with metrics.timer(f"time/update_{name}"):
                    self.update(learner, rollouts, scored, metrics)
            with metrics.timer("time/sync"):
                self.sync()
        return finish(metrics.reduce()), rollouts, scored

    def generate(self, step: int, metrics: StepMetrics) -> Rollouts:
        """M graded completions of each of this process's prompts by the writer."""
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
        with metrics.timer("time/grade"):
            grades = self.grader.grade(texts, [problem.answer for problem in problems])
        form = [format_reward(text) if self.config.reward.format else 0.0 for text in texts]
        correct = torch.tensor(grades.correct, dtype=torch.float32, device=self.device)
        rollouts = Rollouts(
            problems, completions, texts, correct, torch.tensor(form, device=self.device)
        )
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        truncated = torch.tensor([completion.truncated for completion in completions])
        solved = correct.view(-1, rollout.num_generations).any(dim=1)
        metrics.mean_of("reward/accuracy", correct)
        metrics.mean_of("reward/format", rollouts.format)
        metrics.mean_of("reward/zero_fraction", (~solved).float())
        metrics.mean_of("rollout/mean_tokens", lengths)
        metrics.mean_of("rollout/truncated_fraction", truncated.float())
        metrics.total("rollout/tokens", lengths.sum())
        metrics.total("grade/failures", grades.failures)
        metrics.total("grade/timeouts", grades.timeouts)
        return rollouts

    def score(self, rollouts: Rollouts, metrics: StepMetrics) -> Scored:
        """Log-probabilities of both models, effective reward, down-sampling, advantages."""
        options = dict(
            temperature=self.config.rollout.temperature,
            batch_size=self.config.training.micro_batch_size,
            device=self.device,
        )
        logps = {
            name: rollout_logps(policy, rollouts, **options)
            for name, policy in self.policies.items()
        }
        self.check_gap(rollouts, torch.cat(logps[self.config.writer]), metrics)
        scored = score(self.config, rollouts, logps)
        if scored.kd_rewards is not None:
            metrics.mean_of("reward/kd", scored.kd_rewards)
            metrics.mean_of("reward/effective", scored.effective_rewards)
        metrics.mean_of("reward/kept_accuracy", rollouts.accuracy[scored.kept])
        return scored

    def check_gap(self, rollouts: Rollouts, writer_logps: Tensor, metrics: StepMetrics) -> None:
        engine_logps = [logp for completion in rollouts.completions for logp in completion.logps]
        gap = (torch.tensor(engine_logps, device=self.device) - writer_logps).abs()
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
        self, learner: Learner, rollouts: Rollouts, scored: Scored, metrics: StepMetrics
    ) -> None:
        """One optimizer step on the kept rollouts; the ratio is over the writer's policy."""
        rollout = self.config.rollout
        # 1/prompts * 1/G * 1/N of Eq. 5 and Eq. 10, prompts counted over all processes.
        kept = rollout.prompts_per_step * self.config.downsample.keep
        learner.backward(
            self.micro_batches(rollouts, scored, scored.advantages[learner.name]),
            metrics,
            normalizer=kept * rollout.max_completion_tokens,
            temperature=rollout.temperature,
        )
        learner.step(metrics)

    def micro_batches(
        self, rollouts: Rollouts, scored: Scored, advantages: Tensor
    ) -> Iterator[MicroBatch]:
        size = self.config.training.micro_batch_size
        for rows, part in zip(scored.kept.split(size), advantages.split(size), strict=True):
            chosen = rows.tolist()
            yield MicroBatch(
                tokens=rollouts.batch(chosen, self.device),
                old_logps=torch.cat([scored.old_logps[row] for row in chosen]),
                advantages=part,
            )

    def sync(self) -> None:
        self.engine.sync(self.policies[self.config.writer].full_weights())

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out accuracy of the writer and, at both ends of a run that trains it, of the large
        model."""
        writer = self.config.writer
        accuracy = {"step": step, writer: self.evaluate_with(self.engine)}
        at_ends = self.config.evaluation.large and "large" in self.learners and writer != "large"
        if at_ends and step in (0, self.total_steps):
            # Seldom, so a plain engine that lives for this evaluation only is enough.
            engine = HFEngine(self.engine_spec("large"))
            engine.sync(self.policies["large"].full_weights())
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
        if f"ratio/{name}_squared" in numbers:
            squared = numbers.pop(f"ratio/{name}_squared")
            numbers[f"ratio/{name}_ess"] = numbers[f"ratio/{name}_mean"] ** 2 / squared
    numbers["tokens_per_second"] = numbers.pop("rollout/tokens") / numbers["time/step"]
    return numbers
