"""Right calls of the likelihoods and of their methods."""

import math

import torch
from helpers.public_calls import Call
from helpers.wrong_values import POSITIVE, TENSOR

from pyro_ilvae import likelihoods

N, D = 4, 6
# A number for each entry of a datum may be given as a list.
POSITIVE_OF_ENTRIES = [
    *(value for value in POSITIVE if value != [1.0]),
    torch.zeros(D),
    torch.full((D,), math.nan),
    torch.ones(D, dtype=torch.cfloat),
    [],
]
GATE = [*POSITIVE_OF_ENTRIES, 1.0, 1.5, torch.ones(D)]
COUNTS = (
    likelihoods.Poisson,
    likelihoods.NegativeBinomial,
    likelihoods.ZeroInflatedPoisson,
    likelihoods.ZeroInflatedNegativeBinomial,
)


def eta():
    return torch.zeros(N, D)


CALLS = {
    "likelihoods.Normal": Call(
        lambda: (likelihoods.Normal, {"scale": torch.full((D,), 0.5), "estimate": "fixed"}),
        {"scale": POSITIVE_OF_ENTRIES},
    ),
    "likelihoods.NegativeBinomial": Call(
        lambda: (likelihoods.NegativeBinomial, {"total_count": torch.full((D,), 2.0), "estimate": "fixed"}),
        {"total_count": POSITIVE_OF_ENTRIES},
    ),
    "likelihoods.ZeroInflatedPoisson": Call(
        lambda: (likelihoods.ZeroInflatedPoisson, {"gate": torch.full((D,), 0.5), "estimate": "fixed"}), {"gate": GATE}
    ),
    "likelihoods.ZeroInflatedNegativeBinomial": Call(
        lambda: (
            likelihoods.ZeroInflatedNegativeBinomial,
            {"total_count": torch.full((D,), 2.0), "gate": torch.full((D,), 0.5), "estimate": "fixed"},
        ),
        {"total_count": POSITIVE_OF_ENTRIES, "gate": GATE},
    ),
    "likelihoods.Categorical": Call(
        lambda: (likelihoods.Categorical, {"num_categories": 3}), {"num_categories": [0, 1, -1, 2.5, "a"]}
    ),
    **{
        f"likelihoods.{likelihood.__name__}.natural_parameters": Call(
            lambda likelihood=likelihood: (likelihood().natural_parameters, {"mean": torch.full((N, D), 0.5)}),
            {"mean": [*TENSOR, torch.full((N, D), math.nan), torch.full((N, D), math.inf)]},
        )
        for likelihood in (
            likelihoods.Normal,
            likelihoods.Bernoulli,
            likelihoods.ContinuousBernoulli,
            *COUNTS,
        )
    },
    "likelihoods.Categorical.natural_parameters": Call(
        lambda: (likelihoods.Categorical(3).natural_parameters, {"mean": torch.full((N, 3), 1 / 3)}),
        {"mean": [*TENSOR, torch.full((N, 2), 0.5), torch.eye(3), torch.full((N, 3), 0.2)]},
    ),
    **{
        f"likelihoods.{likelihood.__name__}.{method}": Call(
            lambda likelihood=likelihood, method=method, names=names: (
                getattr(likelihood(), method),
                {name: eta() for name in names},
            ),
            {name: [*TENSOR, torch.zeros(3, 5)] if name != "eta" else TENSOR for name in names},
        )
        for likelihood in COUNTS
        for method, names in (
            ("mean", ("eta",)),
            ("divergence", ("eta", "other")),
            ("information_product", ("eta", "tangent")),
            ("smallest_information", ("eta",)),
        )
    },
}
