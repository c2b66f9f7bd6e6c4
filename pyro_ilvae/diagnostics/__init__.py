"""Diagnostics of posterior collapse, for Pyro models and guides, for draws, and for decoders."""

from pyro_ilvae.diagnostics._posteriors import UnavailableError
from pyro_ilvae.diagnostics.aggregate_posterior import MutualInformation, mutual_information
from pyro_ilvae.diagnostics.clusters import ClusterAgreement, cluster_agreement
from pyro_ilvae.diagnostics.collapse import (
    ActiveUnits,
    CollapsedFraction,
    active_units,
    active_units_of_draws,
    collapsed_dimensions,
    collapsed_fraction,
)
from pyro_ilvae.diagnostics.components import (
    CoincidingComponents,
    ComponentMatch,
    ComponentUsage,
    coinciding_components,
    component_usage,
    match_components,
)
from pyro_ilvae.diagnostics.divergences import KLDivergence, KLPerDimension, kl_divergence, kl_per_dimension
from pyro_ilvae.diagnostics.evidence_bounds import Evidence, bits_per_dimension, evidence, perplexity
from pyro_ilvae.diagnostics.fisher import PosteriorFisherDivergence, posterior_fisher_divergence
from pyro_ilvae.diagnostics.fisher_bound import FisherBound, fisher_bound
from pyro_ilvae.diagnostics.fisher_draws import FisherDivergenceOfDraws, posterior_fisher_divergence_of_draws
from pyro_ilvae.diagnostics.fisher_guide import GuideFisherDivergence, guide_fisher_divergence
from pyro_ilvae.diagnostics.identifiability import Separation, separation
from pyro_ilvae.diagnostics.information_metric import MeanFisherDivergence, mean_fisher_divergence
from pyro_ilvae.diagnostics.linear_reference import LinearReference, linear_reference
from pyro_ilvae.diagnostics.lipschitz import LipschitzAudit, lipschitz_audit
from pyro_ilvae.diagnostics.summary import collapse_summary

__all__ = [
    "ActiveUnits",
    "ClusterAgreement",
    "CoincidingComponents",
    "CollapsedFraction",
    "ComponentMatch",
    "ComponentUsage",
    "Evidence",
    "FisherBound",
    "FisherDivergenceOfDraws",
    "GuideFisherDivergence",
    "KLDivergence",
    "KLPerDimension",
    "LinearReference",
    "LipschitzAudit",
    "MeanFisherDivergence",
    "MutualInformation",
    "PosteriorFisherDivergence",
    "Separation",
    "UnavailableError",
    "active_units",
    "active_units_of_draws",
    "bits_per_dimension",
    "cluster_agreement",
    "coinciding_components",
    "collapse_summary",
    "collapsed_dimensions",
    "collapsed_fraction",
    "component_usage",
    "evidence",
    "fisher_bound",
    "guide_fisher_divergence",
    "kl_divergence",
    "kl_per_dimension",
    "linear_reference",
    "lipschitz_audit",
    "match_components",
    "mean_fisher_divergence",
    "mutual_information",
    "perplexity",
    "posterior_fisher_divergence",
    "posterior_fisher_divergence_of_draws",
    "separation",
]
