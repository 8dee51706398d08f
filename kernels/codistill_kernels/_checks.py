"""Checks of arguments, made by public functions alone: a ValueError names the argument."""

import math
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def can_look(tensor: Tensor) -> bool:
    """Whether values may be checked: on a GPU one would wait for them, a graph would break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got}")


def require_tensor(
    name: str, value: object, like_name: str = "", like: Tensor | None = None
) -> None:
    """The value is a tensor, on the device of `like` if that is given."""
    is_tensor = isinstance(value, Tensor)
    module = "" if is_tensor else f"{type(value).__module__}."
    require(is_tensor, name, "a torch.Tensor", f"{module}{type(value).__name__}")
    if like is not None:
        assert isinstance(value, Tensor)
        require_device(name, value, like_name, like)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may lie in the same memory, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    expected = f"{letters} = {shape}"
    require(tuple(tensor.shape) == shape, name, expected, tuple(tensor.shape))


def require_float(name: str, tensor: Tensor) -> None:
    require(tensor.dtype in FLOATS, name, "float32, bfloat16, float16 or float64", tensor.dtype)


def require_mask(
    mask: Tensor | None, tokens: int, like_name: str = "", like: Tensor | None = None
) -> None:
    if mask is not None:
        require_tensor("mask", mask, like_name, like)
        require_shape("mask", mask, (tokens,), "[N]")
        require(mask.dtype == torch.bool, "mask", "bool (mask.bool() of 0 and 1)", mask.dtype)


def require_sequences(cu_seqlens: Tensor, tokens: int, like_name: str, like: Tensor) -> None:
    """cu_seqlens is [S + 1] integers that rise from 0 to `tokens`, where one can look."""
    require_tensor("cu_seqlens", cu_seqlens, like_name, like)
    require(
        cu_seqlens.ndim == 1
        and cu_seqlens.shape[0] > 0
        and cu_seqlens.dtype in (torch.int32, torch.int64),
        "cu_seqlens",
        "[S + 1] int32 or int64",
        (tuple(cu_seqlens.shape), cu_seqlens.dtype),
    )
    if can_look(cu_seqlens):
        rising = bool((cu_seqlens.diff() >= 0).all())
        ends = [cu_seqlens[0].item(), cu_seqlens[-1].item()]
        require(
            rising and ends == [0, tokens],
            "cu_seqlens",
            f"rising from 0 to N = {tokens}",
            cu_seqlens.tolist(),
        )


def require_normalizer(normalizer: float | Tensor) -> None:
    """The normalizer is a scalar, and not negative where one can look."""
    if isinstance(normalizer, Tensor):
        require_shape("normalizer", normalizer, (), "a scalar")
        real = not normalizer.is_complex() and not normalizer.is_meta
        require(real, "normalizer", "a real number", (normalizer.dtype, normalizer.device))
    else:
        expected = "a number or a torch.Tensor"
        require(isinstance(normalizer, Real), "normalizer", expected, type(normalizer).__name__)
    if not isinstance(normalizer, Tensor) or can_look(normalizer):
        require(normalizer >= 0, "normalizer", ">= 0", normalizer)


def require_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    expected = f"on {other.device} like {other_name}"
    require(tensor.device == other.device, name, expected, tensor.device)


def require_token_ids(token_ids: Tensor, shape: tuple[int, ...]) -> None:
    require(token_ids.dtype == torch.int64, "token_ids", "int64", token_ids.dtype)
    require_shape("token_ids", token_ids, shape, "[...]")


def require_in_vocabulary(token_ids: Tensor, active: Tensor, vocab_size: int) -> None:
    if can_look(token_ids):
        wrong = token_ids[active & ((token_ids < 0) | (token_ids >= vocab_size))]
        allowed = f"in [0, {vocab_size}) where it counts"
        require(not len(wrong), "token_ids", allowed, wrong[:3].tolist())


def nan_where_outside(
    temperature: Tensor, token_ids: Tensor, active: Tensor, vocab_size: int
) -> Tensor:
    """temperature [N], NaN where `require_in_vocabulary` would refuse the id if it could look.

    All that follows from such a row is then NaN, where it would be finite and mean nothing.
    """
    if can_look(token_ids):
        return temperature
    is_outside = active & ((token_ids < 0) | (token_ids >= vocab_size))
    return torch.where(is_outside, torch.nan, temperature)


def require_scaling(
    temperature: float | Tensor, softcap: float | None, shape: tuple[int, ...]
) -> None:
    """temperature is a number or a tensor of this shape; softcap a number or None."""
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            require_shape("temperature", temperature, shape, "[...]")
        if can_look(temperature):
            wrong = temperature[~((temperature > 0) & temperature.isfinite())]
            require(not len(wrong), "temperature", "> 0 and finite", wrong[:3].tolist())
    else:
        require(0 < temperature < math.inf, "temperature", "> 0 and finite", temperature)
    # fp32 kernels divide by the softcap and multiply with it.
    valid = softcap is None or 1e-30 <= softcap <= 1e30
    require(valid, "softcap", "in 1e-30 .. 1e30, or None", softcap)


def require_logit_scale(logit_scale: float) -> None:
    valid = isinstance(logit_scale, Real) and 0 < logit_scale < math.inf
    require(valid, "logit_scale", "a number > 0 and finite", logit_scale)


def of_both(name: str, value: object, models: str) -> tuple:
    """(the first model's, the second model's) of an option, which may be one for both."""
    values = value if isinstance(value, tuple) else (value, value)
    require(len(values) == 2, name, f"one for both, or ({models})", values)
    return values


def require_logps(name: str, logps: Tensor) -> None:
    require_tensor(name, logps)
    require(logps.ndim == 1, name, "[N]", tuple(logps.shape))
    require_float(name, logps)
