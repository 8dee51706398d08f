"""The study's problems: arithmetic, sets that do not meet, and from text by tokens to a grade."""

import json
import random
import re

import pytest

from codistill.comparing import is_correct
from codistill.grading import format_reward
from study import problems
from study.problems import HELD_OUT, TRAINING, Problem, held_out, make_problem, make_problems

COMPUTED = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
KINDS = {f"training {n}": kind for n, kind in enumerate(TRAINING)} | HELD_OUT


def steps_of(problem: Problem) -> list[tuple[int, str, int, int]]:
    """Left side, sign, right side and result of every step of the solution."""
    body = re.fullmatch(r"<think>(.*)</think><answer>\d+</answer>", problem.solution)[1]
    lines = [re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line) for line in body.split(";")]
    return [(int(line[1]), line[2], int(line[3]), int(line[4])) for line in lines]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_solutions_are_right(kind):
    rng = random.Random(0)
    for _ in range(200):
        problem = make_problem(rng, kind)
        steps = steps_of(problem)
        total = int(re.match(r"\w+ has (\d+) ", problem.text)[1])
        for left, sign, right, result in steps:
            assert left == total and COMPUTED[sign](left, right) == result
            assert 0 < result <= problems.MAX_NUMBER
            total = result
        assert problem.answer == str(total) and f"<answer>{total}</answer>" in problem.solution
        assert len(steps) in kind.steps
        assert any(sign == "*" for _, sign, _, _ in steps) == kind.products


def test_text_and_solution_tell_the_same_story():
    rng = random.Random(1)
    signs = dict.fromkeys(problems.GAINS, "+") | dict.fromkeys(problems.LOSSES, "-")
    words = {word: ("*", factor) for factor, word in problems.GROWTH.items()}
    for _ in range(200):
        problem = make_problem(rng, rng.choice(list(KINDS.values())))
        told = []
        for verb, number in re.findall(r"Then (\w+)(?: (\d+))?\.", problem.text):
            told.append(words[verb] if verb in words else (signs[verb], int(number)))
        assert told == [(sign, right) for _, sign, right, _ in steps_of(problem)]


def test_held_out_sets_share_nothing_with_training():
    sets = held_out()
    texts = [problem.text for members in sets.values() for problem in members]
    assert {len(members) for members in sets.values()} == {problems.HELD_OUT_PROBLEMS}
    banned = problems.held_out_texts()
    assert len(set(texts)) == len(texts) and banned == set(texts)
    training = {p.text for p in make_problems(3000, 2, TRAINING, banned)}
    assert len(training) == 3000 and not training & banned
    # A problem that was drawn and is banned is replaced, not kept.
    drawn = make_problems(20, 2, TRAINING)
    again = make_problems(20, 2, TRAINING, frozenset(p.text for p in drawn[:5]))
    assert len(again) == 20 and not {p.text for p in again} & {p.text for p in drawn[:5]}


def test_held_out_sets_do_not_change():
    assert held_out() == held_out()


def test_text_through_tokens_to_a_grade():
    tokenizer = problems.make_tokenizer()
    for members in held_out().values():
        for problem in members[:10]:
            ids = tokenizer.encode(problem.text)
            assert tokenizer.decode(ids) == problem.text.replace(" ", "")
            text = tokenizer.decode(tokenizer.encode(problem.solution))
            assert text == problem.solution and format_reward(text) == 1
            assert is_correct(text, [problem.answer])
            assert not is_correct(text, [str(int(problem.answer) + 1)])
    assert tokenizer.unk_token is None and max(ids) < len(tokenizer)


def test_written_rows(tmp_path):
    problem = Problem("Ann has 1 pens. How many?", "1", "")
    problems.write([problem, problem], tmp_path / "new" / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    assert rows == [{"problem": problem.text, "answer": "1"}] * 2
