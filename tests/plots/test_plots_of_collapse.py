"""Pictures of the KL of each dimension, of the epsilon curve, and of divergences against their bound."""

import numpy as np
import pytest
import torch
from helpers.pictures import ACTIVE, KL, OKABE_ITO, legend, result, ticks
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex

from pyro_ilvae.diagnostics import ActiveUnits, KLDivergence
from pyro_ilvae.plots import plot_divergence_bound, plot_epsilon_curve, plot_kl_per_dimension


@pytest.mark.parametrize(
    "kl", [KL, KL.numpy(force=True), KL.double().requires_grad_(), KL.bfloat16(), result(KLDivergence, values=KL)]
)
def test_kl_bars_are_sorted_means(kl):
    ax = plot_kl_per_dimension(kl)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([3.0, 1.5, 0.6, 0.01], rel=5e-3)
    assert ticks(ax.xaxis) == ["1", "3", "2", "0"]
    assert legend(ax) == ["5 to 95 % of the data", "mean"] or legend(ax) == ["mean", "5 to 95 % of the data"]


def test_kl_range_over_the_data():
    kl = torch.rand(200, 3) * torch.tensor([1.0, 3.0, 2.0])
    [bars] = plot_kl_per_dimension(kl, sort=False).collections
    segments = np.array(bars.get_segments())
    np.testing.assert_allclose(
        segments[:, 0], np.c_[range(3), np.quantile(kl.numpy(force=True), 0.05, axis=0)], rtol=1e-5
    )
    np.testing.assert_allclose(
        segments[:, 1], np.c_[range(3), np.quantile(kl.numpy(force=True), 0.95, axis=0)], rtol=1e-5
    )


@pytest.mark.parametrize(
    "active", [ACTIVE, ACTIVE.numpy(force=True), ACTIVE.tolist(), result(ActiveUnits, active=ACTIVE)]
)
def test_kl_inactive_units_are_hollow(active):
    ax = plot_kl_per_dimension(KL, active)
    hollow = {round(bar.get_x() + bar.get_width() / 2): bar.get_facecolor()[3] == 0 for bar in ax.patches}
    assert hollow == {1: False, 2: False, 3: False, 4: True}
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, False, False, True]
    assert {"active", "inactive"} < set(legend(ax))


@pytest.mark.parametrize("active", [torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
def test_kl_all_active_or_all_inactive(active):
    ax = plot_kl_per_dimension(KL, active)
    assert len(ax.patches) == 4
    assert ("active" in legend(ax), "inactive" in legend(ax)) == (bool(active[0]), not active[0])


@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 0.05, 2.0])
@pytest.mark.parametrize("kl", [KL, torch.zeros(3, 2), KL - 1], ids=["positive", "zero", "negative"])
def test_kl_epsilon_is_in_sight(epsilon, kl):
    ax = plot_kl_per_dimension(kl, epsilon=epsilon)
    assert set(ax.lines[0].get_ydata()) == {epsilon}
    assert ax.lines[0].get_linestyle() == "--"
    low, high = ax.get_ylim()
    assert low <= epsilon <= high
    assert low <= float(kl.mean(0).min())
    assert float(kl.mean(0).max()) <= high


@pytest.mark.parametrize("epsilon", [1e-4, 0.05])
def test_kl_epsilon_stands_apart_from_zero_and_from_the_means(epsilon):
    ax = plot_kl_per_dimension(KL, epsilon=epsilon)
    zero, line, mean = ax.transAxes.inverted().transform(ax.transData.transform([(1, 0), (1, epsilon), (1, 1.0)]))[:, 1]
    assert line - zero > 0.05
    assert mean - line > 0.2


def test_kl_of_several_models_are_lines_told_apart_without_color():
    more = torch.rand(5, 2)
    ax = plot_kl_per_dimension({"a": KL, "b": result(KLDivergence, values=more)}, {"a": ACTIVE})
    a, hollow, b = ax.lines
    np.testing.assert_allclose(a.get_ydata(), [3.0, 1.5, 0.6, 0.01], rtol=1e-5)
    np.testing.assert_allclose(b.get_ydata(), more.mean(0).sort(descending=True).values.numpy(force=True), rtol=1e-5)
    assert a.get_xdata().tolist() == [1, 2, 3, 4]
    assert (hollow.get_xdata().tolist(), to_hex(hollow.get_markerfacecolor())) == ([4], "#ffffff")
    assert a.get_linestyle() != b.get_linestyle()
    assert a.get_marker() != b.get_marker()
    assert {to_hex(a.get_color()), to_hex(b.get_color())} < OKABE_ITO
    assert legend(ax) == ["a", "b", "inactive"]


def test_kl_unsorted_lines_stand_at_their_dimension():
    [line] = plot_kl_per_dimension({"a": KL}, sort=False).lines
    assert line.get_xdata().tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(line.get_ydata(), KL.mean(0).numpy(force=True), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 1), (3, 60)])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("sort", [False, True])
def test_kl_of_one_datum_one_dimension_and_many(shape, several, sort):
    kl = torch.full(shape, 0.5)
    ax = plot_kl_per_dimension({"a": kl} if several else kl, sort=sort)
    heights = ax.lines[0].get_ydata() if several else [bar.get_height() for bar in ax.patches]
    assert list(heights) == [0.5] * shape[1]


def test_kl_of_a_scalar_site():
    assert (
        len(
            plot_kl_per_dimension(
                result(KLDivergence, values=torch.rand(5)), result(ActiveUnits, active=ACTIVE[0])
            ).patches
        )
        == 1
    )


# Epsilon curve


def test_epsilon_curve_is_the_fraction_at_or_below():
    values = torch.tensor([0.5, 2.0, 0.5, 1.0, 4.0])
    ax = plot_epsilon_curve(values.clone().requires_grad_())
    [line] = ax.lines
    assert ax.get_legend() is None
    assert line.get_drawstyle() == "steps-post"
    for epsilon, fraction in zip(*line.get_data(), strict=True):
        assert fraction == pytest.approx(float((values <= epsilon).float().mean()))
    assert set(values.tolist()) < set(line.get_xdata())
    assert ax.get_xscale() == "log"


def test_epsilon_curve_keeps_what_has_no_logarithm():
    ax = plot_epsilon_curve({"a": [0.0, -0.1, 1.0, 2.0], "b": [3.0]})
    a, b = ax.lines
    assert a.get_ydata().tolist() == [0.5, 0.75, 1.0, 1.0]
    assert b.get_ydata().tolist() == [0.0, 1.0, 1.0]
    assert all(line.get_xdata().min() == ax.get_xlim()[0] > 0 for line in (a, b))
    assert legend(ax) == ["a\n(50 % at or below 0)", "b"]


@pytest.mark.parametrize("values", [[0.0], [-1.0, 0.0], [1.0], [2.0, 2.0], [1e-30, 5.0]])
def test_epsilon_curve_of_degenerate_data(values):
    ax = plot_epsilon_curve(values)
    assert ax.lines[0].get_ydata()[-1] == 1.0
    assert ax.lines[0].get_ydata()[0] == sum(value <= 0 for value in values) / len(values)
    ax.figure.draw_without_rendering()


# Divergence against bound


def test_bound_marks_and_counts_the_points_below():
    bound = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    divergence = torch.tensor([1.5, 1.0, 3.0 * (1 - 1e-7), 9.0, 4.9])
    ax = plot_divergence_bound(divergence.requires_grad_(), bound)
    above, below = (points for points in ax.collections if isinstance(points, PathCollection))
    np.testing.assert_allclose(above.get_offsets(), np.c_[bound, divergence.numpy(force=True)][[0, 2, 3]], rtol=1e-6)
    np.testing.assert_allclose(below.get_offsets(), np.c_[bound, divergence.numpy(force=True)][[1, 4]], rtol=1e-6)
    assert to_hex(above.get_facecolor()) != to_hex(below.get_facecolor())
    assert {to_hex(points.get_facecolor()) for points in (above, below)} < OKABE_ITO
    assert legend(ax) == ["divergence = bound", "at or above: 3 of 5", "below: 2 of 5"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    line = ax.lines[0]
    assert line.get_xdata().tolist() == line.get_ydata().tolist() == [*ax.get_xlim()] == [*ax.get_ylim()]


def test_bound_counts_the_points_below_by_more_than_their_error():
    ax = plot_divergence_bound([1.0, 2.0, 4.0], [2.0, 2.5, 3.0], standard_error=[0.1, 0.3, 0.1])
    assert legend(ax)[2] == "below: 2 of 3\n(1 by more than 2 SE)"
    [errors] = (lines for lines in ax.collections if isinstance(lines, LineCollection))
    expected = [[[2.0, 0.8], [2.0, 1.2]], [[2.5, 1.4], [2.5, 2.6]], [[3.0, 3.8], [3.0, 4.2]]]
    np.testing.assert_allclose(errors.get_segments(), expected)


def test_bound_keeps_what_has_no_logarithm():
    ax = plot_divergence_bound([-0.1, 1.0, 0.0], [0.5, 0.0, 0.0], standard_error=[1.0, 1.0, 0.0])
    edge = ax.get_xlim()[0]
    above, below = (points.get_offsets().tolist() for points in ax.collections if isinstance(points, PathCollection))
    assert (above, below) == ([[edge, 1.0], [edge, edge]], [[0.5, edge]])
    assert "3 not positive,\nat the edge" in legend(ax)
    ax.figure.draw_without_rendering()


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0, 1e-12])
@pytest.mark.parametrize("num_data", [1, 3])
def test_bound_of_equal_values(value, num_data):
    ax = plot_divergence_bound([value] * num_data, [value] * num_data, standard_error=[0.0] * num_data)
    assert legend(ax)[1] == f"at or above: {num_data} of {num_data}"
    ax.figure.draw_without_rendering()
