"""Diagnostics of posterior collapse, for Pyro models and guides whose latent variables are local to the data."""

from pyro_ilvae.diagnostics.collapse import ActiveUnits, KLPerDimension, active_units, kl_per_dimension
from pyro_ilvae.diagnostics.evidence_bounds import Evidence, evidence
from pyro_ilvae.diagnostics.summary import collapse_summary

__all__ = [
    "ActiveUnits",
    "Evidence",
    "KLPerDimension",
    "active_units",
    "collapse_summary",
    "evidence",
    "kl_per_dimension",
]
