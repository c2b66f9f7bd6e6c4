"""Pictures: what is drawn is what was given, in the axes that were given, and nothing else changes."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import EllipseCollection, LineCollection, PathCollection
from matplotlib.colors import to_hex

from pyro_ilvae.diagnostics import ActiveUnits, KLDivergence
from pyro_ilvae.infer import schedules
from pyro_ilvae.plots import (
    plot_class_samples,
    plot_divergence_bound,
    plot_epsilon_curve,
    plot_images,
    plot_kl_per_dimension,
    plot_posteriors,
    plot_reconstructions,
    plot_sweep,
    plot_training,
    plot_traversals,
)

NAN, INF = float("nan"), float("inf")
KL = torch.tensor([[0.0, 2.0, 0.5, 1.0], [0.0, 4.0, 0.7, 2.0], [0.03, 3.0, 0.6, 1.5]])
ACTIVE = torch.tensor([False, True, True, True])
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}


def decode(z):
    """Images (M, 4, 5) in which pixel k is coordinate k."""
    return torch.cat([z, torch.zeros(len(z), 20 - z.shape[1], dtype=z.dtype)], 1).reshape(-1, 4, 5)


def result(kind, **fields):
    """A result of the diagnostics, of which the pictures look at these fields alone."""
    return kind(**(dict.fromkeys(kind._fields) | fields))


def images(*shape):
    return torch.rand(*shape)


PICTURES = {
    "kl": lambda **ax: plot_kl_per_dimension(KL, ACTIVE, epsilon=0.01, **ax),
    "kl-several": lambda **ax: plot_kl_per_dimension({"a": KL, "b": KL / 2}, {"a": ACTIVE}, **ax),
    "epsilon": lambda **ax: plot_epsilon_curve({"a": KL.sum(1), "b": KL.sum(1) - 3.1}, **ax),
    "bound": lambda **ax: plot_divergence_bound(KL[:, 1], KL[:, 3], standard_error=KL[:, 2], **ax),
    "training": lambda **ax: plot_training([3.0, 2.0, 1.0], beta=0.5, inverse_lipschitz=[0, 1, 2], smoothing=2, **ax),
    "posteriors": lambda **ax: plot_posteriors(KL[:, :2], KL[:, 2:], labels=["a", "b", "a"], **ax),
    "posteriors-wide": lambda **ax: plot_posteriors([[-20.0, 0.0], [20.0, 0.0]], [[1.0, 1.0]] * 2, **ax),
    "posteriors-tall": lambda **ax: plot_posteriors([[0.0, -20.0], [0.0, 20.0]], [[1.0, 1.0]] * 2, labels=[0, 1], **ax),
    "images": lambda **ax: plot_images(images(5, 4, 6), labels=["one", "two", "three", "four", "five"], **ax),
    "images-color": lambda **ax: plot_images(images(5, 4, 6, 3), **ax),
    "traversals": lambda **ax: plot_traversals(decode, 3, **ax),
    "traversals-one": lambda **ax: plot_traversals(decode, 1, num_steps=12, **ax),
    "reconstructions": lambda **ax: plot_reconstructions(images(8, 4, 6), images(8, 4, 6), **ax),
    "reconstructions-one": lambda **ax: plot_reconstructions(images(1, 4, 4), images(1, 4, 4), **ax),
    "classes": lambda **ax: plot_class_samples(images(2, 9, 4, 6), ["trouser", "ankle boot"], **ax),
}


def pictures():
    return pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES.keys())


@pytest.fixture(autouse=True)
def _agg_figures():
    plt.switch_backend("agg")
    plt.close("all")
    yield
    plt.close("all")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def tiles(ax, height, width, rows, columns):
    """The images of a mosaic without labels of its own, by row and column."""
    mosaic = np.asarray(ax.images[0].get_array())
    tops = np.linspace(0, mosaic.shape[0] - height, rows).round().astype(int)
    lefts = np.linspace(0, mosaic.shape[1] - width, columns).round().astype(int)
    return np.array([[mosaic[top : top + height, left : left + width] for left in lefts] for top in tops])


# For every picture


@pictures()
def test_given_axes_are_used_and_returned_and_no_style_changes(draw):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    before = dict(plt.rcParams)
    assert draw(ax=axes[0]) is axes[0]
    figure.draw_without_rendering()
    assert dict(plt.rcParams) == before
    assert plt.get_fignums() == [figure.number]
    assert not axes[1].has_data()
    assert plt.gca() is axes[1]


@pictures()
def test_new_axes_in_a_constrained_figure_with_nothing_cut_off_or_covered(draw):
    ax = draw()
    figure = ax.figure
    assert plt.get_fignums() == [figure.number]
    assert type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
    figure.draw_without_rendering()
    inside = figure.bbox.padded(1.5)
    for one in figure.axes:
        box = one.get_tightbbox()
        assert inside.containsx(box.x0)
        assert inside.containsx(box.x1)
        assert inside.containsy(box.y0)
        assert inside.containsy(box.y1)
    if ax.get_legend() is not None:
        box = ax.get_legend().get_window_extent()
        data = [one.transData.transform(line.get_xydata()) for one in figure.axes for line in one.lines]
        data += [one.transData.transform(points.get_offsets()) for one in figure.axes for points in one.collections]
        assert not box.count_contains(np.concatenate(data))
    for axis in (ax.xaxis, ax.yaxis):
        boxes = [tick.get_window_extent() for tick in axis.get_ticklabels() if tick.get_text()]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# KL per dimension


@pytest.mark.parametrize(
    "kl", [KL, KL.numpy(), KL.double().requires_grad_(), KL.bfloat16(), result(KLDivergence, values=KL)]
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
    np.testing.assert_allclose(segments[:, 0], np.c_[range(3), np.quantile(kl.numpy(), 0.05, axis=0)], rtol=1e-5)
    np.testing.assert_allclose(segments[:, 1], np.c_[range(3), np.quantile(kl.numpy(), 0.95, axis=0)], rtol=1e-5)


@pytest.mark.parametrize("active", [ACTIVE, ACTIVE.numpy(), ACTIVE.tolist(), result(ActiveUnits, active=ACTIVE)])
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
    np.testing.assert_allclose(b.get_ydata(), more.mean(0).sort(descending=True).values, rtol=1e-5)
    assert a.get_xdata().tolist() == [1, 2, 3, 4]
    assert (hollow.get_xdata().tolist(), to_hex(hollow.get_markerfacecolor())) == ([4], "#ffffff")
    assert a.get_linestyle() != b.get_linestyle()
    assert a.get_marker() != b.get_marker()
    assert {to_hex(a.get_color()), to_hex(b.get_color())} < OKABE_ITO
    assert legend(ax) == ["a", "b", "inactive"]


def test_kl_unsorted_lines_stand_at_their_dimension():
    [line] = plot_kl_per_dimension({"a": KL}, sort=False).lines
    assert line.get_xdata().tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(line.get_ydata(), KL.mean(0), rtol=1e-5)


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
    np.testing.assert_allclose(above.get_offsets(), np.c_[bound, divergence.detach()][[0, 2, 3]], rtol=1e-6)
    np.testing.assert_allclose(below.get_offsets(), np.c_[bound, divergence.detach()][[1, 4]], rtol=1e-6)
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


# Sweep


def test_sweep_has_seeds_as_points_and_their_median_as_a_line():
    runs = torch.tensor([[3.0, 1.0, 2.0], [5.0, NAN, 4.0], [10.0, NAN, NAN]])
    [ax] = plot_sweep([2.0, 0.0, 1.0], {"KL (nats)": {"a": runs}}, xlabel="L")
    points, line = ax.lines
    assert sorted(zip(*(data.tolist() for data in points.get_data()), strict=True)) == [
        (0.0, 1.0),
        (1.0, 2.0),
        (1.0, 4.0),
        (2.0, 3.0),
        (2.0, 5.0),
        (2.0, 10.0),
    ]
    assert points.get_linestyle() == "None"
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("L", "KL (nats)", "")
    assert legend(ax) == ["a"]


def test_sweep_without_any_run_at_a_setting_has_a_gap():
    [ax] = plot_sweep([0.0, 1.0], {"KL": {"a": [[1.0, NAN]], "none": [[NAN, NAN]]}})
    assert ax.lines[0].get_xdata().tolist() == [0.0]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [1.0, NAN])
    assert len(ax.lines[2].get_xdata()) == 0
    ax.figure.draw_without_rendering()


def test_sweep_draws_a_label_alike_in_all_panels_in_the_axes_given():
    one, two = [[1.0]], [[2.0]]
    _, axes = plt.subplots(2, 1, layout="constrained")
    panels = {"left": {"a": one, "b": two}, "right": {"b": one}}
    drawn = plot_sweep([0.0], panels, ylabels=["x (nats)", "y (nats)"], axes=axes)
    assert list(drawn) == list(axes)
    [b_left], [b_right] = ([line for line in ax.lines if line.get_marker() == "s"][:1] for ax in drawn)
    assert to_hex(b_left.get_color()) == to_hex(b_right.get_color())
    assert [ax.get_title() for ax in drawn] == ["left", "right"]
    assert [ax.get_ylabel() for ax in drawn] == ["x (nats)", "y (nats)"]
    assert legend(drawn[1]) == ["a", "b"]
    assert drawn[0].get_legend() is None


def test_sweep_takes_one_axes_for_one_panel():
    _, ax = plt.subplots()
    before = dict(plt.rcParams)
    assert plot_sweep([0.0, 1.0], {"KL": {"a": [[0.0, 1.0]]}}, axes=ax).tolist() == [ax]
    assert dict(plt.rcParams) == before


# Training


def test_training_has_the_loss_and_beta_and_l_on_an_axis_of_their_own():
    losses = torch.tensor([5.0, 3.0, 4.0, 2.0], requires_grad=True)
    ax = plot_training(losses, beta=schedules.linear(0.0, 1.0, num_steps=2), inverse_lipschitz=0.7, smoothing=2)
    loss, mean = ax.lines
    assert loss.get_data()[0].tolist() == [0, 1, 2, 3]
    assert loss.get_data()[1].tolist() == [5.0, 3.0, 4.0, 2.0]
    assert (mean.get_xdata().tolist(), mean.get_ydata().tolist()) == ([0.5, 1.5, 2.5], [4.0, 3.5, 3.0])
    right = ax.figure.axes[-1]
    beta, constant = right.lines
    assert beta.get_ydata().tolist() == [0.0, 0.5, 1.0, 1.0]
    assert constant.get_ydata().tolist() == [0.7] * 4
    assert right is not ax
    assert len({line.get_linestyle() for line in (loss, beta, constant)}) == 3
    assert legend(ax) == ["loss", "mean of 2 steps", r"$\beta$", "$L$"]
    assert ax.get_ylabel() == "loss: negative ELBO (nats)"


def test_training_loss_alone():
    ax = plot_training([2.0, 1.0])
    assert ax.figure.axes == [ax]
    assert ax.get_legend() is None


@pytest.mark.parametrize("losses", [[1.0], [1.0, 1.0]])
@pytest.mark.parametrize("beta", [None, 0.0, 1.0])
def test_training_of_one_step_and_of_constant_loss(losses, beta):
    ax = plot_training(losses, beta=beta, smoothing=1)
    ax.figure.draw_without_rendering()
    assert ax.lines[1].get_ydata().tolist() == losses


# Posteriors


def ellipses(ax):
    return [collection for collection in ax.collections if isinstance(collection, EllipseCollection)]


def points(ax):
    return [collection for collection in ax.collections if isinstance(collection, PathCollection)]


def test_posteriors_are_means_and_ellipses_of_two_sigma():
    loc, scale = torch.randn(5, 2, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    ax = plot_posteriors(loc, scale)
    [collection], [means] = ellipses(ax), points(ax)
    np.testing.assert_allclose(means.get_offsets(), loc.detach(), rtol=1e-6)
    np.testing.assert_allclose(collection.get_offsets(), loc.detach(), rtol=1e-6)
    np.testing.assert_allclose(collection.get_widths(), 4 * scale[:, 0].detach(), rtol=1e-6)
    np.testing.assert_allclose(collection.get_heights(), 4 * scale[:, 1].detach(), rtol=1e-6)
    assert ax.get_aspect() == 1
    assert legend(ax) == ["prior"]
    np.testing.assert_allclose(np.hypot(*ax.lines[0].get_data()), 2.0)


def test_posteriors_with_covariances_are_where_the_quadratic_form_is_four():
    root = torch.randn(6, 2, 2, dtype=torch.float64)
    covariance, loc = root @ root.mT, torch.randn(6, 2, dtype=torch.float64)
    [collection] = ellipses(plot_posteriors(loc, covariance, prior=False))
    t = np.linspace(0, 2 * math.pi, 50)
    # What EllipseCollection draws: axes along x and y, turned by the angle.
    shapes = zip(collection.get_widths(), collection.get_heights(), collection.get_angles(), strict=True)
    for (width, height, angle), precision in zip(shapes, np.linalg.inv(covariance.numpy()), strict=True):
        turn = np.radians(angle)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        boundary = rotation @ [width / 2 * np.cos(t), height / 2 * np.sin(t)]
        np.testing.assert_allclose(np.einsum("in,ij,jn->n", boundary, precision, boundary), 4.0, rtol=1e-6)


@pytest.mark.parametrize("covariance", [False, True])
def test_posteriors_fit_into_the_axes(covariance):
    loc, scale = torch.tensor([[10.0, 0.0], [-3.0, 1.0]]), torch.tensor([[1.0, 5.0], [4.0, 0.1]])
    ax = plot_posteriors(loc, torch.diag_embed(scale**2) if covariance else scale)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert left <= -11 < 12 <= right
    assert bottom <= -10 < 10 <= top


def test_posteriors_draw_all_means_and_at_most_so_many_ellipses_of_all_classes():
    loc, labels = torch.randn(1000, 2), torch.arange(1000) // 100
    ax = plot_posteriors(loc, torch.ones(1000, 2), labels=labels, max_ellipses=50)
    assert [len(collection.get_offsets()) for collection in points(ax)] == [100] * 10
    assert [len(collection.get_offsets()) for collection in ellipses(ax)] == [5] * 10
    assert legend(ax) == ["prior", *map(str, range(10))]
    looks = {
        (to_hex(p.get_facecolor()), len(p.get_paths()[0]), p.get_paths()[0].vertices.tobytes()) for p in points(ax)
    }
    assert len(looks) == 10
    assert {to_hex(collection.get_facecolor()) for collection in points(ax)} < OKABE_ITO


def test_posteriors_by_class_belong_to_their_class():
    loc = torch.randn(20, 2)
    labels = np.array(["b", "a"])[np.arange(20) % 2]
    ax = plot_posteriors(loc, torch.ones(20, 2), labels=labels)
    for collection, name in zip(points(ax), ["a", "b"], strict=True):
        assert collection.get_label() == name
        np.testing.assert_allclose(collection.get_offsets(), loc[torch.from_numpy(labels == name)], rtol=1e-6)


@pytest.mark.parametrize("scale", [torch.zeros(1, 2), torch.zeros(1, 2, 2), torch.ones(1, 2)])
def test_posterior_of_one_datum(scale):
    ax = plot_posteriors(torch.zeros(1, 2), scale, prior=False)
    ax.figure.draw_without_rendering()
    assert len(points(ax)[0].get_offsets()) == 1


def test_posteriors_in_axes_that_share_their_limits():
    figure, axes = plt.subplots(1, 2, sharex=True, sharey=True, layout="constrained")
    for ax in axes:
        plot_posteriors(torch.randn(5, 2), torch.ones(5, 2), ax=ax)
    figure.draw_without_rendering()


# Images


def test_components_of_a_prior_are_two_sigma_ellipses():
    loc, scale = torch.randn(3, 2).double(), torch.rand(3, 2).double() + 0.1
    ax = plot_posteriors(torch.zeros(2, 2), torch.ones(2, 2), prior=(loc, scale))
    curves, crosses = ax.lines[::2], ax.lines[1::2]
    for mean, deviation, curve, cross in zip(loc.numpy(), scale.numpy(), curves, crosses, strict=True):
        np.testing.assert_allclose((((curve.get_xydata() - mean) / deviation) ** 2).sum(1), 4.0)
        np.testing.assert_allclose(cross.get_xydata(), [mean])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["prior"]


@pytest.mark.parametrize("color", [(), (3,)])
def test_images_are_tiles_in_order(color):
    pictures = images(6, 4, 5, *color).requires_grad_()
    ax = plot_images(pictures, num_columns=3)
    drawn = tiles(ax, 4, 5, 2, 3)[..., :3] if color else tiles(ax, 4, 5, 2, 3)
    np.testing.assert_allclose(drawn.reshape(6, 4, 5, *color), pictures.detach(), rtol=1e-6)


def test_images_leave_the_rest_of_the_last_row_empty():
    mosaic = plot_images(images(5, 4, 5) + 1).images[0].get_array()
    assert np.ma.count(mosaic) == 5 * 4 * 5
    mosaic = plot_images(images(5, 4, 5, 3)).images[0].get_array()
    assert mosaic[..., 3].sum() == 5 * 4 * 5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integer_colors_go_to_255(dtype):
    ax = plot_images(torch.full((1, 2, 2, 3), 51, dtype=dtype))
    np.testing.assert_allclose(ax.images[0].get_array()[..., :3], 0.2)


def test_colors_are_clipped():
    ax = plot_images([[[[-0.5, 0.5, 1.5]]]])
    assert ax.images[0].get_array().tolist() == [[[0.0, 0.5, 1.0, 1.0]]]


def test_gray_images_share_one_scale():
    ax = plot_images(torch.tensor([0.0, 2.0, 7.0])[:, None, None].expand(3, 2, 2), cmap="viridis")
    assert ax.images[0].get_clim() == (0.0, 7.0)
    assert ax.images[0].get_cmap().name == "viridis"


def test_images_have_titles_above_or_labels_beside():
    ax = plot_images(images(5, 8, 8), num_columns=3, labels=list("abcde"))
    ax.figure.draw_without_rendering()
    assert [text.get_text() for text in ax.texts] == list("abcde")
    assert [text.get_position()[0] for text in ax.texts[:3]] == [text.get_position()[0] for text in ax.texts[3:]] + [
        ax.texts[2].get_position()[0]
    ]
    mosaic = ax.images[0].get_array()
    for text in ax.texts:
        corners = ax.transData.inverted().transform(text.get_window_extent().get_points())
        assert mosaic.mask[max(0, math.ceil(corners[:, 1].min())) : math.floor(text.get_position()[1]) + 1].all()
    ax = plot_images(images(5, 8, 8), num_columns=3, labels=np.array([3, 7]))
    assert ticks(ax.yaxis) == ["3", "7"]
    rows = ax.get_yticks()
    assert rows.tolist() == [3.5, 3.5 + 8 + 1]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 28, 28), (1, 1, 1, 3), (2, 1, 7)])
@pytest.mark.parametrize("num_columns", [None, 1, 10])
def test_images_of_one_pixel_one_image_and_one_value(shape, num_columns):
    plot_images(torch.ones(shape), num_columns=num_columns).figure.draw_without_rendering()


def test_traversals_move_one_dimension_at_a_time():
    center = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    seen = []

    def recording(z):
        seen.append(z)
        assert not torch.is_grad_enabled()
        return decode(z)

    ax = plot_traversals(recording, 3, dims=[2, 0], center=center.requires_grad_(), span=2.0, num_steps=5)
    [z] = seen
    assert (z.dtype, z.shape, z.requires_grad) == (torch.float64, (10, 3), False)
    expected = center.detach().repeat(2, 5, 1)
    expected[0, :, 2] += torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    expected[1, :, 0] += torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    torch.testing.assert_close(z.reshape(2, 5, 3), expected)
    np.testing.assert_allclose(tiles(ax, 4, 5, 2, 5), decode(z).reshape(2, 5, 4, 5))
    assert ticks(ax.yaxis) == ["$z_{2}$", "$z_{0}$"]
    assert [tick.replace("\N{MINUS SIGN}", "-") for tick in ticks(ax.xaxis)] == ["-2", "-1", "0", "1", "2"]
    assert ax.get_xlabel() == "$z_j$ less its value at the center"
    # Each label stands in the middle of its column.
    mosaic = ax.images[0].get_array()
    assert ax.get_xticks().tolist() == [left + 2.0 for left in range(0, mosaic.shape[1], 6)]


def test_traversals_start_at_zero_with_a_module_in_evaluation_mode():
    module = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Dropout(0.9), torch.nn.Unflatten(1, (2, 3)))
    ax = plot_traversals(module, 2, num_steps=2)
    assert module.training
    z = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, -3.0], [0.0, 3.0]])
    expected = module.eval()(z).detach().reshape(2, 2, 2, 3)
    np.testing.assert_allclose(tiles(ax, 2, 3, 2, 2), expected, rtol=1e-5)
    assert ax.get_xlabel() == "value of $z_j$"


@pytest.mark.parametrize("center", [[1, 2], np.ones(2), torch.ones(2, dtype=torch.int64)])
def test_traversals_decode_gets_floats(center):
    def checked(z):
        assert z.dtype == torch.float32
        return decode(z)

    plot_traversals(checked, 2, center=center)


def test_reconstructions_stand_below_their_images_on_the_same_scale():
    x = images(3, 4, 5)
    ax = plot_reconstructions(x, 10 * x)
    np.testing.assert_allclose(tiles(ax, 4, 5, 2, 3), torch.stack([x, 10 * x]), rtol=1e-6)
    assert ticks(ax.yaxis) == ["data", "reconstruction"]
    assert ax.images[0].get_clim() == pytest.approx((float(x.min()), float(x.max())))


@pytest.mark.parametrize(("size", "num_images"), [((3, 4), 1), ((4, 2), 3)])
def test_row_labels_fit_into_axes_larger_than_the_images(size, num_images):
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    plot_reconstructions(images(num_images, 28, 28), images(num_images, 28, 28), ax=ax)
    figure.draw_without_rendering()
    assert ax.get_tightbbox().x0 >= -1


def test_reconstructions_of_blank_images_are_on_their_own_scale():
    ax = plot_reconstructions(torch.zeros(1, 2, 2), torch.arange(4.0).reshape(1, 2, 2))
    assert ax.images[0].get_clim() == (0.0, 3.0)


@pytest.mark.parametrize("color", [(), (3,)])
def test_class_samples_are_rows(color):
    samples = images(2, 4, 3, 5, *color)
    ax = plot_class_samples(samples)
    drawn = tiles(ax, 3, 5, 2, 4)
    np.testing.assert_allclose(drawn[..., :3] if color else drawn, samples, rtol=1e-6)
    assert ticks(ax.yaxis) == ["0", "1"]
    assert ticks(plot_class_samples(samples[:, :1], labels=torch.tensor([5, 6])).yaxis) == ["5", "6"]


# Errors

ONE = torch.ones(2, 2)
ERRORS = {
    "kl-shape": (lambda: plot_kl_per_dimension(torch.ones(3)), r"kl of shape \(N, K\), got \(3,\)"),
    "kl-empty": (lambda: plot_kl_per_dimension(torch.ones(0, 3)), r"kl of shape \(N, K\), got \(0, 3\)"),
    "kl-nan": (lambda: plot_kl_per_dimension([[1.0, NAN]]), r"kl to be finite, got nan at index \(0, 1\)"),
    "kl-text": (lambda: plot_kl_per_dimension([["a"]]), "kl to be real numbers, got dtype <U1"),
    "kl-none": (lambda: plot_kl_per_dimension({}), "kl to be a mapping with at least one label"),
    "kl-of-model": (lambda: plot_kl_per_dimension({"a": ONE, "b": [INF]}), r"kl\['b'\] of shape"),
    "kl-event": (lambda: plot_kl_per_dimension(result(KLDivergence, values=torch.ones(2, 2, 2))), r"got \(2, 2, 2\)"),
    "active-shape": (lambda: plot_kl_per_dimension(ONE, [True]), r"active to be booleans of shape \(2,\), got bool"),
    "active-type": (lambda: plot_kl_per_dimension(ONE, [1, 0]), r"active to be booleans of shape \(2,\), got int"),
    "active-one": (lambda: plot_kl_per_dimension(ONE, {"a": [True, True]}), "active to be one array"),
    "active-many": (lambda: plot_kl_per_dimension({"a": ONE}, [True, True]), "active to be a mapping .* got list"),
    "active-label": (lambda: plot_kl_per_dimension({"a": ONE}, {"b": [True]}), r"from some of \['a'\], got \['b'\]"),
    "kl-epsilon": (lambda: plot_kl_per_dimension(ONE, epsilon=-1.0), "epsilon to be a finite number >= 0"),
    "epsilon-shape": (lambda: plot_epsilon_curve(ONE), r"kl_total of shape \(N,\), got \(2, 2\)"),
    "epsilon-inf": (lambda: plot_epsilon_curve({"a": [-INF]}), r"kl_total\['a'\] to be finite, got -inf"),
    "bound-shape": (lambda: plot_divergence_bound([1.0, 2.0], [1.0]), r"bound of shape \(2,\), got \(1,\)"),
    "bound-nan": (lambda: plot_divergence_bound([NAN], [1.0]), "divergence to be finite"),
    "bound-error": (lambda: plot_divergence_bound([1.0], [1.0], standard_error=[-1.0]), "standard_error >= 0, got -1"),
    "sweep-x": (lambda: plot_sweep([NAN], {"a": {"b": [[1.0]]}}), "x to be finite"),
    "sweep-shape": (lambda: plot_sweep([1.0], {"a": {"b": [1.0]}}), r"results\['a'\]\['b'\] of shape \(S, 1\)"),
    "sweep-inf": (lambda: plot_sweep([1.0], {"a": {"b": [[INF]]}}), "to be finite or NaN, got inf"),
    "sweep-empty": (lambda: plot_sweep([1.0], {"a": {}}), "got an empty panel"),
    "sweep-ylabels": (lambda: plot_sweep([1.0], {"a": {"b": [[1.0]]}}, ylabels=["a", "b"]), "ylabels to be 1 labels"),
    "sweep-axes": (lambda: plot_sweep([1.0], {"a": {"b": [[1.0]]}}, axes=plt.subplots(2)[1]), "axes to be 1 axes"),
    "training-shape": (lambda: plot_training(ONE), r"losses of shape \(T,\)"),
    "training-nan": (lambda: plot_training([1.0, NAN]), r"losses to be finite, got nan at index \(1,\)"),
    "training-beta": (lambda: plot_training([1.0, 2.0], beta=[1.0]), r"beta of shape \(2,\), got \(1,\)"),
    "training-l": (lambda: plot_training([1.0], inverse_lipschitz=NAN), "inverse_lipschitz to be finite"),
    "training-smoothing": (lambda: plot_training([1.0], smoothing=2), "smoothing to be at most the 1 steps"),
    "training-window": (lambda: plot_training([1.0], smoothing=0), "smoothing to be an int >= 1"),
    "loc-shape": (lambda: plot_posteriors(torch.ones(2, 3), ONE), r"loc of shape \(N, 2\), got \(2, 3\)"),
    "scale-shape": (lambda: plot_posteriors(ONE, torch.ones(1, 2)), r"scale of shape \(2, 2\), got \(1, 2\)"),
    "scale-negative": (lambda: plot_posteriors(ONE, -ONE), "scale >= 0, got -1"),
    "covariance-shape": (lambda: plot_posteriors(ONE, torch.ones(2, 2, 3)), r"scale of shape \(2, 2, 2\)"),
    "covariance-skew": (lambda: plot_posteriors(ONE, [[[1.0, 0.5], [0.0, 1.0]]] * 2), "symmetric"),
    "covariance-negative": (lambda: plot_posteriors(ONE, [[[1.0, 2.0], [2.0, 1.0]]] * 2), "semi-definite"),
    "prior-arrays": (lambda: plot_posteriors(ONE, ONE, prior=(ONE,)), "a bool or a tuple of locations and scales, got"),
    "prior-loc": (lambda: plot_posteriors(ONE, ONE, prior=(torch.ones(3), ONE)), r"locations of prior of shape"),
    "prior-scale": (lambda: plot_posteriors(ONE, ONE, prior=(ONE, ONE[:1])), r"scales of prior of shape \(2, 2\)"),
    "prior-negative": (lambda: plot_posteriors(ONE, ONE, prior=(ONE, -ONE)), "scales of prior >= 0, got -1"),
    "labels-shape": (lambda: plot_posteriors(ONE, ONE, labels=[1]), r"labels of shape \(2,\), got \(1,\)"),
    "labels-many": (lambda: plot_posteriors(torch.ones(99, 2), torch.ones(99, 2), labels=range(99)), "at most 56"),
    "ellipses": (lambda: plot_posteriors(ONE, ONE, max_ellipses=0), "max_ellipses to be an int >= 1"),
    "images-shape": (lambda: plot_images(torch.ones(2, 1, 4, 4)), r"images of shape \(N, H, W\) or \(N, H, W, 3\)"),
    "images-empty": (lambda: plot_images(torch.ones(0, 4, 4)), r"images of shape \(N, H, W\), got \(0, 4, 4\)"),
    "images-nan": (lambda: plot_images(torch.full((1, 1, 1), NAN)), "images to be finite"),
    "images-labels": (lambda: plot_images(torch.ones(9, 4, 4), labels=[1, 2]), "labels for 3 rows or 9 images, got 2"),
    "images-columns": (lambda: plot_images(torch.ones(9, 4, 4), num_columns=0), "num_columns to be an int >= 1"),
    "traversals-dims": (lambda: plot_traversals(decode, 2, dims=[2]), r"dims to be dimensions from 0 to 1, got \[2\]"),
    "traversals-none": (lambda: plot_traversals(decode, 2, dims=[]), "dims to be dimensions"),
    "traversals-center": (lambda: plot_traversals(decode, 2, center=[0.0]), r"center of shape \(2,\), got \(1,\)"),
    "traversals-span": (lambda: plot_traversals(decode, 2, span=0.0), "span > 0"),
    "traversals-steps": (lambda: plot_traversals(decode, 2, num_steps=1), "num_steps >= 2"),
    "traversals-flat": (lambda: plot_traversals(lambda z: z, 2), "decode to return images of shape"),
    "traversals-count": (lambda: plot_traversals(lambda z: decode(z)[1:], 2), "decode to return 18 images, got 17"),
    "reconstruction": (lambda: plot_reconstructions(torch.ones(2, 4, 4), torch.ones(1, 4, 4)), "reconstruction of sh"),
    "classes-shape": (lambda: plot_class_samples(torch.ones(2, 4, 4)), r"images of shape \(C, S, H, W\) or"),
    "classes-labels": (lambda: plot_class_samples(torch.ones(2, 3, 4, 4), ["a"]), "labels for 2 classes, got 1"),
}


@pytest.mark.parametrize(("draw", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_what_was_expected_and_leave_no_figure(draw, message, request):
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        draw()
    if request.node.callspec.id != "sweep-axes":  # which makes one itself
        assert not plt.get_fignums()
