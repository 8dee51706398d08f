"""From a step's problems to graded rollouts: prompts, hints, engine, grader."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from codistill.config import Config
from codistill.data import Problem, draw
from codistill.hints import hint_length, hint_uniforms, write_hints
from codistill.metrics import StepMetrics
from codistill.model import Policy
from codistill.rewards import Grader, format_reward
from codistill.rollout import Completion, Engine, Sampling, prompt_seeds
from codistill.scoring import Rollouts


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its models."""

    tokenizer: Any
    problems: list[Problem]
    held_out: list[Problem]


class Generation:
    """Writes and grades the rollouts of a step; each process those of its own prompts."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        engine: Engine,
        grader: Grader,
        hinter: Policy | None,
        device: torch.device,
        end_token_ids: tuple[int, ...],
    ) -> None:
        self.config, self.inputs, self.engine, self.grader = config, inputs, engine, grader
        self.hinter, self.device, self.end_token_ids = hinter, device, end_token_ids

    def rollouts(self, step: int, metrics: StepMetrics) -> Rollouts:
        """M graded rollouts of each of this process's prompts in step `step`, from 1."""
        rollout, seed = self.config.rollout, self.config.seed
        indices = draw(len(self.inputs.problems), rollout.prompts_per_step, step - 1, seed)
        share = indices[dist.get_rank() :: dist.get_world_size()].tolist()
        length = hint_length(self.config, step, len(self.inputs.problems))
        if length:
            hints, completions = self.write_with_hints(step, share, length, metrics)
        else:
            completions = self.engine.generate(
                [self.inputs.problems[i].prompt_ids for i in share],
                prompt_seeds(seed, step, share),
                self.sampling(rollout.num_generations, rollout.max_completion_tokens),
            )
            hints = [0] * len(completions)
        if self.config.hint.tokens:
            metrics.mean_of("rollout/hint_tokens", torch.tensor(hints))
            metrics.maximum("time/hint", 0.0)  # there in the steps without, too
        problems = [self.inputs.problems[i] for i in share for _ in range(rollout.num_generations)]
        return self.grade(problems, completions, hints, metrics)

    def sampling(self, num_generations: int, max_tokens: int) -> Sampling:
        return Sampling(num_generations, self.config.rollout.temperature, max_tokens)

    def write_with_hints(
        self, step: int, share: list[int], length: int, metrics: StepMetrics
    ) -> tuple[list[int], list[Completion]]:
        """Tokens of each rollout's hint, and the rollouts: hint and what the engine made of it."""
        rollout, seed = self.config.rollout, self.config.seed
        count = rollout.num_generations
        prompts = [self.inputs.problems[i].prompt_ids for i in share for _ in range(count)]
        assert self.hinter is not None
        with metrics.timer("time/hint"):
            hints = write_hints(
                self.hinter,
                prompts,
                hint_uniforms(seed, step, share, count, length),
                temperature=rollout.temperature,
                end_token_ids=self.end_token_ids,
            )
        # A hint that ended is the whole rollout.
        open_rows = [row for row, hint in enumerate(hints) if hint[-1] not in self.end_token_ids]
        seeds = prompt_seeds(seed, step, [i * count + j for i in share for j in range(count)])
        written = self.engine.generate(
            [prompts[row] + hints[row] for row in open_rows],
            [seeds[row] for row in open_rows],
            self.sampling(1, rollout.max_completion_tokens - length),
        )
        completions = [Completion(hint, [], truncated=False) for hint in hints]
        for row, rest in zip(open_rows, written, strict=True):
            completions[row] = Completion(hints[row] + rest.token_ids, rest.logps, rest.truncated)
        return [len(hint) for hint in hints], completions

    def grade(
        self,
        problems: list[Problem],
        completions: list[Completion],
        hints: list[int],
        metrics: StepMetrics,
    ) -> Rollouts:
        texts = [
            self.inputs.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            for completion in completions
        ]
        with metrics.timer("time/grade"):
            grades = self.grader.grade(texts, [problem.answer for problem in problems])
        form = [format_reward(text) if self.config.reward.format else 0.0 for text in texts]
        correct = torch.tensor(grades.correct, dtype=torch.float32, device=self.device)
        rollouts = Rollouts(
            problems, completions, hints, texts, correct, torch.tensor(form, device=self.device)
        )
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        truncated = torch.tensor([completion.truncated for completion in completions])
        solved = correct.view(-1, self.config.rollout.num_generations).any(dim=1)
        metrics.mean_of("reward/accuracy", correct)
        metrics.mean_of("reward/format", rollouts.format)
        metrics.mean_of("reward/zero_fraction", (~solved).float())
        metrics.mean_of("rollout/mean_tokens", lengths)
        metrics.mean_of("rollout/truncated_fraction", truncated.float())
        metrics.total("rollout/tokens", lengths.sum())
        metrics.total("grade/failures", grades.failures)
        metrics.total("grade/timeouts", grades.timeouts)
        return rollouts
