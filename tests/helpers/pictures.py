"""What pictures are drawn of, and how to read off what was drawn."""

import numpy as np
import torch

NAN, INF = float("nan"), float("inf")
KL = torch.tensor([[0.0, 2.0, 0.5, 1.0], [0.0, 4.0, 0.7, 2.0], [0.03, 3.0, 0.6, 1.5]])
ACTIVE = torch.tensor([False, True, True, True])
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}


def decode(z):
    """Images (M, 4, 5) in which pixel k is coordinate k."""
    return torch.cat([z, torch.zeros(len(z), 20 - z.shape[1], dtype=z.dtype)], 1).reshape(-1, 4, 5)


def result(kind, **fields):
    """A result of the diagnostics, of which the pictures look at these fields alone."""
    return kind(**(dict.fromkeys(kind._fields) | fields))


def images(*shape):
    return torch.rand(*shape)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def tiles(ax, height, width, rows, columns):
    """The images of a mosaic without labels of its own, by row and column."""
    mosaic = np.asarray(ax.images[0].get_array())
    tops = np.linspace(0, mosaic.shape[0] - height, rows).round().astype(int)
    lefts = np.linspace(0, mosaic.shape[1] - width, columns).round().astype(int)
    return np.array([[mosaic[top : top + height, left : left + width] for left in lefts] for top in tops])
