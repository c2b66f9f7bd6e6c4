"""Pictures of images: grids, traversals of a latent space, reconstructions, and samples by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae.plots import _drawing
from pyro_ilvae.plots._drawing import Array, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_class_samples", "plot_images", "plot_reconstructions", "plot_traversals"]


def plot_images(
    images: Array,
    *,
    num_columns: int | None = None,
    labels: Sequence[object] | Array | None = None,
    cmap: str = "gray",
    ax: Axes | None = None,
) -> Axes:
    """A grid of images in one axes, filled row by row.

    Gray images share one scale, from the smallest to the largest value of all images. Colors are integers from 0 to
    255, or floats, which are clipped to [0, 1].

    Args:
        images: the images, of shape (N, H, W) or (N, H, W, 3).
        num_columns: the number of columns; about the number of rows if None.
        labels: a label for each row, or a title for each image.
        cmap: the name of Matplotlib's color map for gray images.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for other shapes, values that are not finite, and another number of labels.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plot_images(torch.rand(6, 8, 8), num_columns=3, labels=["first", "second"])
        >>> [tick.get_text() for tick in ax.get_yticklabels()]
        ['first', 'second']
        >>> plt.close(ax.figure)
    """
    _drawing.checked_axes(ax)
    _check_color_map(cmap)
    array = _images("images", images, 3)
    num_images, height, width = array.shape[:3]
    if num_columns is None:
        num_columns = math.ceil(math.sqrt(num_images))
    columns = min(_checks.positive_int("num_columns", num_columns), num_images)
    rows = math.ceil(num_images / columns)
    texts = [] if labels is None else _drawing.texts("labels", labels)
    if labels is not None and len(texts) not in (rows, num_images):
        raise ValueError(f"Expected labels for {rows} rows or {num_images} images, got {len(texts)} labels")
    titled = labels is not None and len(texts) != rows

    gap = _gap(height, width)
    above = max(gap, round(0.28 * max(height, width))) if titled else gap
    mosaic = np.full((rows * (height + above) - above, columns * (width + gap) - gap, *array.shape[3:]), np.nan)
    corners = [(i // columns * (height + above), i % columns * (width + gap)) for i in range(num_images)]
    for (top, left), image in zip(corners, array, strict=True):
        mosaic[top : top + height, left : left + width] = image
    if array.ndim == 4:
        # The gaps are transparent, as NaN is in a color map.
        mosaic = np.nan_to_num(np.concatenate([mosaic, np.isfinite(mosaic[..., :1])], axis=-1))

    if ax is None:
        letters = 0.09 * max(map(len, texts), default=0)  # the width of the longest label in inches
        size = min(max(0.75, letters if titled else 0.0), 11 / columns)
        margin = 0.3 if titled else 0.3 + min(letters, 3.0)
        ax = _drawing.new_axes((columns * size + margin, max(size * mosaic.shape[0] / (width + gap) + 0.3, 1.2)))
    ax.imshow(mosaic, cmap=cmap, aspect="equal", origin="upper", interpolation="auto")
    ax.set(xticks=[], yticks=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if titled:
        for (top, left), text in zip(corners, texts, strict=True):
            ax.text(left + (width - 1) / 2, top - 0.5 - 0.15 * gap, text, ha="center", va="bottom", fontsize=8)
        ax.set_ylim(mosaic.shape[0] - 0.5, -0.5 - above)
    elif labels is not None:
        ax.set_yticks(_centers(rows, height, above), labels=texts)
        # In the middle of a larger space, a constrained layout would cut the labels off.
        ax.set_anchor("SW")
    return ax


def plot_traversals(
    decode: Callable[[Tensor], Array],
    latent_dim: int,
    *,
    dims: Sequence[int] | None = None,
    center: Array | None = None,
    span: float = 3.0,
    num_steps: int = 9,
    ax: Axes | None = None,
) -> Axes:
    r"""Images along one latent dimension at a time; moving a collapsed dimension changes nothing.

    Row j shows :math:`f(c + t e_j)` for t from -span to span, around the center c.

    Args:
        decode: a function from a tensor of shape (M, K) to images of shape (M, H, W) or (M, H, W, 3). It is called
            once, without gradients; a module is in evaluation mode during the call.
        latent_dim: the dimension :math:`K`.
        dims: the dimensions to move, counted from 0, in the order of the rows; all if None.
        center: the center c, of shape (K,); zeros if None. The argument of ``decode`` has its dtype and device.
        span: the largest t, in standard deviations of the prior.
        num_steps: the number of images in a row, at least 2.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for dimensions outside 0, ..., K - 1, other shapes, a span that is not positive, and values that
            are not finite.

    References:
        Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder network,
        https://arxiv.org/abs/2304.12770

    Example:
        >>> import matplotlib.pyplot as plt
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Unflatten(1, (8, 8)))
        >>> ax = plot_traversals(decoder, 3, dims=[0, 2], span=2.0, num_steps=5)
        >>> [tick.get_text() for tick in ax.get_yticklabels()], ax.get_xlabel()
        (['$z_{0}$', '$z_{2}$'], 'value of $z_j$')
        >>> plt.close(ax.figure)
    """
    from matplotlib.ticker import Formatter

    _checks.function("decode", decode, "a function or module from z to images")
    _checks.positive_int("latent_dim", latent_dim)
    _drawing.checked_axes(ax)
    if not isinstance(dims, Iterable | None) or isinstance(dims, str) or getattr(dims, "ndim", 1) != 1:
        raise ValueError(f"Expected dims to be a sequence of dimensions, got {dims!r}")
    moved = [
        _checks.index_below("each entry of dims", dim, latent_dim)
        for dim in (range(latent_dim) if dims is None else dims)
    ]
    if not moved:
        raise ValueError(f"Expected dims to name at least one dimension, got {dims!r}")
    _checks.positive("span", span)
    _checks.positive_int("num_steps", num_steps, at_least=2)
    if center is None:
        middle = torch.zeros(latent_dim)
    else:
        numbers = _drawing.floats("center", center, f"({latent_dim},)")
        middle = (
            center.detach() if isinstance(center, Tensor) else torch.tensor(numbers, dtype=torch.get_default_dtype())
        )
    if not middle.is_floating_point():
        middle = middle.to(torch.get_default_dtype())
    # The rounding of linspace would miss the 0 in the middle.
    steps = [span * (2 * i - (num_steps - 1)) / (num_steps - 1) for i in range(num_steps)]
    z = middle.repeat(len(moved), num_steps, 1)
    for row, dim in zip(z, moved, strict=True):
        row[:, dim] += torch.tensor(steps, dtype=middle.dtype, device=middle.device)
    with torch.no_grad(), evaluation_mode(decode):
        images = _images("decode to return images", _decoded(decode, z.flatten(0, 1)), 3)
    if len(images) != len(moved) * num_steps:
        raise ValueError(f"Expected decode to return {len(moved) * num_steps} images, got {len(images)}")
    ax = plot_images(images, num_columns=num_steps, labels=[f"$z_{{{dim}}}$" for dim in moved], ax=ax)
    height, width = images.shape[1:3]
    labels = [Formatter.fix_minus(f"{step:.3g}") for step in steps]
    ax.set_xticks(_centers(num_steps, width, _gap(height, width)), labels=labels)
    ax.set_xlabel("value of $z_j$" if not middle.any() else "$z_j$ less its value at the center")
    return ax


def plot_reconstructions(x: Array, reconstruction: Array, *, ax: Axes | None = None) -> Axes:
    """Images, and below each image its reconstruction, all on the images' scale of gray.

    Args:
        x: the images, of shape (N, H, W) or (N, H, W, 3).
        reconstruction: the reconstructions of the images, of the same shape.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for other shapes, shapes that differ, and values that are not finite.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> x = torch.rand(5, 8, 8)
        >>> ax = plot_reconstructions(x, x.round())
        >>> [tick.get_text() for tick in ax.get_yticklabels()]
        ['data', 'reconstruction']
        >>> plt.close(ax.figure)
    """
    original, decoded = _images("x", x, 3), _images("reconstruction", reconstruction, 3)
    if original.shape != decoded.shape:
        raise ValueError(f"Expected reconstruction of shape {original.shape}, as x, got {decoded.shape}")
    both = np.concatenate([original, decoded])
    ax = plot_images(both, num_columns=len(original), labels=["data", "reconstruction"], ax=ax)
    if original.min() < original.max():
        ax.images[-1].set_clim(original.min(), original.max())
    return ax


def plot_class_samples(
    images: Array, labels: Sequence[object] | Array | None = None, *, ax: Axes | None = None
) -> Axes:
    """A row of samples for each class or component.

    Args:
        images: the samples, of shape (C, S, H, W) or (C, S, H, W, 3).
        labels: the names of the classes, of shape (C,); the numbers 0, ..., C - 1 if None.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for other shapes, values that are not finite, and another number of labels.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plot_class_samples(torch.rand(2, 6, 8, 8), ["shirt", "boot"])
        >>> [tick.get_text() for tick in ax.get_yticklabels()]
        ['shirt', 'boot']
        >>> plt.close(ax.figure)
    """
    array = _images("images", images, 4)
    names = _drawing.texts("labels", range(len(array)) if labels is None else labels)
    if len(names) != len(array):
        raise ValueError(f"Expected labels for {len(array)} classes, got {len(names)} labels")
    return plot_images(array.reshape(-1, *array.shape[2:]), num_columns=array.shape[1], labels=names, ax=ax)


def _decoded(decode: Callable[[Tensor], Array], z: Tensor) -> Array:
    try:
        return decode(z)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        expected = f"{str(z.dtype).removeprefix('torch.')} of shape {tuple(z.shape)}"
        raise ValueError(f"Expected decode to take z, {expected}, got {type(error).__name__}: {error}") from error


def _check_color_map(cmap: object) -> None:
    """Raise where Matplotlib would, but before it has made a figure."""
    from matplotlib import colormaps
    from matplotlib.colors import Colormap

    if not isinstance(cmap, Colormap | None) and not (isinstance(cmap, str) and cmap in colormaps):
        raise ValueError(f"Expected cmap to be the name of one of Matplotlib's color maps, got {cmap!r}")


def _images(name: str, value: Array, ndim: int) -> Floats:
    """Gray images with ``ndim`` dimensions, or color images with a last dimension of size 3 and colors in [0, 1]."""
    gray = {3: "(N, H, W)", 4: "(C, S, H, W)"}[ndim]
    array = _drawing.as_numpy(name, value)
    colored = array.ndim == ndim + 1 and array.shape[-1] == 3
    if not colored and array.ndim != ndim:
        raise ValueError(f"Expected {name} of shape {gray} or {gray[:-1]}, 3), got {array.shape}")
    checked = _drawing.floats(name, array, f"{gray[:-1]}, 3)" if colored else gray)
    if not colored:
        return checked
    return np.asarray(np.clip(checked / 255 if array.dtype.kind in "iu" else checked, 0.0, 1.0))


def _gap(height: int, width: int) -> int:
    return max(1, round(max(height, width) / 16))


def _centers(count: int, size: int, gap: int) -> Floats:
    return np.arange(count, dtype=np.float64) * (size + gap) + (size - 1) / 2
