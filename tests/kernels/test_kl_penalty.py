"""kl_penalty: Eq. 4 in the objective, and what its gradient knows of the reference."""

import math

import pytest
import torch
from numerics import seeded

from codistill_kernels import kl_penalty, reference

ENDS = torch.tensor([0, 4, 4, 11, 15, 30])  # sequence 1 is empty; the mask takes all of sequence 3


def make_case(seed: int = 1, dtype: torch.dtype = torch.float64) -> dict:
    generator = seeded(seed)
    logps = -torch.rand(30, generator=generator, dtype=torch.float64) * 3
    noise = torch.randn(30, generator=generator, dtype=torch.float64)
    mask = torch.rand(30, generator=generator) > 0.2
    mask[11:15] = False
    return dict(logps=logps.to(dtype), reference_logps=(logps + noise).to(dtype), mask=mask)


def test_by_hand():
    # pi = 1/2, 1/2; pi_ref = 1, 1/4: ratios 2 and 1/2
    logps = torch.tensor([0.5, 0.5]).log().requires_grad_()
    other = torch.tensor([1.0, 0.25]).log()
    loss, stats = kl_penalty(logps, other, normalizer=10.0)
    # Eq. 4: 2 - log 2 - 1 = 0.306853 and 0.5 + log 2 - 1 = 0.193147, together 0.5
    assert loss.item() == pytest.approx(0.05) and stats["kl"].item() == pytest.approx(0.25)
    # d/dlogp: 1 - ratio = -1 and 0.5
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx([-0.1, 0.05])
    loss, _ = kl_penalty(logps, other, normalizer=10.0, estimator="k2")
    # log(2)^2 / 2 twice; d/dlogp: minus the log-ratio
    assert loss.item() == pytest.approx(math.log(2) ** 2 / 10)
    gradient = torch.autograd.grad(loss, logps)[0]
    assert gradient.tolist() == pytest.approx([-math.log(2) / 10, math.log(2) / 10])


@pytest.mark.parametrize("ends", [None, ENDS], ids=["tokens", "sequences"])
def test_weights_of_tokens_and_of_sequences(ends):
    case = make_case()
    weights = torch.rand(30 if ends is None else 5, generator=seeded(2), dtype=torch.float64)
    terms = dict(normalizer=7.0, weights=weights, cu_seqlens=ends)
    grads = []
    for function in (kl_penalty, reference.kl_penalty):
        logps = case["logps"].clone().requires_grad_()
        loss = function(logps, case["reference_logps"], case["mask"], **terms)
        loss = loss[0] if isinstance(loss, tuple) else loss
        grads.append((loss.detach(), torch.autograd.grad(loss, logps)[0]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0)
    assert (grads[1][1] == 0).sum() == (~case["mask"]).sum()


def test_nan_stays_behind_the_mask():
    case = make_case()
    clean, _ = kl_penalty(**case, normalizer=1, weights=torch.ones(5), cu_seqlens=ENDS)
    logps = case["logps"].clone()
    logps[~case["mask"]] = case["reference_logps"][~case["mask"]] = torch.nan
    logps.requires_grad_()
    weights = torch.ones(5, dtype=torch.float64)
    weights[3] = torch.nan  # 1/|o| of a sequence without a token
    loss, stats = kl_penalty(
        logps, case["reference_logps"], case["mask"], normalizer=1, weights=weights, cu_seqlens=ENDS
    )
    assert torch.equal(loss, clean) and stats["kl"].isfinite()
    assert torch.autograd.grad(loss, logps)[0].isfinite().all()


@pytest.mark.parametrize("ours", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.float64])
def test_dtypes_mix_freely(other, ours):
    # pi_ref / pi = 1/2, with weight 1/2 and normalizer 4: (0.5 + log 2 - 1) / 8
    logps = torch.zeros(1, dtype=ours, requires_grad=True)
    reference_logps = torch.tensor([-math.log(2)], dtype=other)
    normalizer = torch.tensor(4, dtype=other if other != torch.float16 else torch.int64)
    terms = dict(weights=torch.tensor([0.5], dtype=other), normalizer=normalizer)
    loss, stats = kl_penalty(logps, reference_logps, **terms)
    computed = torch.float64 if ours == torch.float64 else torch.float32
    assert loss.dtype == stats["kl"].dtype == computed
    assert loss.item() == pytest.approx((math.log(2) - 0.5) / 8, rel=2e-3)
    assert torch.autograd.grad(loss, logps)[0].dtype == ours


def test_weight_0_adds_exactly_0():
    # k3 of d = 100 is inf in fp32: the definition has it times 0, or leaves it out, as here
    logps = torch.tensor([-100.0, 0.0], requires_grad=True)
    other = torch.tensor([0.0, -math.log(2)])
    loss, stats = kl_penalty(logps, other, normalizer=1.0, weights=torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx(math.log(2) - 0.5)
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx([0.0, 0.5])
    assert stats["kl"] == math.inf  # a statistic of all unmasked tokens


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("normalizer", [0, torch.tensor(0)], ids=["number", "tensor"])
def test_nothing_to_train_on_is_0(normalizer, backend):
    def step(logps):
        nothing = torch.zeros(3, dtype=torch.bool)
        return kl_penalty(logps, torch.ones(3), nothing, normalizer=normalizer)[0]

    torch._dynamo.reset()
    run = step if backend == "eager" else torch.compile(step, backend="aot_eager", fullgraph=True)
    logps = torch.zeros(3, requires_grad=True)
    loss = run(logps)
    assert loss.item() == 0 and torch.autograd.grad(loss, logps)[0].tolist() == [0, 0, 0]
    some, _ = kl_penalty(logps, torch.ones(3), normalizer=normalizer)
    assert some == math.inf  # as the formula has it, in sight


def test_without_a_token():
    loss, stats = kl_penalty(torch.zeros(0, requires_grad=True), torch.zeros(0), normalizer=1)
    assert (loss.item(), stats["kl"].item(), stats["tokens"].item()) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "k1"}, "estimator must be one of k2, k3, abs .the gradient of k1"),
        ({"normalizer": -1}, "normalizer must be >= 0"),
        ({"normalizer": "1"}, "normalizer must be a number or a torch.Tensor, got str"),
        ({"reference_logps": torch.zeros(30).numpy()}, "reference_logps must be a torch.Tensor"),
        ({"reference_logps": torch.zeros(30, device="meta")}, "reference_logps must be on cpu"),
        ({"weights": 1.0}, "weights must be a torch.Tensor, got builtins.float"),
        ({"weights": torch.ones(30, device="meta")}, "weights must be on cpu"),
        ({"mask": torch.ones(30, dtype=torch.bool, device="meta")}, "mask must be on cpu"),
        ({"cu_seqlens": ENDS.short()}, "cu_seqlens must be .* int32 or int64"),
        ({"reference_logps": torch.zeros(3)}, "reference_logps must be"),
        ({"weights": torch.ones(5)}, "weights must be"),
        ({"mask": torch.ones(30)}, "mask must be bool"),
        ({"logps": torch.zeros(30, dtype=torch.long)}, "logps must be float32"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        kl_penalty(**make_case() | {"normalizer": 1.0} | change)
