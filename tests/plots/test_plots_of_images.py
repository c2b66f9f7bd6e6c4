"""Pictures of images: tiles, traversals, reconstructions and samples by class."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers.pictures import decode, images, ticks, tiles

from pyro_ilvae.plots import plot_class_samples, plot_images, plot_reconstructions, plot_traversals


@pytest.mark.parametrize("color", [(), (3,)])
def test_images_are_tiles_in_order(color):
    pictures = images(6, 4, 5, *color).requires_grad_()
    ax = plot_images(pictures, num_columns=3)
    drawn = tiles(ax, 4, 5, 2, 3)[..., :3] if color else tiles(ax, 4, 5, 2, 3)
    np.testing.assert_allclose(drawn.reshape(6, 4, 5, *color), pictures.numpy(force=True), rtol=1e-6)


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
    np.testing.assert_allclose(tiles(ax, 4, 5, 2, 5), decode(z).reshape(2, 5, 4, 5).numpy(force=True))
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
    expected = module.eval()(z).reshape(2, 2, 2, 3).numpy(force=True)
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
    np.testing.assert_allclose(tiles(ax, 4, 5, 2, 3), torch.stack([x, 10 * x]).numpy(force=True), rtol=1e-6)
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
    np.testing.assert_allclose(drawn[..., :3] if color else drawn, samples.numpy(force=True), rtol=1e-6)
    assert ticks(ax.yaxis) == ["0", "1"]
    assert ticks(plot_class_samples(samples[:, :1], labels=torch.tensor([5, 6])).yaxis) == ["5", "6"]
