"""Folders of runs as the tests of the report need them: invented numbers, no training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
KEYS = (
    *("reward/accuracy", "reward/zero_fraction", "reward/kd", "rollout/mean_tokens"),
    *("rollout/truncated_fraction", "rollout/logp_gap_mean", "time/rollout", "time/score"),
    *("time/update_small", "time/update_large", "time/sync", "time/step"),
    *(
        key
        for model in ("small", "large")
        for key in (
            f"ratio/{model}_mean",
            f"ratio/{model}_clip_fraction",
            f"ratio/{model}_ess",
            f"grad_norm/{model}",
            f"loss/{model}",
        )
    ),
)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(
    folder: Path, *, steps: int = 40, seed: int = 0, finished: bool = True, **settings: Any
) -> Path:
    """A run that has evaluated on two sets every tenth step, with one file of rollouts."""
    (folder / "samples").mkdir(parents=True)
    config = {"name": folder.name, "seed": seed, "algorithm": "codistill", "kd": {"alpha": 1.0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | settings))
    random = np.random.default_rng(seed)
    rows = [{"step": n} | {key: random.random() for key in KEYS} for n in range(1, steps + 1)]
    write_lines(folder / "metrics.jsonl", rows)
    names = ("small", "small/math", "small/amc", "large", "large/math")
    rows = [
        {"step": n} | {name: random.random() for name in names} for n in range(0, steps + 1, 10)
    ]
    write_lines(folder / "evaluations.jsonl", rows)
    if finished:
        pair = {"before": 0.25, "after": 0.5}
        summary = {"steps": steps, "problems": 8, "seconds": 400.0, "small": pair, "large": pair}
        (folder / "summary.json").write_text(json.dumps(summary))
    write_rollouts(folder, steps)
    return folder


def write_rollouts(folder: Path, step: int, *, tokens: bool = True, count: int = 6) -> None:
    """Every second rollout is right; the first one has a completion that would harm a page."""
    texts = [
        [HOSTILE, "\n", f" {n}"] if n == 0 else ["so ", "it is", f" {n}"] for n in range(count)
    ]
    columns: dict[str, list] = {
        "prompt": [f"What is {n} + 0?" for n in range(count)],
        "answer": [str(n) for n in range(count)],
        "completion": ["".join(parts) for parts in texts],
        "tokens": [3] * count,
        "truncated": [False] * count,
        "accuracy": [float(n % 2 == 0) for n in range(count)],
        "format": [1.0] * count,
        "kd": [-0.5] * count,
        "kept": [n < 2 for n in range(count)],
    }
    if tokens:
        columns |= {
            "token_ids": [[1, 2, 3]] * count,
            "token_texts": texts,
            "hint_tokens": [1] * count,
            "engine_logps": [[None, -1.0, -2.0]] * count,
            "small_logps": [[-1.0, -3.0, -2.0]] * count,
            "large_logps": [[-2.0, -1.0, float("nan")]] * count,
            "score": [n / 4 for n in range(count)],
            "advantage/small": [0.5, None] * (count // 2),
        }
    path = folder / "samples" / f"step_{step:06d}.parquet"
    pyarrow.parquet.write_table(pa.table(columns), path)
