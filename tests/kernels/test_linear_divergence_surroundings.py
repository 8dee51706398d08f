"""linear_divergence: masks, chunks, frozen inputs, NaN, torch.compile, mistakes."""

import pytest
import torch
from numerics import BACKENDS, DEVICE
from pairs import as_dtype, as_leaves, every_backend, every_kind, make_models, with_gradients

from codistill_kernels import linear_divergence, linear_reverse_kl, reference


@every_backend
@every_kind
def test_masked_rows_do_not_matter(kind, backend):
    mask = torch.arange(24) % 3 != 1
    student, teacher = make_models()
    kept = tuple(m if m is None else m[mask] for m in student[:1]) + student[1:]
    options = dict(kind=kind, backend=backend)
    clean = with_gradients(
        linear_divergence,
        as_leaves(kept),
        (teacher[0][mask], *teacher[1:]),
        torch.ones(()),
        **options,
    )
    student[0][~mask], teacher[0][~mask] = torch.nan, torch.inf
    dirty = with_gradients(
        linear_divergence, as_leaves(student), teacher, torch.ones(()), mask=mask, **options
    )
    assert not dirty[1][~mask].any()
    dirty[1] = dirty[1][mask]
    for one, wanted in zip(dirty, clean, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-6)


@every_backend
@every_kind
def test_nan_and_overflow_are_never_hidden(kind, backend):
    for bad in (torch.nan, 3e38, -torch.inf):
        for of_student in (True, False):
            student, teacher = make_models(rows=6)
            (student if of_student else teacher)[0][2] = bad
            options = dict(kind=kind, reduction="none", backend=backend)
            values, dx, dw, db = with_gradients(
                linear_divergence, as_leaves(student), teacher, torch.ones(()), **options
            )
            is_bad = torch.arange(6) == 2
            assert torch.equal(values.isnan(), is_bad) and torch.equal(dx[:, 0].isnan(), is_bad)
            assert dw[:1021].isnan().all() and db.isnan().all()


@every_backend
@every_kind
def test_tokens_that_a_model_rules_out(kind, backend):
    """A bias of -inf: out of both models, a token counts nothing; out of one, as its kind says."""
    (x, w, b), (x_t, w_t, _) = make_models(rows=5, vocab=(60, 60))
    out_s, out_t, b = b.clone(), b.clone(), b.clone()
    out_s[7], out_t[7] = -torch.inf, -torch.inf
    options = dict(kind=kind, backend=backend)
    both = with_gradients(
        linear_divergence, as_leaves((x, w, out_s)), (x_t, w_t, out_t), torch.ones(()), **options
    )
    left = torch.arange(60) != 7
    without = with_gradients(
        linear_divergence,
        as_leaves((x, w[left], b[left])),
        (x_t, w_t[left], b[left]),
        torch.ones(()),
        **options,
    )
    torch.testing.assert_close(both[0], without[0])
    torch.testing.assert_close(both[1], without[1], rtol=1e-4, atol=1e-5)
    assert not both[2][7].any()
    values = [
        linear_divergence((x, w, s), (x_t, w_t, t), reduction="none", **options)[0]
        for s, t in ((out_s, b), (b, out_t))
    ]
    infinite = {"reverse_kl": [False, True], "forward_kl": [True, False], "jsd": [False, False]}
    assert [bool(v.isinf().all()) for v in values] == infinite[kind]
    assert not any(v.isnan().any() for v in values)


@every_backend
def test_chunks_of_a_small_workspace_give_the_same(backend):
    student, teacher = make_models(rows=130)
    results = [
        with_gradients(
            linear_divergence,
            as_leaves(student),
            teacher,
            torch.ones(()),
            kind="jsd",
            backend=backend,
            workspace_mib=mib,
        )
        for mib in (1, 64)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_backend
def test_row_does_not_depend_on_other_rows(backend):
    student, teacher = make_models()
    rows = torch.tensor([23, 3, 14])
    few = tuple((x[rows], *head) for x, *head in (student, teacher))
    options = dict(kind="jsd", reduction="none", backend=backend)
    every, some = (linear_divergence(*pair, **options)[0] for pair in ((student, teacher), few))
    torch.testing.assert_close(every[rows], some, rtol=1e-5, atol=1e-6)
    again = linear_divergence(student, teacher, **options)[0]
    assert torch.equal(every, again)


@every_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_frozen_inputs_get_nothing_and_the_teacher_never(reduction, backend):
    student, teacher = make_models(rows=9)
    options = dict(reduction=reduction, backend=backend)
    full = as_leaves(student)
    wanted = with_gradients(linear_divergence, full, teacher, torch.ones(()), **options)[1:]
    for frozen in range(3):
        part, others = as_leaves(student), as_leaves(teacher)
        part[frozen].requires_grad_(False)
        linear_divergence(part, others, **options)[0].sum().backward()
        for place, leaf in enumerate(part):
            is_right = (
                leaf.grad is None if place == frozen else torch.equal(leaf.grad, wanted[place])
            )
            assert is_right
        assert all(t.grad is None for t in others)
    loss, _ = linear_divergence(student, teacher, **options)
    assert not loss.requires_grad


@every_backend
@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all masked"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nothing_to_do(rows, reduction, backend):
    student, teacher = make_models(rows=rows)
    mask = torch.zeros(rows, dtype=torch.bool)
    leaves = as_leaves(student)
    options = dict(reduction=reduction, normalizer=0.0, backend=backend)
    loss, stats = linear_divergence(leaves, teacher, mask, **options)
    loss.sum().backward()
    assert not loss.any() and stats["tokens"] == 0
    assert not any(leaf.grad.any() for leaf in leaves)


@every_backend
def test_rows_of_sequences(backend):
    student, teacher = make_models(rows=12)
    shaped = tuple((x.view(3, 4, -1), *head) for x, *head in (student, teacher))
    mask = torch.arange(12).view(3, 4) % 3 != 0
    temperature = torch.linspace(0.5, 2, 12).view(3, 4)
    options = dict(kind="forward_kl", reduction="none", backend=backend)
    found, stats = linear_divergence(*shaped, mask, temperature=temperature, **options)
    expected, _ = linear_divergence(
        student, teacher, mask.flatten(), temperature=temperature.flatten(), **options
    )
    assert torch.equal(found, expected.view(3, 4)) and torch.equal(stats["divergence"], found)


@every_backend
def test_reverse_kl_is_the_reward(backend):
    (x, w, _), (x_t, w_t, _) = make_models()
    options = dict(temperature=0.8, vocab_size=1000, softcap=(None, 9.0), backend=backend)
    loss, stats = linear_divergence((x, w), (x_t, w_t), **options)
    reward = linear_reverse_kl((x, w), (x_t, w_t), **options)
    torch.testing.assert_close(stats["divergence"], reward, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, reward.sum())


@every_backend
def test_padding_of_the_vocabulary_gets_no_gradient(backend):
    student, teacher = make_models()
    leaves = as_leaves(student)
    linear_divergence(leaves, teacher, vocab_size=900, backend=backend)[0].backward()
    assert leaves[1].grad[:900].any(dim=1).all() and not leaves[1].grad[900:].any()
    assert leaves[2].grad[:900].all() and not leaves[2].grad[900:].any()


@every_backend
def test_mixed_dtypes(backend):
    student, teacher = make_models(rows=9)
    mixed = (student[0], student[1].bfloat16(), student[2].double()), as_dtype(teacher, torch.half)
    leaves = as_leaves(mixed[0])
    linear_divergence(leaves, mixed[1], backend=backend)[0].backward()
    gold = as_leaves(mixed[0], torch.float64)
    reference.linear_divergence(gold, as_dtype(mixed[1], torch.float64)).backward()
    for ours, wanted in zip(leaves, gold, strict=True):
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(ours.grad.double(), wanted.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.skipif("torch" not in BACKENDS, reason="fp64")
@every_kind
def test_fp64(kind):
    student, teacher = (as_dtype(model, torch.float64) for model in make_models())
    check = [
        with_gradients(function, as_leaves(student), teacher, torch.ones(()), kind=kind)
        for function in (linear_divergence, reference.linear_divergence)
    ]
    for one, other in zip(*check, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@every_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiles_and_passes_opcheck(reduction, backend):
    student, teacher = make_models(rows=5, vocab=(30, 30))
    options = dict(kind="jsd", reduction=reduction, backend=backend)

    def loss(student):
        return linear_divergence(student, teacher, **options)[0].sum()

    torch._dynamo.reset()
    plain, compiled = as_leaves(student), as_leaves(student)
    wanted = loss(plain)
    wanted.backward()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    found.backward()
    torch.testing.assert_close(found, wanted)
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    ones, mask = torch.ones(5), torch.arange(5) != 2
    arguments = (*student, ones, *teacher, ones, mask, [0.0, 2.0], 28, "jsd", 0.5)
    coefficients = ones if reduction == "none" else None
    torch.library.opcheck(
        torch.ops.codistill.divergence_gradients,
        (*arguments, coefficients, [True, True, False], None, backend),
    )


@every_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_second_derivative_and_no_transforms(reduction, backend):
    student, teacher = make_models(rows=5)
    leaves = as_leaves(student)
    options = dict(reduction=reduction, backend=backend)
    loss = linear_divergence(leaves, teacher, **options)[0].sum()
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        (loss + gradient.square().sum()).backward()
    with pytest.raises(RuntimeError, match="linear_divergence does not work inside torch.func"):
        torch.func.grad(
            lambda x: linear_divergence((x, *student[1:]), teacher, **options)[0].sum()
        )(student[0])


@pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not looked at")
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(kind="alpha"), "kind"),
        (dict(jsd_weight=0.3), "jsd_weight"),
        (dict(kind="jsd", jsd_weight=1.0), "jsd_weight"),
        (dict(reduction="mean"), "reduction"),
        (dict(normalizer=-1), "normalizer"),
        (dict(workspace_mib=0), "workspace_mib"),
        (dict(mask=torch.ones(3).bool()), "mask"),
        (dict(mask=torch.ones(4)), "mask"),
        (dict(vocab_size=9), "vocab_size"),
        (dict(temperature=0.0), "temperature"),
        (dict(softcap=(1.0, 2.0, 3.0)), "softcap"),
        (dict(logit_scale=0.0), "logit_scale"),
        (dict(backend="gpu"), "backend"),
        (dict(student=(torch.zeros(4, 3), torch.zeros(9, 4))), "student"),
        (dict(student=torch.zeros(4, 3)), "student"),
        (dict(student=(torch.zeros(4, 3), torch.zeros(8, 3), torch.zeros(9))), "student"),
        (dict(teacher=(torch.zeros(4, 5), torch.zeros(9, 5), 1.0)), "teacher"),
        (dict(teacher=(torch.zeros(3, 5), torch.zeros(9, 5))), "teacher"),
        (dict(teacher=(torch.zeros(4, 5).long(), torch.zeros(9, 5))), "teacher"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change, name):
    arguments = dict(
        student=(torch.zeros(4, 3), torch.zeros(8, 3)),
        teacher=(torch.zeros(4, 5), torch.zeros(9, 5)),
    )
    with pytest.raises(ValueError, match=f"^{name} must be"):
        linear_divergence(**arguments | change)
