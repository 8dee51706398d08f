"""verl's cases: its fused head, with fewer tokens, and its registered policy losses."""

from types import SimpleNamespace

import pytest
import torch
from peers import log_softmax_head, verl_loss

from codistill_kernels.integrations import verl

# Hidden size and vocabulary.
SMALL = [(128, 4099), (896, 8192)]
FULL = [(2048, 32256), (4096, 102400), (896, 151936), (3584, 152064)]


def head_case(hidden, vocab, tokens):
    generator = torch.Generator().manual_seed(0)

    def uniform(*size):
        return (torch.rand(*size, generator=generator) - 0.5).bfloat16()

    labels = torch.randint(0, vocab, (1, tokens), generator=generator)
    upstream = (2 * uniform(tokens).float(), uniform(tokens).float())
    return uniform(1, tokens, hidden), uniform(vocab, hidden), labels, upstream


def check_head(hidden, vocab, tokens):
    """Compared with fp32 logits, with verl's tolerances and the temperature of its suite."""
    x, weight, labels, upstream = head_case(hidden, vocab, tokens)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    outputs = verl.linear_cross_entropy(*leaves, labels, 1.5)
    torch.autograd.backward(outputs, upstream)
    plain = [t.float().requires_grad_() for t in (x, weight)]
    expected = log_softmax_head(plain[0].flatten(0, 1), plain[1], labels.flatten(), temperature=1.5)
    torch.autograd.backward(expected, upstream)
    for got, other, atol, rtol in zip(outputs, expected, (1e-3, 5e-3), (2e-4, 5e-4), strict=True):
        assert got.shape == (tokens,) and got.dtype == torch.float32
        torch.testing.assert_close(got, other, atol=atol, rtol=rtol)
    for leaf, other in zip(leaves, plain, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        torch.testing.assert_close(leaf.grad.float(), other.grad, atol=2e-2, rtol=4e-2)


@pytest.mark.parametrize(("hidden", "vocab"), SMALL)
def test_head(hidden, vocab):
    check_head(hidden, vocab, tokens=193)


@pytest.mark.long
@pytest.mark.parametrize(("hidden", "vocab"), FULL)
def test_head_at_full_vocabulary(hidden, vocab):
    check_head(hidden, vocab, tokens=128)


@pytest.mark.parametrize("vocab", [152064, 149 * 1024])
def test_nothing_beyond_the_vocabulary_counts(vocab):
    """One logit is 3, all others are -15: a row too many changes the fourth digit."""
    x, weight = torch.zeros(1, 8, 16).bfloat16(), torch.zeros(vocab, 16).bfloat16()
    x[..., 0], weight[:, 0], weight[0, 0] = 1.0, -15 * 1.5, 3 * 1.5
    labels = torch.zeros(1, 8, dtype=torch.int64)
    got = verl.linear_cross_entropy(x, weight, labels, 1.5)
    expected = log_softmax_head(
        x.float().flatten(0, 1), weight.float(), labels.flatten(), temperature=1.5
    )
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)


# --- policy losses -----------------------------------------------------------------------------

B, T = 5, 11
LOW, HIGH, FAR, BETA, TAUS = 0.15, 0.28, 1.8, 0.3, (1.0, 1.05)
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


class ActorConfig(SimpleNamespace):
    """The fields of verl's ActorConfig that the losses read."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def defaults(**info):
    """Bounds of 0.2, and no clip_ratio_c, so that each loss takes verl's default."""
    return ActorConfig(
        clip_ratio=0.2,
        clip_ratio_low=None,
        clip_ratio_high=None,
        tau_pos=1.0,
        tau_neg=1.05,
        policy_loss=SimpleNamespace(dro_beta=BETA),
        global_batch_info=info,
    )


def loss_case(per_token: bool, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    logps = -0.01 - normal(B, T).abs()
    old = (logps + 0.4 * normal(B, T)).clamp(max=-0.01)
    mask = torch.rand(B, T, generator=generator) > 0.3
    mask[0], mask[-1] = True, False
    advantages = normal(B, T if per_token else 1).expand(B, T) * mask
    weights = 0.5 + torch.rand(B, T, generator=generator, dtype=torch.float64)
    return logps, old, advantages, mask, weights


def run(function, logps):
    leaf = logps.clone().requires_grad_()
    result = function(leaf)
    loss = result[0] if isinstance(result, tuple) else result
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("name", verl.NAMES)
@pytest.mark.parametrize("mode", [*MODES, "seq-mean-token-mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("copies", [1, 2])
def test_policy_loss(name, mode, weighted, copies):
    """In fp64, up to the rounding of the factors 1/L, which are fp32."""
    case = loss_case(per_token=name != "geo_mean")
    logps, old, advantages, mask, weights = case
    counts = dict(batch_num_tokens=50, global_batch_size=7) if copies == 2 else {}
    policy = SimpleNamespace(dro_beta=BETA)
    config = ActorConfig(
        clip_ratio=0.2,
        clip_ratio_low=LOW,
        clip_ratio_high=HIGH,
        clip_ratio_c=FAR,
        tau_pos=TAUS[0],
        tau_neg=TAUS[1],
        policy_loss=policy,
        global_batch_info=dict(dp_size=copies, **counts),
    )
    weights = weights if weighted else None
    settings = dict(low=LOW, high=HIGH, far=FAR, positive=TAUS[0], negative=TAUS[1], beta=BETA)
    counted = dict(copies=2, tokens=50, sequences=7) if copies == 2 else {}
    function = verl.get_policy_loss_fn(name)
    got = run(
        lambda leaf: function(old, leaf, advantages, mask.int(), mode, config, weights), logps
    )
    expected = run(
        lambda leaf: verl_loss(
            name, leaf, old, advantages, mask, mode, settings, weights, **counted
        ),
        logps,
    )
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", verl.NAMES)
def test_far_ratios(name):
    """Log-ratios beyond verl's clamps of 20 and 10 nats, most of all high ones with A < 0."""
    logps, old, advantages, mask, _ = loss_case(per_token=False)
    logps = torch.full_like(logps, -0.5)
    old = logps - torch.tensor([25.0, 12.0, 15.0, 0.1, 0.0], dtype=torch.float64)[:, None]
    if name != "gspo":  # verl clamps its log-ratio from above alone; below e^-10 it hardly matters
        old[1] = logps[1] + 0.4
        old[2], logps[2] = -0.5, -25.0
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    advantages = advantages.expand(B, T)
    config = defaults()
    config.clip_ratio_c = 1e9  # so large that the clamp takes effect first
    far = dict(low=0.2, high=0.2, far=1e9, positive=1.0, negative=1.05, beta=BETA)
    function = verl.get_policy_loss_fn(name)
    got = run(lambda leaf: function(old, leaf, advantages, mask, config=config), logps)
    arguments = (old, advantages, mask, "token-mean", far)
    expected = run(lambda leaf: verl_loss(name, leaf, *arguments), logps)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_metrics():
    logps, old, advantages, mask, _ = loss_case(per_token=True)
    old[0] = logps[0] - torch.linspace(0.9, 1.5, T)  # ratios around 3, the default dual clip
    function = verl.get_policy_loss_fn("vanilla")
    _, metrics = function(old, logps, advantages, mask, config=defaults())
    ratio = (logps - old).exp()
    cut = (ratio > 1.2) & (advantages > 0) | (ratio < 0.8) & (advantages < 0)
    expected = {
        "actor/pg_clipfrac": cut[mask].double().mean().item(),
        "actor/pg_clipfrac_lower": ((ratio > 3) & (advantages < 0))[mask].double().mean().item(),
        "actor/ppo_kl": (old - logps)[mask].mean().item(),
    }
    assert metrics == pytest.approx(expected, rel=1e-6)


# geo_mean is left out: in verl each rank takes its own mean.
@pytest.mark.parametrize("name", [name for name in verl.NAMES if name != "geo_mean"])
def test_split_over_ranks(name):
    """The mean of two ranks' losses is the whole batch's, however sequences are split."""
    *tensors, weights = loss_case(per_token=False)
    logps, old, advantages, mask = tensors
    function = verl.get_policy_loss_fn(name)

    def loss(rows, **info):
        arguments = (t[rows] for t in (old, logps, advantages, mask))
        return function(*arguments, "token-mean", defaults(**info), weights[rows])[0]

    info = dict(batch_num_tokens=mask.sum().item(), global_batch_size=4)
    parts = [loss(rows, dp_size=2, **info) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(parts) / 2, loss(slice(None), dp_size=1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", verl.NAMES)
def test_padding_counts_for_nothing(name):
    logps, old, advantages, mask, weights = loss_case(per_token=False)
    function = verl.get_policy_loss_fn(name)

    def outcome(value):
        dirty = [torch.where(mask, t, value) for t in (old, advantages, weights)]
        arguments = (dirty[1], mask, "token-mean", defaults(), dirty[2])
        return run(
            lambda leaf: function(dirty[0], leaf, *arguments), torch.where(mask, logps, value)
        )

    for clean, other in zip(outcome(0.0), outcome(torch.nan), strict=True):
        assert torch.equal(clean, other)
