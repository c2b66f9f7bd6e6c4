"""No picture needs a display, and each test starts and ends without figures."""

import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def _agg_figures():
    plt.switch_backend("agg")
    plt.close("all")
    yield
    plt.close("all")
