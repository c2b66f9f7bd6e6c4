"""How the data are spread over the components of a mixture."""

import math
from typing import NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.assignments import float_dtype, probabilities

__all__ = ["ComponentUsage", "component_usage"]


class ComponentUsage(NamedTuple):
    """How the data are spread over components; entropies and divergences in nats."""

    usage: Tensor  #: the aggregate posterior q(y), of shape (C,)
    kl: float  #: KL(q(y) || pi) in nats; infinite if a component without prior weight is used
    effective_number: float  #: exp of the entropy of q(y), between 1 and C
    empty: Tensor  #: the components whose usage is below the threshold, booleans of shape (C,)
    assignment_entropy: float  #: the mean entropy of q(y | x) in nats; 0 if every datum is assigned with certainty
    mutual_information: float  #: I_q(x; y) in nats; 0 if every datum is assigned alike

    def __repr__(self) -> str:
        return printing.described(
            self,
            f"effective number {printing.number(self.effective_number)} of {len(self.usage)} components",
            f"{int(self.empty.sum())} empty",
            f"KL {printing.number(self.kl)} nats",
            f"mutual information {printing.number(self.mutual_information)} nats",
        )


def component_usage(
    probs: Tensor | npt.ArrayLike,
    weights: Tensor | npt.ArrayLike | None = None,
    *,
    threshold: float = 0.01,
) -> ComponentUsage:
    r"""How the data are spread over the components of a mixture.

    .. math:: q(y) = \frac1N \sum_n q(y \mid x_n), \qquad I_q(x; y) = H[q(y)] - \frac1N \sum_n H[q(y \mid x_n)], \qquad
        \frac1N \sum_n \mathrm{KL}(q(y \mid x_n) \,\|\, \pi) = \mathrm{KL}(q(y) \,\|\, \pi) + I_q(x; y).

    The ELBO of a guide with y charges the mean KL from q(y | x) to the prior for y [1], and the two parts of this
    mean tell two failures apart. If all data fall into one component, the effective number [2] is 1 and KL is
    :math:`-\log \pi` of this component. If all data are assigned alike, whether to one component or to all, the mutual
    information is 0.

    Args:
        probs: the probabilities :math:`q(y \mid x_n)` of shape (N, C), as from
            :meth:`~pyro_ilvae.MixtureVAE.predict_component`.
        weights: the weights :math:`\pi` of the prior, of shape (C,), such as ``component_logits.softmax(-1)`` of a
            :class:`~pyro_ilvae.MixtureVAE` that learns them; uniform if None.
        threshold: the usage in [0, 1] below which a component counts as empty. Equal usage of C components is 1 / C:
            the threshold should be well below this.

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
    _checks.fraction("threshold", threshold)
    posteriors = probabilities("probs", probs, "(N, C)", dim=2)
    usage = posteriors.mean(0)
    if weights is None:
        prior = torch.full_like(usage, 1 / len(usage))
    else:
        prior = probabilities("weights", weights, "(C,)", dim=1).to(usage.device)
        if prior.shape != usage.shape:
            raise ValueError(f"Expected weights of shape {tuple(usage.shape)}, got {tuple(prior.shape)}")
    entropy = float(torch.special.entr(usage).sum())
    assignment_entropy = float(torch.special.entr(posteriors).sum(1).mean())
    return ComponentUsage(
        usage=usage.to(float_dtype(probs)),
        kl=max(0.0, -float(torch.xlogy(usage, prior).sum()) - entropy),
        effective_number=math.exp(entropy),
        # A component is not empty by rounding alone: the usage of three equal components is not quite 1 / 3.
        empty=usage < threshold * (1 - 1e-6),
        assignment_entropy=assignment_entropy,
        mutual_information=max(0.0, entropy - assignment_entropy),
    )
