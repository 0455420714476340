"""Studies of mixture-of-experts models: experts in FP8, and where they should lie."""
