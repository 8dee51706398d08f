"""linear_policy_loss: the loss of the log-probabilities, its gradients, and what it leaves out."""

import contextlib
import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from losses import LOSSES
from numerics import (
    BACKENDS,
    DTYPES,
    INTERPRETED,
    MatrixUnit,
    assert_as_accurate_as_eager,
    seeded,
)
from processes import spawn

from codistill_kernels import PolicyLoss, linear_logps, linear_policy_loss, policy_loss, reference
from codistill_kernels._linear import cpu_backend, passes, planning
from codistill_kernels._linear.chunks import Plan

NAMES = ("hidden_states", "lm_head_weight", "bias")
BOUNDS = dict(epsilon_low=0.1, epsilon_high=0.3, dual_clip=2.0)


def make_case(dtype=torch.float32, *, rows=60, hidden=48, vocab=509, seed=0):
    """leaves, what the loss takes, how hidden states become logits. Every fifth row is masked."""
    generator = seeded(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    leaves = dict(
        hidden_states=randn(rows, hidden).to(dtype),
        lm_head_weight=(2 * randn(vocab, hidden) / hidden**0.5).to(dtype),
        bias=randn(vocab),
    )
    ids = torch.randint(0, vocab - 9, (rows,), generator=generator)
    head = dict(temperature=torch.rand(rows, generator=generator) + 0.5, vocab_size=vocab - 9)
    head["softcap"] = 20.0
    gold = {name: leaf.double() for name, leaf in leaves.items()}
    logps = reference.linear_logps(**gold, token_ids=ids, **head).float()
    mask = torch.arange(rows) % 5 != 0
    ids[~mask] = -100
    terms = dict(
        old_logps=(logps + 0.3 * randn(rows)).clamp(max=-0.01),
        advantages=randn(rows),
        mask=mask,
        importance_weights=torch.rand(rows, generator=generator),
    )
    return leaves, ids, terms, head


def gradients(leaves, loss):
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def leaves_in(dtype, leaves):
    return {
        name: leaf.detach().to(dtype or leaf.dtype).requires_grad_()
        for name, leaf in leaves.items()
    }


# The chunks have several blocks of rows, of 64 in C++ and of 32 in the interpreter, which is slow.
ROWS, CHUNK = (100, 43) if INTERPRETED else (200, 85)
WAYS = {
    "kept": Plan("kept", ROWS),
    "one chunk": Plan("chunks", ROWS),
    "chunks of rows": Plan("chunks", CHUNK),
    "two passes": Plan("columns", CHUNK),
}


@pytest.fixture
def way(request, monkeypatch):
    """In which order tokens and vocabulary rows are gone through, whatever the workspace."""
    for backend in BACKENDS:
        kind = planning.chunks_for(torch.empty(0), 1, backend)
        is_kept = request.param == "kept" and backend != "torch"  # which has not this way
        plan = WAYS["kept" if is_kept else request.param.replace("kept", "one chunk")]
        monkeypatch.setattr(kind, "plan", lambda *_, plan=plan: plan)
    return request.param


# What differs in the passes is compared in each of them; kinds differ in their slopes alone, which
# no kernel computes: the interpreter has nothing to say about them.
PASSES = ("clip", "cispo", "gspo", "clip with entropy", "gspo with entropy")
COMPARED = [*itertools.product(PASSES, DTYPES, BACKENDS, WAYS)]
if not INTERPRETED:
    COMPARED += [
        (name, torch.float32, BACKENDS[0], way)
        for name in LOSSES.keys() - set(PASSES)
        for way in ("chunks of rows", "two passes")
    ]


@pytest.mark.parametrize(
    ("name", "dtype", "backend", "way"), sorted(COMPARED, key=str), indirect=["way"]
)
def test_equals_fp64_as_well_as_eager(name, dtype, backend, way):
    leaves, ids, terms, head = make_case(dtype, rows=ROWS)
    if backend == "triton" and way != "two passes":
        head["bias"] = leaves.pop("bias")  # frozen: its gradient takes two passes
    settings = dataclasses.asdict(LOSSES[name])
    if LOSSES[name].needs_sequences:
        terms |= dict(cu_seqlens=torch.tensor([0, 25, 25, 90, ROWS]))
        terms["advantages"] = torch.tensor([1.0, 3.0, -2.0, 0.5])
    results = {}
    for label, precision in (("gold", torch.float64), ("eager", torch.float32)):
        copies = leaves_in(precision, leaves)
        with MatrixUnit(dtype) if label == "eager" else contextlib.nullcontext():
            logps, entropy = reference.linear_logps(
                **copies, token_ids=ids, **head, return_entropy=True
            )
            outputs = dict(logps=logps, entropy=entropy)
            loss = reference.policy_loss(**outputs, **terms, **settings, normalizer=17.0)
            results[label] = (loss, gradients(copies, loss))
    copies = leaves_in(None, leaves)
    loss, stats = linear_policy_loss(
        **copies,
        token_ids=ids,
        **terms,
        **head,
        loss=LOSSES[name],
        normalizer=17.0,
        workspace_mib=1,
        backend=backend,
    )
    found = gradients(copies, loss)
    # One number, the sum of terms of both signs: its relative error is luck to some extent.
    losses = (loss, results["eager"][0], results["gold"][0])
    assert_as_accurate_as_eager("loss", *losses, floor=1e-5)
    for leaf, gold in results["gold"][1].items():
        eager = results["eager"][1][leaf].to(found[leaf].dtype)
        assert_as_accurate_as_eager(f"d{leaf}", found[leaf], eager, gold)
    logps, entropy = linear_logps(**leaves, token_ids=ids, **head, return_entropy=True)
    outputs = dict(logps=logps, entropy=entropy)
    separate = policy_loss(**outputs, **terms, loss=LOSSES[name], normalizer=1.0)[1]
    assert stats.keys() == separate.keys()
    for key, value in separate.items():
        tolerance = 1e-5 if key in outputs else 1e-4
        torch.testing.assert_close(stats[key], value, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_rows_without_a_gradient_reach_neither_product(way, monkeypatch):
    leaves, ids, terms, head = make_case()
    head["bias"] = leaves.pop("bias")
    terms["advantages"][1::5] = 0
    added = []
    kind = planning.chunks_for(torch.empty(0), 1, BACKENDS[0])
    if kind.__name__ == "TritonChunks":
        from codistill_kernels._linear import exponentials_triton, triton_backend

        original = triton_backend.product

        def spy(a, b, out, **options):
            if b.shape == (509 - 9, 48) or a.shape == (60, 48):
                added.append(len(a))
            return original(a, b, out, **options)

        for module in (exponentials_triton, triton_backend):
            monkeypatch.setattr(module, "product", spy)
    else:
        original = cpu_backend.HeldLogits.finish

        def spy(self, kept, *rest):
            added.append(len(kept))
            return original(self, kept, *rest)

        monkeypatch.setattr(cpu_backend.HeldLogits, "finish", spy)
    copies = leaves_in(None, leaves)
    loss, stats = linear_policy_loss(
        **copies, token_ids=ids, **terms, **head, normalizer=1.0, backend=BACKENDS[0]
    )
    found = gradients(copies, loss)
    assert sum(added) == found["hidden_states"].ne(0).any(dim=1).sum()
    assert 0 < sum(added) < 36  # 60 rows, less 12 masked, 12 of advantage 0 and the clipped
    assert stats["clip_fraction_high"] > 0 and stats["tokens"] == 48


def test_what_is_behind_the_mask_does_not_matter():
    leaves, ids, terms, head = make_case()
    masked = ~terms["mask"]
    clean = leaves_in(None, leaves)
    loss, _ = linear_policy_loss(**clean, token_ids=ids, **terms, **head, normalizer=3.0)
    expected = gradients(clean, loss)
    leaves["hidden_states"][masked] = torch.nan
    for name in ("old_logps", "advantages", "importance_weights"):
        terms[name] = torch.where(masked, torch.nan, terms[name])
    dirty = leaves_in(None, leaves)
    again, _ = linear_policy_loss(**dirty, token_ids=ids, **terms, **head, normalizer=3.0)
    found = gradients(dirty, again)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("frozen", NAMES)
def test_frozen_input_gets_and_costs_nothing(frozen):
    leaves, ids, terms, head = make_case()
    full, part = leaves_in(None, leaves), leaves_in(None, leaves)
    part[frozen].requires_grad_(False)
    results = []
    for copies in (full, part):
        loss, _ = linear_policy_loss(**copies, token_ids=ids, **terms, **head, normalizer=1.0)
        results.append(gradients(copies, loss))
    assert results[1][frozen] is None
    for name in set(NAMES) - {frozen}:
        assert torch.equal(results[0][name], results[1][name])


def test_without_gradients_none_is_made(monkeypatch):
    leaves, ids, terms, head = make_case()
    monkeypatch.setattr(passes.GradientSums, "add", None)
    with torch.no_grad():
        copies = leaves_in(None, leaves)
        loss, _ = linear_policy_loss(**copies, token_ids=ids, **terms, **head, normalizer=1.0)
    assert not loss.requires_grad


@pytest.mark.parametrize("way", ["one chunk"], indirect=True)
def test_upstream_gradient_scales_and_a_second_backward_is_refused(way):
    leaves, ids, terms, head = make_case()
    grads = []
    for factor in (1.0, -2.5):
        copies = leaves_in(None, leaves)
        loss, _ = linear_policy_loss(**copies, token_ids=ids, **terms, **head, normalizer=1.0)
        grads.append(gradients(copies, factor * loss))
    for name in NAMES:
        torch.testing.assert_close(-2.5 * grads[0][name], grads[1][name])
    copies = leaves_in(None, leaves)
    loss, _ = linear_policy_loss(**copies, token_ids=ids, **terms, **head, normalizer=1.0)
    (dx,) = torch.autograd.grad(loss, copies["hidden_states"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        dx.sum().backward()


def test_first_step_and_advantages_of_sequences():
    leaves, ids, terms, head = make_case()
    ends = torch.tensor([0, 25, 25, 60])
    terms |= dict(old_logps=None, advantages=torch.tensor([1.0, 5.0, -2.0]))
    copies, plain = leaves_in(None, leaves), leaves_in(None, leaves)
    options = dict(normalizer=9.0, cu_seqlens=ends)
    loss, stats = linear_policy_loss(**copies, token_ids=ids, **terms, **head, **options)
    logps = linear_logps(**plain, token_ids=ids, **head)
    expected, _ = policy_loss(logps, **terms, **options)
    torch.testing.assert_close(loss, expected)
    one, other = gradients(copies, loss), gradients(plain, expected)
    for name in NAMES:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
    assert stats["ratio_max"] == 1


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all masked"])
def test_nothing_to_do(rows):
    leaves, ids, terms, head = make_case(rows=rows)
    terms["mask"][:] = False
    copies = leaves_in(None, leaves)
    loss, _ = linear_policy_loss(**copies, token_ids=ids, **terms, **head, normalizer=1.0)
    assert loss == 0 and not any(g.any() for g in gradients(copies, loss).values())


def test_compiles_as_one_graph_and_passes_opcheck():
    leaves, ids, terms, head = make_case(rows=80)

    def step(hidden_states, lm_head_weight, bias):
        inputs = dict(hidden_states=hidden_states, lm_head_weight=lm_head_weight, bias=bias)
        return linear_policy_loss(**inputs, token_ids=ids, **terms, **head, normalizer=2.0)[0]

    plain, compiled = leaves_in(None, leaves), leaves_in(None, leaves)
    torch._dynamo.reset()
    function = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, found = gradients(plain, step(**plain)), gradients(compiled, function(**compiled))
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])
    arguments = (leaves["hidden_states"], leaves["lm_head_weight"], None, ids, torch.ones(80), 0.0)
    arguments += (terms["old_logps"], terms["advantages"], None, terms["mask"])
    op = torch.ops.codistill.linear_policy_gradients
    settings = PolicyLoss(entropy_bonus=0.1).settings()
    for needs in ([True, True, False], [False, True, False], [False, False, False]):
        for backend in BACKENDS:
            options = (None, "clip", settings, 509, 1, "", needs, backend)
            torch.library.opcheck(op, (*arguments, *options))
            # With 2**22 vocabulary rows the logits of 64 tokens fit, not of 80: two passes.
            # Gradients are not rounded before they are scaled.
            halves = (t.to(DTYPES[-1]) for t in arguments[:2])
            options = (None, "clip", settings, 2**22, 1, "", needs, backend)
            torch.library.opcheck(op, (*halves, *arguments[2:], *options))


def sharded(rank: int, folder: str, vocab_size: int, way: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    planning.CpuChunks.plan = lambda *_: Plan(way, 68)
    planning.TorchChunks.plan = lambda *_: Plan("chunks" if way == "kept" else way, 68)
    leaves, ids, terms, head = make_case(vocab=510, rows=150)
    head["vocab_size"] = vocab_size  # cuts the second shard, or leaves nothing of it
    ids[ids >= vocab_size] %= vocab_size
    whole = leaves_in(None, leaves)
    loss, _ = linear_policy_loss(**whole, token_ids=ids, **terms, **head, normalizer=5.0)
    expected = gradients(whole, loss)
    mine = slice(255 * rank, 255 * (rank + 1))
    leaves |= {name: leaves[name][mine] for name in NAMES[1:]}
    expected |= {name: expected[name][mine] for name in NAMES[1:]}
    part = leaves_in(None, leaves)
    again, _ = linear_policy_loss(
        **part,
        token_ids=ids,
        **terms,
        **head,
        normalizer=5.0,
        workspace_mib=1,
        group=dist.group.WORLD,
    )
    found = gradients(part, again)
    torch.testing.assert_close(again, loss)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-5, atol=2e-6)
    dist.barrier()  # who leaves early closes connections that the other still uses
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["kept", "chunks", "columns"])
@pytest.mark.parametrize("vocab_size", [300, 200], ids=["cut shard", "empty shard"])
def test_sharded_vocabulary_equals_whole(tmp_path, vocab_size, way):
    spawn(sharded, str(tmp_path), vocab_size, way, processes=2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(hidden_states=torch.zeros(1, 4, 5)), "hidden_states"),
        (dict(old_logps=torch.zeros(3)), "old_logps"),
        (dict(advantages=torch.zeros(3)), "advantages"),
        (dict(mask=torch.zeros(4)), "mask"),
        (dict(mask=torch.zeros(3).bool()), "mask"),
        (dict(normalizer=-1.0), "normalizer"),
        (dict(token_ids=torch.full((4,), 11)), "token_ids"),
        (dict(workspace_mib=0), "workspace_mib"),
        (dict(backend="cuda"), "backend"),
        (dict(loss=PolicyLoss("gspo")), "cu_seqlens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, name):
    arguments = dict(
        hidden_states=torch.zeros(4, 5),
        lm_head_weight=torch.zeros(11, 5),
        token_ids=torch.zeros(4, dtype=torch.long),
        old_logps=torch.zeros(4),
        advantages=torch.zeros(4),
        normalizer=1.0,
    )
    with pytest.raises(ValueError, match=f"^{name} must be"):
        linear_policy_loss(**arguments | change)
