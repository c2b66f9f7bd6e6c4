"""Pictures of how collapsed a posterior is: divergences by dimension, by datum, and against their lower bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics import ActiveUnits, KLDivergence
from pyro_ilvae.plots import _drawing
from pyro_ilvae.plots._drawing import Array, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_divergence_bound", "plot_epsilon_curve", "plot_kl_per_dimension"]

_MOST_TICKS = 24  # the largest number of latent dimensions whose numbers are readable on an axis
_ROUNDING = 1e-5  # the relative error of sums in float32


def plot_kl_per_dimension(
    kl: Array | KLDivergence | Mapping[str, Array | KLDivergence],
    active: Array | ActiveUnits | Mapping[str, Array | ActiveUnits] | None = None,
    *,
    epsilon: float | None = None,
    sort: bool = True,
    ax: Axes | None = None,
) -> Axes:
    r"""The divergence of each latent dimension from the prior, averaged over the data, in nats.

    .. math:: \overline{\mathrm{KL}}_j = \frac1N \sum_n \mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j)).

    One model is drawn as bars, with a thin line from the 5 % to the 95 % quantile over the data; several models are
    drawn as lines. Inactive units are hollow.

    Args:
        kl: the divergences in nats, of shape (N, K), or the result of
            :func:`~pyro_ilvae.diagnostics.kl_per_dimension`. For several models, a mapping from labels to these.
        active: booleans that say which units are active, of shape (K,): ``summary.verdict.values == "active"`` by their
            nats, of a :func:`~pyro_ilvae.diagnostics.collapse_summary`; or the result of
            :func:`~pyro_ilvae.diagnostics.active_units`, by the variance of their posterior means. For several models,
            a mapping from labels to these.
        epsilon: a divergence in nats below which a dimension counts as collapsed, drawn as a dashed line. Epsilon is
            small beside the other divergences, so the axis is then logarithmic, and linear near zero.
        sort: whether to sort the dimensions from the largest mean to the smallest.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for another shape, values that are not finite, a negative epsilon, and labels in ``active`` that
            are not in ``kl``.

    References:
        | Lucas et al. 2019, Don't blame the ELBO!, https://arxiv.org/abs/1911.02469
        | Burda, Grosse & Salakhutdinov 2016, Importance weighted autoencoders, https://arxiv.org/abs/1509.00519

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plot_kl_per_dimension([[0.0, 1.0, 2.0], [0.0, 1.5, 3.0]], [False, True, True], epsilon=0.01)
        >>> [tick.get_text() for tick in ax.get_xticklabels()], ax.get_ylabel()
        (['2', '1', '0'], 'mean KL to the prior (nats)')
        >>> plt.close(ax.figure)
    """
    if epsilon is not None:
        _checks.non_negative("epsilon", epsilon)
    _checks.boolean("sort", sort)
    _drawing.checked_axes(ax)
    _drawing.refuse_dataset("kl", kl)
    if isinstance(kl, Mapping):
        models = _drawing.labeled("kl", {label: _divergences(values) for label, values in kl.items()}, "(N, K)")
        if not isinstance(active, Mapping | None) or not {str(label) for label in active or {}} <= models.keys():
            got = list(active) if isinstance(active, Mapping) else type(active).__name__
            raise ValueError(f"Expected active to be a mapping from some of {list(models)}, got {got}")
        given = {str(label): value for label, value in (active or {}).items()}
    else:
        models = {"": _drawing.floats("kl", _divergences(kl), "(N, K)")}
        if isinstance(active, Mapping):
            raise ValueError("Expected active to be one array for one model, got a mapping")
        given = {} if active is None else {"": active}
    units = {label: _active(given.get(label), values.shape[1]) for label, values in models.items()}

    ax = ax or _drawing.new_axes((6.4, 3.8))
    if epsilon is not None:
        if epsilon > 0:
            # The linear part ends at a power of ten, because ticks within it would overlap.
            ax.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(epsilon)), linscale=0.5)
        ax.axhline(epsilon, color="black", linestyle="--", linewidth=1, label=rf"$\epsilon$ = {epsilon:g} nats")
    ax.set_ylabel("mean KL to the prior (nats)")
    if isinstance(kl, Mapping):
        _kl_lines(ax, models, units, sort)
    else:
        _kl_bars(ax, models[""], units[""], active is not None, sort)
    if epsilon and min(values.min() for values in models.values()) >= 0:
        ax.set_ylim(bottom=0)  # symlog is symmetric and would show negative values
    handles = ax.get_legend_handles_labels()[0]
    if isinstance(kl, Mapping) and active is not None:
        from matplotlib.lines import Line2D

        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "linestyle": "none"}
        handles.append(Line2D([], [], color="black", label="inactive", **hollow))
    if isinstance(kl, Mapping) or len(handles) > 1:
        _drawing.legend_beside(ax, handles=handles)
    return ax


def plot_epsilon_curve(kl_total: Array | Mapping[str, Array], *, ax: Axes | None = None) -> Axes:
    r"""The fraction of the data whose posterior is within epsilon of the prior, against epsilon in nats.

    .. math:: \epsilon \mapsto \frac1N \#\{n : D(p(z \mid x_n) \,\|\, p(z)) \le \epsilon\},

    which is the fraction of the data in epsilon-posterior collapse. A logarithmic axis has no place for divergences of
    zero, or for negative estimates from draws: each curve starts at the fraction of such data, and the legend names
    this fraction.

    Args:
        kl_total: the divergences in nats, of shape (N,). For several curves, a mapping from labels to these.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for another shape, and for values that are not finite.

    References:
        Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder network,
        https://arxiv.org/abs/2304.12770

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plot_epsilon_curve({"L = 0": [0.0, 0.1, 0.2, 4.0], "L = 1": [2.0, 3.0, 4.0, 5.0]})
        >>> [line.get_ydata().tolist() for line in ax.lines]
        [[0.25, 0.5, 0.75, 1.0, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]]
        >>> plt.close(ax.figure)
    """
    _drawing.checked_axes(ax)
    _drawing.refuse_dataset("kl_total", kl_total)
    if isinstance(kl_total, Mapping):
        curves = _drawing.labeled("kl_total", kl_total, "(N,)")
    else:
        curves = {"": _drawing.floats("kl_total", kl_total, "(N,)")}
    low, high = _positive_range(*curves.values())
    ax = ax or _drawing.new_axes((6.8, 3.8))
    legend = isinstance(kl_total, Mapping)
    for i, (label, values) in enumerate(curves.items()):
        epsilon, counts = np.unique(values[values > 0], return_counts=True)
        none = np.count_nonzero(values <= 0)
        fraction = (none + np.concatenate([[0], counts.cumsum()])) / len(values)
        if none:
            legend = True
            label = f"{label or 'divergence'}\n({100 * none / len(values):.3g} % at or below 0)"
        ax.plot(
            np.concatenate([[low / 2], epsilon, [high * 2]]),
            np.append(fraction, 1.0),
            drawstyle="steps-post",
            color=_drawing.color(i),
            linestyle=_drawing.line_style(i),
            label=label,
        )
    ax.set(xscale="log", xlim=(low / 2, high * 2), ylim=(-0.03, 1.03))
    if high < 100 * low:
        from matplotlib.ticker import LogLocator, NullFormatter

        # On less than two decades Matplotlib labels every minor tick, and the labels overlap.
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=r"$\epsilon$ (nats)", ylabel=r"fraction of data with divergence $\leq \epsilon$")
    if legend:
        _drawing.legend_beside(ax)
    return ax


def plot_divergence_bound(
    divergence: Array, bound: Array, *, standard_error: Array | None = None, ax: Axes | None = None
) -> Axes:
    r"""The divergence of each datum's posterior from the prior against its guaranteed lower bound, on logarithmic axes.

    By Theorem 3.4 of the paper, every point lies on or above the dashed line, up to Monte Carlo error, where z reaches
    the data through the decoder alone:

    .. math:: F(p(z \mid x_n) \,\|\, p(z)) \ge L^2\, E_{p(z \mid x_n)} \|s\|^2.

    Points below the line have another color and marker, and the legend counts them. A relative shortfall of 1e-5
    counts as rounding. Values that are not positive are drawn at the edge of the axes, and the legend counts them too.

    Args:
        divergence: the divergences, of shape (N,).
        bound: the lower bounds of the divergences, of shape (N,), in the same unit.
        standard_error: the standard errors of the divergences, of shape (N,). Thin lines then reach two standard errors
            up and down, and the legend counts the points that lie below the bound by more than that.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for shapes that differ, values that are not finite, and negative standard errors.

    References:
        Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder network,
        https://arxiv.org/abs/2304.12770

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plot_divergence_bound([2.0, 3.0, 0.9], [1.0, 1.0, 1.0], standard_error=[0.1, 0.1, 0.2])
        >>> [text.get_text().replace("\n", " ") for text in ax.get_legend().get_texts()]
        ['divergence = bound', 'at or above: 2 of 3', 'below: 1 of 3 (0 by more than 2 SE)', '± 2 standard errors']
        >>> plt.close(ax.figure)
    """
    _drawing.checked_axes(ax)
    y = _drawing.floats("divergence", divergence, "(N,)")
    x = _drawing.floats("bound", bound, f"({len(y)},)")
    error = None if standard_error is None else _drawing.floats("standard_error", standard_error, f"({len(y)},)")
    if error is not None and (error < 0).any():
        raise ValueError(f"Expected standard_error >= 0, got {error.min()}")
    shortfall = x - y - _ROUNDING * np.abs(x)
    below = shortfall > 0
    counts = [f"at or above: {np.count_nonzero(~below)} of {len(y)}", f"below: {np.count_nonzero(below)} of {len(y)}"]
    low, high = _positive_range(x, y)
    edge = (low / 2, high * 2)
    drawn_x, drawn_y = (np.where(values > 0, values, edge[0]) for values in (x, y))
    ax = ax or _drawing.new_axes((6.4, 4.2))
    ax.plot(edge, edge, color="black", linestyle="--", linewidth=1, label="divergence = bound")
    if error is not None:
        counts[1] += f"\n({np.count_nonzero(shortfall > 2 * error)} by more than 2 SE)"
    for i, points in enumerate((~below, below)):
        ax.scatter(
            drawn_x[points],
            drawn_y[points],
            s=18 + 12 * i,
            color=_drawing.color(i),
            marker="ov"[i],
            alpha=0.7,
            linewidths=0,
            clip_on=bool((drawn_y[points] > edge[0]).all() and (drawn_x[points] > edge[0]).all()),
            zorder=3 + i,
            label=counts[i],
        )
    if error is not None:
        ends = np.clip(y - 2 * error, *edge), np.clip(y + 2 * error, *edge)
        ax.vlines(drawn_x, *ends, color="#666666", linewidth=0.7, label="± 2 standard errors")
    outside = np.count_nonzero((x <= 0) | (y <= 0))
    if outside:
        ax.plot([], [], linestyle="none", label=f"{outside} not positive,\nat the edge")
    ax.set(xscale="log", yscale="log", xlim=edge, ylim=edge)
    ax.set(xlabel="lower bound on the divergence", ylabel="divergence from the prior\n(in the unit of the bound)")
    _drawing.legend_beside(ax)
    return ax


def _divergences(kl: Array | KLDivergence) -> Array:
    if not isinstance(kl, KLDivergence):
        return kl
    return kl.values[:, None] if kl.values.dim() == 1 else kl.values  # a scalar site has values of shape (N,)


def _active(active: Array | ActiveUnits | None, latent_dim: int) -> npt.NDArray[np.bool_]:
    if active is None:
        return np.ones(latent_dim, dtype=bool)
    units = active.active.reshape(-1) if isinstance(active, ActiveUnits) else active
    array = _drawing.as_numpy("active", units)
    if array.dtype != bool or array.shape != (latent_dim,):
        raise ValueError(f"Expected active to be booleans of shape ({latent_dim},), got {array.dtype} {array.shape}")
    return array


def _kl_bars(ax: Axes, values: Floats, active: npt.NDArray[np.bool_], marked: bool, sort: bool) -> None:
    mean = values.mean(0)
    order, position = _places(mean, sort)
    mean, active = mean[order], active[order]
    filled: dict[str, Any] = {"color": _drawing.color(0), "label": "active" if marked else "mean"}
    hollow: dict[str, Any] = {"facecolor": "none", "edgecolor": _drawing.color(1), "hatch": "////", "label": "inactive"}
    for chosen, style in ((active, filled), (~active, hollow)):
        if chosen.any():
            ax.bar(position[chosen], mean[chosen], **style)
    if len(values) > 1:
        low, high = np.quantile(values[:, order], [0.05, 0.95], axis=0)
        ax.vlines(position, low, high, color="black", linewidth=1, label="5 to 95 % of the data")
    if len(mean) <= _MOST_TICKS:
        ax.set_xticks(position, labels=[str(j) for j in order])
        for tick in np.array(ax.get_xticklabels())[~active]:
            tick.set_color(_drawing.color(1))  # the tick shows what a bar of height 0 cannot
        ax.set_xlabel("latent dimension, sorted" if sort else "latent dimension")
    else:
        _dimension_axis(ax, len(mean), sort)


def _kl_lines(ax: Axes, models: dict[str, Floats], active: dict[str, npt.NDArray[np.bool_]], sort: bool) -> None:
    for i, (label, values) in enumerate(models.items()):
        mean = values.mean(0)
        order, position = _places(mean, sort)
        mean, hollow = mean[order], ~active[label][order]
        style: dict[str, Any] = {"color": _drawing.color(i), "marker": _drawing.marker(i), "markersize": 5}
        ax.plot(position, mean, linestyle=_drawing.line_style(i), linewidth=1.2, label=label, **style)
        if hollow.any():
            ax.plot(position[hollow], mean[hollow], linestyle="none", markerfacecolor="white", **style)
    _dimension_axis(ax, max(values.shape[1] for values in models.values()), sort)


def _places(mean: Floats, sort: bool) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The dimensions in drawing order, and their positions: ranks count from 1, dimensions from 0."""
    numbers = np.arange(len(mean))
    return (np.argsort(-mean, kind="stable"), numbers + 1) if sort else (numbers, numbers)


def _dimension_axis(ax: Axes, latent_dim: int, sort: bool) -> None:
    ax.set_xlabel("rank of the latent dimension" if sort else "latent dimension")
    positions = np.arange(latent_dim) + int(sort)
    if latent_dim <= _MOST_TICKS:
        ax.set_xticks(positions)
    else:
        from matplotlib.ticker import MaxNLocator

        ax.set_xlim(positions[0] - 0.8, positions[-1] + 0.8)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _positive_range(*arrays: Floats) -> tuple[float, float]:
    """The smallest and the largest positive value, for the limits of a logarithmic axis."""
    values = np.concatenate(arrays)
    positive = values[values > 0]
    return (float(positive.min()), float(positive.max())) if len(positive) else (0.1, 1.0)
