"""Is an answer right, does a text have its form, and what the grader does when it cannot say."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from codistill import gold_cache
from codistill.comparing import is_correct, is_only_text
from codistill.config import ConfigError
from codistill.failures import RunError
from codistill.grading import (
    Grader,
    Grades,
    GradingError,
    format_reward,
    with_alarm,
)

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "data" / "grading.jsonl"
CASES = [json.loads(line) for line in TABLE.read_text().splitlines()]
HANGS = "<answer>9^{(9^9)!}</answer>"  # sympy computes the number


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of the user's cache, an own one of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "codistill"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think>a</think>", 0.5),
        ("<think><think>a</think><answer>b</answer>", 0.75),
        ("b", 0.0),
    ],
)
def test_format_reward(text, reward):
    assert format_reward(text) == reward


def test_golden_table():
    """Cases of every kind, each with a verdict of ours: tests/data/grading.jsonl."""
    wrong = [
        f"{case['kind']}: {case['text']!r} for {case['gold']!r} must be {case['correct']}"
        for case in CASES
        if case["kind"] != "hostile" and is_correct(case["text"], [case["gold"]]) != case["correct"]
    ]
    assert len(CASES) >= 250 and not wrong, "\n".join(wrong)


def test_hostile_answers_neither_hang_nor_crash():
    cases = [case for case in CASES if case["kind"] == "hostile"]
    texts = [case["text"] for case in cases]
    for long in (
        "1" * 2**20,
        "(" * 2**20,
        "\\boxed{" * 2**17,
        "<answer>" * 2**17,
        "$1 is " * 2**18,
    ):
        texts += [long, f"<answer>{long}</answer>"]
    golds = [[case["gold"]] for case in cases] + [["3"]] * (len(texts) - len(cases))
    with Grader(timeout=2, processes=2) as grader:
        grades = grader.grade([*texts, "\\boxed{3}"], [*golds, ["3"]])
    assert [text for text, right in zip(texts, grades.correct, strict=False) if right] == []
    assert grades.correct[-1] and grades.failures == 0


@pytest.mark.parametrize(("text", "correct"), [("2", True), ("1/3", True), ("3", False)])
def test_any_of_several_answers_is_right(text, correct):
    assert is_correct(f"<answer>{text}</answer>", ["2", "\\frac{1}{3}"]) is correct


def test_text_that_is_no_mathematics():
    assert not is_only_text("\\frac{1}{2}") and not is_only_text("Evelyn")
    assert is_only_text("???") and is_only_text("$\\{x|-2\\leq x < 1\\}$")
    with pytest.raises(ValueError, match="nothing can be compared with the gold answer ''"):
        is_only_text("")


def test_grader_counts_what_it_could_not_grade(grader):
    texts = ["<answer>3</answer>"] * 4
    grades = grader.grade(texts, [["3"], ["4"], [""], ["4", "3"]])  # "" is no gold answer
    assert grades.correct == [True, False, False, True]
    assert (grades.failures, grades.timeouts) == (1, 0)


def test_grader_outlives_a_completion_that_hangs():
    with Grader(timeout=1) as grader:
        grades = grader.grade([HANGS, "<answer>3</answer>"], [["3"], ["3"]])
    assert (grades.correct, grades.failures, grades.timeouts) == ([False, True], 0, 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_grading_process_that_is_killed_while_idle_is_replaced(caplog, number):
    ours = {child.pid for child in multiprocessing.active_children()}
    with Grader(timeout=9, processes=2) as grader:
        assert grader.grade(["\\boxed{5}"], [["5"]]).correct == [True]
        (one, _) = {child.pid for child in multiprocessing.active_children()} - ours
        os.kill(one, number)
        time.sleep(1)
        grades = grader.grade(["\\boxed{5}", "\\boxed{6}"], [["5"], ["5"]])
    assert (grades.correct, grades.failures, grades.timeouts) == ([True, False], 0, 0)
    assert caplog.messages == ["a grading process was killed: new ones grade 2 completions again"]


def test_a_grading_process_that_is_killed_at_work_does_it_again(caplog):
    ours = {child.pid for child in multiprocessing.active_children()}

    def kill() -> None:
        time.sleep(1)
        for child in multiprocessing.active_children():
            if child.pid not in ours:
                os.kill(child.pid, signal.SIGKILL)

    with Grader(timeout=30) as grader:
        grader.grade(["\\boxed{5}"], [["5"]])
        killer = threading.Thread(target=kill)
        killer.start()
        assert grader.call(time.sleep, [(2,)]) == [None]
        killer.join()
    assert caplog.messages == ["a grading process was killed: new ones grade 1 completions again"]


def test_what_kills_its_process_each_time_fails(monkeypatch, caplog):
    monkeypatch.setattr(Grader, "attempts", 2)
    with Grader(timeout=9) as grader:
        (outcome,) = grader.call(os._exit, [(3,)])
        assert isinstance(outcome, OSError) and len(caplog.messages) == 1
        monkeypatch.setattr(grader, "attempt", lambda function, items: {})
        with pytest.raises(GradingError, match="were killed 2 times in a row"):
            grader.grade(["a"], [["1"]])


def test_a_grading_process_ends_itself_where_nobody_is_left_to_end_it():
    assert with_alarm(9, max, 1, 2) == 2 and signal.alarm(0) == 0
    code = "from codistill.grading import with_alarm; with_alarm(0, pow, 9, 9**9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGALRM


def test_a_grading_process_is_ready_before_the_time_runs():
    code = (
        "import signal, sys; from codistill.grading import prepare_process; prepare_process()\n"
        "assert 'math_verify' in sys.modules and 'torch' not in sys.modules\n"
        "for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):\n"
        "    assert signal.getsignal(number) == signal.SIG_IGN\n"
        "import os; assert os.getsid(0) == os.getpid()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_gold_answers_that_cannot_be_graded_are_refused(grader, caplog, cache):
    path = Path("a.jsonl")
    grader.check_golds("data.train", path, [["1"], ["\\frac12", "x+1"]])
    assert not caplog.records
    grader.check_golds("data.train", path, [["1"], ["???"], ["$t(0,4]$"], ["???"]])
    assert caplog.messages == [
        "data.train: to math-verify 2 answers are mere text: only the same text is right (first in "
        "row 2: '???')"
    ]
    with pytest.raises(ConfigError) as error:
        grader.check_golds("data.train", path, [["1"], ["2", "}"]])
    expected = "data.train = 'a.jsonl': expected an answer in row 2 that can be compared"
    assert str(error.value).startswith(expected) and "'}'" in str(error.value)
    with pytest.raises(ConfigError, match="row 1 that can be compared.*TimeoutError"):
        grader.check_golds("data.train", path, [["10^{10^{10^{10}}}"]])


def test_gold_answers_are_checked_once(grader, cache, monkeypatch, caplog):
    check = partial(grader.check_golds, "data.train", Path("a.jsonl"), [["???"], ["x+1"]])
    check()
    (file,) = cache.rglob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr(grader, "call", None)
        check()  # from the cache, with its warning
        assert len(caplog.messages) == 2 and caplog.messages[0] == caplog.messages[1]
        for version in (gold_cache, "GRADER_VERSION", 0), (gold_cache, "version", lambda name: "0"):
            with monkeypatch.context() as other, pytest.raises(TypeError):
                other.setattr(*version)
                check()
        with pytest.raises(TypeError):
            grader.check_golds("data.train", Path("a.jsonl"), [["???"], ["x+2"]])
    for damaged in (b"", b"{}", b'["another"]', b"\xff"):
        file.write_bytes(damaged)
        check()
        assert json.loads(file.read_bytes()) == ["???"]


def test_a_cache_that_cannot_be_written_is_no_error(grader, cache, caplog):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    grader.check_golds("data.train", Path("a.jsonl"), [["???"]])
    assert len(caplog.messages) == 1


def test_a_training_step_whose_gradings_all_fail_stops_the_run(make_trainer, caplog):
    class FailingGrader:
        failing = 12

        def grade(self, texts, answers) -> Grades:
            fine = len(texts) - 2 * self.failing
            correct = [True] * fine + [False] * 2 * self.failing
            return Grades(correct, failures=self.failing, timeouts=self.failing)

    grader = FailingGrader()
    trainer = make_trainer({}, grader)
    text = "grading failed on 12 and timed out on 12 of 24 rollouts"
    with pytest.raises(RunError, match=rf"^{text} \(reward.timeout = 5 s\)$"):
        trainer.step(1)
    grader.failing = 1
    trainer.step(1)
    text = "grading failed on 1 and timed out on 1 of 24 rollouts: counted as wrong"
    assert caplog.messages.count(text) == 1


def test_held_out_completions_that_cannot_be_graded_are_named(make_trainer, caplog):
    class FailingGrader:
        def grade(self, texts, answers) -> Grades:
            return Grades([True] + [False] * (len(texts) - 1), failures=1, timeouts=2)

    assert make_trainer({}, FailingGrader()).evaluate(1)["small"] == 1 / 8
    expected = "grading failed on 1 and timed out on 2 of 8 held-out completions: counted as wrong"
    assert expected in caplog.messages
