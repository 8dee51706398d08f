"""What is kept of a run."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from study.record import KD_STD, Record, read


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_numbers_of_a_run(tmp_path):
    """Steps stay whole, a number that was not finite stays missing, other keys are left out."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    metrics = [{"step": 1, "reward/kd": 0.123456789, "other": 1.0}, {"step": 2, "reward/kd": None}]
    write_rows(folder / "metrics.jsonl", metrics)
    rows = [{"step": 0, "small": 0.25}, {"step": 2, "small": 1 / 3}]
    write_rows(folder / "evaluations.jsonl", rows)
    table = pa.table({"prompt": ["a", "a", "b", "b"], "kd": [1.0, 3.0, 5.0, 5.0]})
    pq.write_table(table, folder / "samples" / "step_000002.parquet")
    record = Record.begin(tmp_path / "seed_3.json", "kdrl", 3, ["train.py"], {"torch": "2"})
    assert not read(record.file).finished
    record.take(folder)
    record.end("finished", 1.23)
    kept = read(tmp_path / "seed_3.json")
    assert kept.metrics == {"reward/kd": [0.12346, None], KD_STD: [0.5]}  # the mean of 1 and 0
    assert kept.evaluations == [{"step": 0, "small": 0.25}, {"step": 2, "small": 0.33333}]
    assert all(type(row["step"]) is int for row in kept.evaluations)  # names of folders
    assert kept.finished and (kept.method, kept.seed) == ("kdrl", 3)


@pytest.mark.parametrize("ends", [[], ["exit code 1"], ["finished", None]], ids=str)
def test_a_run_that_did_not_end_well_is_not_finished(tmp_path, ends):
    record = Record("kdrl", 0, file=tmp_path / "seed_0.json")
    record.starts = [{"at": "now"} | ({"status": end} if end else {}) for end in ends]
    record.write()
    assert not read(record.file).finished
