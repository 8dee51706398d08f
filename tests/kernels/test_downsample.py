"""Section 3.3, which rollouts are kept: by hand, and each method against its definition."""

import math
import sys
from itertools import combinations

import pytest
import torch
from numerics import seeded
from torch._dynamo.testing import CompileCounterWithBackend

from codistill_kernels import downsample, reference
from codistill_kernels.rewards import METHODS, Method

RANKED = [name for name, method in METHODS.items() if not method.is_random]
SHAPES = {  # groups, M
    "no groups": (0, 6),
    "groups of one": (5, 1),
    "pairs": (3, 2),
    "Table 3": (20, 14),
    "one group": (1, 33),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_by_hand():
    # group 0: best are 1 (0.9) and 4 (0.7), worst 2 (0.0) and 5 (0.1); group 1 starts at 6
    scores = torch.tensor([0.5, 0.9, 0.0, 0.4, 0.7, 0.1] + [3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    assert downsample(scores, 6, 4).tolist() == [1, 2, 4, 5, 6 + 1, 6 + 2, 6 + 3, 6 + 4]
    assert downsample(scores, 6, 2).tolist() == [1, 2, 6 + 1, 6 + 3]
    assert downsample(scores, 6, 6).tolist() == list(range(12))


def test_breaks_ties_by_place():
    assert downsample(torch.zeros(5), 5, 4).tolist() == [0, 1, 3, 4]
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert downsample(scores, 6, 2).tolist() == [0, 5]


def test_top_by_hand():
    scores = torch.tensor([0.5, 0.9, 0.0, 0.4, 0.9, 0.1] + [3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    assert downsample(scores, 6, 3, method="top").tolist() == [0, 1, 4, 6 + 3, 6 + 4, 6 + 5]
    assert downsample(scores, 6, 1, method="top").tolist() == [1, 6 + 3]  # the first of the 0.9


def test_max_variance_by_hand():
    # one failure among six: two successes (k = 2, the first) and the failure
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    assert downsample(scores, 6, 3, method="max_variance").tolist() == [0, 1, 3]
    # three of 10, 9, 8, 0: variance 20.2 for {10, 9, 0} (k = 2), 18.7 for {10, 8, 0}
    # (k = 1), 16.2 for {9, 8, 0} (k = 0) and 0.7 for {10, 9, 8} (k = 3)
    scores = torch.tensor([8.0, 0.0, 10.0, 9.0])
    assert downsample(scores, 4, 2, method="max_variance").tolist() == [1, 2]
    assert downsample(scores, 4, 3, method="max_variance").tolist() == [1, 2, 3]
    # one row has no variance, nor have equal scores: the largest k, so the first rows
    assert downsample(scores, 4, 1, method="max_variance").tolist() == [2]
    assert downsample(torch.ones(5), 5, 3, method="max_variance").tolist() == [0, 1, 2]


@pytest.mark.parametrize("offset", [0.0, 1e6], ids=["", "far from 0"])
def test_max_variance_finds_the_best_of_all_subsets(offset):
    generator = torch.Generator().manual_seed(0)
    groups = torch.rand(40, 7, generator=generator, dtype=torch.float64) ** 3 + offset
    for keep in range(1, 8):
        rows = downsample(groups.reshape(-1), 7, keep, method="max_variance").view(40, keep)
        found = groups.view(-1)[rows].var(dim=1, correction=0)
        subsets = torch.tensor(list(combinations(range(7), keep)))
        best = groups[:, subsets].var(dim=2, correction=0).max(dim=1).values
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-12)


def test_at_random():
    scores = torch.zeros(400 * 6)
    rows = downsample(scores, 6, 3, method="random", seed=5)
    assert torch.equal(rows, downsample(scores - 1, 6, 3, method="random", seed=5))
    assert not torch.equal(rows, downsample(scores, 6, 3, method="random", seed=6))
    within = rows.view(400, 3) - torch.arange(400)[:, None] * 6
    assert len(within.unique(dim=0)) == 20  # all subsets of 3 of 6 come: groups differ
    # each row is kept in half of the groups, within 5 deviations of 200
    assert (within.flatten().bincount() - 200).abs().max() < 5 * 10


# --- the table ---------------------------------------------------------------------------------


def check_method(name: str, groups: int, size: int, dtype: torch.dtype = torch.float32) -> None:
    """For every keep, scores that are all different and scores with ties."""
    method, generator = METHODS[name], seeded(0)
    different = torch.randn(groups * size, generator=generator).to(dtype)
    ties = torch.randint(0, 4, (groups * size,), generator=generator).to(dtype)
    options = dict(method=name, seed=3 if method.is_random else None)
    for keep in range(method.divisor, size + 1, method.divisor):
        for scores in (different, ties):
            rows = downsample(scores, size, keep, **options)
            gold = reference.downsample(scores, size, keep, **options)
            assert torch.equal(rows, gold), f"{name}: rows {rows}, by definition {gold}"
            kept = rows.view(groups, keep)
            assert (kept.diff(dim=1) > 0).all()
            assert (kept // size == torch.arange(groups)[:, None]).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_equals_reference(name, dtype, shape):
    check_method(name, *shape, dtype)


def test_each_has_a_definition():
    assert METHODS.keys() == reference.SPLITS.keys()


WRONG = {
    "one fewer of the highest": lambda right: lambda falling, keep: right(falling, keep) - 1,
    "the lowest": lambda right: lambda falling, keep: 0,
}


@pytest.mark.parametrize("break_", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_split_is_found(name, break_, monkeypatch):
    entry = METHODS[name]
    monkeypatch.setitem(METHODS, name, entry._replace(highest=break_(entry.highest)))
    with pytest.raises(AssertionError, match="by definition"):
        check_method(name, *SHAPES["Table 3"])


def test_an_entry_without_a_definition_is_found(monkeypatch):
    monkeypatch.setitem(METHODS, "bottom", Method(lambda falling, keep: 0))
    assert downsample(torch.tensor([2.0, 1.0, 3.0]), 3, 2, method="bottom").tolist() == [0, 1]
    with pytest.raises(KeyError, match="bottom"):
        check_method("bottom", *SHAPES["pairs"])


@pytest.mark.parametrize("name", RANKED)
def test_in_one_graph_for_all_lengths(name):
    def call(scores):
        return downsample(scores, 6, 2, method=name)

    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for groups in range(2, 12):
        scores = torch.arange(6 * groups).roll(5).float()
        assert torch.equal(compiled(scores), call(scores))
    assert count.frame_count <= 2


@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
def test_unseen_scores_that_are_not_finite_keep_the_highest(bad, monkeypatch):
    # As on a GPU, where values are not looked at.
    monkeypatch.setattr(sys.modules["codistill_kernels.rewards"], "can_look", lambda _: False)
    scores = torch.tensor([1.0, bad, 3.0, 2.0])
    highest = downsample(scores, 4, 2, method="top")
    assert torch.equal(downsample(scores, 4, 2, method="max_variance"), highest)


INFINITE = torch.tensor([1.0, math.inf])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: downsample(torch.zeros(4), 4, 3), "keep"),
        (lambda: downsample(torch.zeros(4), 4, 6), "keep"),
        (lambda: downsample(torch.tensor([1.0, torch.nan]), 2, 2), "scores"),
        (lambda: downsample(torch.zeros(4), 4, 0, method="top"), "keep"),
        (lambda: downsample(torch.zeros(4), 4, 5, method="max_variance"), "keep"),
        (lambda: downsample(torch.zeros(4), 4, 2, method="best"), "method"),
        (lambda: downsample(torch.zeros(4), 4, 2, method="random"), "seed"),
        (lambda: downsample(torch.zeros(4), 4, 2, method="random", seed=-1), "seed"),
        (lambda: downsample(INFINITE, 2, 1, method="max_variance"), "scores"),
        (lambda: downsample(-INFINITE, 2, 1, method="max_variance"), "scores"),
        (lambda: downsample(torch.zeros(4).numpy(), 4, 2), "scores"),
        (lambda: downsample(torch.zeros(4), 4, 2, seed=3), "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        call()
