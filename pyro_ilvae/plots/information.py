"""The picture of the dial in nats: what is guaranteed, and what is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_ilvae.diagnostics import GuaranteedInformation, KLDivergence, MutualInformation
from pyro_ilvae.plots import _drawing
from pyro_ilvae.plots._drawing import Array, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_guaranteed_information"]

_LABELS = {
    "floor": r"guaranteed by $L$ and $\sigma$",
    "by_jacobian": "guaranteed by the Jacobian",
    "information": "measured information",
    "kl": "mean KL of the guide",
}


def plot_guaranteed_information(
    kappas: Array,
    guaranteed: Sequence[Any] | Mapping[str, Array],
    *,
    information: Array | Sequence[Any] | None = None,
    kl: Array | Sequence[Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""What a decoder guarantees and what is found, against :math:`\kappa`, in nats: each seed is a point.

    .. math:: K \kappa = \tfrac K2 \log(1 + L^2 / \sigma^2) \le \text{by the Jacobian} \le I(x; z).

    A line joins the medians. Guaranteed is the information of the model, on its own data. What is measured by a guide
    may fall below: where the guide is far from the posterior, on data that the model fits badly, and because an
    estimate from N data is at most log N.

    Args:
        kappas: the settings :math:`\kappa`, in nats per dimension, of shape (X,), in any order.
        guaranteed: results of :func:`~pyro_ilvae.diagnostics.guaranteed_information`, a list with one for each setting,
            or a list of such lists with one for each seed; or a mapping from "floor" and "by_jacobian" to numbers in
            nats, of shape (X,) or (S, X) for S seeds. NaN, as where nothing is guaranteed, is left out.
        information: the measured information in nats, as such numbers, or as lists of results of
            :func:`~pyro_ilvae.diagnostics.mutual_information`.
        kl: the mean KL of the guide in nats, summed over dimensions, as such numbers, or as lists of results of
            :func:`~pyro_ilvae.diagnostics.kl_divergence`.
        ax: the axes to draw into; new ones if None.

    Returns:
        The axes.

    Raises:
        ValueError: for other shapes, infinite values, and a mapping with other keys.
        TypeError: for what is no array or list of results.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> guaranteed = {"floor": [0.0, 2.0, 4.0], "by_jacobian": [1.5, 3.0, 4.5]}
        >>> ax = plot_guaranteed_information([0.0, 1.0, 2.0], guaranteed, information=[[2.0, 3.5, 5.0]])
        >>> [text.get_text() for text in ax.get_legend().get_texts()][1:]
        ['guaranteed by the Jacobian', 'measured information']
        >>> plt.close(ax.figure)
    """
    from matplotlib.lines import Line2D

    _drawing.checked_axes(ax)
    settings = _drawing.floats("kappas", kappas, "(X,)")
    _drawing.refuse_dataset("guaranteed", guaranteed)
    if isinstance(guaranteed, Mapping):
        if guaranteed.keys() != {"floor", "by_jacobian"}:
            raise ValueError(f"Expected guaranteed with the keys 'floor' and 'by_jacobian', got {list(guaranteed)}")
        bounds: dict[str, Any] = {name: guaranteed[name] for name in ("floor", "by_jacobian")}
    else:
        _check_results(guaranteed)
        bounds = {
            "floor": _numbers(guaranteed, GuaranteedInformation, lambda result: result.floor),
            "by_jacobian": _numbers(guaranteed, GuaranteedInformation, lambda result: result.by_jacobian),
        }
    names = {name: f"guaranteed[{name!r}]" if isinstance(guaranteed, Mapping) else "guaranteed" for name in bounds}
    measured = {
        "information": _numbers(information, MutualInformation, lambda result: result.mutual_information),
        "kl": _numbers(kl, KLDivergence, lambda result: float(result.values.double().mean())),
    }
    given = bounds | {name: value for name, value in measured.items() if value is not None}
    lines = {name: _runs(names.get(name, name), value, len(settings)) for name, value in given.items()}
    ax = ax or _drawing.new_axes((6.8, 3.8))
    order = settings.argsort(kind="stable")
    handles = []
    for i, (name, label) in enumerate(_LABELS.items()):
        if name in lines:
            _drawing.sweep_line(ax, settings[order], lines[name][:, order], i)
            style: dict[str, Any] = {"color": _drawing.color(i), "marker": _drawing.marker(i)}
            handles.append(Line2D([], [], linestyle=_drawing.line_style(i), label=label, **style))
    ax.set(xlabel=r"$\kappa$ (nats per dimension)", ylabel=r"information about $z$ (nats)")
    if not any((runs < 0).any() for runs in lines.values()):
        ax.set_ylim(bottom=0)
    several = any(len(runs) > 1 for runs in lines.values())
    title = {"title": "points: seeds\nline: median", "alignment": "left"} if several else {}
    _drawing.legend_beside(ax, handles=handles, **title)
    return ax


def _check_results(guaranteed: Any) -> None:
    """Raise for what is no list of results, and no list of lists of them."""
    entries: list[Any] = []
    if isinstance(guaranteed, list | tuple) and not isinstance(guaranteed, GuaranteedInformation):
        for row in guaranteed:
            nested = isinstance(row, list | tuple) and not isinstance(row, GuaranteedInformation)
            entries += row if nested else [row]
    if not entries:
        raise TypeError(f"Expected guaranteed to be lists of results or a mapping, got a {type(guaranteed).__name__}")
    for entry in entries:
        if not isinstance(entry, GuaranteedInformation):
            raise TypeError(
                f"Expected guaranteed to be lists of results or a mapping from 'floor' and 'by_jacobian', got a "
                f"{type(entry).__name__}"
            )


def _numbers(value: Any, kind: type, read: Callable[[Any], float]) -> Any:
    """Lists of results as lists of numbers; all else as it is."""
    if isinstance(value, kind):
        return read(value)
    return [_numbers(entry, kind, read) for entry in value] if isinstance(value, list | tuple) else value


def _runs(name: str, value: Any, num_settings: int) -> Floats:
    """Numbers of shape (S, X), with one row for numbers of shape (X,)."""
    array = _drawing.as_numpy(name, value)
    if array.ndim == 1:
        array = array[np.newaxis]
    return _drawing.floats(name, array, f"(S, {num_settings})", missing=True)
