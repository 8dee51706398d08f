"""Checked arguments of the operations on two linear heads, a student's and a teacher's."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from codistill_kernels._checks import (
    of_both,
    require,
    require_device,
    require_float,
    require_logit_scale,
    require_mask,
    require_scaling,
    require_shape,
    require_tensor,
)
from codistill_kernels._linear.head import Head
from codistill_kernels._linear.inputs import temperatures
from codistill_kernels._shards import require_plain, whole_head
from codistill_kernels._tokens import TokenShape

Model: TypeAlias = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]
Scaling: TypeAlias = float | tuple[float, float]
Softcap: TypeAlias = float | None | tuple[float | None, float | None]


@dataclass(frozen=True)
class ModelInputs:
    """Checked arguments of one model, flat."""

    hidden_states: Tensor
    """[N, H]"""
    head: Head
    """With all its rows, also those outside the vocabulary."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self.hidden_states, self.head.weight, self.head.bias, self.head.temperature


@dataclass(frozen=True)
class PairInputs:
    """Checked arguments of an operation on two models, flat."""

    student: ModelInputs
    teacher: ModelInputs
    """Detached."""
    mask: Tensor | None
    """[N] bool"""
    vocab: int
    """Rows of both heads that belong to the vocabulary."""
    shape: TokenShape
    """How the caller brought the tokens."""


def prepare_pair(
    student: Model,
    teacher: Model,
    mask: Tensor | None,
    *,
    temperature: float | Tensor,
    softcap: Softcap,
    logit_scale: Scaling,
    vocab_size: int | None,
    takes_bias: bool,
) -> PairInputs:
    """Check the arguments of an operation on two models, and bring them to flat tokens.

    takes_bias: whether a model may be a triple with its head's bias.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        check_model(name, model, takes_bias)
    shape = TokenShape(student[0].shape[:-1])
    expected = "([N, H] or [B, T, H], [V, H])"
    require(len(shape.shape) in (1, 2), "student", expected, tuple(student[0].shape))
    flat = [
        (
            shape.flat_states(name, model[0]),
            *(t if t is None else whole_head(name, t) for t in rest),
        )
        for name, model, rest in (
            ("student", student, student[1:]),
            ("teacher", teacher, teacher[1:]),
        )
    ]
    mask, temperature = shape.flat(mask=mask, temperature=temperature)
    vocab_size = check_inputs(flat[0], flat[1], mask, vocab_size)
    softcaps = of_both("softcap", softcap, "the student's, the teacher's")
    scales = of_both("logit_scale", logit_scale, "the student's, the teacher's")
    models = []
    for model, cap, scale in zip(flat, softcaps, scales, strict=True):
        hidden_states, weight, *bias = model
        require_scaling(temperature, cap, hidden_states.shape[:1])
        require_logit_scale(scale)
        # In the dtype of the student's softmax. The scale becomes part of temperature and softcap,
        # as in `_linear.inputs.prepare`.
        per_token = temperatures(temperature, hidden_states.shape[:1], flat[0][0], scale)
        head = Head(weight, bias[0] if bias else None, per_token.contiguous(), (cap or 0.0) / scale)
        models.append(ModelInputs(hidden_states, head))
    return PairInputs(models[0], detached(models[1]), mask, vocab_size, shape)


def detached(model: ModelInputs) -> ModelInputs:
    """The same model, outside every graph."""
    hidden_states, weight, bias, temperature = model.tensors()
    bias = None if bias is None else bias.detach()
    head = Head(weight.detach(), bias, temperature, model.head.softcap)
    return ModelInputs(hidden_states.detach(), head)


def check_model(name: str, model: Model, takes_bias: bool) -> None:
    letters = "(hidden states, weight)" + takes_bias * " or (hidden states, weight, bias)"
    is_model = isinstance(model, tuple | list) and len(model) in (2, 2 + takes_bias)
    got = len(model) if isinstance(model, tuple | list) else type(model).__name__
    require(is_model, name, letters, got)
    hidden_states, weight, *bias = model
    require_plain(name, hidden_states)
    for tensor in (weight, *(t for t in bias if t is not None)):
        require_tensor(name, tensor)


def check_inputs(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None, vocab: int | None
) -> int:
    """The size of the vocabulary, checked with all else."""
    tokens = len(student[0])
    for name, (hidden, weight, *bias) in (("student", student), ("teacher", teacher)):
        require(hidden.ndim == 2, name, "([N, H], [V, H])", tuple(hidden.shape))
        require_shape(name, hidden, (tokens, hidden.shape[-1]), "([N, H], ...)")
        require(weight.ndim == 2, name, "([N, H], [V, H])", tuple(weight.shape))
        require_shape(name, weight, (len(weight), hidden.shape[-1]), "(..., [V, H])")
        biases = [t for t in bias if t is not None]
        for tensor in biases:
            require_shape(name, tensor, (len(weight),), "(..., bias [V])")
        for tensor in (hidden, weight, *biases):
            require_float(name, tensor)
            require_device(name, tensor, "student", student[0])
    require_mask(mask, tokens, "student", student[0])
    common = min(len(student[1]), len(teacher[1]))
    vocab = common if vocab is None else vocab
    require(0 < vocab <= common, "vocab_size", f"in 1 .. {common}", vocab)
    return vocab
