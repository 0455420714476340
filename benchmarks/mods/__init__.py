"""What the mods are worth on trained models and real data."""
