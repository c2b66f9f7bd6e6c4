"""Colors, new axes, checked arrays, and legends that cover no data."""

from __future__ import annotations

from collections.abc import Sequence
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


def new_axes(figsize: tuple[float, float]) -> Axes:
    """The axes of a new figure."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]


def as_numpy(value: Array | Sequence[object]) -> npt.NDArray[Any]:
    """A tensor, of any device and with or without a gradient, or an array-like, as an array."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        return (value.double() if value.is_floating_point() else value).numpy(force=True)
    return np.asarray(value)


def floats(name: str, value: Array, shape: str, *, missing: bool = False) -> Floats:
    """``value`` as finite floats of a shape such as "(N, K)", in which letters stand for sizes of at least 1.

    NaN is accepted if ``missing``.
    """
    sizes = [size.strip() for size in shape.strip("()").split(",") if size.strip()]
    array = as_numpy(value)
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
    return {str(label): floats(f"{name}[{label!r}]", array, shape) for label, array in value.items()}


def legend_beside(ax: Axes, **options: Any) -> None:
    """Draw the legend to the right of the axes."""
    entries = len(options["handles"] if "handles" in options else ax.get_legend_handles_labels()[1])
    options = {"frameon": False, "ncols": 1 + (entries - 1) // 14} | options
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, **options)
