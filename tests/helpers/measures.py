"""The measures of any model and guide, which share one way to be called."""

from pyro_ilvae.diagnostics import (
    active_units,
    collapse_summary,
    evidence,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    mutual_information,
    posterior_fisher_divergence,
)
from pyro_ilvae.io_pyro import from_pyro_svi

MEASURES = (
    active_units,
    collapse_summary,
    evidence,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    mutual_information,
    posterior_fisher_divergence,
)


def exported(model, guide, model_args, **_):
    """A conversion to ArviZ, which takes fewer arguments."""
    return from_pyro_svi((model, guide), model_args, num_samples=3)
