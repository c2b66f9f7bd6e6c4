"""The diagnostics on models with discrete sites, drawn by the guide or summed out, against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_within, compared
from helpers.latent_structures import (
    CENTERS,
    WEIGHTS,
    data_plate,
    empty_guide,
    exact_mixture_guide,
    gmvae_guide,
    gmvae_guide_without_y,
    gmvae_model,
    mixture_log_marginal,
    mixture_model,
    responsibilities,
    rough_mixture_guide,
)
from pyro import poutine
from pyro.infer import config_enumerate
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import UnavailableError, active_units, evidence, kl_divergence, kl_per_dimension


@pytest.mark.parametrize(
    "guide", [empty_guide, exact_mixture_guide, config_enumerate(exact_mixture_guide), config_enumerate(empty_guide)]
)
def test_evidence_of_a_mixture(guide):
    x = torch.randn(7) * 2
    for model in (mixture_model, config_enumerate(mixture_model)):
        for batch_size in (None, 2):
            bounds = evidence(model, guide, x, num_samples=4, batch_size=batch_size)
            torch.testing.assert_close(bounds.log_likelihood, mixture_log_marginal(x))
            torch.testing.assert_close(bounds.elbo, mixture_log_marginal(x))


def test_rough_guide_of_a_mixture():
    x = torch.randn(7) * 2
    q = dist.Categorical(logits=torch.stack([-x, 0.5 * x], -1))
    for guide in (rough_mixture_guide, config_enumerate(rough_mixture_guide)):
        kl = kl_divergence(mixture_model, guide, x)
        assert kl.estimator == "analytic"
        torch.testing.assert_close(kl.values, exact_kl(q, dist.Categorical(WEIGHTS.expand(7, 2))))
        torch.testing.assert_close(kl_per_dimension(mixture_model, guide, x, site="y").values, kl.values)
        bounds = evidence(mixture_model, guide, x, num_samples=20000)
        assert_within(bounds.log_likelihood, mixture_log_marginal(x), bounds.log_likelihood_standard_errors)
        log_joint = WEIGHTS.log() + Normal(CENTERS, 0.7).log_prob(x[:, None])
        elbo = (q.probs * (log_joint - q.logits)).sum(-1)
        assert_within(bounds.elbo, elbo, bounds.elbo_standard_errors)
    with pytest.raises(UnavailableError, match="site 'y' to have a mean"):
        active_units(mixture_model, rough_mixture_guide, x, site="y")


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_a_mixture_whose_observations_stand_in_an_inner_plate(data_dim):
    x = torch.randn(5, 3)

    def model(x):
        with data_plate(x, data_dim):
            y = pyro.sample("y", dist.Categorical(WEIGHTS))
            with pyro.plate("inner", 3, dim=-3 - data_dim):
                pyro.sample("x", dist.Normal(CENTERS[y], 0.7), obs=x if data_dim == -2 else x.mT)

    exact = (WEIGHTS.log() + Normal(CENTERS, 0.7).log_prob(x[..., None]).sum(1)).logsumexp(-1)
    for num_samples in (1, 3):
        torch.testing.assert_close(evidence(model, empty_guide, x, num_samples=num_samples).elbo, exact)


def test_discrete_sites_in_inner_plates_are_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1):
            y = pyro.sample("y", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(CENTERS[y], 0.7), obs=x)

    with pytest.raises(ValueError, match=r"site 'y'.*plates \['data', 'inner'\]"):
        evidence(model, empty_guide, torch.randn(5, 3))


def test_several_discrete_sites():
    def model(x):
        with data_plate(x):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            b = pyro.sample("b", dist.Categorical(torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])[a.long()]))
            pyro.sample("x", dist.Normal(a + 2.0 * b, 0.7), obs=x)

    x = torch.randn(4)
    a, b = torch.tensor([0.0, 1.0])[:, None], torch.arange(3.0)
    weights = torch.tensor([0.7, 0.3])[:, None] * torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    exact = (weights.log() + Normal(a + 2 * b, 0.7).log_prob(x[:, None, None])).logsumexp((1, 2))
    torch.testing.assert_close(evidence(model, empty_guide, x, num_samples=3).elbo, exact)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_discrete_site_that_all_data_share(num_samples):
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        with data_plate(x):
            y = pyro.sample("y", dist.Categorical(torch.stack([0.3 + 0.5 * k, 0.7 - 0.5 * k], -1)))
            pyro.sample("x", dist.Normal(CENTERS[y] + k, 0.7), obs=x)

    x = torch.randn(5)
    parts = [
        torch.tensor(prior).log()
        + (torch.tensor(weights).log() + Normal(CENTERS + k, 0.7).log_prob(x[:, None])).logsumexp(-1).sum()
        for k, prior, weights in ((0, 0.6, [0.3, 0.7]), (1, 0.4, [0.8, 0.2]))
    ]
    bounds = evidence(model, empty_guide, x, num_samples=num_samples)
    torch.testing.assert_close(bounds.log_likelihood, torch.stack(parts).logsumexp(0)[None])


def test_a_markov_chain_of_discrete_sites():
    transition = torch.tensor([[0.9, 0.1], [0.3, 0.7]])

    def model(x):
        with data_plate(x):
            y = 0
            for t in pyro.markov(range(4)):
                y = pyro.sample(f"y{t}", dist.Categorical(transition[y]))
                pyro.sample(f"x{t}", dist.Normal(CENTERS[y], 0.7), obs=x[:, t])

    x = torch.randn(3, 4)
    alpha = transition[0].log().expand(3, 2)
    for t in range(4):
        if t:
            alpha = (alpha[:, :, None] + transition.log()).logsumexp(1)
        alpha = alpha + Normal(CENTERS, 0.7).log_prob(x[:, t, None])
    torch.testing.assert_close(evidence(model, empty_guide, x, num_samples=2).elbo, alpha.logsumexp(1))


def test_discrete_and_continuous_sites():
    x = torch.randn(6)
    exact = mixture_log_marginal(x, (0.64 + 0.36) ** 0.5)
    for guide in (gmvae_guide, config_enumerate(gmvae_guide), gmvae_guide_without_y):
        bounds = evidence(gmvae_model, guide, x, num_samples=20000)
        assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
    y = exact_kl(dist.Categorical(responsibilities(x, 1.2)), dist.Categorical(WEIGHTS.expand(6, 2)))
    torch.testing.assert_close(kl_divergence(gmvae_model, gmvae_guide, x, site="y").values, y, atol=1e-5, rtol=1e-5)
    each = exact_kl(Normal(0.6 * x[:, None] + 0.3 * CENTERS, 0.6), Normal(CENTERS, torch.tensor(0.8)))
    z = (responsibilities(x, 1.2) * each).sum(-1)
    assert_within(*compared(kl_divergence(gmvae_model, gmvae_guide, x, site="z", num_samples=2000), z))
    assert_within(*compared(kl_per_dimension(gmvae_model, gmvae_guide, x, site="z", num_samples=2000), z))
    assert_within(*compared(kl_divergence(gmvae_model, gmvae_guide, x, num_samples=4000), y + z))


def test_kl_where_a_discrete_site_is_summed_out_of_the_prior():
    x = torch.randn(6)
    q = Normal(0.7 * x, 0.8)
    grid = torch.linspace(-8, 8, 8001)[:, None]
    log_prior = (WEIGHTS.log() + Normal(CENTERS, 0.8).log_prob(grid[..., None])).logsumexp(-1)
    exact = torch.trapezoid(q.log_prob(grid).exp() * (q.log_prob(grid) - log_prior), grid, dim=0)
    for site in (None, "z"):
        kl = kl_divergence(gmvae_model, gmvae_guide_without_y, x, site=site, num_samples=5000)
        assert kl.estimator == "sampled"
        assert_within(*compared(kl, exact))
    assert_within(*compared(kl_per_dimension(gmvae_model, gmvae_guide_without_y, x, num_samples=5000), exact))
    units = active_units(gmvae_model, gmvae_guide_without_y, x)
    torch.testing.assert_close(units.variances, 0.49 * x.var())


def test_a_masked_datum_has_no_evidence_where_its_discrete_site_is_summed_out():
    lengths = torch.tensor([0, 1, 3])

    def model(x):
        with data_plate(x):
            for t in range(3):
                with poutine.mask(mask=t < lengths):
                    y = pyro.sample(f"y{t}", dist.Categorical(WEIGHTS))
                    pyro.sample(f"x{t}", dist.Normal(CENTERS[y], 0.7), obs=x[:, t])

    x = torch.randn(3, 3)
    exact = torch.stack([mixture_log_marginal(row[:length]).sum() for row, length in zip(x, lengths, strict=True)])
    torch.testing.assert_close(evidence(model, empty_guide, x, num_samples=2).elbo, exact)


def test_the_values_of_a_sum_count_in_the_bound_on_memory(monkeypatch):
    seen = []

    def model(x):
        with data_plate(x):
            y = pyro.sample("y", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(CENTERS[y], 0.8))
            seen.append((y + z).numel())
            pyro.sample("x", dist.Normal(CENTERS[y] + z, 0.6), obs=x)

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.batch._MOST_PAIRS", 60)
    evidence(model, gmvae_guide_without_y, torch.randn(10), num_samples=20)
    assert max(seen) == 60


def test_a_sum_over_too_many_values_is_refused():
    def model(x):
        with data_plate(x):
            for t in pyro.markov(range(40)):
                pyro.sample(f"y{t}", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="at most 100000 values"):
        evidence(model, empty_guide, torch.randn(3))


def test_nothing_to_diverge():
    with pytest.raises(UnavailableError, match="samples a latent site of the model, got none"):
        kl_divergence(mixture_model, empty_guide, torch.randn(3))
    with pytest.raises(ValueError, match=r"latent site of the guide, one of \[\], got 'y'"):
        kl_per_dimension(mixture_model, empty_guide, torch.randn(3), site="y")


def test_kl_where_a_shared_discrete_site_is_summed_out_of_the_prior():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(2 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))

    x = torch.randn(2)
    grid = torch.linspace(-6, 6, 241)
    pairs = torch.cartesian_prod(grid, grid)
    log_q = Normal(0.5 * x, 0.8).log_prob(pairs).sum(-1)
    of_each_k = [Normal(2.0 * k, 1.0).log_prob(pairs).sum(-1) + torch.tensor(p).log() for k, p in ((0, 0.6), (1, 0.4))]
    exact = (log_q.exp() * (log_q - torch.logaddexp(*of_each_k))).sum() * 0.05**2
    for site in (None, "z"):
        kl = kl_divergence(model, guide, x, site=site, num_samples=5000)
        assert_within(*compared(kl, exact[None]), rtol=1e-3)
    with pytest.raises(ValueError, match="batch_size=None"):
        kl_divergence(model, guide, x, batch_size=1)
