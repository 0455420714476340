"""Functions called in a forward: found in its source, and exchanged there."""
