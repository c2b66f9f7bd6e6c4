"""What tests read from conversions to ArviZ."""

import warnings

import matplotlib
import numpy as np

matplotlib.use("Agg")
with warnings.catch_warnings():
    # Once a day ArviZ 0.x announces ArviZ 1 when it is imported.
    warnings.filterwarnings("ignore", "\nArviZ is undergoing a major refactor", FutureWarning)
    import arviz as az

__all__ = ["PASSES", "SAMPLED", "assert_same", "az", "values", "z_scores"]

# Of 10 draws: one by one, with a remainder, all at once, more than there are, as the conversion chooses.
PASSES = [1, 4, 10, 25, None]
SAMPLED = ["posterior", "posterior_predictive", "log_likelihood", "prior", "prior_predictive"]


def values(fit, group):
    return {name: np.asarray(array) for name, array in fit[group].data_vars.items()}


def assert_same(one, other):
    for group in [*SAMPLED, "observed_data"]:
        first, second = values(one, group), values(other, group)
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def z_scores(difference, variance):
    """The mean over draws (axes 0 and 1) of what has mean 0 and a known variance for each draw, in standard errors."""
    return difference.sum((0, 1)) / np.sqrt(variance.sum((0, 1)))
