"""linear_reverse_kl: two models' softmaxes from one pass, and the exact KD reward made of it."""

import math

import pytest
import torch
from numerics import BACKENDS, DTYPES, assert_as_accurate_as_eager, seeded

from codistill_kernels import kd_rewards, linear_reverse_kl, reference


def make_heads(dtype=torch.float32, *, rows=70, hidden=(24, 40), vocab=(1021, 1100), std=2.0):
    """(hidden states, weight) of a student and a teacher that differ in both sizes."""
    generator = seeded(0)
    return tuple(
        (
            torch.randn(rows, h, generator=generator).to(dtype),
            (std * torch.randn(v, h, generator=generator) / h**0.5).to(dtype),
        )
        for h, v in zip(hidden, vocab, strict=True)
    )


def as_dtype(heads, dtype):
    return tuple(tuple(tensor.to(dtype) for tensor in head) for head in heads)


def check(student, teacher, backend, **options):
    ours = linear_reverse_kl(student, teacher, backend=backend, **options)
    eager, gold = (
        reference.linear_reverse_kl(*as_dtype((student, teacher), dtype), **options)
        for dtype in (torch.float32, torch.float64)
    )
    assert ours.dtype == torch.float32
    # One row per token: each is judged by itself, by the worst of eager's.
    error, base = ((x.double() - gold).abs() / (gold + 1e-3) for x in (ours, eager))
    assert error.max() <= 2 * base.max() + 1e-6
    assert_as_accurate_as_eager("kl", ours, eager, gold)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (dict(), dict()),
        (dict(std=8.0), dict(vocab_size=999, temperature=0.7)),
        (dict(rows=1, hidden=(63, 896), vocab=(7, 5)), dict()),
        (dict(rows=5, hidden=(8, 8), vocab=(40000, 40000)), dict()),
        (dict(std=4.0), dict(logit_scale=0.5, softcap=4.0)),
        (dict(), dict(logit_scale=(2.0, 0.3), softcap=(None, 3.0), temperature=0.7)),
    ],
    ids=["sizes differ", "|z| to 60, cut", "one row", "large V", "scaled", "scaled apart"],
)
def test_equals_fp64_as_well_as_eager(shapes, options, dtype, backend):
    check(*make_heads(dtype, **shapes), backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = log 2 - log 3 / 2, and the other way round."""
    one = torch.ones(1, 1)
    even = (one, torch.zeros(2, 1))
    uneven = (one, torch.tensor([[0.0], [math.log(3)]]))
    forward = math.log(2) - math.log(3) / 2
    backward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert linear_reverse_kl(even, uneven, backend=backend).item() == pytest.approx(forward)
    assert linear_reverse_kl(uneven, even, backend=backend).item() == pytest.approx(backward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_and_equal_models(backend):
    """Where both are sure of one token, its digits count; a model is not apart from itself."""
    eye = 23.0 * torch.eye(8, 1021)
    identity = torch.eye(1021)
    check((eye, identity), (eye * 0.95, identity), backend)
    student, _ = make_heads()
    assert linear_reverse_kl(student, student, backend=backend).max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_are_zero_and_temperatures_are_per_token(backend):
    student, teacher = make_heads(rows=6)
    mask = torch.tensor([True, False, True, True, False, True])
    temperature = torch.linspace(0.5, 1.5, 6)
    expected = linear_reverse_kl(student, teacher, temperature=temperature, backend=backend)
    student[0][1], teacher[0][4] = torch.nan, torch.inf
    found = linear_reverse_kl(student, teacher, mask, temperature=temperature, backend=backend)
    assert torch.equal(found, torch.where(mask, expected, 0.0))
    alone = linear_reverse_kl(
        (student[0][2:3], student[1]),
        (teacher[0][2:3], teacher[1]),
        temperature=temperature[2].item(),
        backend=backend,
    )
    torch.testing.assert_close(alone[0], expected[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_kd_reward(backend):
    student, teacher = make_heads(rows=9)
    ends = torch.tensor([0, 4, 4, 9])
    rewards = torch.tensor([1.0, 0.0, 0.5])
    terms = dict(alpha=0.7, max_completion_tokens=16, estimator="exact", temperature=0.9)
    found = kd_rewards(
        rewards, None, None, ends, student=student, teacher=teacher, backend=backend, **terms
    )
    heads = dict(
        zip(("student", "teacher"), as_dtype((student, teacher), torch.float64), strict=True)
    )
    expected = reference.kd_rewards(rewards.double(), None, None, ends, **heads, **terms)
    torch.testing.assert_close(found, expected.float())
    assert found[1] == 0 and (found[[0, 2]] < rewards[[0, 2]]).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="of the C++ backend")
def test_row_does_not_depend_on_other_rows_or_threads():
    (hidden_s, weight_s), (hidden_t, weight_t) = make_heads(rows=130, vocab=(5003, 5003))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear_reverse_kl((hidden_s, weight_s), (hidden_t, weight_t)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    rows = torch.tensor([129, 3, 64])
    subset = linear_reverse_kl((hidden_s[rows], weight_s), (hidden_t[rows], weight_t))
    assert torch.equal(results[0][rows], subset)


@pytest.mark.parametrize("backend", BACKENDS)
def test_op_passes_opcheck_and_compiles(backend):
    (hidden_s, weight_s), (hidden_t, weight_t) = make_heads(rows=5, vocab=(30, 30))
    models = (hidden_s, weight_s, torch.ones(5), 0.0, hidden_t, weight_t, torch.ones(5), 2.0)
    arguments = (*models, backend)
    torch.library.opcheck(torch.ops.codistill.reverse_kl, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(linear_reverse_kl, fullgraph=True, backend="aot_eager")
    heads = ((hidden_s, weight_s), (hidden_t, weight_t))
    assert torch.equal(
        compiled(*heads, backend=backend), linear_reverse_kl(*heads, backend=backend)
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(student=(torch.zeros(4, 3), torch.zeros(9, 4))), "student"),
        (dict(teacher=(torch.zeros(3, 5), torch.zeros(9, 5))), "teacher"),
        (dict(teacher=(torch.zeros(4, 5).long(), torch.zeros(9, 5))), "teacher"),
        (dict(mask=torch.ones(3).bool()), "mask"),
        (dict(vocab_size=9), "vocab_size"),
        (dict(temperature=0.0), "temperature"),
        (dict(backend="gpu"), "backend"),
        (dict(softcap=(None, 0.0)), "softcap"),
        (dict(softcap=(None,)), "softcap"),
        (dict(logit_scale=(1.0, -1.0)), "logit_scale"),
        (dict(student=(torch.zeros(4, 3), torch.zeros(8, 3), None)), "student"),
        (dict(teacher=(torch.zeros(4, 3), None)), "teacher"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, name):
    arguments = dict(
        student=(torch.zeros(4, 3), torch.zeros(8, 3)),
        teacher=(torch.zeros(4, 5), torch.zeros(9, 5)),
    )
    with pytest.raises(ValueError, match=f"^{name} must be"):
        linear_reverse_kl(**arguments | change)
