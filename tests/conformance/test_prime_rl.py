"""prime-rl's cases: its output layer, and the losses of its trainer."""

from types import SimpleNamespace

import pytest
import torch
from peers import log_softmax_head, prime_rl_loss

from codistill_kernels import linear_token_loss
from codistill_kernels.integrations import prime_rl
from codistill_kernels.integrations.prime_rl import FusedOutputLinear


def make_case(b=2, s=4, h=8, v=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*size, generator=generator) for size in ((b, s, h), (v, h)))
    labels = torch.randint(0, v, (b, s), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels, 0.5 + torch.rand(b, s, generator=generator)


def make_head(weight, softcap=None, frozen=False):
    head = FusedOutputLinear(weight.shape[1], weight.shape[0], chunk_size=3, softcap=softcap)
    head.weight = torch.nn.Parameter(weight.clone(), requires_grad=not frozen)
    return head


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_full_logits(softcap, frozen):
    hidden, weight, labels, temperature = make_case()
    head, x = make_head(weight, softcap, frozen), hidden.clone().requires_grad_()
    out = head(x, labels, temperature=temperature)
    assert set(out) == {"logprobs", "entropy"}
    out["logprobs"].sum().backward()
    y, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps, entropy = log_softmax_head(y, w, labels, temperature=temperature, softcap=softcap)
    logps.sum().backward()
    tolerance = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(out["logprobs"], logps, **tolerance)
    torch.testing.assert_close(out["entropy"], entropy, **tolerance)
    torch.testing.assert_close(x.grad, y.grad, **tolerance)
    if frozen:
        assert head.weight.grad is None
    else:
        torch.testing.assert_close(head.weight.grad, w.grad, **tolerance)


def test_half_precision():
    hidden, weight, labels, temperature = make_case(dtype=torch.float16)
    out = make_head(weight)(hidden, labels, temperature)
    expected = log_softmax_head(hidden, weight, labels, temperature=temperature)
    for got, other in zip((out["logprobs"], out["entropy"]), expected, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("missing", ["labels", "temperature"])
def test_what_is_needed(missing):
    hidden, weight, labels, temperature = make_case()
    arguments = dict(labels=labels, temperature=temperature) | {missing: None}
    with pytest.raises(ValueError, match=f"{missing} must be given"):
        make_head(weight)(hidden, **arguments)


def test_shifted_labels_agree_with_the_engine():
    """Log-probabilities of the next token, shifted by one, are those of each token given the tokens
    before it, as an engine returns them: the ratio of the two is 1."""
    hidden, weight, ids, _ = make_case(b=2, s=16, h=32, v=50)
    temperature = torch.full((2, 16), 1.5)
    labels = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], dim=1)
    logprobs = make_head(weight)(hidden, labels, temperature)["logprobs"]
    engine = (hidden @ weight.T / 1.5).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(logprobs[:, :-1], engine.squeeze(-1), rtol=0, atol=1e-4)


def loss_case(seed):
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(40, generator=generator, dtype=torch.float64)
    old = logps + 0.5 * torch.randn(40, generator=generator, dtype=torch.float64)
    advantages = torch.randn(40, generator=generator, dtype=torch.float64)
    advantages[3] = 0.0
    mask = torch.rand(40, generator=generator) > 0.3
    return logps, old, advantages, mask, torch.rand(40, generator=generator, dtype=torch.float64)


CONFIG = SimpleNamespace(
    dppo_mask_low=0.1, dppo_mask_high=0.15, ipo_threshold=0.15, adv_tau=0.9, kl_tau=0.01
)
TERMS: dict = dict(low=0.1, high=0.15, tau=0.9, kl_tau=0.01)


@pytest.mark.parametrize("name", ["default_loss_fn", "ipo_loss_fn"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_loss(name, weighted, seed):
    logps, old, advantages, mask, weights = loss_case(seed)
    results = []
    for ours in (True, False):
        leaf = logps.clone().requires_grad_()
        if ours:
            inputs = SimpleNamespace(
                trainer_logprobs=leaf,
                inference_logprobs=torch.where(mask, old, torch.nan),
                advantages=advantages,
                loss_mask=mask,
                loss_weights=weights if weighted else None,
            )
            loss, metrics = getattr(prime_rl, name)(inputs, CONFIG)
            assert ("is_masked_low" in metrics) == (name == "default_loss_fn")
        else:
            factors = weights if weighted else torch.ones_like(weights)
            terms = TERMS | dict(both_ways=name == "ipo_loss_fn")
            loss = prime_rl_loss(leaf, old, advantages, mask, factors, **terms)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_metrics():
    logps, old, advantages, mask, _ = loss_case(0)
    inputs = SimpleNamespace(
        trainer_logprobs=logps,
        inference_logprobs=old,
        advantages=advantages,
        loss_mask=mask,
        loss_weights=None,
    )
    metrics = prime_rl.default_loss_fn(inputs, CONFIG).metrics
    moved = logps.exp() - old.exp()
    high = (moved > 0.15) & (advantages > 0)
    low = (moved < -0.1) & (advantages < 0)
    masked = high | (moved < -0.1) & (advantages <= 0)
    kl = (logps - old).expm1() - (logps - old)
    expected = {
        "is_masked": masked[mask].double().mean(),
        "is_masked_low": low[mask].double().mean(),
        "is_masked_high": high[mask].double().mean(),
        "masked_mismatch_kl": kl[mask & masked].mean(),
        "unmasked_mismatch_kl": kl[mask & ~masked].mean(),
        "masked_advantage_positive": (advantages > 0)[mask & masked].double().mean(),
        "masked_advantage_negative": (advantages < 0)[mask & masked].double().mean(),
    }
    assert set(metrics) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key].double(), value, rtol=1e-6, atol=1e-7, msg=key)


def test_loss_from_hidden_states_in_one_pass():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator) for size in ((40, 8), (37, 8)))
    ids = torch.randint(0, 37, (40,), generator=generator)
    with torch.no_grad():
        exact = log_softmax_head(x, weight, ids)[0]
    _, old, advantages, mask, _ = loss_case(0)
    old = (exact + 0.5 * torch.sin(torch.arange(40.0))).clamp(max=-0.01)
    advantages = advantages.float()

    def fn(logps, entropy, rows):
        terms = (logps, old[rows], advantages[rows])
        masked = prime_rl.outside_trust(*terms, mask_low=0.1, mask_high=0.15)
        return prime_rl.dppo_token_losses(*terms, masked, adv_tau=0.9, kl_tau=0.01)

    results = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        if ours:
            loss, _ = linear_token_loss(*leaves, ids, fn, mask)
        else:
            logps = log_softmax_head(*leaves, ids)[0]
            ones = torch.ones(40)
            loss = prime_rl_loss(logps, old, advantages, mask, ones, **TERMS, both_ways=False)
        loss.backward()
        results.append((loss.detach(), *(t.grad for t in leaves)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)
