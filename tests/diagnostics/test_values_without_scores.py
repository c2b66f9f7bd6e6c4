"""Fisher divergences refuse sites whose density has no gradient at their values."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ilvae.diagnostics import guide_fisher_divergence, posterior_fisher_divergence
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError

X = torch.linspace(-1.0, 1.0, 6)
HALF = torch.tensor(0.5)


def relaxed(probs):
    return dist.RelaxedBernoulli(HALF, probs=probs).expand([len(X)])


def straight_through(probs):
    return dist.RelaxedBernoulliStraightThrough(HALF, probs=probs).expand([len(X)])


def inflated(probs):
    return dist.ZeroInflatedDistribution(dist.Gamma(2.0, 2.0).expand([len(X)]), gate=probs.expand([len(X)]))


def pair(prior, posterior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(torch.tensor(0.5)))
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + u, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(torch.tensor(0.7)))
            pyro.sample("u", dist.Normal(x / 2, 1.0))

    return model, guide


@pytest.mark.parametrize(
    ("prior", "posterior", "message"),
    [
        (straight_through, straight_through, "site 'z' to have a density at its value, got a RelaxedBernoulliStraight"),
        (relaxed, straight_through, "site 'z' to have a density at its value, got a RelaxedBernoulliStraight"),
        (inflated, inflated, "site 'z' to have a density, got a ZeroInflatedDistribution"),
    ],
)
def test_a_site_without_a_density_at_its_value_is_refused(prior, posterior, message):
    model, guide = pair(prior, posterior)
    with pytest.raises(UnavailableError, match=message):
        guide_fisher_divergence(model, guide, X, site="z")
    with pytest.raises(UnavailableError, match=message):
        posterior_fisher_divergence(model, guide, X, sites=["z"], num_samples=20)


def test_a_straight_through_site_beside_another_is_refused():
    # The copies at which the other site is differentiated would lose the draw before rounding, and so the weights.
    with pytest.raises(UnavailableError, match="site 'z' to have a density at its value"):
        posterior_fisher_divergence(*pair(straight_through, straight_through), X, sites=["u"], num_samples=20)
    posterior_fisher_divergence(*pair(relaxed, relaxed), X, sites=["u", "z"], num_samples=20)


@pytest.mark.parametrize("direct", [0.0, 1e-6, 1e-3])
def test_a_negligible_path_past_a_lower_layer_is_no_divergence(direct):
    def model(x):
        with pyro.plate("data", len(x)):
            above = pyro.sample("above", dist.Normal(0.0, 1.0))
            below = pyro.sample("below", dist.Normal(above, 1.0))
            pyro.sample("x", dist.Normal(below + direct * above, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            above = pyro.sample("above", dist.Normal(x / 3, 1.0))
            pyro.sample("below", dist.Normal((x + above) / 2, 0.5**0.5))

    with pytest.raises(UnavailableError, match=r"without other drawn sites in between, got \['below'\]"):
        posterior_fisher_divergence(model, guide, X, sites=["above"], num_samples=100)
    assert posterior_fisher_divergence(model, guide, X, num_samples=500, seed=0).values.min() > 0.2
