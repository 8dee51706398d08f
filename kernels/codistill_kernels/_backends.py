"""Which implementation runs."""

import functools
import importlib
import logging

import torch

log = logging.getLogger("codistill_kernels")
BACKENDS = ("auto", "cpu", "torch")


@functools.cache
def extension_error() -> str | None:
    """Load the compiled extension; why it cannot be loaded, or None."""
    try:
        importlib.import_module("codistill_kernels._C")
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def report_fallback() -> None:
    log.warning("codistill_kernels: the torch backend serves on the CPU: %s", extension_error())


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: "cpu" or "torch".

    Raises:
        ValueError: unknown, or "cpu" and the extension, the device or the dtype does not allow it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    possible = device.type == "cpu" and dtype != torch.float64
    if backend == "torch" or (backend == "auto" and not possible):
        return "torch"
    if not possible:
        raise ValueError(
            f"backend 'cpu' must have float32, bfloat16 or float16 tensors on the CPU, "
            f"got {dtype} on {device}"
        )
    if extension_error() is None:
        return "cpu"
    if backend == "cpu":
        raise ValueError(
            "backend 'cpu' must have the compiled extension (pip install --no-build-isolation .), "
            f"got: {extension_error()}"
        )
    report_fallback()
    return "torch"
