"""Every picture: drawn in the axes that were given, with nothing cut off, and errors that name what was expected."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers.pictures import ACTIVE, INF, KL, NAN, decode, images, result

from pyro_ilvae.diagnostics import KLDivergence
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
    "sweep-empty": (lambda: plot_sweep([1.0], {"a": {}}), r"got no labels for \['a'\]"),
    "sweep-ylabels": (lambda: plot_sweep([1.0], {"a": {"b": [[1.0]]}}, ylabels=["a", "b"]), "ylabels to be 1 labels"),
    "sweep-axes": (lambda: plot_sweep([1.0], {"a": {"b": [[1.0]]}}, axes=plt.subplots(2)[1]), "axes to be 1 axes"),
    "training-shape": (lambda: plot_training(ONE), r"training of shape \(T,\)"),
    "training-nan": (lambda: plot_training([1.0, NAN]), r"training to be finite, got nan at index \(1,\)"),
    "training-beta": (lambda: plot_training([1.0, 2.0], beta=[1.0]), r"beta of shape \(2,\), got \(1,\)"),
    "training-l": (lambda: plot_training([1.0], inverse_lipschitz=NAN), "inverse_lipschitz to be finite"),
    "training-smoothing": (
        lambda: plot_training([1.0], smoothing=2),
        "smoothing to be at most 1, the number of",
    ),
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
    "traversals-dims": (lambda: plot_traversals(decode, 2, dims=[2]), "dims to be an int from 0 to 1, got 2"),
    "traversals-none": (lambda: plot_traversals(decode, 2, dims=[]), r"dims to name at least one dimension, got \[\]"),
    "traversals-center": (lambda: plot_traversals(decode, 2, center=[0.0]), r"center of shape \(2,\), got \(1,\)"),
    "traversals-span": (lambda: plot_traversals(decode, 2, span=0.0), "span to be a finite number > 0, got 0.0"),
    "traversals-steps": (lambda: plot_traversals(decode, 2, num_steps=1), "num_steps to be an int >= 2, got 1"),
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
