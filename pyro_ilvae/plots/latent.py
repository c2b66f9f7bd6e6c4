"""Pictures of the latent space: posteriors in two dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyro_ilvae import _checks
from pyro_ilvae.plots import _drawing
from pyro_ilvae.plots._drawing import Array, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_posteriors"]

_MOST_CLASSES = len(_drawing.COLORS) * len(_drawing.MARKERS)


def plot_posteriors(
    loc: Array,
    scale: Array,
    *,
    labels: Array | None = None,
    prior: bool | tuple[Array, Array] = True,
    max_ellipses: int = 200,
    ax: Axes | None = None,
) -> Axes:
    r"""Posterior means and 2-sigma ellipses in a latent space of two dimensions.

    .. math:: \{z : (z - \mu_n)^\top \Sigma_n^{-1} (z - \mu_n) = 4\},

    each of which holds 86 % of a Gaussian posterior. The ellipse of a collapsed posterior is the prior's circle.

    Args:
        loc: the posterior means, of shape (N, 2).
        scale: the standard deviations, of shape (N, 2), or the covariances, of shape (N, 2, 2).
        labels: the class of each datum, of shape (N,), shown by color and marker; one class if None.
        prior: whether to draw the 2-sigma circle of the prior N(0, I), dashed. For a mixture prior, the locations and
            scales of its components, each of shape (C, 2): the ellipse of each component is drawn, with a cross at
            its location.
        max_ellipses: the largest number of ellipses to draw. Their data are evenly spaced in the order of the data;
            the means of all data are drawn.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for other shapes, values that are not finite, negative scales, covariances that are not symmetric
            or not positive semi-definite, and more classes than there are pairs of color and marker.

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
    from matplotlib.collections import EllipseCollection

    _drawing.checked_axes(ax)
    means = _drawing.floats("loc", loc, "(N, 2)")
    axis_lengths, angles, extents = _ellipses(scale, len(means))
    _checks.positive_int("max_ellipses", max_ellipses)
    classes = np.zeros(len(means), dtype=int) if labels is None else _drawing.as_numpy("labels", labels)
    if classes.shape != (len(means),):
        raise ValueError(f"Expected labels of shape ({len(means)},), got {classes.shape}")
    names = _different(classes)
    if len(names) > _MOST_CLASSES:
        raise ValueError(f"Expected labels of at most {_MOST_CLASSES} classes, got {len(names)}")
    components = _components(prior)

    ax = ax or _drawing.new_axes((5.6, 4.8))
    _draw_components(ax, *components, crosses=not isinstance(prior, bool))
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
    # For the limits of the axes, Matplotlib counts only the centers of a collection of ellipses.
    corners = [means[chosen] - extents[chosen], means[chosen] + extents[chosen]]
    ax.update_datalim(np.concatenate(corners))
    ax.autoscale_view()
    shared = [len(axes.get_siblings(ax)) > 1 for axes in (ax.get_shared_x_axes(), ax.get_shared_y_axes())]
    # Wider limits keep the box from becoming narrow, but Matplotlib refuses them for axes that share both limits.
    ax.set_aspect("equal", adjustable="box" if all(shared) else "datalim")
    ax.set(xlabel="latent coordinate $z_0$", ylabel="latent coordinate $z_1$")
    if prior is not False or labels is not None:
        _drawing.legend_beside(ax, markerscale=1.5)
    return ax


def _different(classes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The different classes in order."""
    if classes.dtype.kind in "fc" and not np.isfinite(classes).all():
        raise ValueError(f"Expected labels to be finite, got {classes[~np.isfinite(classes)][0]}")
    try:
        return np.unique(classes)
    except TypeError as error:  # None beside strings, for example
        raise TypeError(f"Expected labels to be of one kind, got a mixture: {error}") from error


def _components(prior: bool | tuple[Array, Array]) -> tuple[Floats, Floats]:
    """Locations and scales of the prior's components, each of shape (C, 2)."""
    if isinstance(prior, bool):
        return np.zeros((int(prior), 2)), np.ones((int(prior), 2))
    if not (isinstance(prior, tuple) and len(prior) == 2):
        raise ValueError(f"Expected prior to be a bool or a tuple of locations and scales, got {prior!r}")
    locations = _drawing.floats("locations of prior", prior[0], "(C, 2)")
    scales = _drawing.floats("scales of prior", prior[1], f"({len(locations)}, 2)")
    if (scales < 0).any():
        raise ValueError(f"Expected scales of prior >= 0, got {scales.min()}")
    return locations, scales


def _draw_components(ax: Axes, locations: Floats, scales: Floats, crosses: bool) -> None:
    angle = np.linspace(0, 2 * np.pi, 201)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)
    style: dict[str, Any] = {"color": "black", "linewidth": 1, "zorder": 4}
    for i, (location, scale) in enumerate(zip(locations, scales, strict=True)):
        ax.plot(*(location + 2 * scale * circle).T, linestyle="--", label="prior" if i == 0 else None, **style)
        if crosses:
            ax.plot(*location, marker="+", markersize=10, **style)


def _ellipses(scale: Array, num_data: int) -> tuple[Floats, Floats, Floats]:
    """Widths and heights (N, 2), angles in degrees (N,), and half the extents along the two coordinates (N, 2)."""
    if _drawing.as_numpy("scale", scale).ndim != 3:
        sigma = _drawing.floats("scale", scale, f"({num_data}, 2)")
        if (sigma < 0).any():
            raise ValueError(f"Expected scale >= 0, got {sigma.min()}")
        return 4 * sigma, np.zeros(num_data), 2 * sigma
    covariance = _drawing.floats("scale", scale, f"({num_data}, 2, 2)")
    size = np.abs(covariance).max()
    if np.abs(covariance - covariance.mT).max() > 1e-4 * size:
        wrong = int(np.abs(covariance - covariance.mT).max((1, 2)).argmax())
        raise ValueError(
            f"Expected scale to hold symmetric covariances, got {covariance[wrong].tolist()} at index {wrong}"
        )
    variances, directions = np.linalg.eigh(covariance)
    if variances.min() < -1e-4 * size:
        raise ValueError(f"Expected scale to hold positive semi-definite covariances, got eigenvalue {variances.min()}")
    angles = np.degrees(np.arctan2(directions[:, 1, 0], directions[:, 0, 0]))
    diagonal = np.diagonal(covariance, axis1=-2, axis2=-1)
    return 4 * np.sqrt(np.maximum(variances, 0)), angles, 2 * np.sqrt(np.maximum(diagonal, 0))
