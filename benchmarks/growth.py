"""How time and memory of a training step grow with each size, and their picture on log-log axes."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from decoders import training_step
from timing import Line, Step, on_gpu, peak_bytes, seconds_of, settings
from torch import nn

from pyro_ilvae import InverseLipschitzDecoder, ProjectedDecoder, mlp

# One size grows, the others stay at these values.
START = {"D": 784, "K": 32, "width": 512, "batch": 128}
SIZES = {
    "D": (64, 256, 1024, 4096, 12288),
    "K": (2, 8, 32, 128, 512),
    "width": (64, 128, 256, 512, 1024),
    "batch": (16, 64, 256, 1024, 4096),
}
LABELS = ("D, data dimension", "K, latent dimension", "width of the hidden layers", "batch size")
LIMIT = 1.1  # of a slope that should be at most 1, with room for the noise of a timing

Curves = dict[str, tuple[list[float], list[int]]]
measured: dict[str, Curves] = {}


def build(kind: str, sizes: dict[str, int]) -> Step:
    latent_dim, features, width = sizes["K"], sizes["D"], sizes["width"]
    decoder: nn.Module
    if kind == "composition":
        decoder = InverseLipschitzDecoder(latent_dim=latent_dim, event_shape=features, map_features=(width, width))
    else:
        decoder = ProjectedDecoder(
            mlp(latent_dim, (width, width), features), latent_dim=latent_dim, event_shape=features
        )
    return training_step(decoder, latent_dim, features, sizes["batch"])


def slopes(xs: tuple[int, ...], ys: list[float] | list[int]) -> list[float]:
    """The slopes between neighbors on log-log axes: what is superlinear anywhere shows in one of them."""
    points = list(zip(xs, ys, strict=True))
    return [math.log(y1 / y0) / math.log(x1 / x0) for (x0, y0), (x1, y1) in itertools.pairwise(points)]


def growth(row: str, kind: str) -> list[Line]:
    lines = []
    measured[kind] = {}
    for name, values in SIZES.items():
        values = values[:2] if settings["quick"] else values
        times, memory = [], []
        for value in values:
            step = build(kind, START | {name: value})
            seconds_of(step, 3)
            # The least disturbed of a few calls: there is nothing here to pair with.
            times.append(min(seconds_of(step, 1) for _ in range(3 if settings["quick"] else 15)))
            memory.append(peak_bytes(step))
        measured[kind][name] = (times, memory)
        points = ", ".join(
            f"{value}: {1e3 * t:.1f} ms {m / 2**20:.0f} MiB" for value, t, m in zip(values, times, memory, strict=True)
        )
        steepest = max(slopes(values, times)), max(slopes(values, memory))
        bounded = name in ("D", "batch")
        lines.append(
            Line(
                row,
                f"{kind}, {name} = {points}",
                "",
                f"steepest slope: time {steepest[0]:.2f}, memory {steepest[1]:.2f}",
                f"<= {LIMIT:g}" if bounded else "",
                max(steepest) <= LIMIT if bounded else None,
            )
        )
    if not (settings["quick"] or on_gpu()) and len(measured) == 2:
        draw(Path(__file__).with_name("growth.png"))
    return lines


def draw(path: Path) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.5), sharex="col", sharey="row", layout="constrained")
    for row, (label, unit) in enumerate((("time of a step, ms", 1e-3), ("memory of a step, MiB", 2**20))):
        for ax, (name, values) in zip(axes[row], SIZES.items(), strict=True):
            for kind, color in (("composition", "C0"), ("projected", "C1")):
                ys = [y / unit for y in measured[kind][name][row]]
                ax.loglog(values, ys, "o-", color=color, label=f"{kind}, steepest slope {max(slopes(values, ys)):.2f}")
            # Slope 1 through the last point of the lower curve, as far down as a decade.
            last = min(measured[kind][name][row][-1] / unit for kind in measured)
            xs = [value for value in values if value >= values[-1] / 10]
            ax.loglog(xs, [last * x / values[-1] for x in xs], ":", color="0.4", label="slope 1")
            ax.set_xticks(values, [f"{value:,}" for value in values])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            ax.legend(fontsize=7, loc="upper left")
        axes[row, 0].set_ylabel(label)
        low, high = axes[row, 0].get_ylim()
        axes[row, 0].set_ylim(low, 4 * high)  # room for the legends
    for ax, label in zip(axes[1], LABELS, strict=True):
        ax.set_xlabel(label)
    figure.suptitle("A training step as one size grows (the others: D = 784, K = 32, width 512, batch 128)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


ROWS: dict[str, Callable[[str], list[Line]]] = {
    "growth": lambda row: growth(row, "composition"),
    "growth-projected": lambda row: growth(row, "projected"),
}
