"""From a step's problems to graded rollouts: prompts, hints, engine, grader."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from codistill.config import Config
from codistill.data import Problem, draw, redraw
from codistill.engine import Completion, Engine, Sampling, prompt_seeds
from codistill.grading import Grader
from codistill.hints import hint_length, hint_uniforms, write_hints
from codistill.inputs import Inputs
from codistill.model import Policy
from codistill.output.metrics import StepMetrics
from codistill.rewards import RolloutRewards
from codistill.scoring import Rollouts


@dataclass(frozen=True)
class Group:
    """M graded rollouts of one prompt."""

    problem: Problem
    completions: list[Completion]
    hints: list[int]
    texts: list[str]
    accuracy: list[float]
    format: list[float]
    functions: dict[str, list[float]]

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
        self.config, self.inputs, self.engine = config, inputs, engine
        self.rewards = RolloutRewards(config.reward, grader, inputs.reward_functions, device)
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
        token_ids = [completion.token_ids for completion in completions]
        each = [problem for problem in problems for _ in range(count)]
        terms = self.rewards(each, texts, token_ids, metrics)
        # Numbers, not tensors: they may be sent to other processes.
        accuracy, form = terms.accuracy.tolist(), terms.format.tolist()
        functions = {name: values.tolist() for name, values in terms.functions.items()}
        groups = []
        for problem, start in zip(problems, range(0, len(texts), count), strict=True):
            part = slice(start, start + count)
            added = {name: values[part] for name, values in functions.items()}
            written = (completions[part], hints[part], texts[part])
            groups.append(Group(problem, *written, accuracy[part], form[part], added))
        unsolved = torch.tensor([not any(group.accuracy) for group in groups])
        lengths = torch.tensor([len(tokens) for tokens in token_ids])
        truncated = torch.tensor([completion.truncated for completion in completions])
        metrics.mean_of("reward/zero_fraction", unsolved.float())
        metrics.mean_of("rollout/mean_tokens", lengths)
        metrics.mean_of("rollout/truncated_fraction", truncated.float())
        metrics.total("rollout/tokens", lengths.sum())
        return groups


def join(groups: list[Group], device: torch.device) -> Rollouts:
    """The rollouts of all groups, one after the other."""

    def tensor(values: Iterable[list[float]]) -> Tensor:
        return torch.tensor([x for part in values for x in part], device=device)

    return Rollouts(
        problems=[group.problem for group in groups for _ in group.texts],
        completions=[completion for group in groups for completion in group.completions],
        hints=[hint for group in groups for hint in group.hints],
        texts=[text for group in groups for text in group.texts],
        accuracy=tensor(group.accuracy for group in groups),
        format=tensor(group.format for group in groups),
        functions={
            name: tensor(group.functions[name] for group in groups) for name in groups[0].functions
        },
    )


def gathered(mine: list[Group]) -> list[Group]:
    """The groups of all processes, which have equally many, in the order their prompts were drawn:
    by turns. Every process must call."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [group for turn in zip(*parts, strict=True) for group in turn]
