"""What a mixture makes of its components: which are used, which coincide, and which are the same in another fit."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]
from torch import Tensor

from pyro_ilvae import _checks


class ComponentUsage(NamedTuple):
    """How the data are spread over components; entropies and divergences in nats."""

    usage: Tensor  #: the aggregate posterior q(y), of shape (C,)
    kl: float  #: KL(q(y) || pi); infinite if a component without prior weight is used
    effective_number: float  #: exp of the entropy of q(y), between 1 and C
    empty: Tensor  #: the components whose usage is below the threshold, booleans of shape (C,)
    assignment_entropy: float  #: the mean entropy of q(y | x); 0 if every datum is assigned with certainty
    mutual_information: float  #: I_q(x; y); 0 if every datum is assigned alike


class CoincidingComponents(NamedTuple):
    """The overlap of each pair of components, and the groups of those that overlap by more than the threshold."""

    overlap: Tensor  #: Bhattacharyya coefficients in [0, 1], of shape (C, C), 1 on the diagonal
    groups: tuple[tuple[int, ...], ...]  #: groups of two components or more, none of them in two groups


class ComponentMatch(NamedTuple):
    """The components of one fit in the order of another's."""

    permutation: Tensor  #: integers of shape (C,): ``other[:, permutation]`` is aligned with the reference
    agreement: float  #: the probability that labels drawn from the two, once aligned, are the same


def component_usage(
    probs: Tensor | npt.ArrayLike,
    weights: Tensor | npt.ArrayLike | None = None,
    *,
    threshold: float = 0.01,
) -> ComponentUsage:
    r"""How the data are spread over the components of a mixture.

    .. math:: q(y) = \frac1N \sum_n q(y \mid x_n), \qquad I_q(x; y) = H[q(y)] - \frac1N \sum_n H[q(y \mid x_n)], \qquad
        \frac1N \sum_n \mathrm{KL}(q(y \mid x_n) \,\|\, \pi) = \mathrm{KL}(q(y) \,\|\, \pi) + I_q(x; y).

    The left side of the last equation is what the ELBO of a guide with y charges for it [1]; its parts tell two
    failures apart. Where all data fall into one component, the effective number [2] is 1 and KL is :math:`-\log \pi` of
    that component. Where the data are assigned alike, whether to one component or to all, the mutual information is 0.

    Args:
        probs: the probabilities :math:`q(y \mid x_n)` of shape (N, C), as from
            :meth:`~pyro_ilvae.MixtureVAE.predict_component`.
        weights: the weights :math:`\pi` of the prior, of shape (C,), such as ``component_logits.softmax(-1)`` of a
            :class:`~pyro_ilvae.MixtureVAE` that learns them; uniform if None.
        threshold: the usage in [0, 1] below which a component counts as empty. Equal usage of C components is 1 / C, so
            that the threshold should be well below it.

    Returns:
        The usage, its divergence from the weights and its effective number, the empty components, the mean entropy of
        the assignments, and the mutual information.

    Raises:
        ValueError: for no data, other shapes, probabilities or weights that are negative, NaN or do not sum to 1, and a
            threshold out of range.

    References:
        | [1] Hoffman & Johnson 2016, ELBO surgery, http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
        | [2] Hill 1973, Diversity and evenness: a unifying notation and its consequences, Ecology 54

    Example:
        >>> result = component_usage(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]))
        >>> result.usage.tolist(), round(result.effective_number, 3), result.empty.any().item()
        ([0.5, 0.25, 0.25], 2.828, False)
        >>> round(result.mutual_information / math.log(2), 3), round(result.assignment_entropy / math.log(2), 3)
        (1.0, 0.5)
    """
    if not 0 <= _checks.constant("threshold", threshold) <= 1:
        raise ValueError(f"Expected threshold in [0, 1], got {threshold!r}")
    posteriors = _probabilities("probs", probs, "(N, C)", dim=2)
    usage = posteriors.mean(0)
    if weights is None:
        prior = torch.full_like(usage, 1 / len(usage))
    else:
        prior = _probabilities("weights", weights, "(C,)", dim=1).to(usage.device)
        if prior.shape != usage.shape:
            raise ValueError(f"Expected weights of shape {tuple(usage.shape)}, got {tuple(prior.shape)}")
    entropy = float(torch.special.entr(usage).sum())
    assignment_entropy = float(torch.special.entr(posteriors).sum(1).mean())
    return ComponentUsage(
        usage=usage.to(_dtype(probs)),
        kl=max(0.0, -float(torch.xlogy(usage, prior).sum()) - entropy),
        effective_number=math.exp(entropy),
        # Not by rounding alone: the usage of three equal components is not quite 1 / 3.
        empty=usage < threshold * (1 - 1e-6),
        assignment_entropy=assignment_entropy,
        mutual_information=max(0.0, entropy - assignment_entropy),
    )


def coinciding_components(
    loc: Tensor | npt.ArrayLike,
    scale: Tensor | npt.ArrayLike,
    *,
    threshold: float = 0.9,
) -> CoincidingComponents:
    r"""The Gaussian components that lie on top of each other, by their Bhattacharyya coefficients.

    .. math:: B_{ij} = \int \sqrt{N(z; m_i, s_i^2)\, N(z; m_j, s_j^2)} \, dz = \prod_k \sqrt{\frac{2 s_{ik} s_{jk}}
        {s_{ik}^2 + s_{jk}^2}} \exp\left( -\frac{(m_{ik} - m_{jk})^2}{4 (s_{ik}^2 + s_{jk}^2)} \right).

    It is 1 if and only if the two are the same. The best guess at which of two equally probable components a z was
    drawn from is wrong with a probability between :math:`\tfrac12 (1 - \sqrt{1 - B_{ij}^2})` and
    :math:`\tfrac12 B_{ij}` [1]. Above the default threshold that is at least 0.28, where a guess without z has 0.5: z
    says little about which it was. Components with the same scale in all dimensions then have means less than 0.92
    scales apart.

    Components are in one group if a chain of such pairs connects them, so that the ends of a long chain may differ;
    ``overlap`` tells.

    Args:
        loc: the means :math:`m`, of shape (C, K); ``component_loc`` of a :class:`~pyro_ilvae.MixtureVAE`.
        scale: the standard deviations :math:`s`, of shape (C, K); ``component_log_scale.exp()`` there.
        threshold: the coefficient in [0, 1] above which two components coincide.

    Returns:
        The coefficients, of shape (C, C), and the groups of coinciding components, each in ascending order.

    Raises:
        ValueError: for other or different shapes, means that are not finite, standard deviations that are not finite
            and positive, and a threshold out of range.

    References:
        [1] Kailath 1967, The divergence and Bhattacharyya distance measures in signal selection, IEEE Transactions on
        Communication Technology 15

    Example:
        >>> result = coinciding_components(torch.tensor([[0.0], [5.0], [0.1]]), torch.ones(3, 1))
        >>> result.groups, result.overlap[0]
        (((0, 2),), tensor([1.0000, 0.0439, 0.9988]))
    """
    if not 0 <= _checks.constant("threshold", threshold) <= 1:
        raise ValueError(f"Expected threshold in [0, 1], got {threshold!r}")
    means, deviations = _double("loc", loc), _double("scale", scale)
    if means.dim() != 2 or means.numel() == 0:
        raise ValueError(f"Expected loc of shape (C, K), got {tuple(means.shape)}")
    if deviations.shape != means.shape:
        raise ValueError(f"Expected scale of the shape {tuple(means.shape)} of loc, got {tuple(deviations.shape)}")
    if not means.isfinite().all():
        raise ValueError("Expected finite loc, got NaN or infinity")
    others = deviations[~(deviations.isfinite() & (deviations > 0))]
    if len(others):
        raise ValueError(f"Expected scale to be finite and > 0, got {others[0].item()}")
    deviations = deviations.to(means.device)
    # One row at a time: all at once would take C times the memory.
    rows = [_log_overlap(mean, deviation, means, deviations) for mean, deviation in zip(means, deviations, strict=True)]
    overlap = torch.stack(rows).exp()
    _, labels = connected_components((overlap > threshold).numpy(force=True), directed=False)
    groups = [tuple(np.flatnonzero(labels == label).tolist()) for label in range(labels.max() + 1)]
    return CoincidingComponents(overlap.to(_dtype(loc)), tuple(group for group in groups if len(group) > 1))


def match_components(reference: Tensor | npt.ArrayLike, other: Tensor | npt.ArrayLike) -> ComponentMatch:
    r"""The order of another fit's components in which they agree best with those of a reference.

    .. math:: \text{agreement} = \max_{\sigma\ \text{permutation}} \frac1N \sum_n \sum_c r_{nc}\, o_{n \sigma(c)},

    found by the Hungarian algorithm: fits of one model differ in the names of their components, known as label
    switching [1]. The same permutation minimises the squared distance of :math:`r` and the permuted :math:`o`. The
    agreement is 1 only if both are certain of every datum; for the fraction of data that both assign alike, pass
    labels, such as ``probs.argmax(1)``.

    Args:
        reference: the probabilities :math:`r` of the components given each datum, of shape (N, C), or labels from 0 to
            C - 1 of shape (N,).
        other: those of another fit, :math:`o`, for the same data. For two arguments that are labels, C is the largest
            of all plus 1.

    Returns:
        The permutation :math:`\sigma`, with which ``other[:, permutation]`` and, say, ``other_loc[permutation]`` are in
        the order of the reference, and the agreement.

    Raises:
        ValueError: for no data, other shapes, different numbers of data or of components, probabilities that are
            negative, NaN or do not sum to 1, and labels that are not integers from 0 to C - 1.

    References:
        [1] Stephens 2000, Dealing with label switching in mixture models, Journal of the Royal Statistical Society B 62

    Example:
        >>> match = match_components(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 2, 0, 1]))
        >>> match.permutation, match.agreement
        (tensor([2, 0, 1]), 1.0)
    """
    found = {"reference": _assignments("reference", reference), "other": _assignments("other", other)}
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
        if largest >= size:
            raise ValueError(f"Expected {name} to be labels from 0 to {size - 1}, got {largest}")
    first, second = (
        torch.nn.functional.one_hot(value, size).double() if value.dim() == 1 else value for value in (first, second)
    )
    table = (first.to(second.device).T @ second).numpy(force=True)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return ComponentMatch(
        permutation=torch.as_tensor(columns, device=second.device),
        agreement=float(table[rows, columns].sum()) / len(second),
    )


def _log_overlap(mean: Tensor, deviation: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
    """Log Bhattacharyya coefficients of one component with all, of shape (C,)."""
    # 2 s t / (s^2 + t^2) = 1 / cosh(log s - log t), which squares nothing that could overflow.
    ratio = deviation.log() - deviations.log()
    log_cosh = torch.logaddexp(ratio, -ratio) - math.log(2)
    distance = (mean - means) / torch.hypot(deviation, deviations)
    return -(0.5 * log_cosh + 0.25 * distance.square()).sum(1).clamp(min=0)


def _double(name: str, value: Tensor | npt.ArrayLike) -> Tensor:
    """The numbers in double precision, which differences of entropies need, and without their gradient."""
    if not isinstance(value, torch.Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"Expected {name} to be numbers, got {array.dtype}")
        # A contiguous copy, because PyTorch takes no negative strides and warns of arrays that are read-only.
        value = torch.from_numpy(array.astype(np.float64, order="C"))
    if value.is_complex():
        raise ValueError(f"Expected {name} to be real, got {value.dtype}")
    return value.detach().double()


def _dtype(value: Tensor | npt.ArrayLike) -> torch.dtype:
    return value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else torch.float64


def _probabilities(name: str, value: Tensor | npt.ArrayLike, shape: str, dim: int) -> Tensor:
    """Probabilities of so many dimensions that sum to 1 over the last in double precision."""
    probs = _double(name, value)
    if probs.dim() != dim or probs.numel() == 0:
        raise ValueError(f"Expected {name} of shape {shape}, got {tuple(probs.shape)}")
    negative = probs[~(probs >= 0)]
    if len(negative):
        raise ValueError(f"Expected {name} to be probabilities, got {negative[0].item()}")
    totals = probs.sum(-1, keepdim=True)
    # Room for the rounding of single precision, not for scores that were never normalised.
    others = totals[~((totals - 1).abs() <= 1e-3)]
    if len(others):
        raise ValueError(f"Expected {name} to sum to 1 over components, got a sum of {others[0].item()}")
    return probs / totals


def _assignments(name: str, value: Tensor | npt.ArrayLike) -> Tensor:
    """Probabilities of shape (N, C) in double precision, or labels of shape (N,) as integers."""
    numbers = _double(name, value)
    if numbers.dim() != 1 or len(numbers) == 0:
        return _probabilities(name, value, "(N,) or (N, C)", dim=2)
    others = numbers[~((numbers >= 0) & (numbers == numbers.floor()) & numbers.isfinite())]
    if len(others):
        raise ValueError(f"Expected {name} to be labels from 0 to C - 1, got {others[0].item()}")
    return numbers.long()
