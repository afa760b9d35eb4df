"""`pytest bench/`: our variant of every quick case under pytest-benchmark, checked first."""

import pytest

from bench.measure import OURS, Timing, check


def test_op(case, benchmark):
    work = case.make()
    work.variants = {name: f for name, f in work.variants.items() if name in (OURS, work.same_dtype)}
    timings = {name: Timing() for name in work.variants}
    check(work, timings)
    if timings[OURS].failed:
        pytest.fail(timings[OURS].failed)
    benchmark.group = case.op
    benchmark.pedantic(work.variants[OURS], setup=work.reset, rounds=5, warmup_rounds=1)
