"""Routing traces: which experts the tokens of each request go to, recorded, read and described."""
