"""Relative Fisher divergences: of the exact posterior, of draws, of the guide, averaged over the model's own data."""

from pyro_ilvae.diagnostics.fisher.fisher_bound import FisherBound, fisher_bound
from pyro_ilvae.diagnostics.fisher.guide_fisher_divergence import GuideFisherDivergence, guide_fisher_divergence
from pyro_ilvae.diagnostics.fisher.mean_fisher_divergence import MeanFisherDivergence, mean_fisher_divergence
from pyro_ilvae.diagnostics.fisher.posterior_fisher_divergence import (
    PosteriorFisherDivergence,
    posterior_fisher_divergence,
)
from pyro_ilvae.diagnostics.fisher.posterior_fisher_divergence_of_draws import (
    FisherDivergenceOfDraws,
    posterior_fisher_divergence_of_draws,
)

__all__ = [
    "FisherBound",
    "FisherDivergenceOfDraws",
    "GuideFisherDivergence",
    "MeanFisherDivergence",
    "PosteriorFisherDivergence",
    "fisher_bound",
    "guide_fisher_divergence",
    "mean_fisher_divergence",
    "posterior_fisher_divergence",
    "posterior_fisher_divergence_of_draws",
]
