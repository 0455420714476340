"""Experts told apart: tokens and error of each, which part a site plays in their layer, verdicts."""
