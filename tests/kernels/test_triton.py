"""The Triton backend: the tests of the kernels once more, by its interpreter and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SUITES = [
    HERE / f"test_{name}.py"
    for name in (
        "exponentials",
        "linear_divergence",
        "linear_divergence_surroundings",
        "linear_logps",
        "linear_policy_loss",
        "linear_reverse_kl",
        "linear_token_loss",
        "rows_of_sequences",
        "selective_logps",
        "surroundings",
    )
]


def run(*arguments: str, **environment: str) -> None:
    """pytest on the suites, in a process of its own: Triton asks for its mode when imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, SUITES)]
    done = subprocess.run(
        [*command, *arguments],
        env=os.environ | environment,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "triton" in done.stdout and " passed" in done.stdout


def test_interpreted():
    """Without what takes long there and is no property of the kernels."""
    slow = ("large", "H896", "sharded", "compile", "opcheck", "equal_bits")
    chosen = " and ".join(f"not {name}" for name in slow)
    run("-rA", "-k", chosen, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpu():
    run("-rA", "-k", "not sharded", CODISTILL_TEST_DEVICE="cuda")
