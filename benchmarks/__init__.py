"""Side-by-side studies and their dated results; run each as `python -m benchmarks.NAME`."""
