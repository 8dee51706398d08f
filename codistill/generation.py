"""From a step's problems to graded rollouts: prompts, hints, engine, grader."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from codistill.config import Config
from codistill.data import Problem, draw, redraw
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


@dataclass(frozen=True)
class Group:
    """M graded rollouts of one prompt."""

    problem: Problem
    completions: list[Completion]
    hints: list[int]
    texts: list[str]
    accuracy: list[float]
    format: list[float]

    @property
    def has_signal(self) -> bool:
        """Some right, some wrong: else accuracy gives no advantage."""
        return 0 < sum(self.accuracy) < len(self.accuracy)


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
        """M graded rollouts of each of this process's prompts in step `step`, from 1.

        With sampling rounds, those of the first prompts of all processes that have a signal, in the
        order drawn; if there are too few, then of the first ones without.
        """
        rank, processes = dist.get_rank(), dist.get_world_size()
        wanted = self.config.rollout.prompts_per_step
        groups: list[Group] = []
        for number, indices in enumerate(self.rounds(step), start=1):
            mine = self.write(step, indices[rank::processes].tolist(), metrics)
            if self.config.rollout.sampling_rounds == 1:
                return join(mine, self.device)
            groups += gathered(mine)
            metrics.maximum("rollout/sampling_rounds", number)
            if sum(group.has_signal for group in groups) >= wanted:
                break
        groups.sort(key=lambda group: not group.has_signal)  # stable: else in the order drawn
        return join(groups[:wanted][rank::processes], self.device)

    def rounds(self, step: int) -> Iterator[np.ndarray]:
        """Indices of the problems of each round of sampling."""
        rollout, seed = self.config.rollout, self.config.seed
        terms = (len(self.inputs.problems), rollout.prompts_per_step, step - 1, seed)
        yield draw(*terms)
        yield from itertools.islice(redraw(*terms), rollout.sampling_rounds - 1)

    def write(self, step: int, share: list[int], metrics: StepMetrics) -> list[Group]:
        """A group of each of these problems."""
        rollout = self.config.rollout
        length = hint_length(self.config, step, len(self.inputs.problems))
        if length:
            hints, completions = self.write_with_hints(step, share, length, metrics)
        else:
            completions = self.engine.generate(
                [self.inputs.problems[i].prompt_ids for i in share],
                prompt_seeds(self.config.seed, step, share),
                self.sampling(rollout.num_generations, rollout.max_completion_tokens),
            )
            hints = [0] * len(completions)
        if self.config.hint.tokens:
            metrics.mean_of("rollout/hint_tokens", torch.tensor(hints))
            metrics.maximum("time/hint", 0.0)  # there in the steps without, too
        return self.grade([self.inputs.problems[i] for i in share], completions, hints, metrics)

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
    ) -> list[Group]:
        count = self.config.rollout.num_generations
        texts = [
            self.inputs.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            for completion in completions
        ]
        answers = [problem.answer for problem in problems for _ in range(count)]
        with metrics.timer("time/grade"):
            grades = self.grader.grade(texts, answers)
        accuracy = [float(correct) for correct in grades.correct]
        form = [format_reward(text) if self.config.reward.format else 0.0 for text in texts]
        parts = [slice(start, start + count) for start in range(0, len(texts), count)]
        groups = [
            Group(problem, completions[p], hints[p], texts[p], accuracy[p], form[p])
            for problem, p in zip(problems, parts, strict=True)
        ]
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        unsolved = torch.tensor([not any(group.accuracy) for group in groups])
        truncated = torch.tensor([completion.truncated for completion in completions])
        metrics.mean_of("reward/accuracy", torch.tensor(accuracy))
        metrics.mean_of("reward/format", torch.tensor(form))
        metrics.mean_of("reward/zero_fraction", unsolved.float())
        metrics.mean_of("rollout/mean_tokens", lengths)
        metrics.mean_of("rollout/truncated_fraction", truncated.float())
        metrics.total("rollout/tokens", lengths.sum())
        metrics.total("grade/failures", grades.failures)
        metrics.total("grade/timeouts", grades.timeouts)
        return groups


def join(groups: list[Group], device: torch.device) -> Rollouts:
    """The rollouts of all groups, one after the other."""
    return Rollouts(
        problems=[group.problem for group in groups for _ in group.texts],
        completions=[completion for group in groups for completion in group.completions],
        hints=[hint for group in groups for hint in group.hints],
        texts=[text for group in groups for text in group.texts],
        accuracy=torch.tensor([x for group in groups for x in group.accuracy], device=device),
        format=torch.tensor([x for group in groups for x in group.format], device=device),
    )


def gathered(mine: list[Group]) -> list[Group]:
    """The groups of all processes, which have equally many, in the order their prompts were drawn:
    by turns. Every process must call."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [group for turn in zip(*parts, strict=True) for group in turn]
