"""Predict from early steps, measure on later unseen ones; run it as `python -m benchmarks.truth`."""
