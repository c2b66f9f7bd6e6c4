"""Wrong arguments end in errors that name them, and arrays stand in for tensors."""

import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fisher_models import Linear
from helpers.latent_structures import scalar_guide, scalar_model

from pyro_ilvae.diagnostics import (
    active_units,
    active_units_of_draws,
    collapse_summary,
    collapsed_dimensions,
    collapsed_fraction,
    fisher_bound,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    mutual_information,
    posterior_fisher_divergence,
    posterior_fisher_divergence_of_draws,
)

X = torch.linspace(-1.0, 1.0, 5)
PAIR = (scalar_model, scalar_guide, X)
KL = torch.rand(6, 3)


@pytest.mark.parametrize(
    "measure", [kl_divergence, kl_per_dimension, active_units, mutual_information, guide_fisher_divergence]
)
@pytest.mark.parametrize("site", [3, ["z"], "", 0, b"z"])
def test_a_site_that_is_no_name(measure, site):
    with pytest.raises((TypeError, ValueError), match=r"Expected (the argument )?site"):
        measure(*PAIR, site=site)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: posterior_fisher_divergence(*PAIR, sites=["z", "z"]), ValueError, "each once"),
        (lambda: posterior_fisher_divergence(*PAIR, sites=3), TypeError, "sites to be a sequence of names, got 3"),
        (lambda: posterior_fisher_divergence(*PAIR, sites=[3]), ValueError, "sites to be names"),
        (lambda: posterior_fisher_divergence(*PAIR, sites=[]), ValueError, r"got sites=\[\]"),
        (lambda: fisher_bound(*PAIR, decoder=Linear), TypeError, "decoder to be a module.*the class Linear"),
        (lambda: fisher_bound(*PAIR, decoder="f"), TypeError, "decoder to be a module.*a str"),
        (lambda: fisher_bound(*PAIR, decoder=Linear(torch.eye(1)), site=3), TypeError, "site to be the name"),
        (lambda: posterior_fisher_divergence_of_draws(scalar_model, X, X), TypeError, "draws to be a mapping"),
        (
            lambda: posterior_fisher_divergence_of_draws(scalar_model, {"z": "a"}, X),
            TypeError,
            "draws of site 'z' to be a tensor",
        ),
        (lambda: active_units(*PAIR, threshold=math.nan), ValueError, "threshold to be a finite number"),
        (lambda: active_units_of_draws("a"), TypeError, "draws to be a tensor"),
        (lambda: active_units_of_draws(torch.ones(3, 4).long()), ValueError, "draws of floating point"),
        (lambda: active_units_of_draws(torch.ones(0, 4)), ValueError, "draws of shape"),
        (lambda: collapsed_dimensions(kl_per_dimension(*PAIR)), TypeError, "got a KLDivergence: pass its .values"),
        (lambda: collapsed_dimensions(None), TypeError, "kl to be a tensor"),
        (lambda: collapsed_dimensions(KL > 0), ValueError, "kl of real numbers"),
        (lambda: collapsed_dimensions(KL, epsilon="a"), ValueError, "epsilon to be a finite number"),
        (lambda: collapsed_fraction(KL, "a"), TypeError, "epsilons to be a tensor"),
        (lambda: collapsed_fraction(KL, []), ValueError, "at least one of epsilons"),
        (lambda: collapsed_fraction(kl_divergence(*PAIR)), TypeError, "pass its .values"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_arrays_stand_in_for_tensors():
    array = KL.numpy()
    for kl in (array, array.tolist()):
        assert torch.equal(collapsed_dimensions(kl, epsilon=0.5), collapsed_dimensions(KL, epsilon=0.5))
        assert torch.equal(
            collapsed_fraction(kl, np.array([0.1, 0.5])).fractions, collapsed_fraction(KL, [0.1, 0.5])[1]
        )
    draws = torch.randn(7, 5)
    assert torch.equal(active_units_of_draws(draws.numpy()).variances, active_units_of_draws(draws).variances)
    of_arrays = posterior_fisher_divergence_of_draws(scalar_model, {"z": draws.numpy()}, X)
    assert torch.equal(of_arrays.values, posterior_fisher_divergence_of_draws(scalar_model, {"z": draws}, X).values)


def test_a_scale_that_is_nan_is_named_by_its_site():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, x + math.nan))

    with pytest.raises(ValueError, match="site 'z'"):
        mutual_information(scalar_model, guide, X)


@pytest.mark.parametrize("num_samples", [3, 40])
def test_the_summary_makes_the_draws_that_it_says(num_samples, monkeypatch):
    summary = collapse_summary(*PAIR, num_samples=num_samples, seed=0)
    direct = mutual_information(*PAIR, num_samples=num_samples, seed=0)
    assert float(summary.mutual_information_se[0]) == pytest.approx(direct.mutual_information_se)
    assert float(summary.mutual_information_samples[0]) == summary.attrs["num_samples"] == num_samples
    # All pairs of a large data set would take too long, and the summary says how many draws it made.
    module = sys.modules["pyro_ilvae.diagnostics.mutual_information"]
    monkeypatch.setattr(module, "_MOST_PAIRS", 7 * len(X) ** 2)
    summary = collapse_summary(*PAIR, num_samples=num_samples, seed=0, measures=["mutual_information"])
    assert float(summary.mutual_information_samples[0]) == min(num_samples, 7)
