"""Which backend runs, and why another one does not."""

import functools
import importlib
import logging
import os

import torch

from codistill_kernels import _native
from codistill_kernels._checks import require

log = logging.getLogger("codistill_kernels")
BACKENDS = ("auto", "triton", "cpu", "torch")


@functools.cache
def library_error() -> str | None:
    """Why the C++ library cannot be loaded; None: it is loaded now."""
    try:
        _native.library()
    except OSError as error:
        return str(error)
    return None


@functools.cache
def report_fallback(wanted: str, error: str) -> None:
    log.warning("codistill_kernels: the torch backend serves for %r: %s", wanted, error)


@functools.cache
def triton_error() -> str | None:
    """Why Triton cannot be imported; None: it is imported now."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return str(error)
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: "triton", "cpu" or "torch".

    Raises:
        ValueError: the backend is unknown, or it is asked for by name and the device, the dtype or
            the installation does not allow it.
    """
    require(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    fused = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "torch")
    if dtype == torch.float64:
        fused = "torch"
    if backend == "torch" or (backend == "auto" and fused == "torch"):
        return "torch"
    wanted = fused if backend == "auto" else backend
    # TRITON_INTERPRET=1 runs Triton kernels on the CPU, for debugging and tests.
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    expected = {
        "triton": "float32, bfloat16 or float16 tensors on a GPU",
        "cpu": "float32, bfloat16 or float16 tensors on the CPU",
    }[wanted]
    possible = wanted == fused or (interpreted and dtype != torch.float64)
    require(possible, f"backend {wanted!r}", expected, f"{dtype} on {device}")
    error = triton_error() if wanted == "triton" else library_error()
    if error is None:
        return wanted
    if backend != "auto":
        needed = {
            "triton": "triton installed",
            "cpu": "its C++ library (install again, with a C++ compiler)",
        }[wanted]
        raise ValueError(f"backend {wanted!r} must have {needed}, got: {error}")
    report_fallback(wanted, error)
    return "torch"
