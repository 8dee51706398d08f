"""What the tests of numbers share: the tolerance, the device, and the backends and dtypes on it."""

import os

import torch

from bench.tolerance import MatrixUnit, assert_as_accurate_as_eager, row_error

__all__ = [
    "BACKENDS",
    "DEVICE",
    "DTYPES",
    "INTERPRETED",
    "MatrixUnit",
    "assert_as_accurate_as_eager",
    "row_error",
    "seeded",
]

# The kernels' tests run three times: on the CPU, in Triton's interpreter and on a GPU;
# test_triton.py starts the second and the third run.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("CODISTILL_TEST_DEVICE", "cpu")
BACKENDS = {"cpu": ["triton"] if INTERPRETED else ["cpu", "torch"]}.get(DEVICE, ["triton", "torch"])
# The interpreter truncates to bf16 where hardware rounds.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


def seeded(seed: int) -> torch.Generator:
    """A random generator on the tests' device."""
    return torch.Generator(DEVICE).manual_seed(seed)
