"""Pictures of sweeps over a setting and of losses along the training."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers.pictures import NAN, legend
from matplotlib.colors import to_hex

from pyro_ilvae.infer import schedules
from pyro_ilvae.plots import plot_sweep, plot_training


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
