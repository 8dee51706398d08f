"""The cases that a run can measure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.operations import OPERATIONS, OURS
from bench.shapes import (
    MODELS,
    PAIR,
    PAPER_MODELS,
    VOCABULARY,
    Shape,
    head_shape,
    pair_shape,
    rollout_shape,
)

HEADS = ("linear_policy_loss", "linear_logps", "linear_cross_entropy")
INACTIVE = (0.3, 0.6)
GROWING = (OURS, "eager", "TRL chunked", "cut-cross-entropy")


@dataclass(frozen=True)
class Case:
    """An operation at one size, in some of its modes, by some of its implementations."""

    operation: str
    shape: Shape
    modes: tuple[str, ...]
    implementations: tuple[str, ...] = ()
    """Names of those to measure; empty: all that the operation has."""
    is_goal: bool = False
    """Whether our implementation is measured before anything else."""

    def names(self) -> list[str]:
        """Names of the implementations to measure, in the order of the operation's."""
        names = OPERATIONS[self.operation].implementations()
        return [name for name in names if name in (self.implementations or names)]


def main_cases(is_cpu: bool) -> Iterator[Case]:
    """Each operation at the models' sizes."""
    tokens = 1024 if is_cpu else 8192
    for operation in HEADS:
        models = PAPER_MODELS if operation == "linear_policy_loss" or not is_cpu else PAIR[:1]
        for model in models:
            shape = head_shape(model, tokens, is_cpu=is_cpu)
            # The backward pass alone is measured on one model: it says little where gradients are
            # made in the forward pass, as here and in Liger.
            modes = OPERATIONS[operation].modes if model == PAIR[0] else ("forward", "both")
            yield Case(operation, shape, modes)
    small = head_shape(PAIR[0], tokens, is_cpu=is_cpu)
    logits = Shape(PAIR[0], tokens, vocab=small.vocab)
    rollouts = rollout_shape(prompts=64, tokens=512)
    shapes = {
        "codistill_losses": pair_shape(tokens, is_cpu=is_cpu, logit_gap=0.02),
        "linear_reverse_kl": pair_shape(tokens, is_cpu=is_cpu),
        "linear_divergence": pair_shape(tokens, is_cpu=is_cpu, has_teacher=True),
        "selective_logps": logits,
    }
    for name, operation in OPERATIONS.items():
        if name not in HEADS:
            yield Case(name, shapes.get(name, rollouts), operation.modes)


def inactive_cases(is_cpu: bool) -> Iterator[Case]:
    """The loss with a share of its tokens masked out."""
    models = ((PAIR[0], 1024),) if is_cpu else ((PAIR[0], 8192), ("Llama-3.1-8B", 4096))
    for model, tokens in models:
        for share in INACTIVE:
            shape = head_shape(model, tokens, is_cpu=is_cpu, inactive=share)
            yield Case("linear_policy_loss", shape, ("both",))


def goal_cases(is_cpu: bool) -> Iterator[Case]:
    """The shapes that the kernels are judged by on a Hopper GPU; other projects publish them."""
    if is_cpu:
        return
    for model, tokens in (("Llama-3.1-8B", 4096), ("Qwen3-8B", 8192)):
        shape = head_shape(model, tokens, is_cpu=False)
        yield Case("linear_policy_loss", shape, ("both",), is_goal=True)
        yield Case("linear_logps", shape, ("forward", "both"), is_goal=True)
        yield Case("linear_cross_entropy", shape, ("both",), is_goal=True)
    yield Case("linear_reverse_kl", larger_pair(), ("forward",), is_goal=True)
    for operation in ("linear_policy_loss", "linear_logps"):
        yield Case(operation, odd_head(), ("both",), (OURS, "eager"), is_goal=True)


def odd_head() -> Shape:
    """A head as a trainer has it: of its rows an odd number is the vocabulary."""
    hidden, rows = MODELS[PAIR[0]]
    return Shape(PAIR[0], 8192, hidden, VOCABULARY, head_rows=rows)


def larger_pair() -> Shape:
    """Both models of the paper, and as many tokens as are scored at once."""
    return pair_shape(16384, is_cpu=False)


def growth_cases(is_cpu: bool) -> Iterator[Case]:
    """The loss with more and more tokens, and with more and more of the vocabulary."""
    model = PAIR[0]
    middle = 1024 if is_cpu else 8192
    whole = head_shape(model, middle, is_cpu=is_cpu)
    for tokens in (512, 2048, 4096) if is_cpu else (512, 2048, 32768, 65536):
        yield growing(head_shape(model, tokens, is_cpu=is_cpu))
    for part in (4, 2):
        yield growing(Shape(f"{model} / {part}", middle, whole.hidden, whole.vocab // part))


def growing(shape: Shape) -> Case:
    """The loss at this size, by the implementations whose growth is shown."""
    return Case("linear_policy_loss", shape, ("both",), GROWING)


def quick_cases(is_cpu: bool) -> Iterator[Case]:
    """One small case of each operation, to see that everything runs."""
    for case in main_cases(is_cpu):
        if not case.shape.vocab:
            yield case
        elif case.shape.model in (PAIR[0], "+".join(PAIR)):
            yield replace(case, shape=replace(case.shape, tokens=256, vocab=4096))


SETS = {
    "goals": goal_cases,
    "main": main_cases,
    "inactive": inactive_cases,
    "growth": growth_cases,
    "quick": quick_cases,
}


def cases(sets: list[str], operations: list[str], *, is_cpu: bool) -> list[Case]:
    """The cases of these sets that are about these operations (all if empty), each once."""
    found: dict[tuple, Case] = {}
    for name in sets:
        for case in SETS[name](is_cpu):
            if not operations or case.operation in operations:
                found.setdefault((case.operation, case.shape), case)
    return list(found.values())


def in_order(cases: list[Case]) -> list[tuple[Case, str]]:
    """Every case with every implementation to measure. Ours at the goals come first, so that a run
    that is cut off has them; otherwise those of a case follow each other and share its inputs."""
    pairs = [(case, name) for case in cases for name in case.names()]
    return sorted(pairs, key=lambda pair: not (pair[0].is_goal and pair[1] == OURS))
