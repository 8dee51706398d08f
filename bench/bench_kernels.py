"""The kernels' benchmark suite, of pytest-benchmark: `python -m bench kernels`.

A test measures one implementation of one operation on one case in one mode. It fails where ours is
inaccurate, fails or runs out of memory; a peer that does is a row that says so.
"""

from bench.operations import OURS
from bench.plan import Measurement, Plan


def test_operation(benchmark, plan: Plan, measurement: Measurement):
    row = plan.measure(measurement, benchmark)
    assert row.is_ok or row.implementation != OURS, row.status
