"""Equivalent mods on trial: what reads what, what is gained, and whether the model still computes the same."""
