"""The Triton backend: the tests of the kernels once more, by its interpreter and on a GPU."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# Halves that take the interpreter about as long: it has one thread, so two run at once.
HALVES = (
    (
        "exponentials",
        "linear_divergence",
        "linear_reverse_kl",
        "rows_of_sequences",
        "selective_logps",
    ),
    (
        "linear_divergence_surroundings",
        "linear_logps",
        "linear_policy_loss",
        "linear_token_loss",
        "surroundings",
    ),
)


def run(suites: tuple[str, ...], *arguments: str, **environment: str) -> None:
    """pytest on these files, in a process of its own: Triton asks for its mode when imported."""
    files = (str(HERE / f"test_{name}.py") for name in suites)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *files]
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
    one_thread = dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run, half, "-k", chosen, **one_thread) for half in HALVES]
    for one in runs:
        one.result()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpu():
    run(sum(HALVES, ()), "-k", "not sharded", CODISTILL_TEST_DEVICE="cuda")
