"""linear_token_loss: any loss of log-probability and entropy, in every way through the logits."""

import pytest
import torch
import torch.distributed as dist
from numerics import BACKENDS, DTYPES, MatrixUnit, assert_as_accurate_as_eager, seeded
from processes import spawn

from codistill_kernels import PolicyLoss, linear_policy_loss, linear_token_loss, reference
from codistill_kernels._linear import planning
from codistill_kernels._linear.chunks import Plan

NAMES = ("hidden_states", "lm_head_weight", "bias")
WAYS = {
    "chunks": Plan("chunks", 17),
    "columns": Plan("columns", 17),
    "kept": Plan("kept", 0),  # which the torch backend has not
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    for backend in BACKENDS:
        kind = planning.chunks_for(torch.empty(0), 1, backend)
        plan = WAYS["chunks" if request.param == "kept" and backend == "torch" else request.param]
        monkeypatch.setattr(kind, "plan", lambda *_, plan=plan: plan)
    return request.param


def make_case(dtype=torch.float32, rows=60, hidden=24, vocab=509):
    generator = seeded(0)
    x = torch.randn(rows, hidden, generator=generator).to(dtype)
    weight = (2 * torch.randn(vocab, hidden, generator=generator) / hidden**0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator)
    ids = torch.randint(0, vocab - 9, (rows,), generator=generator)
    mask = torch.arange(rows) % 5 != 0
    leaves = dict(hidden_states=x, lm_head_weight=weight, bias=bias)
    head = dict(temperature=0.8, vocab_size=vocab - 9)
    gold = {name: t.double() for name, t in leaves.items()}
    logps = reference.linear_logps(**gold, token_ids=ids, **head)
    noise = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    numbers = dict(
        old=logps + 0.4 * noise[0],
        reference=logps + 0.3 * noise[1],
        advantages=torch.randn(rows, generator=generator, dtype=torch.float64),
    )
    ids[~mask] = -100
    return leaves, ids, mask, numbers, head


def sapo(numbers):
    """4/t sigmoid(t (r - 1)) A, softer where A < 0 (arXiv:2511.20347)."""

    def fn(logps, entropy, rows):
        advantages = numbers["advantages"][rows].to(logps.dtype)
        ratio = (logps - numbers["old"][rows].to(logps.dtype)).exp()
        tau = torch.where(advantages > 0, 1.0, 1.05)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages

    return fn


def clip_with_kl_and_entropy(numbers):
    def fn(logps, entropy, rows):
        old, other, advantages = (
            numbers[name][rows].to(logps.dtype) for name in ("old", "reference", "advantages")
        )
        ratio = (logps - old).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        far = other - logps
        return -surrogate + 0.04 * ratio * (far.exp() - far - 1) - 0.01 * entropy

    return fn


LOSSES = {"sapo": sapo, "clip, KL, entropy": clip_with_kl_and_entropy}


def as_leaves(leaves, dtype=None):
    return {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in leaves.items()}


def gradients(loss, leaves):
    loss.backward()
    return [leaves[name].grad for name in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_equals_fp64_as_well_as_eager(make, dtype, backend, way):
    leaves, ids, mask, numbers, head = make_case(dtype)
    fn = make(numbers)
    results = []
    for precision in (torch.float64, torch.float32):
        copies = as_leaves(leaves, precision)
        with MatrixUnit(dtype if precision == torch.float32 else precision):
            loss = reference.linear_token_loss(
                **copies, token_ids=ids, fn=fn, mask=mask, normalizer=7.0, **head
            )
            results.append([loss.detach(), *gradients(loss, copies)])
    copies = as_leaves(leaves)
    options = dict(normalizer=7.0, backend=backend, **head)
    loss, stats = linear_token_loss(**copies, token_ids=ids, fn=fn, mask=mask, **options)
    found = [loss.detach(), *gradients(loss, copies)]
    for name, got, gold, eager in zip(("loss", *NAMES), found, *results, strict=True):
        floor = 1e-5 if name == "loss" else 1e-6  # one number: luck to some extent
        assert_as_accurate_as_eager(name, got, eager.to(got.dtype), gold, floor=floor)
    gold_leaves = {n: t.double() for n, t in leaves.items()}
    exact = reference.linear_logps(**gold_leaves, token_ids=ids, return_entropy=True, **head)
    for name, value in zip(("logps", "entropy"), exact, strict=True):
        torch.testing.assert_close(stats[name].double(), value, rtol=1e-5, atol=2e-5)
    assert stats["tokens"] == 48


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_policy_loss_of_the_same_formula(backend, way):
    leaves, ids, mask, numbers, head = make_case()
    old, advantages = numbers["old"].float(), numbers["advantages"].float()

    def clip(logps, entropy, rows):
        ratio, a = (logps - old[rows]).exp(), advantages[rows]
        return -torch.where(
            ((ratio < 0.8) & (a < 0)) | ((ratio > 1.2) & (a > 0)), ratio.clamp(0.8, 1.2), ratio
        ).mul(a)

    ours, theirs = as_leaves(leaves), as_leaves(leaves)
    options = dict(normalizer=3.0, backend=backend, **head)
    loss, _ = linear_token_loss(**ours, token_ids=ids, fn=clip, mask=mask, **options)
    other, _ = linear_policy_loss(
        **theirs,
        token_ids=ids,
        old_logps=old,
        advantages=advantages,
        mask=mask,
        loss=PolicyLoss(),
        **options,
    )
    torch.testing.assert_close(loss, other)
    for one, two in zip(gradients(loss, ours), gradients(other, theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_themselves_and_compiled(backend):
    leaves, ids, mask, numbers, head = make_case()
    fn = clip_with_kl_and_entropy(numbers)
    options = dict(fn=fn, mask=mask, backend=backend, **head)

    def whole(**leaves):
        return linear_token_loss(**leaves, token_ids=ids, **options)[0]

    def summed(**leaves):
        return linear_token_loss(**leaves, token_ids=ids, reduction="none", **options)[0].sum()

    expected = as_leaves(leaves)
    wanted = gradients(whole(**expected), expected)
    torch._dynamo.reset()
    for function in (summed, torch.compile(whole, fullgraph=True, backend="aot_eager")):
        copies = as_leaves(leaves)
        loss = function(**copies)
        torch.testing.assert_close(loss, whole(**leaves))
        for one, other in zip(gradients(loss, copies), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    losses, _ = linear_token_loss(**leaves, token_ids=ids, reduction="none", **options)
    assert losses.shape == mask.shape and not losses[~mask].any() and losses[mask].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_slope_and_masked_ones_do_not_matter(backend, way):
    leaves, ids, mask, numbers, head = make_case()
    head["bias"] = leaves.pop("bias")

    def fn(logps, entropy, rows):
        return torch.where(rows % 2 == 0, logps, 0.0).square()

    clean, dirty = as_leaves(leaves), as_leaves(leaves)
    with torch.no_grad():
        dirty["hidden_states"][~mask] = torch.nan
        dirty["hidden_states"][torch.arange(60) % 2 == 1] += torch.inf
    options = dict(token_ids=ids, fn=fn, mask=mask, backend=backend, **head)
    wanted = gradients(linear_token_loss(**clean, **options)[0], clean)
    found = gradients(linear_token_loss(**dirty, **options)[0], dirty)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", ["sum", "none", "compiled sum", "compiled none"])
def test_masked_rows_do_not_reach_a_loss_that_is_infinite_at_0(run, backend):
    """A masked row has log-probability and entropy 0: log(0) = -inf with an infinite slope."""
    leaves, ids, mask, _, head = make_case()

    def fn(logps, entropy, rows):
        return (-logps).log() + 1 / entropy + entropy.sqrt()

    def loss(reduction, **leaves):
        options = dict(token_ids=ids, fn=fn, mask=mask, backend=backend, reduction=reduction)
        return linear_token_loss(**leaves, **options, **head)[0].sum()

    gold, ours = as_leaves(leaves, torch.float64), as_leaves(leaves)
    expected = reference.linear_token_loss(**gold, token_ids=ids, fn=fn, mask=mask, **head)
    torch._dynamo.reset()
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if "compiled" in run else loss
    found = call(run.split()[-1], **ours)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    wanted = gradients(expected, gold)
    for one, other in zip(gradients(found, ours), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_fn_sees_unmasked_rows_alone(reduction):
    leaves, ids, mask, *_ = make_case()
    seen = []

    def fn(logps, entropy, rows):
        seen.append(rows)
        return logps

    losses, _ = linear_token_loss(
        **leaves, token_ids=ids, fn=fn, mask=mask, reduction=reduction, vocab_size=500
    )
    assert torch.equal(torch.cat(seen), mask.nonzero().squeeze(1))
    if reduction == "none":
        assert losses.shape == mask.shape and not losses[~mask].any() and losses[mask].all()


@pytest.mark.parametrize("frozen", NAMES)
def test_frozen_input_gets_nothing(frozen):
    leaves, ids, mask, numbers, head = make_case()
    fn = sapo(numbers)
    full, part = as_leaves(leaves), as_leaves(leaves)
    part[frozen].requires_grad_(False)
    options = dict(token_ids=ids, fn=fn, mask=mask, **head)
    wanted = dict(zip(NAMES, gradients(linear_token_loss(**full, **options)[0], full), strict=True))
    linear_token_loss(**part, **options)[0].backward()
    for name, leaf in part.items():
        assert (leaf.grad is None) if name == frozen else torch.equal(leaf.grad, wanted[name])


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all masked"])
def test_nothing_to_do(rows):
    leaves, ids, mask, numbers, head = make_case(rows=rows)
    copies = as_leaves(leaves)
    options = dict(token_ids=ids, fn=sapo(numbers), mask=torch.zeros_like(mask), **head)
    loss, stats = linear_token_loss(**copies, **options)
    assert loss == 0 and stats["tokens"] == 0
    assert not any(gradient.any() for gradient in gradients(loss, copies))


def test_upstream_gradient_scales():
    leaves, ids, mask, numbers, head = make_case()
    options = dict(token_ids=ids, fn=sapo(numbers), mask=mask, **head)
    one, other = as_leaves(leaves), as_leaves(leaves)
    wanted = gradients(linear_token_loss(**one, **options)[0], one)
    found = gradients(-2.5 * linear_token_loss(**other, **options)[0], other)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, -2.5 * b)


def half_of_the_vocabulary(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    leaves, ids, mask, numbers, head = make_case(vocab=510)
    fn = clip_with_kl_and_entropy(numbers)
    whole = as_leaves(leaves)
    options = dict(token_ids=ids, fn=fn, mask=mask, normalizer=5.0, **head)
    wanted = gradients(linear_token_loss(**whole, **options)[0], whole)
    mine = slice(255 * rank, 255 * (rank + 1))
    expected = [wanted[0], wanted[1][mine], wanted[2][mine]]
    part = as_leaves({n: t if n == NAMES[0] else t[mine] for n, t in leaves.items()})
    for way in WAYS.values():
        planning.CpuChunks.plan = lambda *_, way=way: way
        # Where a process has no vocabulary row.
        planning.TorchChunks.plan = lambda *_: WAYS["chunks"]
        for leaf in part.values():
            leaf.grad = None
        loss, _ = linear_token_loss(**part, **options, group=dist.group.WORLD)
        for one, other in zip(gradients(loss, part), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
    dist.barrier()  # who leaves early closes connections that the other still uses
    dist.destroy_process_group()


def test_sharded_vocabulary_equals_whole(tmp_path):
    spawn(half_of_the_vocabulary, str(tmp_path), processes=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(fn=lambda logps, entropy, rows: logps.sum()), r"fn's result must be \[R\]"),
        (dict(fn=lambda logps, entropy, rows: 1.0), r"fn's result must be \[R\]"),
        (
            dict(fn=lambda logps, e, rows: logps * torch.ones(4, requires_grad=True)[rows]),
            "fn must use no gradient but",
        ),
        (
            dict(fn=lambda logps, entropy, rows: logps.sum(), reduction="none"),
            r"fn's result must be \[R\]",
        ),
        (dict(reduction="mean"), "reduction must be"),
        (dict(workspace_mib=0), "workspace_mib must be"),
        (dict(mask=torch.zeros(3).bool()), "mask must be"),
        (dict(token_ids=torch.full((4,), 11)), "token_ids must be"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(
        hidden_states=torch.zeros(4, 5),
        lm_head_weight=torch.zeros(11, 5, requires_grad=True),
        token_ids=torch.zeros(4, dtype=torch.long),
        fn=lambda logps, entropy, rows: -logps,
    )
    with pytest.raises(ValueError, match=message):
        linear_token_loss(**arguments | change)
