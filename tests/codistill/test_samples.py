"""A step computed again from its file in samples/ and config.yaml alone."""

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from tiny import FakeGrader

from codistill.output.run_directory import RunDirectory


@pytest.fixture(params=["codistill", "hint", "kdrl", "grpo"])
def written(request, make_trainer):
    """The configuration as a file has it, and the rows of a step's file."""
    changes = {
        "codistill": {"rollout": {"truncated": "zero_reward"}},
        "hint": {"hint": {"tokens": 2}, "rollout": {"temperature": 0.8}, "kd": {"estimator": "k3"}},
        "kdrl": {"algorithm": "kdrl", "advantage": {"scale": "std"}},
        "grpo": {"algorithm": "grpo", "grpo": {"model": "large"}},
    }[request.param]
    trainer = make_trainer(changes, FakeGrader())
    directory = RunDirectory(trainer.config)
    directory.start(-1, {})
    _, rollouts, scored = trainer.step(1)
    directory.add_samples(1, rollouts, scored, trainer.inputs.tokenizer)
    rows = pyarrow.parquet.read_table(directory.path / "samples" / "step_000001.parquet")
    config = yaml.safe_load((directory.path / "config.yaml").read_text())
    return config, rows.to_pylist(), trainer


def kd_reward(config: dict, row: dict) -> float:
    """alpha/N of the sum over tokens (Eq. 6); k3 takes exp(x) - 1 - x, which is a divergence."""
    log_ratio = np.array(row["large_logps"]) - np.array(row["small_logps"])
    k3 = config["kd"]["estimator"] == "k3"
    terms = -(np.exp(log_ratio) - 1 - log_ratio) if k3 else log_ratio
    return config["kd"]["alpha"] * terms.sum() / config["rollout"]["max_completion_tokens"]


def test_a_step_can_be_computed_from_its_file(written):
    config, rows, _ = written
    count, keep = config["rollout"]["num_generations"], config["downsample"]["keep"]
    for row in rows:
        row["r"] = row["accuracy"] + row["format"]
        if config["rollout"]["truncated"] == "zero_reward" and row["truncated"]:
            row["r"] = 0.0
        row["kd_expected"] = 0.0 if config["algorithm"] == "grpo" else kd_reward(config, row)
        assert row.get("kd", 0.0) == pytest.approx(row["kd_expected"], rel=1e-6, abs=1e-6)
        assert row["score"] == pytest.approx(row["r"] + row["kd_expected"], rel=1e-6, abs=1e-6)
    assert len(rows) == 4 * count and ("kd" in rows[0]) == (config["algorithm"] != "grpo")
    writer = "large" if config["algorithm"] == "grpo" else "small"
    for first in range(0, len(rows), count):
        group = rows[first : first + count]
        order = sorted(group, key=lambda row: row["score"])
        chosen = order[: keep // 2] + order[-(keep // 2) :]
        assert {r["score"] for r in group if r["kept"]} == {r["score"] for r in chosen}
        kept = [row for row in group if row["kept"]]
        assert len(kept) == keep
        advantages = {f"advantage/{writer}": "score"}
        if config["algorithm"] == "codistill":
            advantages["advantage/large"] = "r"
        for name, source in advantages.items():
            values = np.array([row[source] for row in kept])
            expected = values - values.mean()
            if config["advantage"]["scale"] == "std":
                expected /= values.std(ddof=1)
            found = [row[name] for row in kept]
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
            assert all(row[name] is None for row in group if not row["kept"])
        assert {name for name in kept[0] if name.startswith("advantage/")} == set(advantages)


def test_tokens_and_their_log_probabilities(written):
    config, rows, trainer = written
    tokenizer, names = trainer.inputs.tokenizer, trainer.config.loaded
    for row in rows:
        ids, hint = row["token_ids"], row["hint_tokens"]
        assert tokenizer.decode(row["prompt_token_ids"]) == row["prompt"]
        assert "".join(row["token_texts"]) == tokenizer.decode(ids)
        assert row["tokens"] == len(ids) == len(row["token_texts"])
        assert row["completion"] == trainer.inputs.text(ids)
        assert hint <= config["hint"]["tokens"]
        assert row["engine_logps"][:hint] == [None] * hint
        writer = row[f"{trainer.config.writer}_logps"]
        assert row["engine_logps"][hint:] == pytest.approx(writer[hint:], abs=1e-4)
        assert {f"{name}_logps" for name in names} == {
            name for name in row if name.endswith("_logps") and name != "engine_logps"
        }
    assert any(row["hint_tokens"] for row in rows) == (config["hint"]["tokens"] > 0)
