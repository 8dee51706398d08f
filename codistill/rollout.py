"""Rollouts, and how a step's problems become some: prompts, hints, engine, grades."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from codistill import distributed
from codistill.batch import Ragged, TokenBatch, pack
from codistill.config import Config
from codistill.data import Problem, counted, draw, redraw
from codistill.engine import Completion, Sampler, Sampling, cut_at_end, prompt_seeds
from codistill.grading import Grader
from codistill.hints import hint_length, hint_uniforms, write_hints
from codistill.inputs import Inputs
from codistill.model.policy import Policy
from codistill.output.metrics import StepMetrics
from codistill.rewards import RewardTerms, RolloutRewards


@dataclass(frozen=True)
class Rollouts:
    """S = prompts x M graded completions of the writer, prompt after prompt, N tokens in all.

    On the host.
    """

    problems: list[Problem]
    """[S] each problem M times."""
    texts: list[str]
    """[S]"""
    prompts: Ragged
    """[S] token ids of each prompt."""
    completions: Ragged
    """[S] token ids of each completion, its hint and its end token included."""
    engine_logps: Tensor
    """[N] fp32, log-probability of each token as the engine sampled it (nats); NaN in a hint."""
    hint_lengths: Tensor
    """[S] int64: how many of a completion's first tokens the large model wrote."""
    truncated: Tensor
    """[S] bool: cut off by max_completion_tokens."""
    accuracy: Tensor
    """[S] 1.0 where the answer is right, else 0.0."""
    format: Tensor
    """[S] format reward; zeros where the run has none."""
    functions: dict[str, Tensor]
    """[S] what each reward function of the user's adds, weight included."""

    @classmethod
    def of(
        cls,
        problems: list[Problem],
        texts: list[str],
        completions: Sequence[Completion],
        hint_lengths: list[int],
        rewards: RewardTerms,
    ) -> Self:
        """From what the engine wrote and the grader found; everything is [S]."""
        hints = zip(completions, hint_lengths, strict=True)
        logps = [value for c, hint in hints for value in (*[torch.nan] * hint, *c.logps)]
        return cls(
            problems,
            texts,
            Ragged.of([problem.prompt_ids for problem in problems]),
            Ragged.of([completion.token_ids for completion in completions]),
            torch.tensor(logps, dtype=torch.float32),
            torch.tensor(hint_lengths),
            torch.tensor([completion.truncated for completion in completions]),
            *rewards,
        )

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def tokens(self) -> int:
        """N"""
        return len(self.completions.values)

    @property
    def rewards(self) -> Tensor:
        """r of Eq. 6 as graded, [S]."""
        return self.accuracy + self.format + sum(self.functions.values())

    @cached_property
    def is_hint(self) -> Tensor:
        """[N] bool: tokens that the large model wrote."""
        lengths, starts = self.completions.lengths, self.completions.cu_seqlens[:-1]
        place = torch.arange(self.tokens) - starts.repeat_interleave(lengths)
        return place < self.hint_lengths.repeat_interleave(lengths)

    def has_signal(self, group_size: int) -> Tensor:
        """[prompts] bool: some of a prompt's rollouts are right, some wrong; else accuracy gives no
        advantage."""
        right = self.accuracy.view(-1, group_size).sum(dim=1)
        return (right > 0) & (right < group_size)

    def rows(self, rows: Tensor) -> "Rollouts":
        """Some of the rollouts, in the order of `rows` [K]."""
        places, chosen = self.completions.places(rows), rows.tolist()
        return Rollouts(
            [self.problems[row] for row in chosen],
            [self.texts[row] for row in chosen],
            self.prompts.rows(rows),
            self.completions.rows(rows),
            self.engine_logps[places],
            self.hint_lengths[rows],
            self.truncated[rows],
            self.accuracy[rows],
            self.format[rows],
            {name: values[rows] for name, values in self.functions.items()},
        )

    @classmethod
    def cat(cls, parts: Sequence["Rollouts"]) -> Self:
        """All rollouts of all parts, in order."""
        values: list[Any] = []
        for field in fields(cls):
            found = [getattr(part, field.name) for part in parts]
            values.append(joined(found))
        return cls(*values)

    def batches(self, rows: Sequence[int], tokens: int, device: torch.device) -> list[TokenBatch]:
        """These rollouts in rows of at most `tokens` tokens, prompts included.

        Collective: every process gets as many, some of them perhaps without a rollout.
        """
        lengths = (self.prompts.lengths + self.completions.lengths)[list(rows)]
        parts = [[rows[place] for place in part] for part in pack(lengths, tokens)]
        parts += [[]] * (int(distributed.largest(len(parts), device)) - len(parts))
        return [TokenBatch.build(self.prompts, self.completions, p, device) for p in parts]


def joined(parts: list) -> Any:
    """One of tensors, lists, `Ragged`s, or dicts of tensors, one after the other."""
    match parts[0]:
        case Tensor():
            return torch.cat(parts)
        case Ragged():
            return Ragged.cat(parts)
        case dict():
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return list(itertools.chain.from_iterable(parts))


class Generation:
    """Writes and grades the rollouts of a step; each process those of its own prompts."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        engine: Sampler,
        grader: Grader,
        hinter: Policy | None,
    ) -> None:
        self.config, self.inputs, self.engine = config, inputs, engine
        self.rewards = RolloutRewards(config.reward, grader, inputs.reward_functions)
        self.hinter = hinter

    def rollouts(self, step: int, metrics: StepMetrics) -> Rollouts:
        """M graded rollouts of each of this process's prompts in step `step`, from 1.

        With sampling rounds, those of the first prompts of all processes that have a signal, in the
        order drawn; if there are too few, then of the first ones without.
        """
        rank, processes = dist.get_rank(), dist.get_world_size()
        group_size = self.config.rollout.num_generations
        rounds: list[Rollouts] = []
        for number, indices in enumerate(self.rounds(step), start=1):
            mine = self.write(step, counted(indices.tolist())[rank::processes], metrics)
            if self.config.rollout.sampling_rounds == 1:
                return mine
            rounds.append(gathered(mine, group_size))
            metrics.maximum("rollout/sampling_rounds", number)
            signals = torch.cat([part.has_signal(group_size) for part in rounds])
            if signals.sum() >= self.config.rollout.prompts_per_step:
                break
        # Stable, so that prompts are in the order drawn, those with a signal first.
        order = signals.int().argsort(descending=True, stable=True)
        prompts = order[: self.config.rollout.prompts_per_step][rank::processes]
        return Rollouts.cat(rounds).rows(members(prompts, group_size))

    def rounds(self, step: int) -> Iterator[np.ndarray]:
        """Indices of the problems of each round of sampling."""
        rollout, seed = self.config.rollout, self.config.seed
        terms = (len(self.inputs.problems), rollout.prompts_per_step, step - 1, seed)
        yield draw(*terms)
        yield from itertools.islice(redraw(*terms), rollout.sampling_rounds - 1)

    def write(self, step: int, share: list[tuple[int, int]], metrics: StepMetrics) -> Rollouts:
        """M rollouts of each of these problems, which `counted` has counted."""
        rollout = self.config.rollout
        length = hint_length(self.config, step, len(self.inputs.problems))
        if length:
            hint_lengths, completions = self.write_with_hints(step, share, length, metrics)
        else:
            completions = self.engine.generate(
                [self.inputs.problems[i].prompt_ids for i, _ in share],
                prompt_seeds(self.config.seed, step, share),
                self.sampling(rollout.num_generations, rollout.max_completion_tokens),
            )
            hint_lengths = [0] * len(completions)
        if self.config.hint.tokens:
            metrics.mean_of("rollout/hint_tokens", torch.tensor(hint_lengths))
            metrics.maximum("time/hint", 0.0)  # there in the steps without, too
        count = rollout.num_generations
        problems = [self.inputs.problems[i] for i, _ in share for _ in range(count)]
        return self.graded(problems, completions, hint_lengths, metrics)

    def sampling(self, num_generations: int, max_tokens: int) -> Sampling:
        return Sampling(num_generations, self.config.rollout.temperature, max_tokens)

    def write_with_hints(
        self, step: int, share: list[tuple[int, int]], length: int, metrics: StepMetrics
    ) -> tuple[list[int], list[Completion]]:
        """Tokens of each rollout's hint, and the rollouts: hint and what the engine made of it."""
        rollout, seed = self.config.rollout, self.config.seed
        count, ends, stop = rollout.num_generations, self.inputs.end_token_ids, self.inputs.stop
        prompts = [self.inputs.problems[i].prompt_ids for i, _ in share for _ in range(count)]
        assert self.hinter is not None
        with metrics.timer("time/hint"):
            hints = write_hints(
                self.hinter,
                prompts,
                hint_uniforms(seed, step, share, count, length),
                temperature=rollout.temperature,
                end_token_ids=ends,
                stop=stop,
            )
        # A hint that ended is the whole rollout.
        open_rows = [row for row, hint in enumerate(hints) if cut_at_end(hint, ends, stop)[1]]
        members = [(i * count + j, before) for i, before in share for j in range(count)]
        seeds = prompt_seeds(seed, step, members)
        written = self.engine.generate(
            [prompts[row] + hints[row] for row in open_rows],
            [seeds[row] for row in open_rows],
            self.sampling(1, rollout.max_completion_tokens - length),
        )
        completions = [Completion(hint, [], truncated=False) for hint in hints]
        for row, rest in zip(open_rows, written, strict=True):
            # A stop string may begin in the hint, which the engine takes for a part of the prompt.
            whole, unended = cut_at_end(hints[row] + rest.token_ids, ends, stop)
            logps = rest.logps[: len(whole) - len(hints[row])]
            completions[row] = Completion(whole, logps, unended and rest.truncated)
        return [len(hint) for hint in hints], completions

    def graded(
        self,
        problems: list[Problem],
        completions: list[Completion],
        hint_lengths: list[int],
        metrics: StepMetrics,
    ) -> Rollouts:
        """Everything is [S]."""
        token_ids = [completion.token_ids for completion in completions]
        texts = [self.inputs.text(ids) for ids in token_ids]
        terms = self.rewards(problems, texts, token_ids, metrics)
        rollouts = Rollouts.of(problems, texts, completions, hint_lengths, terms)
        lengths, count = rollouts.completions.lengths, self.config.rollout.num_generations
        is_unsolved = rollouts.accuracy.view(-1, count).sum(dim=1) == 0
        metrics.mean_of("reward/zero_fraction", is_unsolved.float())
        metrics.mean_of("rollout/mean_tokens", lengths)
        metrics.mean_of("rollout/truncated_fraction", rollouts.truncated.float())
        metrics.total("rollout/tokens", rollouts.tokens)
        return rollouts


def members(prompts: Tensor, group_size: int) -> Tensor:
    """[P] numbers of prompts -> [P * group_size] numbers of their rollouts."""
    return (prompts[:, None] * group_size + torch.arange(group_size)).flatten()


def gathered(mine: Rollouts, group_size: int) -> Rollouts:
    """The rollouts of all processes, which have equally many prompts. Collective.

    In the order these were drawn: interleaved by rank.
    """
    parts = distributed.gathered(mine)
    whole = Rollouts.cat(parts)
    prompts = torch.arange(len(whole) // group_size).view(len(parts), -1).T.flatten()
    return whole.rows(members(prompts, group_size))
