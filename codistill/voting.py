"""Several completions of each problem: pass@k, and the answer that most of them give.

The grader's processes import this module; it imports no torch.
"""

import math
from collections.abc import Sequence

import numpy as np

from codistill.answers import answers_in, spelled
from codistill.grading import Grader

NO_ANSWER = -1


def sizes(count: int) -> list[int]:
    """Each k that `count` completions of a problem are summed up for: 5 -> 1, 2, 4, 5."""
    powers = [2**n for n in range(count.bit_length()) if 2**n <= count]
    return sorted({*powers, count})


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Probability that one of k completions is right, the mean over problems.

    1 - C(n - c, k) / C(n, k) for c right ones of n, which has no bias.

    correct: [P, n], bool. k: from 1 to n.
    Source: Chen et al. 2021 (arXiv:2107.03374), equation 1.
    """
    count = correct.shape[1]
    wrong = (count - correct.sum(axis=1)).tolist()
    missed = [math.comb(number, k) / math.comb(count, k) for number in wrong]
    return 1 - sum(missed) / len(missed)


def majority_at_k(groups: np.ndarray, correct: np.ndarray, k: int) -> float:
    """Share of problems whose most frequent answer among the first k completions is right.

    Of groups of one size the one that was seen first wins. A completion without an answer has no
    vote; where none has one, the problem is wrong.

    groups: [P, n], as `group` gives them; correct: [P, n], bool. k: from 1 to n.
    """
    right = 0
    for row, verdicts in zip(groups[:, :k].tolist(), correct[:, :k].tolist(), strict=True):
        votes = [number for number in row if number != NO_ANSWER]
        if votes:
            winner = max(dict.fromkeys(votes), key=votes.count)  # the first of those that tie
            right += verdicts[row.index(winner)]
    return right / len(groups)


def answer_of(text: str) -> str | None:
    """The answer of a completion, as text: the shortest of the passages that the grader would take
    for it, None if there is none."""
    found = answers_in(text)
    return spelled(found[-1]) or None if found else None


def find_answers(grader: Grader, texts: Sequence[str]) -> list[str | None]:
    """`answer_of` each text; None also where that fails or takes too long."""
    outcomes = grader.call(answer_of, [(text,) for text in texts])
    return [outcome if isinstance(outcome, str) else None for outcome in outcomes]


def group(
    grader: Grader, texts: Sequence[Sequence[str]], answers: Sequence[Sequence[str | None]]
) -> np.ndarray:
    """Put completions of a problem together whose answers are equal to the grader.

    A completion is in the first group whose first answer, taken as the gold one, makes it right,
    and else begins a group. Equal texts of answers are equal.

    texts, answers: [P][n], n completions of each problem, and the answer of each.

    Returns: [P, n], int64: a number for each group of a problem, from 0 as they are first seen;
        NO_ANSWER for a completion without an answer.
    """
    groups = np.full((len(texts), len(texts[0])), NO_ANSWER)
    firsts: list[list[str]] = [[] for _ in texts]  # the first answer of each group
    for column in range(groups.shape[1]):
        new = [answers[row][column] for row in range(len(texts))]
        asked = [
            (row, number)
            for row, answer in enumerate(new)
            if answer is not None and answer not in firsts[row]
            for number in range(len(firsts[row]))
        ]
        equal = grader.grade(
            [texts[row][column] for row, _ in asked],
            [(firsts[row][number],) for row, number in asked],
        ).correct
        matches: dict[int, int] = {}
        for (row, number), is_equal in zip(asked, equal, strict=True):
            if is_equal:
                matches.setdefault(row, number)
        for row, answer in enumerate(new):
            if answer is None:
                continue
            known = firsts[row]
            if answer in known:
                groups[row, column] = known.index(answer)
            elif row in matches:
                groups[row, column] = matches[row]
            else:
                groups[row, column] = len(known)
                known.append(answer)
    return groups
