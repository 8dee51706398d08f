"""The files of a run, in output_dir/name, written by one process."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import yaml

from codistill.config import Config
from codistill.rollout import Rollouts
from codistill.scoring import Scored


class RunDirectory:
    """config.yaml, metrics.jsonl (one row per step), evaluations.jsonl, samples/, summary.json.

    config.yaml is that of the last start: a run may go on with other settings of some keys.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.output_dir / config.name
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (self.path / "config.yaml").write_text(content)

    def keep_until(self, step: int) -> None:
        """Drop the rows of steps after `step`, which are about to be computed again."""
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            rows = [row for row in read_rows(self.path / name) if row["step"] <= step]
            (self.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def add_metrics(self, step: int, numbers: dict[str, float]) -> None:
        self.append("metrics.jsonl", {"step": step} | numbers)

    def add_evaluation(self, accuracy: dict[str, float]) -> None:
        self.append("evaluations.jsonl", accuracy)

    def add_samples(self, step: int, rollouts: Rollouts, scored: Scored) -> None:
        """Write the first process's rollouts of one step."""
        kept = set(scored.credit.kept.tolist())
        kd_rewards = scored.credit.kd_rewards
        kd = {} if kd_rewards is None else {"kd": kd_rewards.tolist()}
        table = pa.table(
            {
                "prompt": [problem.prompt for problem in rollouts.problems],
                "answer": [" or ".join(problem.answers) for problem in rollouts.problems],
                "completion": rollouts.texts,
                "tokens": rollouts.completions.lengths.tolist(),
                "truncated": rollouts.truncated.tolist(),
                "accuracy": rollouts.accuracy.tolist(),
                "format": rollouts.format.tolist(),
                **{f"reward/{name}": v.tolist() for name, v in rollouts.functions.items()},
                **kd,
                "kept": [row in kept for row in range(len(rollouts.texts))],
            }
        )
        pyarrow.parquet.write_table(table, self.path / "samples" / f"step_{step:06d}.parquet")

    def write_summary(self, summary: dict[str, Any]) -> None:
        (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def append(self, name: str, row: dict[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; none if there is no file. A last line that is not ended, because the
    run was killed while it wrote, is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
