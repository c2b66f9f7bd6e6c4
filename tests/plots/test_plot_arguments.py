"""Arguments of pictures: arrays of other kinds are drawn alike, and what is none is refused by name before a figure."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from pyro_ilvae.plots import (
    plot_class_samples,
    plot_divergence_bound,
    plot_epsilon_curve,
    plot_guaranteed_information,
    plot_images,
    plot_kl_per_dimension,
    plot_posteriors,
    plot_reconstructions,
    plot_sweep,
    plot_training,
    plot_traversals,
)

KL, X, ZERO = torch.rand(5, 3), torch.rand(4, 3, 2), torch.zeros(4, 2)
BOUNDS = {"floor": [1.0, 2.0], "by_jacobian": [2.0, 3.0]}
PANELS = {"a": {"b": [[1.0, 2.0]]}}


def decode(z):
    return torch.zeros(len(z), 3, 2)


# Every array argument: the argument's name, and a picture of a value for it.
ARRAYS = {
    "kl": (lambda value: plot_kl_per_dimension(value), KL),
    "kl of a model": (lambda value: plot_kl_per_dimension({"model": value}), KL),
    "active": (lambda value: plot_kl_per_dimension(KL, value), torch.tensor([True, False, True])),
    "kl_total": (lambda value: plot_epsilon_curve(value), KL[:, 0]),
    "divergence": (lambda value: plot_divergence_bound(value, KL[:, 0]), KL[:, 1]),
    "bound": (lambda value: plot_divergence_bound(KL[:, 0], value), KL[:, 1]),
    "standard_error": (lambda value: plot_divergence_bound(KL[:, 0], KL[:, 0], standard_error=value), KL[:, 1]),
    "x": (lambda value: plot_sweep(value, PANELS), torch.tensor([0.0, 1.0])),
    "results": (lambda value: plot_sweep([0.0, 1.0], {"a": {"b": value}}), torch.rand(3, 2)),
    "training": (lambda value: plot_training(value), KL[:, 0]),
    "beta": (lambda value: plot_training(KL[:, 0], beta=value), KL[:, 1]),
    "inverse_lipschitz": (lambda value: plot_training(KL[:, 0], inverse_lipschitz=value), KL[:, 1]),
    "loc": (lambda value: plot_posteriors(value, ZERO + 1), ZERO),
    "scale": (lambda value: plot_posteriors(ZERO, value), ZERO + 1),
    "labels": (lambda value: plot_posteriors(ZERO, ZERO + 1, labels=value), torch.tensor([3, 7, 3, 9])),
    "locations of prior": (lambda value: plot_posteriors(ZERO, ZERO + 1, prior=(value, ZERO + 1)), ZERO),
    "scales of prior": (lambda value: plot_posteriors(ZERO, ZERO + 1, prior=(ZERO, value)), ZERO + 1),
    "kappas": (lambda value: plot_guaranteed_information(value, BOUNDS), torch.tensor([0.0, 1.0])),
    "guaranteed": (lambda value: plot_guaranteed_information([0, 1], BOUNDS | {"floor": value}), torch.rand(3, 2)),
    "information": (lambda value: plot_guaranteed_information([0, 1], BOUNDS, information=value), torch.rand(3, 2)),
    "kl of guides": (lambda value: plot_guaranteed_information([0, 1], BOUNDS, kl=value), torch.rand(3, 2)),
    "images": (lambda value: plot_images(value), X),
    "labels of images": (lambda value: plot_images(X, labels=value), torch.arange(4)),
    "center": (lambda value: plot_traversals(decode, 3, center=value), KL[0]),
    "decode": (lambda value: plot_traversals(lambda z: value, 2, num_steps=2), X),
    "reconstruction": (lambda value: plot_reconstructions(X, value), X),
    "images of classes": (lambda value: plot_class_samples(value), X[None]),
    "labels of classes": (lambda value: plot_class_samples(X[:, None], value), torch.arange(4)),
}


def name_of(argument):
    return argument.split(" of ")[0] if "prior" not in argument else argument


@pytest.mark.parametrize(("draw", "value"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_any_kind_are_drawn_alike(draw, value):
    def picture(value):
        drawn = draw(value)
        ax = drawn if not isinstance(drawn, np.ndarray) else drawn[0]
        lines = [line.get_xydata() for line in ax.lines] + [points.get_offsets() for points in ax.collections]
        return [*lines, *(image.get_array() for image in ax.images), np.array(ax.get_xlim() + ax.get_ylim())]

    expected = picture(value)
    array = value.numpy(force=True)
    kinds = [array, array.tolist(), tuple(array), list(value), xr.DataArray(array), array.astype(object)]
    if value.is_floating_point():
        kinds.append(value.clone().requires_grad_())
    if array.ndim <= 2:
        kinds.append(pd.Series(array) if array.ndim == 1 else pd.DataFrame(array))
    for kind in kinds:
        for found, drawn in zip(picture(kind), expected, strict=True):
            np.testing.assert_allclose(found, drawn, rtol=1e-6)
    plt.close("all")


class Unfitted:
    """An object without numbers."""


NO_ARRAYS = {
    "none": None,
    "object": Unfitted(),
    "class": torch.Tensor,
    "function": lambda value: value,
    "Dataset": xr.Dataset({"z": ("n", [1.0, 2.0])}),
    "text": "text",
    "ragged": [[1.0, 2.0], [1.0]],
    "texts": ["a", "b", "c"],
    "too deep": torch.ones(2, 2, 2, 2, 2, 2),
    "number": 3.0,
    "complex": torch.ones(4, 2) * 1j,
}
OPTIONAL = ("active", "standard_error", "beta", "inverse_lipschitz", "labels", "center", "information")


@pytest.mark.parametrize("kind", NO_ARRAYS)
@pytest.mark.parametrize("argument", ARRAYS)
def test_what_is_no_array_is_refused_by_name(argument, kind):
    name = name_of(argument)
    if kind == "none" and (name in OPTIONAL or argument == "kl of guides"):
        return
    if kind == "number" and name in ("beta", "inverse_lipschitz"):
        return  # one number for all steps
    with pytest.raises((ValueError, TypeError), match=f"Expected {name}"):
        ARRAYS[argument][0](NO_ARRAYS[kind])
    assert not plt.get_fignums()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("argument", [argument for argument, (_, value) in ARRAYS.items() if value.is_floating_point()])
def test_values_that_are_not_finite_are_refused_by_name(argument, value):
    if argument in ("results", "guaranteed", "information", "kl of guides") and math.isnan(value):
        return  # a missing run
    draw, right = ARRAYS[argument]
    wrong = right.clone()
    wrong.view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"Expected {name_of(argument)}.* to be finite"):
        draw(wrong)
    assert not plt.get_fignums()


DRAWINGS = {
    "plot_kl_per_dimension": lambda ax: plot_kl_per_dimension(KL, ax=ax),
    "plot_kl_per_dimension of models": lambda ax: plot_kl_per_dimension({"a": KL}, ax=ax),
    "plot_epsilon_curve": lambda ax: plot_epsilon_curve(KL[0], ax=ax),
    "plot_divergence_bound": lambda ax: plot_divergence_bound(KL[0], KL[0], ax=ax),
    "plot_guaranteed_information": lambda ax: plot_guaranteed_information([0, 1], BOUNDS, ax=ax),
    "plot_training": lambda ax: plot_training(KL[0], ax=ax),
    "plot_posteriors": lambda ax: plot_posteriors(ZERO, ZERO, ax=ax),
    "plot_images": lambda ax: plot_images(X, ax=ax),
    "plot_traversals": lambda ax: plot_traversals(decode, 2, ax=ax),
    "plot_reconstructions": lambda ax: plot_reconstructions(X, X, ax=ax),
    "plot_class_samples": lambda ax: plot_class_samples(X[None], ax=ax),
}


@pytest.mark.parametrize("ax", ["ax", 3, False, [], plt, Unfitted(), np.array([1])])
@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_what_are_no_axes(draw, ax):
    with pytest.raises(TypeError, match="Expected ax to be axes of Matplotlib or None, got"):
        draw(ax)
    assert not plt.get_fignums()


def test_what_are_no_axes_of_a_sweep():
    figure, axes = plt.subplots(1, 2)
    for wrong in ("ax", figure, [3]):
        with pytest.raises(TypeError, match=r"Expected axes\[0\] to be axes of Matplotlib"):
            plot_sweep([0.0, 1.0], PANELS, axes=wrong)
    with pytest.raises(TypeError, match="got a ndarray: pass one entry of the array"):
        plot_images(X, ax=axes)
    assert plot_sweep([0.0, 1.0], PANELS, axes=axes[0])[0] is axes[0]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_kl_per_dimension(KL, sort="no"), "sort to be True or False"),
        (lambda: plot_kl_per_dimension(KL, epsilon="a"), "epsilon to be a finite number >= 0"),
        (lambda: plot_kl_per_dimension({1: KL, "1": KL}), "labels of kl that are written differently"),
        (lambda: plot_kl_per_dimension(getattr(xr, "DataTree", xr.Dataset)()), "kl to be an array or a mapping"),
        (lambda: plot_sweep([0.0], [1.0]), "results to be a mapping from titles to panels, got a list"),
        (lambda: plot_sweep([0.0], None), "results to be a mapping from titles to panels, got a NoneType"),
        (lambda: plot_sweep([0.0, 1.0], PANELS, ylabels=5), "ylabels to be 1 labels"),
        (lambda: plot_training([1.0], beta={"z": 1.0}), "beta to be a tensor or an array, got a dict"),
        (lambda: plot_training([1.0], smoothing="a"), "smoothing to be an int >= 1"),
        (lambda: plot_posteriors(ZERO, ZERO, labels=[0.0, math.nan, 1.0, 1.0]), "labels to be finite, got nan"),
        (lambda: plot_posteriors(ZERO, ZERO, labels=np.array(["a", None, "b", "b"])), "labels to be of one kind"),
        (lambda: plot_posteriors(ZERO, ZERO, prior="normal"), "prior to be a bool or a tuple"),
        (lambda: plot_posteriors(ZERO, ZERO, max_ellipses="a"), "max_ellipses to be an int >= 1"),
        (lambda: plot_images(X, cmap="no color"), "cmap to be the name of .* got 'no color'"),
        (lambda: plot_images(X, cmap=3), "cmap to be the name of .* got 3"),
        (lambda: plot_images(X, num_columns="a"), "num_columns to be an int >= 1"),
        (lambda: plot_images(X, labels="abcd"), r"labels to be a sequence of labels, got shape \(\)"),
        (lambda: plot_images([X[0], X[0, :2]]), "images to be a tensor or an array, got a list that is none"),
        (lambda: plot_traversals(torch.nn.Linear, 2), "decode to be a function or module .*, got the class Linear"),
        (lambda: plot_traversals("decode", 2), "decode to be a function or module .*, got a str"),
        (lambda: plot_traversals(decode, "a"), "latent_dim to be an int >= 1"),
        (lambda: plot_traversals(decode, 2, dims=1), "dims to be a sequence of dimensions, got 1"),
        (lambda: plot_traversals(decode, 2, dims="01"), "dims to be a sequence of dimensions, got '01'"),
        (lambda: plot_traversals(decode, 2, dims=torch.tensor(1)), "dims to be a sequence of dimensions"),
        (lambda: plot_traversals(decode, 2, dims=[0.5]), "each entry of dims to be an int from 0 to 1, got 0.5"),
        (lambda: plot_traversals(decode, 2, span="a"), "span to be a finite number > 0"),
        (lambda: plot_traversals(decode, 2, num_steps=2.5), "num_steps to be an int >= 2"),
        (lambda: plot_traversals(torch.nn.Linear(3, 4), 2), "decode to take z, float32 of shape .* got RuntimeError"),
        (lambda: plot_traversals(lambda z, y: z, 2), "decode to take z, .* got TypeError"),
        (lambda: plot_traversals(lambda z: torch.distributions.Normal(z, 1), 2), "decode to return images to be"),
        (lambda: plot_reconstructions(X, X[:, :2]), r"reconstruction of shape \(4, 3, 2\), as x"),
    ],
)  # fmt: skip
def test_other_arguments_that_are_refused(draw, message):
    with pytest.raises((ValueError, TypeError), match=f"Expected {message}"):
        draw()
    assert not plt.get_fignums()


def test_plots_of_modules_are_in_evaluation_mode():
    class Noisy(torch.nn.Sequential):
        def __init__(self):
            super().__init__(
                torch.nn.Linear(2, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(), torch.nn.Unflatten(1, (3, 2))
            )

        def decode(self, z):
            return self(z)

    module = Noisy()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = (plot_traversals(function, 2).images[0].get_array() for function in (module, module.decode))
    np.testing.assert_array_equal(first, second)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
