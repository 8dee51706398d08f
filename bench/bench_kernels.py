"""The kernels' benchmark suite for pytest-benchmark: `python -m bench kernels`.

A test measures one implementation of one operation on one case in one mode. It fails if one of ours
is inaccurate, raises an error or runs out of memory; of a peer the row of the table says so.
"""

from bench.plan import Measurement, Plan


def test_operation(benchmark, plan: Plan, measurement: Measurement):
    row = plan.measure(measurement, benchmark)
    assert row.is_ok or not row.is_ours, row.status
