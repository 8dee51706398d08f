"""The C++ library (csrc/): loaded at the first call; its functions take tensors.

The library knows nothing of torch, so one build serves every torch and every Python. It multiplies
tiles by functions of ATen, found by name in the torch that runs, or by its own where that torch has
none of that name.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).with_name("libcodistill_cpu.so")
# at::native::cpublas: brgemm of float and of BFloat16, brgemm_release. The names hold the types of
# the parameters; the library compares one product of each before it trusts it.
BRGEMM = (
    "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
    "_ZN2at6native7cpublas14brgemm_releaseEb",
)
DTYPES = {  # as DType of csrc/interface.h
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
}


class View(ctypes.Structure):
    """A tensor: View of csrc/interface.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    ]


CODES = {"t": ctypes.POINTER(View), "i": ctypes.c_int64, "f": ctypes.c_double, "b": ctypes.c_bool}
PARAMETERS = {  # CODES of the parameters of each function; csrc/ has their names
    "linear_forward": "tttttfttt",
    "finish_exponentials": "ttttttttit",
    "finish_raw": "tttttfttit",
    "hidden_gradient": "ttttitb",
    "weight_gradient": "ttttitb",
    "reverse_kl": "tttftttft",
    "logits_statistics": "tittft",
    "logits_gradients": "ttittftt",
}


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; OSError where it was not built, or cannot be loaded."""
    if not PATH.exists():
        raise OSError(f"{PATH.name} is not there: no C++ compiler was found at installation")
    loaded = ctypes.CDLL(str(PATH))
    try:
        declare(loaded)
    except AttributeError as error:
        raise OSError(f"{PATH.name} was built from other sources: {error}") from None
    loaded.codistill_use_products(*products_of_torch())
    return loaded


def declare(loaded: ctypes.CDLL) -> None:
    """Give the functions their types; AttributeError where one is missing."""
    for name, parameters in PARAMETERS.items():
        function = getattr(loaded, f"codistill_{name}")
        function.argtypes = (ctypes.c_int64, *(CODES[code] for code in parameters))  # threads first
        function.restype = ctypes.c_char_p  # None, or why it failed
    loaded.codistill_use_products.argtypes = (ctypes.c_void_p,) * len(BRGEMM)
    loaded.codistill_multiplies_bf16.restype = ctypes.c_bool
    loaded.codistill_use_huge_pages.argtypes = (ctypes.c_void_p, ctypes.c_int64)


def products_of_torch() -> list[int | None]:
    """Addresses of the functions BRGEMM, None for each that this torch does not have."""
    linked = ctypes.CDLL(torch._C.__file__)  # a name is looked up in the libraries it links to, too
    functions = (getattr(linked, name, None) for name in BRGEMM)
    return [ctypes.cast(f, ctypes.c_void_p).value if f else None for f in functions]


def multiplies_bf16() -> bool:
    """Whether products of bf16 run on bf16 instructions; else operands are converted to fp32."""
    return library().codistill_multiplies_bf16() and torch.backends.mkldnn.enabled


@functools.cache
def tile_shape() -> tuple[int, int]:
    """Rows that matrices in memory are padded to, and vocabulary rows of a panel."""
    return library().codistill_tile_rows(), library().codistill_panel()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor as large as a weight or all logits, on huge pages where Linux has them.

    Page faults, one for every 4 KiB, took 3 to 7 % of the time of a loss.
    """
    out = torch.empty(shape, dtype=dtype)
    library().codistill_use_huge_pages(out.data_ptr(), out.nbytes)
    return out


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Run a function of PARAMETERS on as many threads as torch; results go into the arguments."""
    converted = [view(a) if isinstance(a, Tensor) else a for a in arguments]
    function = getattr(library(), f"codistill_{name}")
    reason = function(torch.get_num_threads(), *converted)
    if reason is not None:
        raise RuntimeError(f"codistill_{name}: {reason.decode()}")


def view(tensor: Tensor) -> View:
    """The view of a CPU tensor [rows] or [rows, columns], contiguous in its last dimension."""
    shape, strides = tensor.shape, tensor.stride()
    assert tensor.is_cpu and (strides[-1] == 1 or shape[-1] <= 1), (tensor.device, strides)
    columns, stride = (shape[1], strides[0]) if len(shape) == 2 else (1, 1)
    return View(tensor.data_ptr(), DTYPES[tensor.dtype], shape[0], columns, stride)
