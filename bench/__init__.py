"""Benchmarks: one `bench_<op>.py` an op, all on `runner`. `python -m bench --help`."""
