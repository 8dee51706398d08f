"""The kernels' benchmark suite, of pytest-benchmark: `python -m bench kernels`.

A test measures one implementation of one operation on one case in one mode.
"""

from bench.plan import Measurement, Plan


def test_operation(benchmark, plan: Plan, measurement: Measurement):
    row = plan.measure(measurement, benchmark)
    assert row.status, "a row says what came of it"
