"""Which components of two fits of a mixture are the same."""

from typing import NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.assignments import assignments

__all__ = ["ComponentMatch", "match_components"]

_MOST_COMPONENTS = 10_000_000  # the longest permutation that is worth its memory


class ComponentMatch(NamedTuple):
    """The components of one fit in the order of another's."""

    permutation: Tensor  #: integers of shape (C,): ``other[:, permutation]`` is aligned with the reference
    agreement: float  #: the probability that labels drawn from the two aligned fits are the same

    def __repr__(self) -> str:
        return printing.described(
            self, f"agreement {printing.number(self.agreement)}", f"{len(self.permutation)} components"
        )


def match_components(reference: Tensor | npt.ArrayLike, other: Tensor | npt.ArrayLike) -> ComponentMatch:
    r"""The order of another fit's components that agrees best with the components of a reference.

    .. math:: \text{agreement} = \max_{\sigma\ \text{permutation}} \frac1N \sum_n \sum_c r_{nc}\, o_{n \sigma(c)},

    found by the Hungarian algorithm. Fits of one model differ in the names of their components, which is known as
    label switching [1]. The same permutation minimizes the squared distance of :math:`r` and the permuted :math:`o`.
    The agreement is 1 only if both fits are certain of every datum. Pass labels, such as ``probs.argmax(1)``, for the
    fraction of data that both fits assign alike.

    Args:
        reference: the probabilities :math:`r` of the components given each datum, of shape (N, C), or labels from 0 to
            C - 1 of shape (N,).
        other: the probabilities :math:`o` or labels of another fit, for the same data. If both arguments are labels,
            C is the largest label plus 1. Components without data that are left over are matched in ascending order.

    Returns:
        The permutation :math:`\sigma`, which brings ``other[:, permutation]`` and, say, ``other_loc[permutation]`` in
        the order of the reference, and the agreement.

    Raises:
        ValueError: for no data, other shapes, different numbers of data or of components, probabilities that are
            negative, NaN or do not sum to 1, and labels that are not integers from 0 to C - 1. If both arguments are
            labels, for one of ten million and above.

    References:
        [1] Stephens 2000, Dealing with label switching in mixture models, Journal of the Royal Statistical Society B 62

    Example:
        >>> match = match_components(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 2, 0, 1]))
        >>> match.permutation, match.agreement
        (tensor([2, 0, 1]), 1.0)
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    found = {"reference": assignments("reference", reference), "other": assignments("other", other)}
    first, second = found.values()
    if len(first) != len(second):
        raise ValueError(f"Expected reference and other of one length, got {len(first)} and {len(second)}")
    sizes = {name: value.shape[1] for name, value in found.items() if value.dim() == 2}
    if len(set(sizes.values())) == 2:
        raise ValueError(
            f"Expected reference and other of one number of components, got {sizes['reference']} and {sizes['other']}"
        )
    labels = {name: int(value.max()) for name, value in found.items() if value.dim() == 1}
    size = next(iter(sizes.values())) if sizes else max(labels.values()) + 1
    for name, largest in labels.items():
        if not sizes and largest >= _MOST_COMPONENTS:
            raise ValueError(f"Expected {name} to be labels below {_MOST_COMPONENTS}, got {largest}")
        if largest >= size:
            raise ValueError(f"Expected {name} to be labels from 0 to {size - 1}, got {largest}")
    # Only components that occur are in the table, because labels can be far apart.
    (first, first_names), (second, second_names) = (_occurring(value) for value in (first, second))
    table = (first.to(second.device).T @ second).numpy(force=True)
    rows, columns = linear_sum_assignment(table, maximize=True)
    matched, matches = first_names[rows], second_names[columns]
    permutation = torch.empty(size, dtype=torch.int64, device="cpu")
    permutation[matched] = matches
    permutation[_others(matched, size)] = _others(matches, size)
    return ComponentMatch(
        permutation=permutation.to(second.device),
        agreement=float(table[rows, columns].sum()) / len(second),
    )


def _occurring(value: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of shape (N, C') and, on the CPU, the components that the columns belong to, of shape (C',)."""
    if value.dim() == 2:
        names = value.any(0).nonzero()[:, 0]
        return value[:, names], names.cpu()
    names, columns = value.unique(return_inverse=True)
    return torch.nn.functional.one_hot(columns, len(names)).double(), names.cpu()


def _others(components: Tensor, size: int) -> Tensor:
    """The components below ``size`` that are not among ``components``, in ascending order."""
    free = torch.ones(size, dtype=torch.bool, device="cpu")
    free[components] = False
    return free.nonzero()[:, 0]
