"""Pictures of what a monitor has recorded."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers.pictures import NAN, legend

from pyro_ilvae.plots import plot_training


def record(step, prefix="", **values):
    site = {
        "kl": 2.0 + step,
        "kl_per_dimension": [1.0 + step, 0.0],
        "active_units": 1,
        "num_units": 2,
        "mutual_information": 0.5,
        "mutual_information_limit": 1.5,
        "guaranteed_floor": 0.4,
        "guaranteed_nats": 0.6,
        "inverse_lipschitz": 0.3,
        "nats": 0.2,
        "noise_scale": 0.5,
    }
    whole = {
        "step": step,
        "loss": None if step == 0 else 100.0 - step,
        "loss_per_datum": None if step == 0 else 10.0 - step,
        "non_finite_losses": 0,
        "elbo": -11.0 + step,
    }
    return whole | {prefix + key: value for key, value in site.items()} | {"beta": 0.5} | values


HISTORY = [record(step) for step in range(4)]
LAYERS = [record(step, "z1/") | record(step, "z2/") | {"kl": 5.0} for step in range(4)]


class Monitor:
    history = HISTORY


def labels(axes):
    return [ax.get_ylabel().replace("\n", " ") for ax in axes[:, 0]]


def line(ax, label):
    [found] = [one for one in ax.lines if one.get_label() == label]
    return np.asarray(found.get_ydata()).tolist()


@pytest.mark.parametrize("training", [Monitor(), HISTORY, tuple(HISTORY), {"": HISTORY}, {"": Monitor}])
def test_each_measure_has_a_panel_with_its_unit(training):
    axes = plot_training(training)
    assert axes.shape == (6, 1)
    assert labels(axes) == [
        "negative ELBO (nats per datum)",
        "KL (nats per dimension)",
        "information (nats)",
        "active units",
        "constant $L$",
        r"KL weight $\beta$",
    ]
    losses, kl, information, active, constant, beta = axes[:, 0]
    np.testing.assert_array_equal(line(losses, "training loss"), [NAN, 9.0, 8.0, 7.0])
    assert line(losses, r"held-out data, $\beta = 1$") == [11.0, 10.0, 9.0, 8.0]
    first, second, threshold = kl.lines
    assert first.get_ydata().tolist() == [1.0, 2.0, 3.0, 4.0]
    assert second.get_ydata().tolist() == [1e-3] * 4
    assert threshold.get_ydata() == [0.1, 0.1]
    assert kl.get_yscale() == "log"
    assert kl.get_ylim()[0] < 1e-3
    assert line(information, "KL of posterior and prior") == [2.0, 3.0, 4.0, 5.0]
    assert line(information, "information $I_q(x; z)$") == [0.5] * 4
    assert line(information, r"its limit $\log N$ for $N$ data") == [1.5] * 4
    assert line(information, "guaranteed by $L$") == [0.4] * 4
    assert line(active, "active") == [1] * 4
    assert line(active, "all") == [2] * 4
    assert constant.lines[0].get_ydata().tolist() == [0.3] * 4
    assert beta.lines[0].get_ydata().tolist() == [0.5] * 4
    assert legend(kl) == ["a dimension", "0.1 nats"]
    assert len(legend(information)) == 4
    assert axes[-1, 0].get_xlabel() == "step"


@pytest.mark.parametrize("entry", [HISTORY[1], LAYERS[1]])
def test_lines_of_a_panel_differ_in_more_than_color(entry):
    for ax in plot_training([{**entry, "step": step} for step in range(100)])[:, 0]:
        named = [one for one in ax.lines if one.get_label()[0] != "_"]
        styles = {one.get_linestyle() for one in named if not one.get_label().endswith("all")}
        assert len(styles) == len([one for one in named if not one.get_label().endswith("all")])


def test_runs_stand_side_by_side_on_the_same_scales():
    plain = [{**entry, "inverse_lipschitz": None, "guaranteed_floor": None} for entry in HISTORY]
    axes = plot_training({"plain": plain, "projected": Monitor()})
    assert axes.shape == (6, 2)
    assert [ax.get_title() for ax in axes[0]] == ["plain", "projected"]
    for row in axes:
        assert row[0].get_ylim() == row[1].get_ylim()
        assert row[0].get_legend() is None
    assert [text.get_text() for text in axes[4, 0].texts] == ["none"]
    assert "guaranteed by $L$" in legend(axes[2, 1])
    assert len(axes[2, 0].lines) == 3


def test_each_site_has_panels():
    axes = plot_training(LAYERS)
    assert labels(axes)[1:5] == [
        "KL of z1 (nats per dimension)",
        "information of z1 (nats)",
        "KL of z2 (nats per dimension)",
        "information of z2 (nats)",
    ]
    assert legend(axes[5, 0]) == ["z1: active", "z1: all", "z2: active", "z2: all"]
    assert legend(axes[6, 0]) == ["$L$ of z1", "$L$ of z2"]


def test_what_no_run_has_is_left_out():
    axes = plot_training([{"step": 0, "elbo": -3.0, "beta": None}, {"step": 5, "elbo": -2.0, "beta": None}])
    assert labels(axes) == ["negative ELBO (nats per datum)"]
    assert axes[0, 0].get_legend() is None


def test_a_loss_whose_number_of_data_is_not_known_has_a_panel_of_its_own():
    axes = plot_training([{**entry, "loss_per_datum": None} for entry in HISTORY])
    assert labels(axes)[:2] == ["negative ELBO (nats per datum)", "loss (nats)"]
    np.testing.assert_array_equal(axes[1, 0].lines[0].get_ydata(), [NAN, 99.0, 98.0, 97.0])


def test_losses_that_are_not_finite_are_marked():
    history = [record(0), record(1, loss=NAN, loss_per_datum=NAN, non_finite_losses=2), record(2), record(3)]
    history += [record(4, loss=np.inf, loss_per_datum=np.inf, non_finite_losses=1)]
    [ax, *_] = plot_training(history)[:, 0]
    [marks] = [one for one in ax.lines if one.get_label() == "losses not finite"]
    assert marks.get_xdata().tolist() == [1, 4]
    assert "losses not finite" in legend(ax)
    np.testing.assert_array_equal(line(ax, "training loss"), [NAN, NAN, 8.0, 7.0, NAN])
    ax.figure.draw_without_rendering()


def test_the_axis_of_the_loss_shows_where_it_goes():
    losses = [1e5, 1e4, *np.linspace(20.0, 10.0, 30)]
    history = [record(step, loss_per_datum=loss, elbo=-loss) for step, loss in enumerate(losses)]
    low, high = plot_training(history)[0, 0].get_ylim()
    assert low < 10.0
    assert 19.0 < high < 30.0


@pytest.mark.parametrize("history", [HISTORY[:1], HISTORY[1:2], LAYERS[:1]])
def test_one_record_is_a_point(history):
    axes = plot_training(history)
    axes[0, 0].figure.draw_without_rendering()
    assert all(one.get_marker() != "None" for one in axes[0, 0].lines)


def test_values_without_a_neighbor_are_points():
    for num_records, shown in ((1, {0}), (60, {30})):
        nothing = dict.fromkeys(("loss_per_datum", "mutual_information_limit", "num_units", "kl_per_dimension", "beta"))
        history = [record(step) | ({} if step in shown else nothing) for step in range(num_records)]
        for ax in plot_training(history)[:, 0]:
            for one in ax.lines:
                there = np.flatnonzero(~np.isnan(np.asarray(one.get_ydata(), dtype=float)))
                if len(there) == 1 and one.get_transform() == ax.transData:
                    assert one.get_marker() not in ("None", "none", ""), one.get_label()


def test_one_record_stands_at_whole_steps_and_below_the_upper_end():
    axes = plot_training([record(7)])
    axes[0, 0].figure.canvas.draw()
    ticks = axes[-1, 0].get_xticks()
    assert np.array_equal(ticks, ticks.round())
    [panel] = [ax for ax in axes[:, 0] if ax.get_yscale() == "log"]
    assert panel.get_ylim()[1] >= 1.2 * 8.0


def test_nothing_is_cut_off_and_no_style_changes():
    before = dict(plt.rcParams)
    axes = plot_training({"a": LAYERS, "b": HISTORY})
    figure = axes[0, 0].figure
    figure.draw_without_rendering()
    inside = figure.bbox.padded(1.5)
    for ax in axes.flat:
        box = ax.get_tightbbox()
        assert inside.containsx(box.x0)
        assert inside.containsx(box.x1)
        assert inside.containsy(box.y0)
        assert inside.containsy(box.y1)
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize(
    ("training", "options", "error", "message"),
    [
        ({}, {}, ValueError, "training to be a mapping with at least one label"),
        ({"a": 3}, {}, TypeError, r"training to map labels .* for \['a'\]"),
        ({"a": []}, {}, TypeError, "training to map labels"),
        (type("Monitor", (), {"history": []})(), {}, ValueError, "training to be a monitor with at least one record"),
        ([{"loss": 1.0}], {}, ValueError, "records without a step"),
        ([{"step": 0, "beta": "a"}], {}, ValueError, r"training\['beta'\] to be numbers"),
        ([{"step": 0, "kl": [1.0, 2.0]}, {"step": 1, "kl": [1.0]}], {}, TypeError, r"training\['kl'\]"),
        ([{"step": 0}], {}, ValueError, "records with a measure"),
        (HISTORY, {"beta": 1.0}, ValueError, "beta=None"),
        (HISTORY, {"inverse_lipschitz": 1.0}, ValueError, "inverse_lipschitz=None"),
        (HISTORY, {"smoothing": 2}, ValueError, "smoothing=None"),
    ],
)
def test_errors_name_what_was_expected(training, options, error, message):
    with pytest.raises(error, match=message):
        plot_training(training, **options)
    assert plt.get_fignums() == []


def test_records_take_no_axes():
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match="ax=None"):
        plot_training(HISTORY, ax=ax)
