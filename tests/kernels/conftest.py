from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numerics import DEVICE, INTERPRETED


def exp2_of_a_gpu(x: np.ndarray) -> np.ndarray:
    """ex2.approx.ftz: a result that would be subnormal is 0."""
    result = np.exp2(x)
    return np.where(result < np.float32(2.0**-126), np.float32(0), result)


@pytest.fixture(scope="session", autouse=True)
def patch_language_once():
    """The interpreter puts its functions into triton.language at every launch, and again at every
    call from one function of a kernel to another: half of its time. Here they stay in."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        yield
    scope.restore()


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    if INTERPRETED:  # small vocabularies and few tokens must have several slabs too
        from triton.runtime.interpreter import InterpreterBuilder

        from codistill_kernels._linear import slab_sizes

        monkeypatch.setattr(
            InterpreterBuilder, "create_exp2", lambda self, x: self.unary_op(x, exp2_of_a_gpu)
        )
        monkeypatch.setattr(slab_sizes, "SEGMENT", 512)
        monkeypatch.setattr(slab_sizes, "ROWS", 32)
        monkeypatch.setattr(slab_sizes, "ROW_PADDING", 16)
        monkeypatch.setattr(slab_sizes, "SLAB_BYTES", 4 * 32 * 512)
    with torch.device(DEVICE):
        yield
