"""From a step's problems to graded rollouts: prompts, hints, engine, grader."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from codistill.config import Config
from codistill.data import Problem, draw
from codistill.hints import hint_length, hint_uniforms, write_hints
from codistill.metrics import StepMetrics
from codistill.model import Policy
from codistill.rewards import Grader
from codistill.rollout import Completion, Engine, Sampling, prompt_seeds
from codistill.rollout_rewards import RolloutRewards
from codistill.scoring import Rollouts
from codistill.user_rewards import RewardFunction


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its models."""

    tokenizer: Any
    problems: list[Problem]
    held_out: list[Problem]
    reward_functions: list[RewardFunction] = field(default_factory=list)


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
        token_ids = [completion.token_ids for completion in completions]
        rewards = self.rewards(problems, texts, token_ids, metrics)
        rollouts = Rollouts(problems, completions, hints, texts, *rewards)
        lengths = torch.tensor([len(tokens) for tokens in token_ids])
        truncated = torch.tensor([completion.truncated for completion in completions])
        solved = rollouts.accuracy.bool().view(-1, self.config.rollout.num_generations).any(dim=1)
        metrics.mean_of("reward/zero_fraction", (~solved).float())
        metrics.mean_of("rollout/mean_tokens", lengths)
        metrics.mean_of("rollout/truncated_fraction", truncated.float())
        metrics.total("rollout/tokens", lengths.sum())
        return rollouts
