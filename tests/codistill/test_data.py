"""Problems, batches and rewards of text."""

import pytest
import torch

from codistill.batching import TokenBatch
from codistill.data import draw
from codistill.rewards import Grader, format_reward, is_correct
from codistill.rollout import cut_at_end, prompt_seeds


def test_every_epoch_draws_every_problem_once():
    drawn = [int(i) for step in range(6) for i in draw(9, 3, step, seed=4)]
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == list(range(9))
    assert drawn[:9] != drawn[9:]


def test_draw_is_a_function_of_its_arguments_across_the_border_of_epochs():
    whole = [int(i) for step in range(10) for i in draw(7, 5, step, seed=0)]
    assert [int(i) for i in draw(7, 5, 6, seed=0)] == whole[30:35]
    assert all(sorted(whole[e * 7 : e * 7 + 7]) == list(range(7)) for e in range(7))
    assert len(draw(2, 7, 0, seed=0)) == 7  # more prompts a step than problems


def test_seeds_depend_on_the_problem_not_on_its_place():
    seeds = prompt_seeds(1, 5, [3, 8])
    assert prompt_seeds(1, 5, [8]) == seeds[1:]
    assert len({*seeds, *prompt_seeds(1, 6, [3, 8]), *prompt_seeds(2, 5, [3, 8])}) == 6


def test_batch_by_hand():
    # prompts [5 6] and [7], completions [8 1] and [9 8 1]; T = 4
    batch = TokenBatch.build([[5, 6], [7]], [[8, 1], [9, 8, 1]], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 8, 1], [7, 9, 8, 1]]
    assert batch.token_ids.tolist() == [8, 1, 9, 8, 1]
    # the position before each token, in the flattened 2 x 4
    assert batch.positions.tolist() == [1, 2, 4, 5, 6]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    assert [part.tolist() for part in batch.split(torch.arange(5))] == [[0, 1], [2, 3, 4]]


def test_mask_comes_from_lengths_even_where_padding_is_a_token():
    batch = TokenBatch.build([[0]], [[0, 0]], torch.device("cpu"))
    assert batch.attention_mask.tolist() == [[1, 1, 1]]
    batch = TokenBatch.build([[3], [3]], [[1], [0, 1]], torch.device("cpu"))
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([4, 1, 1, 5], ([4, 1], False)), ([4, 5], ([4, 5], True)), ([2], ([2], False))],
    ids=["end", "truncated", "other end"],
)
def test_completion_ends_with_its_first_end_token(tokens, expected):
    assert cut_at_end(tokens, (1, 2)) == expected


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


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        ("<think>1</think><answer>102</answer>", "102", True),
        ("<answer>102</answer><answer>103</answer>", "102", False),
        ("<think>102</think><answer>103</answer>", "102", False),
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", True),
        ("<answer>\\frac{1}{2}</answer>", "\\frac{2}{4}", True),
        ("<answer></answer>", "102", False),
        ("", "102", False),
        ("<answer>x+1</answer>", "1+x", True),
    ],
)
def test_answers_are_compared_as_mathematics(text, answer, correct):
    assert is_correct(text, answer) is correct


def test_grader_counts_what_it_could_not_grade():
    texts = ["<answer>3</answer>", "<answer>3</answer>", "<answer>3</answer>"]
    with Grader(timeout=20) as grader:
        grades = grader.grade(texts, ["3", "4", ""])  # "" is no gold answer
    assert (grades.correct, grades.failures, grades.timeouts) == ([True, False, False], 1, 0)


def test_grader_outlives_a_completion_that_hangs(monkeypatch):
    import time

    from codistill import rewards

    with Grader(timeout=0.5) as grader:
        monkeypatch.setattr(rewards, "is_correct", time.sleep)
        monkeypatch.setattr(rewards, "zip", lambda *_, strict: [(60,), (0,)], raising=False)
        grades = grader.grade(["", ""], ["", ""])
        monkeypatch.undo()
        assert grades.timeouts == 1
        # A start of a process takes longer than half a second: give the replacement its time.
        grader.timeout = 20
        assert grader.grade(["<answer>3</answer>"], ["3"]).correct == [True]
