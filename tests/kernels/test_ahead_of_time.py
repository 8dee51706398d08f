"""Every Triton kernel compiles for every GPU of the tile table, into what it was written for."""

import csv
from dataclasses import astuple

import pytest

from bench.ahead_of_time import SHARED_LIMIT_KIB, TABLE, compile_all, compile_kernel, variants

MATMULS = ("linear_statistics_kernel", "reverse_kl_kernel")


@pytest.fixture(scope="module")
def compiled():
    return compile_all()


def test_products_spill_nothing_and_fit(compiled):
    rows = [row for row in compiled if row.kernel in MATMULS]
    assert {row.capability for row in rows} == {80, 90, 100}
    for row in rows:
        assert row.spilled_bytes == 0, row
        assert row.shared_bytes <= SHARED_LIMIT_KIB[row.capability] * 1024, row


@pytest.mark.parametrize(
    ("capability", "instructions"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05.mma")]
)
def test_products_of_halves_run_on_tensor_cores(compiled, capability, instructions):
    found = {
        row.instructions
        for row in compiled
        if row.kernel in MATMULS and (row.capability, row.dtype) == (capability, "bf16")
    }
    assert found == {instructions}


def test_table_names_these_kernels_and_tiles(compiled):
    """Its registers are of one Triton version; which kernels and tiles there are, is ours."""
    with TABLE.open(newline="") as file:
        _, *rows = csv.reader(file)
    names = [tuple(row[:5]) for row in rows]
    assert names == [tuple(map(str, astuple(row)[:5])) for row in compiled]


@pytest.mark.parametrize(
    "variant",
    [v for v in variants() if v.capability == 90 and not any(on for _, on in v.flags)]
    + [v for v in variants() if v.capability == 90 and v.kernel.startswith("logit_")],
    ids=lambda variant: f"{variant.kernel}-{variant.dtype}",
)
def test_sizes_of_one_compile(variant):
    """Triton makes constants of them, which have not all that tensors have."""
    assert compile_kernel(variant, sizes_are_one=True).asm["cubin"]
