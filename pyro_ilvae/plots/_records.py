"""The records of a monitor of the training, as panels over the step, with a column for each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyro_ilvae.plots import _drawing
from pyro_ilvae.plots._drawing import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_ACTIVE_FROM = 0.1  # nats, from which on the summary of collapse calls a unit active
_LEAST_KL = 1e-3  # nats: what is below is drawn there, on a logarithmic axis
_MOST_POINTS = 40  # records whose points are shown


class Run(NamedTuple):
    """The records of a run, as arrays over the records."""

    label: str
    values: Mapping[str, Floats]  #: of shape (R,), or (R, K); NaN where there is nothing
    prefixes: tuple[str, ...]  #: of the keys of each site; "" for the only site

    def get(self, key: str) -> Floats | None:
        """The values of a key, if there is one that is not NaN."""
        found = self.values.get(key)
        return None if found is None or np.isnan(found).all() else found


def runs_of(training: Any) -> list[Run] | None:
    """The runs in a monitor, in its history, or in a mapping from labels to these; None for anything else."""
    if isinstance(training, Mapping):
        if not training:
            raise ValueError("Expected training to be a mapping with at least one label, got an empty one")
        found = {str(label): _records(value) for label, value in training.items()}
        if wrong := [label for label, records in found.items() if records is None]:
            raise TypeError(f"Expected training to map labels to monitors or their histories, got others for {wrong}")
        return [_run(label, records or [], f"training[{label!r}]") for label, records in found.items()]
    records = _records(training)
    return None if records is None else [_run("", records, "training")]


def draw(runs: Sequence[Run]) -> npt.NDArray[Any]:
    """Draw a row of panels for each measure that a run has, of shape (panels, runs)."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = _panels(runs)
    heights = [panel.height for panel in panels]
    size = (4.4 * len(runs) + 2.2, sum(heights) + 0.6)
    axes = plt.subplots(
        len(panels),
        len(runs),
        figsize=size,
        layout="constrained",
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=heights,
    )[1]
    for row, panel in zip(axes, panels, strict=True):
        for ax, run in zip(row, runs, strict=True):
            panel.draw(ax, run)
            if not ax.has_data():
                ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", va="center", color="0.4")
        _set_limits(row, is_loss=panel.is_loss)
        row[0].set_ylabel(panel.ylabel)
        handles = {label: handle for ax in row for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if len(handles) > 1:
            _drawing.legend_beside(row[-1], handles=list(handles.values()), labels=list(handles), fontsize="small")
    for ax, run in zip(axes[0], runs, strict=True):
        ax.set_title(run.label)
    axes[0, 0].figure.align_ylabels(axes[:, 0])
    for ax, run in zip(axes[-1], runs, strict=True):
        ax.set_xlabel("step")
        if len(steps := set(run.values["step"].tolist())) == 1 and math.isfinite(step := steps.pop()):
            ax.set_xlim(step - 1, step + 1)  # whole numbers
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return np.asarray(axes)


def _records(value: Any) -> list[Mapping[str, Any]] | None:
    """The records of a monitor or of a history; None for anything else."""
    history = getattr(value, "history", value)
    if not isinstance(history, list | tuple) or not all(isinstance(record, Mapping) for record in history):
        return None
    return list(history) if history or history is not value else None


def _run(label: str, records: Sequence[Mapping[str, Any]], name: str) -> Run:
    if not records or any("step" not in record for record in records):
        got = "none" if not records else "records without a step"
        raise ValueError(f"Expected {name} to be a monitor with at least one record, or its history, got {got}")
    keys = dict.fromkeys(key for record in records for key in record)
    values = {str(key): _over_records(f"{name}[{key!r}]", [record.get(key) for record in records]) for key in keys}
    prefixes = [key.removesuffix("kl_per_dimension") for key in values if key.endswith("kl_per_dimension")]
    return Run(label, values, tuple(prefixes) or ("",))


def _over_records(name: str, values: list[Any]) -> Floats:
    """The values of a key in all records, without what is infinite, which no axis shows."""
    lists = [value for value in values if isinstance(value, list | tuple)]
    missing: Any = [np.nan] * len(lists[0]) if lists else np.nan
    array = _drawing.as_numpy(name, [missing if value is None else value for value in values])
    if array.dtype.kind not in "biuf" or array.ndim != 1 + bool(lists):
        raise ValueError(f"Expected {name} to be numbers, or lists of one length, got others")
    return np.where(np.isinf(array), np.nan, array).astype(np.float64)


_Draw = Callable[["Axes", Run], None]


class _Panel(NamedTuple):
    """A row of the picture."""

    ylabel: str
    height: float  #: in inches
    draw: _Draw
    is_loss: bool = False


def _panels(runs: Sequence[Run]) -> list[_Panel]:
    """The rows of which some run has values."""
    prefixes = list(dict.fromkeys(prefix for run in runs for prefix in run.prefixes))
    several = prefixes != [""]

    def any_has(*keys: str) -> bool:
        return any(run.get(key) is not None for run in runs for key in keys)

    panels: list[_Panel] = []
    if any_has("loss_per_datum", "elbo"):
        panels.append(_Panel("negative ELBO\n(nats per datum)", 1.9, _losses, is_loss=True))
    if any_has("loss") and not all(run.get("loss_per_datum") is not None for run in runs):
        loss: _Draw = lambda ax, run: _line(ax, run, "loss", 0, "loss")  # noqa: E731
        panels.append(_Panel("loss (nats)", 1.5, loss, is_loss=True))
    for prefix in prefixes:
        of_site = f" of {prefix.removesuffix('/')}" if several else ""
        if any_has(f"{prefix}kl_per_dimension"):
            panels.append(_Panel(f"KL{of_site}\n(nats per dimension)", 1.9, _with(_divergences, prefix)))
        if any_has(*(f"{prefix}{key}" for key in ("kl", "mutual_information", "guaranteed_floor"))):
            panels.append(_Panel(f"information{of_site}\n(nats)", 1.9, _with(_information, prefix)))
    if any_has(*(f"{prefix}active_units" for prefix in prefixes)):
        panels.append(_Panel("active units", 1.3, _active_units))
    if any_has(*(f"{prefix}inverse_lipschitz" for prefix in prefixes)):
        panels.append(_Panel("constant $L$", 1.1, _of_sites("inverse_lipschitz", "$L$", 1)))
    if any_has("beta", *(f"{prefix}beta" for prefix in prefixes)):
        panels.append(_Panel(r"KL weight $\beta$", 1.1, _betas))
    if not panels:
        raise ValueError("Expected training to have records with a measure, got none")
    return panels


def _with(panel: Callable[[Axes, Run, str], None], prefix: str) -> _Draw:
    return lambda ax, run: panel(ax, run, prefix)


def _line(ax: Axes, run: Run, key: str, i: int, label: str, **style: Any) -> None:
    """A line over the steps, with points if they are few; nothing where there are no values."""
    values = run.get(key)
    if values is None:
        return
    points: dict[str, Any] = {"marker": _drawing.marker(i), "markersize": 3} if len(values) <= _MOST_POINTS else {}
    style = {"color": _drawing.color(i), "linestyle": _drawing.line_style(i), "linewidth": 1.5} | points | style
    if style.get("marker", "none") == "none":
        style |= _points_alone(values, _drawing.marker(i))
    ax.plot(run.values["step"], values, label=label, **style)


def _points_alone(values: Floats, marker: str) -> dict[str, Any]:
    """Points for values between missing ones, which have no line to a neighbor."""
    there = np.pad(~np.isnan(values), 1)
    alone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])
    return {"marker": marker, "markersize": 3, "markevery": alone.tolist()} if len(alone) else {}


def _losses(ax: Axes, run: Run) -> None:
    _line(ax, run, "loss_per_datum", 0, "training loss")
    if run.get("elbo") is not None:
        held_out = run._replace(values={**run.values, "elbo": -run.values["elbo"]})
        _line(ax, held_out, "elbo", 1, r"held-out data, $\beta = 1$")
    wrong = run.values.get("non_finite_losses")
    if wrong is not None and (wrong > 0).any():
        steps = run.values["step"][wrong > 0]
        style: dict[str, Any] = {"marker": "X", "color": _drawing.COLORS[-1], "linestyle": "none", "clip_on": False}
        ax.plot(steps, np.ones(len(steps)), transform=ax.get_xaxis_transform(), label="losses not finite", **style)


def _divergences(ax: Axes, run: Run, prefix: str) -> None:
    kl = run.get(f"{prefix}kl_per_dimension")
    if kl is None:
        return
    drawn = np.maximum(kl, _LEAST_KL)
    for k, column in enumerate(drawn.T):
        label = "a dimension" if k == 0 else "_"
        style: dict[str, Any] = {"color": _drawing.color(0), "alpha": 0.45, "linewidth": 1}
        style |= _points_alone(column, "o")
        ax.plot(run.values["step"], column, label=label, **style)
    ax.axhline(_ACTIVE_FROM, color=_drawing.color(1), linestyle="--", linewidth=1.2, label=f"{_ACTIVE_FROM:g} nats")
    ax.set_yscale("log")


def _information(ax: Axes, run: Run, prefix: str) -> None:
    limit = f"{prefix}mutual_information_limit"
    _line(ax, run, f"{prefix}kl", 0, "KL of posterior and prior")
    _line(ax, run, f"{prefix}mutual_information", 2, r"information $I_q(x; z)$")
    _line(ax, run, limit, 2, r"its limit $\log N$ for $N$ data", linestyle=":", marker="none", linewidth=1.2)
    _line(ax, run, f"{prefix}guaranteed_floor", 1, "guaranteed by $L$", linestyle="--")


def _active_units(ax: Axes, run: Run) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    for i, prefix in enumerate(run.prefixes):
        site = f"{prefix.removesuffix('/')}: " if prefix else ""
        _line(ax, run, f"{prefix}active_units", i, f"{site}active", drawstyle="steps-post")
        style: dict[str, Any] = {"linestyle": ":", "marker": "none", "linewidth": 1.2}
        _line(ax, run, f"{prefix}num_units", i, f"{site}all", **style)


def _of_sites(key: str, symbol: str, first: int) -> _Draw:
    def panel(ax: Axes, run: Run) -> None:
        for i, prefix in enumerate(run.prefixes):
            site = f" of {prefix.removesuffix('/')}" if prefix else ""
            _line(ax, run, prefix + key, first + i, symbol + site)

    return panel


def _betas(ax: Axes, run: Run) -> None:
    _line(ax, run, "beta", 3, r"$\beta$", linestyle="-")
    _of_sites("beta", r"$\beta$", 3)(ax, run) if run.prefixes != ("",) else None


def _set_limits(row: Sequence[Axes], *, is_loss: bool) -> None:
    """From 0, or from the least value; a loss without its first records, which are far from where it goes."""
    if row[0].get_yscale() == "log":
        drawn = [_heights(line) for ax in row for line in ax.lines]
        highest = max(np.max(heights, initial=_LEAST_KL) for heights in drawn)
        row[0].set_ylim(_LEAST_KL / 1.3, 1.3 * highest)
        return
    values = [_heights(line) for ax in row for line in ax.lines if line.get_transform() == ax.transData]
    whole = np.concatenate([np.zeros(0 if is_loss else 1), *values])
    later = np.concatenate([found[len(found) // 8 :] for found in values]) if is_loss else whole
    low, high = min(whole), max(later)
    pad = 0.06 * ((high - low) or 1.0)
    row[0].set_ylim(low - (pad if low < 0 or is_loss else 0), high + pad)


def _heights(line: Line2D) -> Floats:
    """What a line shows, without what is missing."""
    heights = np.asarray(line.get_ydata(), dtype=np.float64)
    return heights[~np.isnan(heights)]
