"""Whether the operations on a linear head are right at the size of a real vocabulary.

Each is compared with its definition in fp64 and judged as in the tests (bench/tolerance.py): in the
worst row it may have twice the error that the definition has in fp32, with the operands of products
rounded to the dtype.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import codistill_kernels as kernels
from bench.findings import FAILED, OK, Finding, holds
from bench.gold import (
    LOGIT_STD,
    TOKENS_AT_ONCE,
    Inputs,
    definition,
    divergence,
    forced,
    of_both,
    of_logps,
    of_loss,
    poison,
    reverse_kl,
    standards,
)
from bench.tolerance import CEILING, FACTOR, FLOOR, SCALAR_FLOOR, allowed_error, row_error
from codistill_kernels import reference
from codistill_kernels._linear.slab_sizes import pieces
from codistill_kernels._pair.divergences import DIVERGENCES

ROWS_AT_ONCE = 16384  # rows of a gradient that are in memory in fp64 together


# --- comparison --------------------------------------------------------------------------------


def worst(found: Tensor, gold: Tensor) -> float:
    """`row_error` of many rows, `ROWS_AT_ONCE` at a time."""
    if gold.ndim < 2:
        return row_error(found, gold)
    parts = pieces(len(gold), ROWS_AT_ONCE)
    return max(row_error(found[rows], gold[rows]) for rows in parts)


def compared(
    title: str, found: dict[str, Tensor], gold: dict[str, Tensor], judge: dict[str, Tensor]
) -> Iterator[Finding]:
    """The error of each result as a multiple of the judge's."""
    for name, result in found.items():
        # A gradient is rounded once, to the dtype of its leaf.
        error, base = (worst(t, gold[name]) for t in (result, judge[name].to(result.dtype)))
        base = min(base, CEILING)
        floor = FLOOR if gold[name].ndim else SCALAR_FLOOR
        is_right = error <= allowed_error(base, floor=floor)
        ratio = error / base if base else math.inf if error > floor else 0.0
        verdict = OK if is_right else FAILED
        yield Finding(f"{title}: {name}", f"{ratio:.3g}", "x eager", f"<= {FACTOR:g}", verdict)


# --- operations against their definitions ------------------------------------------------------


def leaves(inputs: Inputs, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states (or `x` in their place) and weight to differentiate."""
    x = inputs.x if x is None else x
    return x.clone().requires_grad_(), inputs.weight.detach().requires_grad_()


def with_gradients(results: dict[str, Tensor], x: Tensor, weight: Tensor, vocab: int) -> dict:
    """Results and gradients. A weight gradient beyond the vocabulary makes all of it NaN, so that
    it is found."""
    dw = weight.grad
    if dw[vocab:].any():
        dw = dw + torch.nan
    return {name: t.detach() for name, t in results.items()} | {"dX": x.grad, "dW": dw[:vocab]}


def linear_logps(
    inputs: Inputs, way: str, *, has_entropy: bool = False, x: Tensor | None = None
) -> dict[str, Tensor]:
    """Our logps, entropy, dX and dW in this way. has_entropy: the entropy has a gradient too; x:
    hidden states in the place of the inputs'."""
    setting, vocab = inputs.setting, inputs.sizes.vocab
    x, weight = leaves(inputs, x)
    poison(setting.device)
    with forced(way, setting, len(x)):
        outputs = kernels.linear_logps(
            x,
            weight,
            inputs.targets,
            vocab_size=vocab,
            return_entropy=True,
            backend=setting.backend,
        )
        count = 2 if has_entropy else 1
        gradients = (inputs.upstream, inputs.entropy_upstream)
        torch.autograd.backward(outputs[:count], gradients[:count])
    return with_gradients(dict(zip(("logps", "entropy"), outputs, strict=True)), x, weight, vocab)


def linear_policy_loss(inputs: Inputs, way: str, *, x: Tensor | None = None) -> dict[str, Tensor]:
    """Our loss, dX and dW in this way; x: hidden states in the place of the inputs'."""
    setting, vocab = inputs.setting, inputs.sizes.vocab
    x, weight = leaves(inputs, x)
    poison(setting.device)
    with forced(way, setting, len(x)):
        loss, _ = kernels.linear_policy_loss(
            x,
            weight,
            inputs.token_ids,
            inputs.old_logps,
            inputs.advantages,
            inputs.mask,
            normalizer=inputs.normalizer,
            vocab_size=vocab,
            backend=setting.backend,
        )
        loss.backward()
    return with_gradients({"loss": loss}, x, weight, vocab)


def check_linear_logps(inputs: Inputs) -> Iterator[Finding]:
    """In every way, with a gradient of the log-probabilities, and of the entropy too."""
    for has_entropy, upstream in ((False, of_logps), (True, of_both)):
        of = functools.partial(definition, inputs, upstream=upstream)
        gold, judge = standards(inputs, lambda precision, of=of: of(precision))
        # A gradient of the entropy cannot come from kept exponentials.
        ways = [way for way in inputs.setting.ways if way != "chunks" and not has_entropy]
        for way in ways or ["columns"]:
            title = f"linear_logps {way}" + (", gradient of the entropy" if has_entropy else "")
            found = linear_logps(inputs, way, has_entropy=has_entropy)
            yield from compared(title, found, gold, judge)


def check_linear_policy_loss(inputs: Inputs) -> Iterator[Finding]:
    """In every way."""
    gold, judge = standards(inputs, lambda precision: definition(inputs, precision, of_loss))
    for way in inputs.setting.ways:
        found = linear_policy_loss(inputs, way)
        yield from compared(f"linear_policy_loss {way}", found, gold, judge)


def selective(
    function: Callable, logits: Tensor, inputs: Inputs, rows: slice, dtype: torch.dtype, **options
) -> dict[str, Tensor]:
    """Results for these rows by `function`, which is ours or the definition."""
    part = logits[rows].to(dtype).requires_grad_()
    outputs = function(
        part,
        inputs.targets[rows],
        vocab_size=inputs.sizes.vocab,
        return_entropy=True,
        **options,
    )
    arriving = of_both(inputs, rows, outputs[0])
    torch.autograd.backward(outputs, arriving)
    logps, entropy = (t.detach() for t in outputs)
    return {"logps": logps, "entropy": entropy, "dlogits": part.grad}


def badness(finding: Finding) -> tuple[bool, float]:
    """Orders findings: failures are the worst, then larger multiples of eager's error."""
    return finding.verdict == FAILED, float(finding.measured)


def check_selective_logps(inputs: Inputs) -> Iterator[Finding]:
    """A block of tokens after the other: the logits in fp64 are the largest thing here."""
    setting, tokens = inputs.setting, len(inputs.x)
    shape = (tokens, inputs.sizes.head_rows)
    logits = inputs.randn(*shape).mul_(LOGIT_STD).to(setting.dtype)
    poison(setting.device)
    everything = slice(0, tokens)
    found = selective(
        kernels.selective_logps, logits, inputs, everything, setting.dtype, backend=setting.backend
    )
    worst_of: dict[str, Finding] = {}
    for rows in pieces(tokens, TOKENS_AT_ONCE):
        of = functools.partial(selective, reference.selective_logps, logits, inputs, rows)
        gold, judge = of(torch.float64), of(torch.float32)
        part = {name: result[rows] for name, result in found.items()}
        for finding in compared("selective_logps", part, gold, judge):
            old = worst_of.get(finding.what)
            if old is None or badness(finding) > badness(old):
                worst_of[finding.what] = finding
    yield from worst_of.values()


def linear_reverse_kl(inputs: Inputs, rows: slice, x: Tensor | None = None) -> Tensor:
    """Our KL of these rows; x: hidden states in the place of the inputs'."""
    x = inputs.x if x is None else x
    poison(inputs.setting.device)
    return kernels.linear_reverse_kl(
        (x[rows], inputs.weight),
        (inputs.large_x[rows], inputs.large_weight),
        inputs.mask[rows],
        vocab_size=inputs.sizes.vocab,
        backend=inputs.setting.backend,
    )


def check_linear_reverse_kl(inputs: Inputs) -> Iterator[Finding]:
    gold, judge = standards(inputs, lambda precision: reverse_kl(inputs, precision))
    found = {"KL": linear_reverse_kl(inputs, slice(0, len(inputs.x)))}
    yield from compared("linear_reverse_kl", found, gold, judge)


def linear_divergence(inputs: Inputs, kind: str, x: Tensor | None = None) -> dict[str, Tensor]:
    """Our divergences from the large model, and dX and dW of their sum; x: as above."""
    vocab = inputs.sizes.vocab
    x, weight = leaves(inputs, x)
    poison(inputs.setting.device)
    loss, stats = kernels.linear_divergence(
        (x, weight),
        (inputs.large_x, inputs.large_weight),
        inputs.mask,
        kind=kind,
        vocab_size=vocab,
        backend=inputs.setting.backend,
    )
    loss.backward()
    return with_gradients({"values": stats["divergence"]}, x, weight, vocab)


def check_linear_divergence(inputs: Inputs) -> Iterator[Finding]:
    for kind in DIVERGENCES:
        of = functools.partial(divergence, inputs, kind=kind)
        gold, judge = standards(inputs, lambda precision, of=of: of(precision))
        found = linear_divergence(inputs, kind)
        yield from compared(f"linear_divergence {kind}", found, gold, judge)


# --- properties --------------------------------------------------------------------------------


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two runs gave the same bits."""
    return all(torch.equal(a[name], b[name]) for name in a)


def check_masked(inputs: Inputs) -> Iterator[Finding]:
    """NaN and infinity in masked tokens change no bit, and these tokens get a gradient of 0."""
    with_nan, with_infinity = inputs.behind_mask(torch.nan), inputs.behind_mask(torch.inf)
    runs = [(f"linear_policy_loss {way}", linear_policy_loss, way) for way in inputs.setting.ways]
    ways = [way for way in inputs.setting.ways if way != "chunks"]
    runs += [(f"linear_logps {way}", linear_logps, way) for way in ways]
    for title, run, way in runs:
        clean = run(inputs, way)
        dirty = [run(inputs, way, x=x) for x in (with_nan, with_infinity)]
        is_hidden = all(equal(clean, d) and not d["dX"][~inputs.mask].any() for d in dirty)
        yield holds(f"{title}: NaN, inf behind the mask", is_hidden)
    everything = slice(0, len(inputs.x))
    kl = linear_reverse_kl(inputs, everything, with_nan)
    is_hidden = torch.equal(kl, linear_reverse_kl(inputs, everything))
    yield holds("linear_reverse_kl: NaN behind the mask", is_hidden)
    clean, dirty = (linear_divergence(inputs, "jsd", x) for x in (inputs.x, with_nan))
    is_hidden = equal(clean, dirty) and not dirty["dX"][~inputs.mask].any()
    yield holds("linear_divergence: NaN behind the mask", is_hidden)


@torch.no_grad()
def values(inputs: Inputs, rows: slice) -> dict[str, Tensor]:
    """Results of the forward passes on these rows alone."""
    poison(inputs.setting.device)
    logps, entropy = kernels.linear_logps(
        inputs.x[rows],
        inputs.weight,
        inputs.targets[rows],
        vocab_size=inputs.sizes.vocab,
        return_entropy=True,
        backend=inputs.setting.backend,
    )
    return dict(logps=logps, entropy=entropy, KL=linear_reverse_kl(inputs, rows))


def check_bits(inputs: Inputs) -> Iterator[Finding]:
    """A row's result does not depend on the other rows, and is the same every time."""
    tokens = len(inputs.x)
    some = slice(tokens // 10, tokens // 5)
    whole, alone = values(inputs, slice(0, tokens)), values(inputs, some)
    for name, result in whole.items():
        yield holds(
            f"{name}: rows alone have the same bits", torch.equal(result[some], alone[name])
        )
    for way in inputs.setting.ways:
        first, again = (linear_policy_loss(inputs, way) for _ in range(2))
        yield holds(f"linear_policy_loss {way}: same bits again", equal(first, again))


CHECKS = (
    check_linear_logps,
    check_linear_policy_loss,
    check_selective_logps,
    check_linear_reverse_kl,
    check_linear_divergence,
    check_masked,
    check_bits,
)
