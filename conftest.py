"""Every test starts with an empty param store, a fixed seed and Pyro's validation on."""

import os

import pyro
import pytest
import torch
from hypothesis import settings

# PYRO_ILVAE_TEST_DEVICE=cuda runs the suite with another default device.
DEVICE = os.environ.get("PYRO_ILVAE_TEST_DEVICE")
if DEVICE:
    torch.set_default_device(DEVICE)

# Small matrix products wait for each other on more threads.
torch.set_num_threads(1)

# Deadlines measure the machine, not the law; derandomized so that a failure on one machine is one on all.
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=25)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "laws"))


def pytest_collection_modifyitems(items):
    for item in items:
        if DEVICE and isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.skip(reason="examples print tensors without their device"))


@pytest.fixture(autouse=True)
def _fresh_pyro():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield


@pytest.fixture(params=[False, True], ids=["global-params", "local-params"])
def local_params(request):
    """Runs a test with Pyro's global param store and with module-local parameters."""
    with pyro.settings.context(module_local_params=request.param):
        yield request.param
