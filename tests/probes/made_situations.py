"""What every situation of a capture is compared with: a plain eager run of the same model."""

from tests.probes.made_probe import PASSES_OF_TWO, seen


def assert_as_eager(run, steps, expected=PASSES_OF_TWO, samples=2):
    assert [seen(step) for step in steps] == [expected] * samples
    assert run.progress.status == "complete"
    assert run.progress.unattributed == 0
    for step in steps:
        for entry in step.products:
            assert all(error.row_error < 0.2 for error in entry.errors.values())
            assert len(entry.errors) == 4
