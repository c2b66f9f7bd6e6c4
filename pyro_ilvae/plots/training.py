"""Pictures of training: the loss with beta and L, and measures over a sweep of L."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from pyro_ilvae import _checks
from pyro_ilvae.infer.schedules import Schedule
from pyro_ilvae.plots import _drawing, _records
from pyro_ilvae.plots._drawing import Array, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_sweep", "plot_training"]


class _Monitor(Protocol):
    """What has the records of a training, such as a :class:`~pyro_ilvae.CollapseMonitor`."""

    history: list[dict[str, Any]]


_Records: TypeAlias = _Monitor | Sequence[Mapping[str, Any]]


def plot_sweep(
    x: Array,
    results: Mapping[str, Mapping[str, Array]],
    *,
    xlabel: str = "inverse Lipschitz constant L",
    ylabels: Sequence[str] | None = None,
    axes: Axes | Sequence[Axes] | npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    r"""Several measures against L (or another setting): each seed is a point, and a line joins the medians.

    Args:
        x: the settings, of shape (X,), in any order.
        results: a mapping from the title of each panel to a mapping from labels of models to values of shape (S, X),
            with a row for each of S seeds. NaN stands for a missing run, which is left out; if all seeds of a setting
            are missing, the line has a gap.
        xlabel: the label of the horizontal axes, with its unit.
        ylabels: the label of each panel's vertical axis, with its unit; the titles of the panels if None.
        axes: the axes to draw into, one for each panel; new axes if None.

    Returns:
        An array of the axes, of shape (number of panels,).

    Raises:
        ValueError: for other shapes, infinite values, and numbers of labels or axes that differ from the number of
            panels.

    References:
        Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder network,
        https://arxiv.org/abs/2304.12770 (Figure 1)

    Example:
        >>> import matplotlib.pyplot as plt
        >>> kl = {"projected": [[0.1, 1.0, 2.0], [0.3, 1.2, float("nan")]]}
        >>> axes = plot_sweep([0.0, 0.5, 1.0], {"smallest KL (nats)": kl})
        >>> axes[0].get_ylabel(), axes[0].lines[-1].get_ydata().round(2).tolist()
        ('smallest KL (nats)', [0.2, 1.1, 2.0])
        >>> plt.close(axes[0].figure)
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    settings = _drawing.floats("x", x, "(X,)")
    if not isinstance(results, Mapping):
        raise TypeError(f"Expected results to be a mapping from titles to panels, got a {type(results).__name__}")
    unlabeled = [title for title, panel in results.items() if not (isinstance(panel, Mapping) and panel)]
    if len(results) == 0 or unlabeled:
        got = f"no labels for {unlabeled}" if unlabeled else "no panel"
        raise ValueError(f"Expected results to map each panel to a mapping from labels to values, got {got}")
    if ylabels is not None and (
        isinstance(ylabels, str) or not hasattr(ylabels, "__len__") or len(ylabels) != len(results)
    ):
        raise ValueError(f"Expected ylabels to be {len(results)} labels, one for each panel, got {ylabels!r}")
    panels = {
        str(title): {
            str(label): _drawing.floats(f"results[{title!r}][{label!r}]", runs, f"(S, {len(settings)})", missing=True)
            for label, runs in panel.items()
        }
        for title, panel in results.items()
    }
    if axes is None:
        size = (4.0 * len(panels) + 1.5, 3.6)
        axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)[1]
    drawn: npt.NDArray[Any] = np.ravel(np.asarray(axes, dtype=object))
    for i, ax in enumerate(drawn):
        _drawing.checked_axes(ax, f"axes[{i}]")
    if len(drawn) != len(panels):
        raise ValueError(f"Expected axes to be {len(panels)} axes, one for each panel, got {len(drawn)}")
    # A label has the same style in all panels, so that one legend is enough.
    styles = {label: i for i, label in enumerate(dict.fromkeys(label for panel in panels.values() for label in panel))}
    order = settings.argsort(kind="stable")
    for i, (ax, (title, panel)) in enumerate(zip(drawn, panels.items(), strict=True)):
        for label, runs in panel.items():
            _drawing.sweep_line(ax, settings[order], runs[:, order], styles[label])
        ax.set(xlabel=xlabel, ylabel=title if ylabels is None else ylabels[i])
        if ylabels is not None:
            ax.set_title(title)
    handles = [
        Line2D(
            [], [], color=_drawing.color(i), marker=_drawing.marker(i), linestyle=_drawing.line_style(i), label=label
        )
        for label, i in styles.items()
    ]
    _drawing.legend_beside(drawn[-1], handles=handles, title="points: seeds\nline: median", alignment="left")
    return drawn


@overload
def plot_training(
    training: Array,
    *,
    beta: Array | Schedule | None = None,
    inverse_lipschitz: Array | Schedule | None = None,
    smoothing: int | None = None,
    ax: Axes | None = None,
) -> Axes: ...


@overload
def plot_training(
    training: _Records | Mapping[str, _Records],
) -> npt.NDArray[Any]: ...


def plot_training(
    training: Array | _Records | Mapping[str, _Records],
    *,
    beta: Array | Schedule | None = None,
    inverse_lipschitz: Array | Schedule | None = None,
    smoothing: int | None = None,
    ax: Axes | None = None,
) -> Axes | npt.NDArray[Any]:
    r"""A training: its losses, or all that a :class:`~pyro_ilvae.CollapseMonitor` has recorded.

    Losses are drawn at each step, in nats, with beta and L on a second axis to the right. The records of a monitor are
    drawn in panels over the step, with a column for each run: the loss and the negative ELBO of held-out data; the KL
    of each dimension; its sum, the mutual information and what L guarantees; active units; L; and beta. A run or a
    panel without values is left out. What is guaranteed is about the model's own data, and the mutual information about
    the held-out data, of which N can show no more than log N nats.

    Args:
        training: the losses, of shape (T,): negative ELBOs in nats; or a monitor, or its ``history``; or a mapping from
            labels to these.
        beta: the weight of the KL at each step, of shape (T,), or one number, or a
            :class:`~pyro_ilvae.infer.Schedule`. Records have their own.
        inverse_lipschitz: the constant L at each step, in one of the forms of ``beta``. Records have their own.
        smoothing: the number of steps of a running mean, which is drawn over the middle of its steps; None draws no
            mean. The losses of records are means.
        ax: the axes to draw losses into; new ones if None. Records take a figure of their own.

    Returns:
        For losses, their axes; the axes of beta and L, if any, are ``ax.figure.axes[-1]``. For records, an array of
        axes of shape (panels, runs).

    Raises:
        ValueError: for other shapes, losses that are not finite, a ``smoothing`` above the number of steps, and for
            records together with any other argument.
        TypeError: for what is neither losses nor records.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from pyro_ilvae.infer import schedules
        >>> ax = plot_training([5.0, 4.0, 3.0, 3.0], beta=schedules.linear(0.0, 1.0, num_steps=2), smoothing=2)
        >>> ax.lines[1].get_ydata().tolist(), ax.figure.axes[-1].lines[0].get_ydata().tolist()
        ([4.5, 3.5, 3.0], [0.0, 0.5, 1.0, 1.0])
        >>> plt.close(ax.figure)
        >>> history = [{"step": 0, "elbo": -9.0, "kl": 0.5}, {"step": 100, "elbo": -4.0, "kl": 2.0}]
        >>> axes = plot_training({"a run": history})
        >>> [ax.get_ylabel().split("\n")[0] for ax in axes[:, 0]]
        ['negative ELBO', 'information']
        >>> plt.close(axes[0, 0].figure)
    """
    runs = _records.runs_of(training)
    if runs is not None:
        for name, value in {"beta": beta, "inverse_lipschitz": inverse_lipschitz, "smoothing": smoothing}.items():
            if value is not None:
                raise ValueError(f"Expected {name}=None for the records of a monitor, which hold it, got {value!r}")
        if ax is not None:
            raise ValueError("Expected ax=None for the records of a monitor, which take a new figure, got axes")
        return _records.draw(runs)
    return _plot_losses(training, beta, inverse_lipschitz, smoothing, ax)  # type: ignore[arg-type]


def _plot_losses(
    training: Array,
    beta: Array | Schedule | None,
    inverse_lipschitz: Array | Schedule | None,
    smoothing: int | None,
    ax: Axes | None,
) -> Axes:
    from matplotlib.ticker import MaxNLocator

    _drawing.checked_axes(ax)
    loss = _drawing.floats("training", training, "(T,)")
    weights = {
        symbol: _per_step(name, value, len(loss))
        for name, symbol, value in (("beta", r"$\beta$", beta), ("inverse_lipschitz", "$L$", inverse_lipschitz))
        if value is not None
    }
    if smoothing is not None and _checks.positive_int("smoothing", smoothing) > len(loss):
        raise ValueError(f"Expected smoothing to be at most {len(loss)}, the number of steps, got {smoothing}")
    ax = ax or _drawing.new_axes((6.4, 3.8))
    steps = np.arange(len(loss))
    alone = smoothing is None
    point = "o" if len(loss) == 1 else None  # a line through one point is invisible
    lines = ax.plot(
        steps, loss, color=_drawing.color(0), alpha=1.0 if alone else 0.35, linewidth=1, marker=point, label="loss"
    )
    if smoothing is not None:
        mean = np.convolve(loss, np.full(smoothing, 1 / smoothing), "valid")
        middle = np.arange(len(mean)) + (smoothing - 1) / 2
        label = f"mean of {smoothing} steps"
        lines += ax.plot(middle, mean, color=_drawing.color(0), linewidth=2, marker=point, label=label)
    ax.set(xlabel="step", ylabel="loss: negative ELBO (nats)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if weights:
        current = ax.figure.gca()
        right = ax.twinx()
        ax.figure.sca(current)
        for i, (symbol, value) in enumerate(weights.items()):
            style: dict[str, Any] = {"linestyle": ("--", "-.")[i], "color": _drawing.color(i + 1)}
            lines += right.plot(steps, value, marker=point, label=symbol, **style)
        right.set_ylabel(" and ".join({r"$\beta$": r"KL weight $\beta$", "$L$": "constant $L$"}[s] for s in weights))
        right.set_ylim(bottom=min(0.0, *(value.min() for value in weights.values())))
    if len(lines) > 1:
        for twin in [ax, right] if weights else [ax]:
            low, high = twin.get_ylim()
            twin.set_ylim(low, high + 0.22 * (high - low))
        ax.legend(handles=lines, loc="upper right", ncols=2, fontsize="small", frameon=False)
    return ax


def _per_step(name: str, value: Array | Schedule, num_steps: int) -> Floats:
    if isinstance(value, Schedule):
        value = [value.at(step) for step in range(num_steps)]
    array = _drawing.as_numpy(name, value)
    return _drawing.floats(name, np.full(num_steps, array) if array.ndim == 0 else array, f"({num_steps},)")
