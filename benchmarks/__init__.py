"""Reproducible benchmark reports; not in the wheel. `python -m benchmarks list | run NAME | report`."""
