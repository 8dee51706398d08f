"""The C++ library by itself: its 16-bit floats, its threads, and whom it lets multiply."""

import ctypes
import subprocess
import sys
import textwrap

import pytest
import torch
from numerics import BACKENDS

from codistill_kernels import _native, linear_logps

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ backend")
SHORT = [torch.bfloat16, torch.float16]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """[65536], infinities and NaNs too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def around(values: torch.Tensor) -> torch.Tensor:
    """In fp32: the values, what lies half-way to the next half and bf16, and one ulp off each."""
    bits = values.float().view(torch.int32)
    points = torch.cat([bits, bits + 2**12, bits + 2**15])
    return torch.cat([points - 1, points, points + 1]).view(torch.float32)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_short_floats_become_fp32_exactly(dtype):
    """A row with one logit has it as its maximum."""
    values = every_value(dtype)
    out = torch.empty(4, len(values))
    ids, ones = torch.zeros(len(values), dtype=torch.int64), torch.ones(len(values))
    _native.call("logits_statistics", values[:, None], 1, ids, ones, 0.0, out)
    finite = values.isfinite()
    assert torch.equal(out[0, finite], values[finite].float())
    assert out[0, values.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_fp32_is_rounded_as_torch_rounds(dtype):
    """The gradient of one hidden state through a head of one row is that row."""
    row = around(every_value(dtype))[None]
    dz, out = torch.zeros(1, 16 * 256), torch.empty(row.shape, dtype=dtype)
    dz[0, 0] = 1.0
    one, first = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    product = _native.DTYPES[torch.float32]
    _native.call("hidden_gradient", dz, row, one, first, product, out, False)
    assert torch.equal(out.isnan(), row.isnan())
    torch.testing.assert_close(out, row.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_product_that_is_wrong_is_not_used():
    signature = [ctypes.c_int64] * 6 + [ctypes.c_bool] + [ctypes.c_void_p] * 3 + [ctypes.c_bool]
    calls = []
    wrong = ctypes.CFUNCTYPE(None, *signature)(lambda *arguments: calls.append(arguments))
    address = ctypes.cast(wrong, ctypes.c_void_p)
    _, _, release = _native.products_of_torch()
    x, weight, ids = torch.randn(5, 24), torch.randn(300, 24), torch.arange(5)
    expected = linear_logps(x, weight, ids, backend="torch")
    try:
        _native.library().codistill_use_products(address, address, release)
        asked = len(calls)
        found = linear_logps(x, weight, ids, backend="cpu")
        assert asked > 0 and len(calls) == asked and not _native.multiplies_bf16()
    finally:
        _native.library().codistill_use_products(*_native.products_of_torch())
    torch.testing.assert_close(found, expected)


def test_products_of_this_torch_are_used():
    """Their names, in BRGEMM, are those of the torch that is tested with."""
    assert None not in _native.products_of_torch()


def test_library_of_other_sources_does_not_load(monkeypatch):
    monkeypatch.setitem(_native.PARAMETERS, "something_new", "t")
    with pytest.raises(OSError, match="built from other sources: .*something_new"):
        _native.library.__wrapped__()


def test_wrong_dtype_is_an_error():
    x, wide = torch.zeros(16, 16), torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="codistill_reverse_kl: .* dtype"):
        _native.call("reverse_kl", x, x, wide, 0.0, x, x, wide, 0.0, torch.empty(1))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_are_those_of_torch():
    """The library runs on as many threads as torch says now, and on those that torch started."""
    code = textwrap.dedent("""
        import os, torch
        from codistill_kernels import selective_logps
        count = lambda: len(os.listdir("/proc/self/task"))
        logits, ids = torch.randn(64, 4096), torch.zeros(64, dtype=torch.int64)
        torch.set_num_threads(1)
        selective_logps(logits, ids, backend="cpu")
        alone = count()
        selective_logps(logits, ids, backend="cpu")
        assert count() == alone
        torch.set_num_threads(3)
        selective_logps(logits, ids, backend="cpu")
        assert count() == alone + 2, (count(), alone)
        torch.randn(10**7).exp_()
        assert count() == alone + 2, "two pools"
    """)
    subprocess.run([sys.executable, "-c", code], check=True)
