"""Pictures of the latent space: posteriors in two dimensions, and images that its points decode to."""

import math
from collections.abc import Callable, Sequence
from operator import index

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.ticker import Formatter
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._modes import evaluation_mode
from pyro_ilvae.plots import _drawing
from pyro_ilvae.plots._drawing import Array, Floats

_MOST_CLASSES = len(_drawing.COLORS) * len(_drawing.MARKERS)


def plot_posteriors(
    loc: Array,
    scale: Array,
    *,
    labels: Array | None = None,
    prior: bool = True,
    max_ellipses: int = 200,
    ax: Axes | None = None,
) -> Axes:
    r"""Posterior means and 2-sigma ellipses over a latent space of two dimensions.

    .. math:: \{z : (z - \mu_n)^\top \Sigma_n^{-1} (z - \mu_n) = 4\},

    which holds 86 % of a Gaussian posterior. Where the posterior has collapsed, the ellipse is the prior's circle.

    Args:
        loc: the posterior means, of shape (N, 2).
        scale: the standard deviations, of shape (N, 2), or the covariances, of shape (N, 2, 2).
        labels: the class of each datum, of shape (N,), told apart by colour and marker; one class if None.
        prior: whether to draw the 2-sigma circle of the prior N(0, I), dashed.
        max_ellipses: the most ellipses to draw, of data evenly spaced in their order; all means are drawn.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for other shapes, values that are not finite, negative scales, covariances that are not symmetric
            or not positive semi-definite, or more classes than there are colours and markers.

    References:
        Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder network,
        https://arxiv.org/abs/2304.12770 (Figures 2 and 4)

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plot_posteriors([[0.0, 1.0], [1.0, 0.0]], [[0.5, 0.1], [0.2, 1.0]], labels=["left", "right"])
        >>> ax.get_xlabel(), [text.get_text() for text in ax.get_legend().get_texts()]
        ('latent coordinate $z_0$', ['prior', 'left', 'right'])
        >>> plt.close(ax.figure)
    """
    means = _drawing.floats("loc", loc, "(N, 2)")
    axis_lengths, angles, extents = _ellipses(scale, len(means))
    _checks.positive_int("max_ellipses", max_ellipses)
    classes = np.zeros(len(means), dtype=int) if labels is None else _drawing.as_numpy(labels)
    if classes.shape != (len(means),):
        raise ValueError(f"Expected labels of shape ({len(means)},), got {classes.shape}")
    names = np.unique(classes)
    if len(names) > _MOST_CLASSES:
        raise ValueError(f"Expected labels of at most {_MOST_CLASSES} classes, got {len(names)}")

    ax = ax or _drawing.new_axes((5.6, 4.8))
    if prior:
        angle = np.linspace(0, 2 * np.pi, 201)
        ax.plot(
            2 * np.cos(angle), 2 * np.sin(angle), color="black", linestyle="--", linewidth=1, zorder=4, label="prior"
        )
    chosen = np.zeros(len(means), dtype=bool)
    chosen[np.linspace(0, len(means) - 1, min(max_ellipses, len(means))).round().astype(int)] = True
    for i, name in enumerate(names):
        members = classes == name
        drawn = members & chosen
        widths, heights = axis_lengths[drawn].T
        ellipses = EllipseCollection(
            widths,
            heights,
            angles[drawn],
            units="xy",
            offsets=means[drawn],
            offset_transform=ax.transData,
            facecolors="none",
            edgecolors=_drawing.color(i),
            linewidths=0.8,
            linestyles=_drawing.line_style(i // len(_drawing.COLORS)),
            alpha=0.5,
        )
        ax.add_collection(ellipses, autolim=False)
        ax.scatter(
            means[members, 0],
            means[members, 1],
            s=20,
            color=_drawing.color(i),
            marker=_drawing.marker(i),
            linewidths=0,
            alpha=0.8,
            zorder=3,
            label=None if labels is None else str(name),
        )
    # A collection of ellipses counts its centres only.
    corners = [means[chosen] - extents[chosen], means[chosen] + extents[chosen]]
    ax.update_datalim(np.concatenate(corners))
    ax.autoscale_view()
    shared = [len(axes.get_siblings(ax)) > 1 for axes in (ax.get_shared_x_axes(), ax.get_shared_y_axes())]
    # Wider limits leave no narrow box, but Matplotlib refuses them where others share both axes.
    ax.set_aspect("equal", adjustable="box" if all(shared) else "datalim")
    ax.set(xlabel="latent coordinate $z_0$", ylabel="latent coordinate $z_1$")
    if prior or labels is not None:
        _drawing.legend_beside(ax, markerscale=1.5)
    return ax


def plot_images(
    images: Array,
    *,
    num_columns: int | None = None,
    labels: Sequence[object] | Array | None = None,
    cmap: str = "gray",
    ax: Axes | None = None,
) -> Axes:
    """A grid of images in one axes, row by row.

    Grey images share one scale, from the smallest value of them all to the largest. Colours are numbers from 0 to 1,
    outside of which they are clipped, or integers from 0 to 255.

    Args:
        images: the images, of shape (N, H, W) or (N, H, W, 3).
        num_columns: the number of columns; about as many as rows if None.
        labels: a label for each row, or a title for each image.
        cmap: the name of Matplotlib's colour map for grey images.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for other shapes, values that are not finite, or another number of labels.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plot_images(torch.rand(6, 8, 8), num_columns=3, labels=["first", "second"])
        >>> [tick.get_text() for tick in ax.get_yticklabels()]
        ['first', 'second']
        >>> plt.close(ax.figure)
    """
    array = _images("images", images, 3)
    num_images, height, width = array.shape[:3]
    if num_columns is None:
        num_columns = math.ceil(math.sqrt(num_images))
    columns = min(_checks.positive_int("num_columns", num_columns), num_images)
    rows = math.ceil(num_images / columns)
    texts = [] if labels is None else [str(text) for text in _drawing.as_numpy(labels)]
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
        # Without a colour between the images, as the missing values of a colour map.
        mosaic = np.nan_to_num(np.concatenate([mosaic, np.isfinite(mosaic[..., :1])], axis=-1))

    if ax is None:
        letters = 0.09 * max(map(len, texts), default=0)  # their width in inches
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
        ax.set_yticks(_centres(rows, height, above), labels=texts)
        # In the middle of a larger place, a constrained layout would cut the labels off.
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
    r"""What moving one latent dimension at a time does to the image: where it has collapsed, nothing.

    Row j shows :math:`f(c + t e_j)` for t from -span to span, around the centre c.

    Args:
        decode: the map from a tensor of shape (M, K) to images of shape (M, H, W) or (M, H, W, 3). It is called once,
            without gradients, and modules are in evaluation mode meanwhile.
        latent_dim: the dimension :math:`K`.
        dims: the dimensions to move, counted from 0, in the order of the rows; all if None.
        center: the centre, of shape (K,), whose dtype and device ``decode`` gets; zeros if None.
        span: the farthest that a dimension is moved either way, in prior standard deviations.
        num_steps: the number of images in a row, at least 2.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for dimensions that are not there, other shapes, a span that is not positive, or values that are
            not finite.

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
    _checks.positive_int("latent_dim", latent_dim)
    moved = list(range(latent_dim)) if dims is None else [index(dim) for dim in dims]
    if not moved or not all(0 <= dim < latent_dim for dim in moved):
        raise ValueError(f"Expected dims to be dimensions from 0 to {latent_dim - 1}, got {dims}")
    if _checks.constant("span", span) == 0:
        raise ValueError(f"Expected span > 0, got {span}")
    if _checks.positive_int("num_steps", num_steps) < 2:
        raise ValueError(f"Expected num_steps >= 2, got {num_steps}")
    if center is None:
        middle = torch.zeros(latent_dim)
    else:
        _drawing.floats("center", center, f"({latent_dim},)")
        middle = (
            center.detach() if isinstance(center, Tensor) else torch.tensor(center, dtype=torch.get_default_dtype())
        )
    if not middle.is_floating_point():
        middle = middle.to(torch.get_default_dtype())
    # Not linspace, whose rounding misses the 0 in the middle.
    steps = [span * (2 * i - (num_steps - 1)) / (num_steps - 1) for i in range(num_steps)]
    z = middle.repeat(len(moved), num_steps, 1)
    for row, dim in zip(z, moved, strict=True):
        row[:, dim] += torch.tensor(steps, dtype=middle.dtype, device=middle.device)
    with torch.no_grad(), evaluation_mode(decode):
        images = _images("decode to return images", decode(z.flatten(0, 1)), 3)
    if len(images) != len(moved) * num_steps:
        raise ValueError(f"Expected decode to return {len(moved) * num_steps} images, got {len(images)}")
    ax = plot_images(images, num_columns=num_steps, labels=[f"$z_{{{dim}}}$" for dim in moved], ax=ax)
    height, width = images.shape[1:3]
    labels = [Formatter.fix_minus(f"{step:.3g}") for step in steps]
    ax.set_xticks(_centres(num_steps, width, _gap(height, width)), labels=labels)
    ax.set_xlabel("value of $z_j$" if not middle.any() else "$z_j$ less its value at the centre")
    return ax


def plot_reconstructions(x: Array, reconstruction: Array, *, ax: Axes | None = None) -> Axes:
    """Images above their reconstructions, all on the images' scale of grey.

    Args:
        x: the images, of shape (N, H, W) or (N, H, W, 3).
        reconstruction: their reconstructions, of the same shape.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for shapes that differ or are others, and values that are not finite.

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
        labels: the names of the classes, of shape (C,); their numbers from 0 if None.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for other shapes, values that are not finite, or another number of labels.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plot_class_samples(torch.rand(2, 6, 8, 8), ["shirt", "boot"])
        >>> [tick.get_text() for tick in ax.get_yticklabels()]
        ['shirt', 'boot']
        >>> plt.close(ax.figure)
    """
    array = _images("images", images, 4)
    names = [str(name) for name in (range(len(array)) if labels is None else _drawing.as_numpy(labels))]
    if len(names) != len(array):
        raise ValueError(f"Expected labels for {len(array)} classes, got {len(names)} labels")
    return plot_images(array.reshape(-1, *array.shape[2:]), num_columns=array.shape[1], labels=names, ax=ax)


def _ellipses(scale: Array, num_data: int) -> tuple[Floats, Floats, Floats]:
    """Widths and heights (N, 2), angles in degrees (N,), and half the extents along the coordinates (N, 2)."""
    if _drawing.as_numpy(scale).ndim != 3:
        sigma = _drawing.floats("scale", scale, f"({num_data}, 2)")
        if (sigma < 0).any():
            raise ValueError(f"Expected scale >= 0, got {sigma.min()}")
        return 4 * sigma, np.zeros(num_data), 2 * sigma
    covariance = _drawing.floats("scale", scale, f"({num_data}, 2, 2)")
    size = np.abs(covariance).max()
    if np.abs(covariance - covariance.mT).max() > 1e-4 * size:
        raise ValueError("Expected scale of shape (N, 2, 2) to hold symmetric covariances, got one that is not")
    variances, directions = np.linalg.eigh(covariance)
    if variances.min() < -1e-4 * size:
        raise ValueError(f"Expected scale to hold positive semi-definite covariances, got eigenvalue {variances.min()}")
    angles = np.degrees(np.arctan2(directions[:, 1, 0], directions[:, 0, 0]))
    diagonal = np.diagonal(covariance, axis1=-2, axis2=-1)
    return 4 * np.sqrt(np.maximum(variances, 0)), angles, 2 * np.sqrt(np.maximum(diagonal, 0))


def _images(name: str, value: Array, ndim: int) -> Floats:
    """Images with ``ndim`` dimensions, or colour images with one more of size 3, with colours from 0 to 1."""
    grey = {3: "(N, H, W)", 4: "(C, S, H, W)"}[ndim]
    array = _drawing.as_numpy(value)
    colored = array.ndim == ndim + 1 and array.shape[-1] == 3
    if not colored and array.ndim != ndim:
        raise ValueError(f"Expected {name} of shape {grey} or {grey[:-1]}, 3), got {array.shape}")
    checked = _drawing.floats(name, array, f"{grey[:-1]}, 3)" if colored else grey)
    if not colored:
        return checked
    return np.asarray(np.clip(checked / 255 if array.dtype.kind in "iu" else checked, 0.0, 1.0))


def _gap(height: int, width: int) -> int:
    return max(1, round(max(height, width) / 16))


def _centres(count: int, size: int, gap: int) -> Floats:
    return np.arange(count, dtype=np.float64) * (size + gap) + (size - 1) / 2
