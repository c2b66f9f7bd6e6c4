"""Pictures of guaranteed and found information against the dial in nats."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers.pictures import NAN, OKABE_ITO, legend, result
from matplotlib.colors import to_hex

from pyro_ilvae.diagnostics import GuaranteedInformation, KLDivergence, MutualInformation
from pyro_ilvae.plots import plot_guaranteed_information

NUMBERS = {"floor": [4.0, 0.0, 2.0], "by_jacobian": [[4.5, 1.0, 3.0], [4.7, 1.4, NAN]]}


def guaranteed(floor, by_jacobian):
    return result(GuaranteedInformation, floor=floor, by_jacobian=by_jacobian)


def drawn(ax):
    """The points and the line of each curve."""
    data = [sorted(zip(*(values.tolist() for values in line.get_data()), strict=True)) for line in ax.lines]
    return list(zip(data[::2], data[1::2], strict=True))


def test_each_seed_is_a_point_and_a_line_joins_the_medians():
    information = [[5.0, 2.0, 4.0], [7.0, 2.5, 4.5]]
    ax = plot_guaranteed_information([2.0, 0.0, 1.0], NUMBERS, information=information, kl=[6, 3, 4])
    floor, jacobian, information, kl = drawn(ax)
    assert floor == ([(0, 0), (1, 2), (2, 4)],) * 2
    assert jacobian[0] == [(0, 1.0), (0, 1.4), (1, 3.0), (2, 4.5), (2, 4.7)]
    assert jacobian[1] == [(0, pytest.approx(1.2)), (1, 3.0), (2, pytest.approx(4.6))]
    assert information[1] == [(0, 2.25), (1, 4.25), (2, 6.0)]
    assert kl[1] == [(0, 3), (1, 4), (2, 6)]
    assert "nats" in ax.get_xlabel()
    assert "nats" in ax.get_ylabel()
    assert ax.get_ylim()[0] == 0
    assert len(legend(ax)) == 4
    assert "seeds" in ax.get_legend().get_title().get_text()
    lines = ax.lines[1::2]
    assert len({line.get_linestyle() for line in lines}) == 4
    assert {to_hex(line.get_color()) for line in lines} <= OKABE_ITO
    ax.figure.draw_without_rendering()


def test_results_are_drawn_as_their_numbers():
    def kl(*values):
        return KLDivergence(torch.tensor(values), "analytic", torch.zeros(2))

    divergences = [kl(1.0, 5.0), kl(4.0, 4.0), kl(2.0, 2.0)]
    information = [result(MutualInformation, mutual_information=value) for value in (2.0, 4.0, 5.0)]
    nested = [
        [guaranteed(4.0, 4.5), guaranteed(0.0, 1.0), guaranteed(2.0, 3.0)],
        [guaranteed(4.0, 4.7), guaranteed(0.0, 1.4), guaranteed(2.0, NAN)],
    ]
    by_numbers = plot_guaranteed_information([2.0, 0.0, 1.0], NUMBERS, information=[2.0, 4.0, 5.0], kl=[3.0, 4.0, 2.0])
    by_results = plot_guaranteed_information(
        [2.0, 0.0, 1.0], nested, information=information, kl=[divergences, divergences]
    )
    for one, two in zip(drawn(by_numbers), drawn(by_results), strict=True):
        assert one[1] == two[1]
    plain = plot_guaranteed_information([2.0, 0.0, 1.0], nested[0])
    assert legend(plain) == [r"guaranteed by $L$ and $\sigma$", "guaranteed by the Jacobian"]
    assert plain.get_legend().get_title().get_text() == ""


def test_what_is_not_guaranteed_is_left_out():
    ax = plot_guaranteed_information([0.0, 1.0], [guaranteed(NAN, NAN), guaranteed(1.0, 2.0)])
    assert ax.lines[0].get_xdata().tolist() == [1.0]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [NAN, 1.0])


def test_negative_estimates_stay_in_view():
    ax = plot_guaranteed_information([0.0, 1.0], {"floor": [0, 1], "by_jacobian": [0, 1]}, information=[-0.2, 1.0])
    assert ax.get_ylim()[0] < -0.2


def test_draws_into_the_axes_given():
    _, ax = plt.subplots(layout="constrained")
    before = dict(plt.rcParams)
    assert plot_guaranteed_information([0.0, 1.0, 2.0], NUMBERS, ax=ax) is ax
    assert dict(plt.rcParams) == before
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], NUMBERS), ValueError, r"guaranteed\['floor'\] of shape \(S, 1\)"),
        (([0.0], [1.0]), TypeError, "guaranteed to be lists of results or a mapping"),
        (([0.0], guaranteed(0.0, 1.0)), TypeError, "guaranteed to be lists of results or a mapping"),
        (([0.0], []), TypeError, "guaranteed to be lists of results or a mapping"),
        (([0.0, 1.0], torch.ones(2)), TypeError, "guaranteed to be lists of results or a mapping"),
        (([0.0], {"floor": [0.0]}), ValueError, r"keys 'floor' and 'by_jacobian', got \['floor'\]"),
        (([[0.0]], NUMBERS), ValueError, r"kappas of shape \(X,\)"),
        (([0.0, 1.0, 2.0], NUMBERS, {"information": [1.0]}), ValueError, r"information of shape \(S, 3\)"),
        (([0.0, 1.0, 2.0], NUMBERS, {"kl": [1.0, float("inf"), 2.0]}), ValueError, "kl to be finite or NaN"),
        (([0.0, 1.0, 2.0], NUMBERS, {"kl": "ab"}), (TypeError, ValueError), "kl"),
    ],
)
def test_refuses_before_a_figure_is_made(arguments, error, message):
    *positional, more = (*arguments, {}) if len(arguments) == 2 else arguments
    with pytest.raises(error, match=message):
        plot_guaranteed_information(*positional, **more)
    assert plt.get_fignums() == []
