"""python -m codistill eval as a user runs it: its tables, its files, what ends it and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from codistill.config import ConfigError, load_options
from codistill.config.evaluation import EvalOptions
from codistill.evaluation_run import evaluate, load_models
from codistill.grading import Grader, Grades
from codistill.output.evaluation_files import COLUMNS
from codistill.output.evaluation_table import (
    accuracy_cells,
    best_rows,
    detail_cells,
    markdown,
    numbers_of_set,
    spread,
)
from codistill.voting import answer_of, find_answers, group, majority_at_k, pass_at_k, sizes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["--max-tokens", "--max_tokens"])
def test_options_are_known_by_their_keys_too(name):
    words = ["--model", "m_1", "--data", "a_b=c_d", "--output", "o_1", "--template", "boxed"]
    for value in ([name, "9"], [f"{name}=9"]):
        options = load_options(EvalOptions, [*words, *value])
        assert (options.max_tokens, options.model, options.output) == (9, ["m_1"], Path("o_1"))


def test_sizes():
    assert [sizes(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]


def test_pass_at_k_by_hand():
    correct = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    assert pass_at_k(correct, 1) == pytest.approx((1 / 4 + 2 / 4) / 3)
    # Pairs of four: 3 of 6 hold the one that is right, 5 of 6 one of the two.
    assert pass_at_k(correct, 2) == pytest.approx((3 / 6 + 5 / 6) / 3)
    assert pass_at_k(correct, 4) == pytest.approx(2 / 3)


def test_majority_by_hand():
    groups = np.array([[0, 1, 1, -1], [0, 1, 0, 1], [-1, -1, -1, -1], [-1, 0, 1, 1]])
    correct = np.array([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]], dtype=bool)
    # Four votes: 1 twice, right; a tie, the first seen is right; no answer; 1 twice, wrong.
    assert majority_at_k(groups, correct, 4) == 2 / 4
    # Two votes: a tie, the first seen is wrong; a tie, right; no answer; 0 alone, right.
    assert majority_at_k(groups, correct, 2) == 2 / 4
    assert majority_at_k(groups, correct, 1) == 1 / 4


def test_equal_answers_are_one_group(grader):
    texts = [
        [
            r"\boxed{\frac{1}{2}}",
            "<answer>0.5</answer>",
            r"\boxed{2}",
            "so it is $2$",
            r"\boxed{3}",
        ],
        ["nothing", r"\boxed{x+1}", r"\boxed{1+x}", r"\boxed{x}", r"\boxed{x+1}"],
    ]
    answers = [find_answers(grader, row) for row in texts]
    assert answers[0][:3] == [r"\frac{1}{2}", "0.5", "2"] and answers[1][0] == "nothing"
    assert group(grader, texts, answers).tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 2, 1]]


def test_the_answer_in_a_text():
    assert answer_of(r"\boxed{1} then <answer> 7 </answer>") == "7"
    assert answer_of("it is $9$") == "9"
    assert answer_of("nothing") == "nothing" and answer_of(r"\boxed{ }") is None


def test_spread_is_of_a_sample():
    assert spread([1.0, 2.0, 4.0])["std"] == pytest.approx((14 / 6) ** 0.5)
    assert spread([0.5]) == {"mean": 0.5, "std": None, "seeds": [0.5]}


class SameText:
    """A grader to which only equal texts are equal."""

    def grade(self, texts, answers) -> Grades:
        return Grades([text == gold[0] for text, gold in zip(texts, answers, strict=True)], 0, 0)


def seed_rows(correct: list[bool], answers: list[str | None], tokens: int) -> pa.Table:
    rows = [
        {
            **dict(number=number, problem="p", gold="g", completion=str(text), answer=text),
            **dict(correct=right, tokens=tokens, truncated=not right),
        }
        for number, (right, text) in enumerate(zip(correct, answers, strict=True))
    ]
    counts = {"failures": "1", "timeouts": "2"}
    return pa.Table.from_pylist(rows, schema=COLUMNS.with_metadata(counts))


def results() -> dict:
    """Two models on two sets, with accuracies over two seeds that were chosen by hand."""
    worse = [seed_rows([True, False], ["a", "b"], 4), seed_rows([False, False], ["b", None], 8)]
    better = [seed_rows([True, True], ["a", "c"], 4), seed_rows([True, False], ["a", "b"], 4)]
    models = {}
    for label, seeds in (("base", worse), ("trained", better)):
        numbers = numbers_of_set(seeds, SameText())
        average = spread(numbers["accuracy"]["seeds"])
        models[label] = {"sets": {"A": numbers, "B": numbers}, "average": average}
    return {"seeds": [0, 1], "models": models}


def test_tables():
    found = results()
    assert markdown(accuracy_cells(found), best_rows(found)) == (
        "| Model | A | B | Average |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| base | 25.00 ± 35.36 | 25.00 ± 35.36 | 25.00 ± 35.36 |\n"
        "| trained | **75.00 ± 35.36** | **75.00 ± 35.36** | **75.00 ± 35.36 (+50.00)** |\n"
    )
    # base: problem 0 once right of two, problem 1 never; the vote takes the first of two answers.
    assert detail_cells(found, "base") == [
        ["base", "A", "B"],
        ["problems", "2", "2"],
        ["pass@2", "50.00", "50.00"],
        ["maj@2", "50.00", "50.00"],
        ["mean tokens", "6.0", "6.0"],
        ["truncated", "75.00%", "75.00%"],
        ["grading failures", "2", "2"],
        ["grading timeouts", "4", "4"],
    ]


@pytest.fixture
def command(settings, models, tmp_path) -> list[str]:
    """An evaluation of seconds, of the small model."""
    options = {
        "--model": models["small"],
        "--data": f"sums={tmp_path / 'problems.jsonl'}",
        "--template": "{problem}=",
        "--max-tokens": 8,
        "--seeds": 12,
        "--engine": "hf",
        "--dtype": "float32",
        "--output": tmp_path / "out",
    }
    return ["-m", "codistill", "eval", *(str(part) for pair in options.items() for part in pair)]


def start(arguments: list[str], *launcher: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output, errors


def test_an_evaluation_that_is_stopped_goes_on(command, models, tmp_path, monkeypatch, caplog):
    """It may have one more model then."""
    folder = tmp_path / "out"
    process = start(command)
    deadline = time.monotonic() + 120
    while not list(folder.glob("rows/*/sums/seed_0.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process, 143)
    assert errors.endswith(
        "codistill: stopped by SIGTERM in the middle of a seed; the same command goes on from the "
        "last finished one\n"
    )
    first = {file: file.stat().st_mtime_ns for file in folder.glob("rows/*/sums/seed_*.parquet")}
    assert 1 <= len(first) < 12 and not (folder / "results.json").exists()

    command += ["--model", str(models["large"])]
    output, _ = finish(start(command))
    assert output.count("small  sums  seed ") == 12 - len(first)
    assert output.count("large  sums  seed ") == 12
    assert {file: file.stat().st_mtime_ns for file in first} == first
    (rows,) = folder.glob("rows/small-*/sums")
    assert sorted(file.name for file in rows.iterdir()) == sorted(
        f"seed_{seed}.parquet" for seed in range(12)
    )
    whole = json.loads((folder / "results.json").read_text())
    check_results(whole, rows)

    (rows / "seed_3.parquet").unlink()
    (rows / "seed_5.parquet").write_bytes(b"PAR1")  # as a damaged disk leaves it
    evaluate_here(command, monkeypatch)
    assert f"{rows / 'seed_5.parquet'}: cannot be read, is written again" in caplog.messages
    assert json.loads((folder / "results.json").read_text()) == whole
    kept = rf"temperature = 0.5: expected 1.0 as in {folder / 'settings.json'}, to go on there, or "
    with pytest.raises(ConfigError, match=kept):
        evaluate_here([*command, "--temperature", "0.5"], monkeypatch)


def evaluate_here(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate in this process, and undo what it sets in its environment in the end."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert evaluate(load_options(EvalOptions, command[3:]), starts=0) == 0


def check_results(results: dict, rows: Path) -> None:
    """The numbers follow from the rows, and what they depend on is there."""
    seeds = [pyarrow.parquet.read_table(rows / f"seed_{seed}.parquet") for seed in range(12)]
    assert all(seed["number"].to_pylist() == list(range(8)) for seed in seeds)
    assert seeds[0]["completion"] != seeds[1]["completion"]
    model = results["models"]["small"]
    found = model["sets"]["sums"]
    assert found["accuracy"]["seeds"] == [np.mean(seed["correct"].to_pylist()) for seed in seeds]
    assert found["mean_tokens"] == np.mean([seed["tokens"].to_pylist() for seed in seeds])
    assert found["problems"] == 8 and found["pass@k"].keys() == {"1", "2", "4", "8", "12"}
    assert model["fingerprints"].keys() >= {"model.safetensors", "config.json"}
    settings = results["settings"]
    assert settings["template"] == "{problem}=" and settings["temperature"] == 1.0
    assert len(settings["data"]["sums"]["contents"]) == 64
    assert settings["grader"]["version"] >= 1 and "math-verify" in settings["versions"]


@pytest.mark.parametrize(
    "more",
    [pytest.param([], id="one model"), pytest.param(["large"], id="two", marks=pytest.mark.long)],
)
def test_vllm_on_two_processes(command, models, tmp_path, more):
    """Each model has an engine of its own, in a process that starts anew."""
    pytest.importorskip("vllm", reason="vLLM cannot be installed on this machine")
    options = {
        "--data": f"more={tmp_path / 'problems.jsonl'}",
        "--seeds": 2,
        "--engine": "vllm",
        "--kv-cache-gib": 0.1,
    }
    command += [str(part) for pair in options.items() for part in pair]
    command += [part for name in more for part in ("--model", str(models[name]))]
    output, _ = finish(start(command, "-m", "torch.distributed.run", "--nproc-per-node", "2"))
    names = ["small", *more]
    assert output.count("engine: vllm, 2 processes") == len(names)
    files = list((tmp_path / "out").glob("rows/*/*/seed_*.parquet"))
    assert len(files) == len(names) * 2 * 2
    for file in files:
        assert pyarrow.parquet.read_table(file)["number"].to_pylist() == list(range(8))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["models"]) == names and results["processes"] == 2
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.startswith("| Model | sums | more | Average |\n")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("--data", "sums"), "data = 'sums': expected NAME=FILE"),
        (("--data", "a/b=c"), "data = 'a/b=c': expected NAME=FILE with a name of at most 60"),
        (("--temperature", "0"), "seeds = 12: expected 1 with temperature 0"),
        (("--max-tokens", "61"), "max_tokens = 61: expected no more than the 64 positions"),
        (("--model", "nowhere/"), "model = 'nowhere/': expected a folder that exists"),
        (("--template", "chat"), "template = 'chat': expected a tokenizer with a chat template"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(command, changes, expected):
    with Grader(timeout=5.0) as grader, pytest.raises(ConfigError) as error:
        load_models(load_options(EvalOptions, [*command[3:], *changes]), grader)
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_messages_about_rows_name_the_options_of_this_command(command, tmp_path):
    turns = [{"role": "user", "content": "1+1"}]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"problem": turns, "answer": "2"}) + "\n")
    for changes, expected in (
        (("--problem-field", "text"), "; problem_field and answer_field name others"),
        (
            ("--data", f"turns={tmp_path / 'turns.jsonl'}"),
            ": expected template = 'chat' for the messages of problem in row 1, which has problem, "
            "answer",
        ),
    ):
        with Grader(timeout=5.0) as grader, pytest.raises(ConfigError) as error:
            load_models(load_options(EvalOptions, [*command[3:], *changes]), grader)
        assert str(error.value).endswith(expected)
