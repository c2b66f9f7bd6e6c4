"""Models and guides that mix the draws that are made together are found, however few draws show it."""

import numpy as np
import pyro
import pytest
import torch
from helpers.arviz_groups import values
from pyro import distributions as dist

from pyro_ilvae.io_pyro import from_pyro_svi

RARE = 1.8  # few of the draws of a pass are beyond it

# What a model computes of z, of shape (N,) as it is written, and with draws to the left in a run of several.
MIXTURES = {
    "mean": lambda z: z + z.mean(),
    "first": lambda z: z + z[0],
    "softmax": lambda z: z.softmax(0),
    "normalized": lambda z: (z - z.mean(0)) / (1 + z.std(0, correction=0)),
    "sorted": lambda z: z.sort(0).values,
    "running": lambda z: z.cummax(0).values,
    "rolled": lambda z: z.roll(1, 0),
    "flipped": lambda z: z.flip(0),
    "largest": lambda z: z / (1 + z.abs().max()),
    "branch": lambda z: 3 * z if (z > RARE).any() else z,
    # Of these the first and the last draw seldom show anything.
    "rare mean": lambda z: torch.where(z > RARE, z.mean(), z),
    "rare rank": lambda z: torch.where(z > RARE, 1.0 * (z > RARE).sum(), z),
    "rare largest": lambda z: torch.where(z > RARE, z / z.max(), z),
    "middle": lambda z: torch.where((z > 0) & (z < 0.1), z.sum(), z),
}


def model_with(mix):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = pyro.deterministic("loc", mix(z))
            pyro.sample("x", dist.Normal(loc, 0.01), obs=x)

    return model


def standard_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("samples_per_pass", [3, 16, None])
def test_a_model_that_mixes_draws(name, samples_per_pass):
    mix = MIXTURES[name]
    x = torch.tensor([0.2, -0.4])
    arguments = {"num_samples": 64, "samples_per_pass": samples_per_pass, "seed": 3, "log_likelihood": "conditional"}
    fit = from_pyro_svi((model_with(mix), standard_guide), x, **arguments)
    for group in ("posterior", "prior"):
        draws = values(fit, group)
        expected = torch.stack([mix(z) for z in torch.tensor(draws["z"][0])])
        np.testing.assert_allclose(draws["loc"][0], expected, rtol=1e-4, atol=1e-5)
        predictive = values(fit, f"{group}_predictive")["x"][0]
        assert abs(predictive - expected.numpy()).max() < 0.06
    found = torch.tensor(values(fit, "posterior")["loc"])
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], dist.Normal(found, 0.01).log_prob(x), rtol=1e-3)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_guide_that_mixes_draws(name):
    mix = MIXTURES[name]

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Normal(mix(z), 0.01))

    fit = from_pyro_svi((model, guide), torch.zeros(2), num_samples=64, seed=3, prior=False)
    draws = values(fit, "posterior")
    expected = torch.stack([mix(z) for z in torch.tensor(draws["z"][0])])
    assert abs(draws["w"][0] - expected.numpy()).max() < 0.06


@pytest.mark.parametrize("name", ["mean", "rare mean", "branch"])
def test_draws_of_local_sites_that_are_mixed_where_the_log_likelihood_is_integrated(name):
    """The model mixes draws only where z is far out, as importance sampling alone draws it."""
    mix = MIXTURES[name]
    x = torch.tensor([0.2, -0.4])

    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(shift + mix(z), 1.0), obs=x)

    def guide(x):
        pyro.sample("shift", dist.Normal(0.0, 0.1))
        standard_guide(x)

    arguments = {"num_samples": 2, "prior": False, "posterior_predictive": False, "seed": 0}
    together = from_pyro_svi((model, guide), x, num_importance_samples=400, **arguments)
    alone = from_pyro_svi((model, guide), x, num_importance_samples=400, samples_per_pass=1, **arguments)
    for fit in (together, alone):
        sizes = values(fit, "importance_sampling")["x_effective_sample_size"]
    error = 5 * np.sqrt(2 * (400 / sizes - 1) / 399)
    assert (abs(values(together, "log_likelihood")["x"] - values(alone, "log_likelihood")["x"]) < error + 0.05).all()
