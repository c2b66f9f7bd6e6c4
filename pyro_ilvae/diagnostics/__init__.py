"""Diagnostics of posterior collapse, for Pyro models and guides, for draws, and for decoders."""

from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics.active_units import ActiveUnits, active_units
from pyro_ilvae.diagnostics.active_units_of_draws import active_units_of_draws
from pyro_ilvae.diagnostics.bits_per_dimension import bits_per_dimension
from pyro_ilvae.diagnostics.cluster_agreement import ClusterAgreement, cluster_agreement
from pyro_ilvae.diagnostics.coinciding_components import CoincidingComponents, coinciding_components
from pyro_ilvae.diagnostics.collapse_summary import collapse_summary
from pyro_ilvae.diagnostics.collapsed_dimensions import collapsed_dimensions
from pyro_ilvae.diagnostics.collapsed_fraction import CollapsedFraction, collapsed_fraction
from pyro_ilvae.diagnostics.component_usage import ComponentUsage, component_usage
from pyro_ilvae.diagnostics.evidence import Evidence, evidence
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
from pyro_ilvae.diagnostics.guaranteed_information import GuaranteedInformation, guaranteed_information
from pyro_ilvae.diagnostics.kl_divergence import KLDivergence, kl_divergence
from pyro_ilvae.diagnostics.kl_per_dimension import kl_per_dimension
from pyro_ilvae.diagnostics.linear_reference import LinearReference, linear_reference
from pyro_ilvae.diagnostics.lipschitz_audit import LipschitzAudit, lipschitz_audit
from pyro_ilvae.diagnostics.match_components import ComponentMatch, match_components
from pyro_ilvae.diagnostics.mutual_information import MutualInformation, mutual_information
from pyro_ilvae.diagnostics.perplexity import perplexity
from pyro_ilvae.diagnostics.separation import Separation, separation

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
    "GuaranteedInformation",
    "GuideFisherDivergence",
    "KLDivergence",
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
    "guaranteed_information",
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
