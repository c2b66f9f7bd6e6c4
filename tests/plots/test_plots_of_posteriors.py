"""Pictures of posteriors in two dimensions."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers.pictures import OKABE_ITO, legend
from matplotlib.collections import EllipseCollection, PathCollection
from matplotlib.colors import to_hex

from pyro_ilvae.plots import plot_posteriors


def ellipses(ax):
    return [collection for collection in ax.collections if isinstance(collection, EllipseCollection)]


def points(ax):
    return [collection for collection in ax.collections if isinstance(collection, PathCollection)]


def test_posteriors_are_means_and_ellipses_of_two_sigma():
    loc, scale = torch.randn(5, 2, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    ax = plot_posteriors(loc, scale)
    [collection], [means] = ellipses(ax), points(ax)
    np.testing.assert_allclose(means.get_offsets(), loc.numpy(force=True), rtol=1e-6)
    np.testing.assert_allclose(collection.get_offsets(), loc.numpy(force=True), rtol=1e-6)
    np.testing.assert_allclose(collection.get_widths(), 4 * scale[:, 0].numpy(force=True), rtol=1e-6)
    np.testing.assert_allclose(collection.get_heights(), 4 * scale[:, 1].numpy(force=True), rtol=1e-6)
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
    for (width, height, angle), precision in zip(shapes, np.linalg.inv(covariance.numpy(force=True)), strict=True):
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
        np.testing.assert_allclose(
            collection.get_offsets(), loc[torch.as_tensor(labels == name)].numpy(force=True), rtol=1e-6
        )


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


def test_components_of_a_prior_are_two_sigma_ellipses():
    loc, scale = torch.randn(3, 2).double(), torch.rand(3, 2).double() + 0.1
    ax = plot_posteriors(torch.zeros(2, 2), torch.ones(2, 2), prior=(loc, scale))
    curves, crosses = ax.lines[::2], ax.lines[1::2]
    for mean, deviation, curve, cross in zip(
        loc.numpy(force=True), scale.numpy(force=True), curves, crosses, strict=True
    ):
        np.testing.assert_allclose((((curve.get_xydata() - mean) / deviation) ** 2).sum(1), 4.0)
        np.testing.assert_allclose(cross.get_xydata(), [mean])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["prior"]
