"""The rollouts of a step as a table, complete enough to compute the step again."""

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from codistill.batch import Ragged
from codistill.rollout import Rollouts
from codistill.scoring import Scored
from codistill.texts import token_texts


def samples_table(rollouts: Rollouts, scored: Scored, tokenizer: Any) -> pa.Table:
    """One row per rollout; docs/operations.md says what the columns are."""
    credit, completions = scored.credit, rollouts.completions
    is_kept = torch.zeros(len(rollouts), dtype=torch.bool)
    is_kept[credit.kept.cpu()] = True
    token_ids = lists(completions.values, completions)
    kd = {} if credit.kd_rewards is None else {"kd": credit.kd_rewards.tolist()}
    advantages = {n: values.cpu() for n, values in credit.advantages.items()}
    return pa.table(
        {
            "prompt": [problem.prompt for problem in rollouts.problems],
            "answer": [" or ".join(problem.answers) for problem in rollouts.problems],
            "completion": rollouts.texts,
            "tokens": completions.lengths.tolist(),
            "truncated": rollouts.truncated.tolist(),
            "accuracy": rollouts.accuracy.tolist(),
            "format": rollouts.format.tolist(),
            **{f"reward/{name}": v.tolist() for name, v in rollouts.functions.items()},
            **kd,
            "score": credit.effective_rewards.tolist(),
            "kept": is_kept.tolist(),
            **{f"advantage/{n}": where(is_kept, values) for n, values in advantages.items()},
            "hint_tokens": rollouts.hint_lengths.tolist(),
            "prompt_token_ids": integers(lists(rollouts.prompts.values, rollouts.prompts)),
            "token_ids": integers(token_ids),
            "token_texts": [token_texts(tokenizer, ids) for ids in token_ids],
            "engine_logps": numbers(engine_logps(rollouts)),
            **{f"{n}_logps": numbers(lists(v, completions)) for n, v in scored.logps.items()},
        }
    )


def lists(values: Tensor, rows: Ragged) -> list[list]:
    """[N] values, one list per row."""
    return [part.tolist() for part in values.cpu().split(rows.lengths.tolist())]


def where(is_kept: Tensor, values: Tensor) -> list[float | None]:
    """[S] values of the rollouts kept, None for the others."""
    pairs = zip(values.tolist(), is_kept.tolist(), strict=True)
    return [value if kept else None for value, kept in pairs]


def engine_logps(rollouts: Rollouts) -> list[list[float | None]]:
    """The engine's log-probabilities per rollout, None in a hint, which it did not sample."""
    rows = zip(
        lists(rollouts.engine_logps, rollouts.completions),
        rollouts.hint_lengths.tolist(),
        strict=True,
    )
    return [[None] * hint + row[hint:] for row, hint in rows]


def integers(rows: list[list[int]]) -> pa.Array:
    return pa.array(rows, pa.list_(pa.int32()))


def numbers(rows: list[list]) -> pa.Array:
    return pa.array(rows, pa.list_(pa.float32()))
