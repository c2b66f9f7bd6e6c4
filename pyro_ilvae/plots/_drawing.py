"""Colors, new axes, checked arrays, and legends that cover no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    # Importing Matplotlib takes half a second, so functions import what they use when they draw.
    from matplotlib.axes import Axes

Array: TypeAlias = Tensor | npt.ArrayLike
Floats: TypeAlias = npt.NDArray[np.float64]

# Okabe & Ito's colors without yellow, which is faint on white. The numbers of colors and of markers have no common
# factor, so that combinations of both repeat late.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE_STYLES = ("-", "--", "-.", ":")


def color(i: int) -> str:
    """The color of the i-th thing drawn."""
    return COLORS[i % len(COLORS)]


def marker(i: int) -> Any:
    """The marker of the i-th thing drawn."""
    return MARKERS[i % len(MARKERS)]


def line_style(i: int) -> Any:
    """The line style of the i-th thing drawn."""
    return LINE_STYLES[i % len(LINE_STYLES)]


def checked_axes(ax: Axes | None, name: str = "ax") -> Axes | None:
    """Axes that a user passes to draw into; None stands for new ones."""
    from matplotlib.axes import Axes

    if ax is not None and not isinstance(ax, Axes):
        hint = ": pass one entry of the array" if isinstance(ax, np.ndarray) else ""
        raise TypeError(f"Expected {name} to be axes of Matplotlib or None, got a {type(ax).__name__}{hint}")
    return ax


def new_axes(figsize: tuple[float, float]) -> Axes:
    """The axes of a new figure."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]


def as_numpy(name: str, value: Array | Sequence[object]) -> npt.NDArray[Any]:
    """A tensor, of any device and with or without a gradient, or an array-like, as an array."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        return (value.double() if value.is_floating_point() else value).numpy(force=True)
    if isinstance(value, list | tuple) and any(isinstance(entry, Tensor) for entry in value):
        value = [as_numpy(name, entry) if isinstance(entry, Tensor) else entry for entry in value]
    try:
        array = np.asarray(value)
        # Columns of pandas can hold numbers as objects.
        plain = np.array(array.tolist()) if array.dtype == object and array.ndim else array
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths, a Dataset of xarray
        got = f"a {type(value).__name__} that is none: {error}"
        raise TypeError(f"Expected {name} to be a tensor or an array, got {got}") from error
    if array.dtype == object and array.ndim == 0:
        got = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"Expected {name} to be a tensor or an array, got {'None' if value is None else got}")
    return plain if plain.dtype.kind in "biuf" else array


def texts(name: str, labels: Array | Sequence[object]) -> list[str]:
    """The labels in a sequence, as they are written."""
    array = as_numpy(name, labels)
    if array.ndim != 1:
        raise ValueError(f"Expected {name} to be a sequence of labels, got shape {array.shape}")
    return [str(label) for label in array]


def refuse_dataset(name: str, value: object) -> None:
    """Raise for a Dataset or a DataTree of xarray, which are mappings too, but from variables and not from labels."""
    if isinstance(value, Mapping) and (hasattr(value, "data_vars") or hasattr(value, "groups")):
        raise TypeError(
            f"Expected {name} to be an array or a mapping from labels to arrays, got a {type(value).__name__}: pass "
            "its variables"
        )


def floats(name: str, value: Array, shape: str, *, missing: bool = False) -> Floats:
    """``value`` as finite floats of a shape such as "(N, K)", in which letters stand for sizes of at least 1.

    NaN is accepted if ``missing``.
    """
    sizes = [size.strip() for size in shape.strip("()").split(",") if size.strip()]
    array = as_numpy(name, value)
    fits = array.ndim == len(sizes) and all(
        got > 0 if size.isalpha() else got == int(size) for size, got in zip(sizes, array.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"Expected {name} of shape {shape}, got {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"Expected {name} to be real numbers, got dtype {array.dtype}")
    refused = np.isinf(array) if missing else ~np.isfinite(array)
    if refused.any():
        first = np.unravel_index(refused.argmax(), array.shape)
        finite = "finite or NaN" if missing else "finite"
        raise ValueError(
            f"Expected {name} to be {finite}, got {array[first]} at index {tuple(map(int, first))} and "
            f"{refused.sum()} such values in all"
        )
    return array.astype(np.float64)


def labeled(name: str, value: Any, shape: str) -> dict[str, Floats]:
    """A mapping from labels to arrays, each checked by :func:`floats`."""
    if len(value) == 0:
        raise ValueError(f"Expected {name} to be a mapping with at least one label, got an empty one")
    arrays = {str(label): floats(f"{name}[{label!r}]", array, shape) for label, array in value.items()}
    if len(arrays) < len(value):
        raise ValueError(f"Expected labels of {name} that are written differently, got {list(value)}")
    return arrays


def sweep_line(ax: Axes, x: Floats, runs: Floats, i: int) -> None:
    """Draw runs of shape (S, X) as points, one for each seed, and a line through their medians; NaN is left out."""
    missing = np.isnan(runs)
    points = np.broadcast_to(x, runs.shape)[~missing], runs[~missing]
    style: dict[str, Any] = {"color": color(i), "marker": marker(i)}
    ax.plot(*points, linestyle="none", markersize=4, alpha=0.5, markeredgewidth=0, **style)
    # One column at a time, because NumPy's nanmedian warns of columns without a value.
    median = [np.median(run[~gone]) if not gone.all() else np.nan for run, gone in zip(runs.T, missing.T, strict=True)]
    ax.plot(x, median, linestyle=line_style(i), linewidth=1.8, markersize=0, **style)


def legend_beside(ax: Axes, **options: Any) -> None:
    """Draw the legend to the right of the axes."""
    entries = len(options["handles"] if "handles" in options else ax.get_legend_handles_labels()[1])
    options = {"frameon": False, "ncols": 1 + (entries - 1) // 14} | options
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, **options)
