"""importance_weights: the ratio of trainer to engine, truncated or dropped."""

import math

import pytest
import torch

from codistill_kernels import importance_weights, policy_loss, reference

ENDS = torch.tensor([0, 4, 4, 11, 15, 30])  # sequence 1 is empty; the mask takes all of sequence 3


def make_case(seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    engine = -torch.rand(30, generator=generator, dtype=torch.float64) * 3
    mask = torch.rand(30, generator=generator) > 0.2
    mask[11:15] = False
    noise = torch.randn(30, generator=generator, dtype=torch.float64)
    return dict(trainer_logps=engine + 0.1 * noise, engine_logps=engine, mask=mask)


def test_by_hand():
    # ratios 2, 0.5, 1; of the sequence: 1
    trainer = torch.tensor([2.0, 0.5, 1.0]).log().requires_grad_()
    engine = torch.zeros(3)
    assert importance_weights(trainer, engine).tolist() == pytest.approx([2, 0.5, 1])
    truncated = importance_weights(trainer, engine, truncate=1.5)
    assert truncated.tolist() == pytest.approx([1.5, 0.5, 1])
    dropped = importance_weights(trainer, engine, drop=(0.6, 5.0))
    assert dropped.tolist() == pytest.approx([2, 0, 1])
    both = importance_weights(trainer, engine, truncate=1.5, drop=(0.6, 5.0))
    assert both.tolist() == pytest.approx([1.5, 0, 1])
    whole = importance_weights(trainer, engine, cu_seqlens=torch.tensor([0, 3]))
    assert whole.tolist() == pytest.approx([1, 1, 1])
    # without the masked token the ratio of the sequence is 2
    mask = torch.tensor([True, False, True])
    whole = importance_weights(trainer, engine, mask, cu_seqlens=torch.tensor([0, 3]))
    assert whole.tolist() == pytest.approx([2, 0, 2])
    assert whole.dtype == torch.float32 and not whole.requires_grad


@pytest.mark.parametrize("ends", [None, ENDS], ids=["tokens", "sequences"])
@pytest.mark.parametrize("drop", [None, (0.9, 1.12)], ids=["all", "band"])
@pytest.mark.parametrize("truncate", [None, 1.05])
def test_equals_reference(truncate, drop, ends):
    terms = make_case() | dict(truncate=truncate, drop=drop, cu_seqlens=ends)
    ours, gold = importance_weights(**terms), reference.importance_weights(**terms)
    torch.testing.assert_close(ours, gold, rtol=1e-12, atol=0)
    assert len(gold.unique()) > 2 and (gold[terms["mask"]] == 0).any() == (drop is not None)


def test_on_the_bound_of_the_band_a_token_stays():
    logps = torch.tensor([math.log(0.75), math.log(1.25)], dtype=torch.float64)
    zeros = torch.zeros_like(logps)
    assert importance_weights(logps, zeros, drop=(0.75, 1.25)).tolist() == [0.75, 1.25]
    inside = (0.75 + 1e-12, 1.25 - 1e-12)
    assert importance_weights(logps, zeros, drop=inside).tolist() == [0, 0]


def test_nan_stays_behind_the_mask_and_is_seen_elsewhere():
    case = make_case()
    terms = dict(truncate=2.0, drop=(0.5, 2.0), cu_seqlens=ENDS)
    clean = importance_weights(**case, **terms)
    case["engine_logps"][~case["mask"]] = torch.nan
    assert torch.equal(importance_weights(**case, **terms), clean)
    assert (clean[~case["mask"]] == 0).all()
    case["mask"] = None
    assert importance_weights(**case, truncate=2.0, drop=(0.5, 2.0))[11:15].isnan().all()


def test_ratio_that_overflows():
    logps, engine = torch.tensor([-1.0, -1.0]), torch.tensor([-100.0, -1.0])
    assert importance_weights(logps, engine).tolist() == [math.inf, 1]
    assert importance_weights(logps, engine, truncate=2.0).tolist() == [2, 1]
    weights = importance_weights(logps, engine, drop=(0.5, 2.0))
    assert weights.tolist() == [0, 1]
    advantages = torch.tensor([-1.0, 1.0])
    loss, _ = policy_loss(logps, engine, advantages, normalizer=1, importance_weights=weights)
    assert loss == -1  # the dropped token's own ratio overflows too


@pytest.mark.parametrize("ours", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("engine", [torch.float32, torch.float16, torch.float64])
def test_dtypes_mix_freely(engine, ours):
    trainer = torch.tensor([-1.0, -2.0], dtype=ours)
    out = importance_weights(trainer, torch.tensor([-1.5, -2.0], dtype=engine))
    assert out.dtype == (torch.float64 if ours == torch.float64 else torch.float32)
    assert out.tolist() == pytest.approx([math.exp(0.5), 1.0])


@pytest.mark.parametrize("ends", [[0], [0, 0]], ids=str)
def test_no_tokens(ends):
    empty = torch.zeros(0)
    terms = dict(truncate=2.0, drop=(0.5, 2.0), cu_seqlens=torch.tensor(ends))
    assert importance_weights(empty, empty, **terms).shape == (0,)


@pytest.mark.parametrize("ends", [None, ENDS], ids=["tokens", "sequences"])
def test_compiles_as_one_graph(ends):
    terms = dict(truncate=1.05, drop=(0.9, 1.12), cu_seqlens=ends)
    torch._dynamo.reset()
    compiled = torch.compile(importance_weights, fullgraph=True, backend="aot_eager")
    found = compiled(**make_case(), **terms)
    torch.testing.assert_close(found, importance_weights(**make_case(), **terms))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(trainer_logps=torch.zeros(3, 1, 1)), "trainer_logps"),
        (dict(trainer_logps=torch.zeros(3).long()), "trainer_logps"),
        (dict(engine_logps=torch.zeros(2)), "engine_logps"),
        (dict(trainer_logps=torch.zeros(3).numpy()), "trainer_logps"),
        (dict(engine_logps=torch.zeros(3).numpy()), "engine_logps"),
        (dict(engine_logps=torch.zeros(3, device="meta")), "engine_logps"),
        (dict(mask=torch.ones(3, dtype=torch.bool, device="meta")), "mask"),
        (dict(cu_seqlens=torch.tensor([0, 3], device="meta")), "cu_seqlens"),
        (dict(cu_seqlens=torch.tensor([0, 3]).short()), "cu_seqlens"),
        (dict(cu_seqlens=[0, 3]), "cu_seqlens"),
        (dict(mask=torch.zeros(3)), "mask"),
        (dict(truncate=0.0), "truncate"),
        (dict(truncate=math.nan), "truncate"),
        (dict(drop=(2.0, 0.5)), "drop"),
        (dict(drop=(-1.0, 0.5)), "drop"),
        (dict(cu_seqlens=torch.tensor([0, 2])), "cu_seqlens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, name):
    arguments = dict(trainer_logps=torch.zeros(3), engine_logps=torch.zeros(3))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        importance_weights(**arguments | change)
