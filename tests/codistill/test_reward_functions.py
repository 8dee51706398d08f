"""Reward functions of the user's own: found, called, weighed, measured, and stopped on errors."""

import json
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml

from codistill.config import Config, ConfigError, load_config
from codistill.config.data import RewardConfig
from codistill.reward_functions import RewardError, RewardFunction, load_functions
from codistill.run import run
from codistill.stopping import StopSignals

MODULE = """
import os

def brevity(prompts, completions, completion_ids, answer, level, **columns):
    assert prompts == [f"{problem}=" for problem in columns["problem"]]
    assert len(completions) == len(completion_ids) == len(answer) == len(level)
    return [-float(len(ids)) for ids in completion_ids]

def easy(prompts, completions, level, **columns):
    return [1.0 if one == "easy" else None for one in level]

def never(prompts, completions, **columns):
    return [None for _ in prompts]

def breaks(prompts, completions, **columns):
    return [1 / int(os.environ["RANK"] != "1") for _ in completions]

async def later(prompts, completions, **columns):
    return [1.0 for _ in completions]

def narrow(prompts, completions):
    return [1.0 for _ in completions]

number = 3
"""
ROW = {"problem": "1+1", "answer": "2", "level": "easy", "prompt": "not passed on"}


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """A module my_rewards that train.py finds too."""
    folder = tmp_path / "rewards"
    folder.mkdir()
    (folder / "my_rewards.py").write_text(MODULE)
    (folder / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(folder))
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    return folder


def call(function, *, completions: int = 3) -> list:
    reward = RewardFunction("my.reward", 1.0, function, timeout=9)
    ids = [[5] * (length + 1) for length in range(completions)]
    texts = [str(length) for length in range(completions)]
    return reward(["p"] * completions, texts, ids, [ROW] * completions)


def test_a_function_gets_lists_and_every_column():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.5, 1, None]

    assert call(reward) == [0.5, 1.0, None]
    assert seen == {
        "prompts": ["p", "p", "p"],
        "completions": ["0", "1", "2"],
        "completion_ids": [[5], [5, 5], [5, 5, 5]],
        "problem": ["1+1"] * 3,
        "answer": ["2"] * 3,
        "level": ["easy"] * 3,
    }


@pytest.mark.parametrize(
    "rewards",
    [np.array([0.5, 1, 0]), torch.tensor([0.5, 1, 0]), (0.5, True, np.False_), map(float, "510")],
    ids=["numpy", "torch", "truth", "iterator"],
)
def test_numbers_of_any_library_are_rewards(rewards):
    assert call(lambda **_: rewards) in ([0.5, 1.0, 0.0], [5.0, 1.0, 0.0])


def test_a_function_cannot_change_what_training_goes_on_with():
    def reward(prompts, completions, completion_ids, **columns):
        completions.clear()
        for ids in completion_ids:
            ids.append(0)
        return [0.0]

    ids = [[1, 2]]
    RewardFunction("my.reward", 1.0, reward, timeout=9)(["p"], ["c"], ids, [ROW])
    assert ids == [[1, 2]]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ([1.0], "returned 1 rewards for 3 completions"),
        ([1.0, math.nan, 1.0], "returned nan for completion 1"),
        ([1.0, 1.0, math.inf], "returned inf for completion 2"),
        ([1e300, 1.0, 1.0], "returned 1e+300 for completion 0, more than 1e+15 with its weight"),
        ([1.0, "2", 1.0], "returned no list of numbers: found the text '2'"),
        ("123", "returned no list of numbers: found the text '1'"),
        ({0.5: 1, 1.0: 2, 2.0: 3}, "returned no list of numbers: found a dict"),
        ({1.0, 2.0, 3.0}, "returned no list of numbers: found a set"),
        ([[1.0], [2.0], [3.0]], "returned no list of numbers: float() argument must be"),
        (None, "returned no list of numbers: 'NoneType'"),
    ],
    ids=["count", "nan", "inf", "huge", "text", "string", "dict", "set", "nested", "nothing"],
)
def test_what_is_no_reward_is_an_error(result, expected):
    with pytest.raises(RewardError) as error:
        call(lambda **_: result)
    assert str(error.value).startswith(f"reward function my.reward {expected}")


def test_a_weight_makes_no_reward_infinite():
    function = RewardFunction("my.reward", -1e6, lambda **_: [1e14], timeout=9)
    with pytest.raises(
        RewardError, match="returned 100000000000000.0 for completion 0, more than 1e.15 with"
    ):
        function(["p"], ["c"], [[1]], [ROW])


def test_an_exception_is_reported_with_its_place():
    def reward(**columns):
        return [columns["nothing"]]

    with pytest.raises(RewardError) as error:
        call(reward)
    line = reward.__code__.co_firstlineno + 1
    place = f"raised KeyError: 'nothing' (test_reward_functions.py, line {line})"
    assert str(error.value) == f"reward function my.reward {place}"


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()])
def test_a_function_cannot_end_the_run_without_a_message(error):
    def reward(**_):
        raise error

    def generator(**_):
        yield 1.0
        raise error

    for function in (reward, generator):
        with pytest.raises(RewardError, match=f"my.reward raised {type(error).__name__}: "):
            call(function)


def test_a_function_may_take_its_time_and_no_more():
    def reward(**_):
        try:
            time.sleep(20)
        except Exception:
            time.sleep(20)

    before = signal.getsignal(signal.SIGALRM)
    slow = RewardFunction("my.reward", 1.0, reward, timeout=0.1)
    with pytest.raises(RewardError) as raised:
        slow(["p"], ["c"], [[1]], [ROW])
    text = "reward function my.reward raised OutOfTime: it may take 0.1 s (reward.function_timeout)"
    line = reward.__code__.co_firstlineno + 2
    assert str(raised.value) == f"{text} (test_reward_functions.py, line {line})"
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_modules_of_the_current_folder_are_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in os.sys.path if path])
    functions = {"rewards_here.brevity": 0.5, "rewards_here.easy": 2}
    brevity, easy = load_functions(RewardConfig(functions=functions), ROW)
    assert (brevity.name, brevity.weight, easy.name, easy.weight) == ("brevity", 0.5, "easy", 2)
    assert easy(["p"], ["c"], [[1]], [ROW]) == [1.0]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nowhere.reward", "the import path of a function; ModuleNotFoundError: No module named"),
        (
            "my_rewards.nothing",
            "the import path of a function; AttributeError: module 'my_rewards'",
        ),
        ("broken_rewards.x", "the import path of a function; ZeroDivisionError: division by zero"),
        ("my_rewards.number", "a plain function, found 3"),
        ("my_rewards.later", "a plain function, found <function later"),
        (
            "my_rewards.narrow",
            "a function that takes prompts, completions, completion_ids, problem",
        ),
    ],
)
def test_a_wrong_import_path_stops_before_models_load(settings, module, path, expected):
    settings["reward"]["functions"] = {path: 1.0}
    with pytest.raises(ConfigError) as error:
        run(Config(**settings), StopSignals())
    assert str(error.value).startswith(f"reward.functions = {path!r}: expected {expected}")


def test_configuration_of_functions(settings, tmp_path):
    path = tmp_path / "config.yaml"

    def functions(values: dict, *arguments: str) -> dict:
        path.write_text(json.dumps(settings | {"reward": {"functions": values}}))
        return load_config(["--config", str(path), *arguments]).reward.functions

    assert functions({}, "--reward.functions", "a.b=0.5") == {"a.b": 0.5}
    for values, expected in (
        ({"brevity": 1}, "reward.functions = 'brevity': expected an import path, module.function"),
        ({"my.accuracy": 1}, "reward.functions = 'my.accuracy': expected a function of another"),
        ({"a.same": 1, "b.same": 2}, "reward.functions = 'b.same': expected a function of another"),
        ({"a.b": "much"}, "reward.functions.a.b = 'much': input should be a valid number"),
    ):
        with pytest.raises(ConfigError) as error:
            functions(values)
        assert str(error.value).startswith(expected)


@pytest.fixture
def with_levels(settings, tmp_path) -> dict:
    """Half of the problems are easy."""
    path = tmp_path / "levels.jsonl"
    rows = [
        {"problem": f"{n}+1", "answer": n + 1, "level": "easy" if n < 4 else "hard"}
        for n in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    settings["data"]["train"] = str(path)
    settings["training"]["steps"] = 2
    settings["evaluation"] = {"every": 1, "large": "never"}
    return settings


def test_a_run_adds_weighs_and_measures_reward_functions(with_levels, module, train):
    weights = {"my_rewards.brevity": 0.01, "my_rewards.easy": 2.0, "my_rewards.never": 1.0}
    with_levels["reward"]["functions"] = weights
    done = train(with_levels)
    assert done.returncode == 0, done.stderr
    assert "data.eval: 4 of 8 problems are in data.train too" in done.stderr
    folder = Path(with_levels["output_dir"]) / with_levels["name"]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        assert numbers["reward/brevity"] == pytest.approx(-numbers["rollout/mean_tokens"])
        assert numbers["reward/easy"] == 1.0  # the mean over those it applies to
        assert "reward/never" not in numbers
        samples = pyarrow.parquet.read_table(
            folder / "samples" / f"step_{numbers['step']:06d}.parquet"
        ).to_pylist()
        assert {row["reward/easy"] for row in samples} == {0.0, 2.0}
        for row in samples:
            assert row["reward/brevity"] == pytest.approx(-0.01 * row["tokens"])
        functions = ("reward/brevity", "reward/easy", "reward/never")
        terms = ("accuracy", "format", "kd", *functions)
        effective = sum(row[term] for row in samples for term in terms) / len(samples)
        assert numbers["reward/effective"] == pytest.approx(effective, abs=1e-5)


def test_an_error_on_one_process_ends_all_with_code_1(with_levels, module, train):
    with_levels["reward"]["functions"] = {"my_rewards.breaks": 1.0}
    done = train(with_levels, processes=2)
    assert done.returncode == 1
    line = "reward function my_rewards.breaks raised ZeroDivisionError: division by zero"
    assert f"train.py: stopped: rank 1: {line} (my_rewards.py, line 16)" in done.stderr
    # Said by the first process, though it was the other whose function failed; no traceback beside.
    assert done.stderr.count("ZeroDivisionError") == 1


def test_the_example_of_the_documentation(make_trainer, settings, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    text = (root / "docs" / "data_and_rewards.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"```sh\npython train.py (.*?)\n```", text, re.DOTALL)
    (section,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.chdir(root)
    reward = load_config(shlex.split(command)).reward
    assert reward.model_dump() == RewardConfig(**yaml.safe_load(section)["reward"]).model_dump()
    numbers, _, _ = make_trainer({"reward": reward.model_dump()}).step(1)
    assert -1 <= numbers["reward/brevity"] < 0
    assert "reward/shows_work" not in numbers  # all answers are short
