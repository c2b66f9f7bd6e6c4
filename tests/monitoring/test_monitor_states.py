"""States of a monitor that are none, and logs that raise."""

from contextlib import suppress

import pytest
from helpers.models import X, vae_with

from pyro_ilvae import CollapseMonitor


def own(**options):
    vae = vae_with()
    return CollapseMonitor(vae.model, vae.guide, X, num_samples=2, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"losses": None},
        {"losses": {}},
        {"losses": {"total": "a", "num_losses": 1, "num_non_finite": 0}},
        {"losses": {"total": 1.0, "num_losses": -1, "num_non_finite": 0}},
        {"history": 3},
        {"history": [3]},
        {"history": [{"step": 3}]},
        {"num_steps_taken": "a"},
        {"num_logged": -1},
    ],
    ids=str,
)
def test_a_state_that_is_none_names_the_entry_and_changes_nothing(change):
    monitor = own(every=2)
    monitor.step(1.0)
    before = monitor.state_dict()
    with pytest.raises((ValueError, TypeError), match=f"Expected state\\['{next(iter(change))}'\\]"):
        monitor.load_state_dict({**before, "num_steps_taken": 7, **change})
    assert monitor.state_dict() == before
    assert "at step 1" in repr(monitor)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_log_that_raises_loses_no_step_and_no_record(size):
    logged = []

    def log(record):
        logged.append(record["step"])
        raise OSError("no room on the disk")

    monitor = own(every=size, log=log)
    for step in range(1, 7):
        with suppress(OSError):
            monitor.step(float(step))
        assert monitor.num_steps_taken == step
    assert [record["step"] for record in monitor.history] == list(range(0, 7, size))
    # The records that wait are logged by the next steps, each once.
    assert logged == [record["step"] for record in monitor.history][: len(logged)]
    for record in monitor.history[1:]:
        assert record["loss"] == record["step"] - (size - 1) / 2
