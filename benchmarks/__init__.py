"""Measurements, side by side in one run, as ratios: `make bench`, or `python -m benchmarks NAME`."""
