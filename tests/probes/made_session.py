"""What the tests of a probe's session share."""

import warnings

import loka
from loka.errors import LokaWarning


def warned(model, tmp_path, loop, told, **options):
    """Run a loop under the probe; collect the words of LoKA's warnings in `told`; return the probe."""
    probe = loka.probe(model, tmp_path / "run.db", **({"every": 2, "overhead": 100.0} | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with probe:
                loop(probe)
        finally:
            told += [str(entry.message) for entry in caught if entry.category is LokaWarning]
    return probe
