import dataclasses

import pytest

from bench.results import OK, Row


@pytest.fixture
def make_row():
    """A row of a measurement, changed by keywords."""
    row = Row(
        device="A GPU",
        driver="1",
        torch="2.13.0",
        triton="3.9.0",
        commit="abc",
        operation="linear_policy_loss",
        model="Model",
        tokens=1000,
        hidden=64,
        vocab=2000,
        inactive=0.0,
        dtype="bf16",
        implementation="codistill_kernels",
        version="0.1.0",
        mode="both",
        status=OK,
        median_ms=10.0,
        p20_ms=9.0,
        p80_ms=11.0,
        rounds=5,
        extra_mib=100.0,
        tflops=3.0,
        matmul_tflops=4.0,
        error=1e-3,
    )
    return lambda **changes: dataclasses.replace(row, **changes)
