"""Diagnostics of posterior collapse, for Pyro models and guides, and for draws."""

from pyro_ilvae.diagnostics._posteriors import UnavailableError
from pyro_ilvae.diagnostics.collapse import (
    ActiveUnits,
    CollapsedFraction,
    active_units,
    active_units_of_draws,
    collapsed_dimensions,
    collapsed_fraction,
)
from pyro_ilvae.diagnostics.divergences import KLDivergence, KLPerDimension, kl_divergence, kl_per_dimension
from pyro_ilvae.diagnostics.evidence_bounds import Evidence, bits_per_dimension, evidence, perplexity
from pyro_ilvae.diagnostics.summary import collapse_summary

__all__ = [
    "ActiveUnits",
    "CollapsedFraction",
    "Evidence",
    "KLDivergence",
    "KLPerDimension",
    "UnavailableError",
    "active_units",
    "active_units_of_draws",
    "bits_per_dimension",
    "collapse_summary",
    "collapsed_dimensions",
    "collapsed_fraction",
    "evidence",
    "kl_divergence",
    "kl_per_dimension",
    "perplexity",
]
