"""Masks, factors, scales and deterministic sites in what is diagnosed."""

import pyro
import pyro.distributions as dist
import torch
from helpers.estimates import assert_within
from helpers.factor_models import N, W, exact_guide, linear_model
from helpers.latent_structures import NOISE, chain_guide, chain_model, data_plate, reversed_chain_guide
from pyro import poutine
from torch.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import evidence, kl_divergence, kl_per_dimension


def test_evidence_respects_masks():
    x = torch.randn(N, 3)
    mask = torch.rand(N) > 0.5

    def masked(batch):
        with pyro.plate("data", len(batch)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=batch)

    def masked_guide(batch):
        with poutine.mask(mask=mask):
            exact_guide(batch)

    log_likelihood = evidence(masked, masked_guide, x, num_samples=3).log_likelihood
    assert not log_likelihood[~mask].any()
    torch.testing.assert_close(
        log_likelihood[mask], evidence(linear_model, exact_guide, x).log_likelihood[mask], atol=1e-4, rtol=1e-4
    )


def test_scales_do_not_enter():
    x = torch.randn(5)

    def scaled(function):
        def call(x):
            with poutine.scale(scale=0.1), data_plate(x, full_size=1000):
                function(x)

        return call

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    bounds = evidence(scaled(model), scaled(guide), x, num_samples=5)
    torch.testing.assert_close(bounds.elbo, Normal(0.0, 2**0.5).log_prob(x))
    kl = kl_divergence(scaled(model), scaled(guide), x)
    torch.testing.assert_close(kl.values, exact_kl(Normal(x / 2, 0.5**0.5), Normal(0.0, 1.0)))


def test_factors():
    def model(x):
        with data_plate(x, full_size=1000):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("pull", -0.5 * 3 * z**2)
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def exact_guide(x):
        precision = 4 + 1 / NOISE**2
        with data_plate(x, full_size=1000):
            pyro.sample("z", dist.Normal(x / NOISE**2 / precision, precision**-0.5))

    x = torch.randn(5)
    # N(0, 1) exp(-3 z^2 / 2) is half of N(0, 1/4).
    exact = Normal(0.0, (0.25 + NOISE**2) ** 0.5).log_prob(x) - torch.tensor(2.0).log()
    bounds = evidence(model, exact_guide, x, num_samples=3, batch_size=2)
    torch.testing.assert_close(bounds.elbo, exact)
    precision = 4 + 1 / NOISE**2
    q = Normal(x / NOISE**2 / precision, torch.tensor(precision**-0.5))
    torch.testing.assert_close(kl_divergence(model, exact_guide, x).values, exact_kl(q, Normal(0.0, 1.0)))


def test_deterministic_sites_change_nothing():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("double", 2 * z, event_dim=0)
            pyro.deterministic("joint", 2 * z)
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)
        pyro.deterministic("total", z.sum(-1))

    def guide(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x / (1 + NOISE**2), NOISE / (1 + NOISE**2) ** 0.5))
        pyro.deterministic("square", z**2)

    x = torch.randn(300)
    exact = Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x)
    torch.testing.assert_close(evidence(model, guide, x, num_samples=30, batch_size=200).elbo, exact)
    assert kl_divergence(model, guide, x).values.shape == (300,)


def test_missing_entries_by_mask():
    loadings = torch.tensor([1.0, -0.5, 2.0])
    x = torch.randn(6, 3)
    present = torch.rand(6, 3) > 0.4
    present[0] = False

    def model(x, present):
        with data_plate(x, -2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("entries", 3, dim=-1), poutine.mask(mask=present):
                pyro.sample("x", dist.Normal(z * loadings, NOISE), obs=x)

    def guide(x, present):
        precision = 1 + (present * loadings**2).sum(1, keepdim=True) / NOISE**2
        loc = (present * x * loadings).sum(1, keepdim=True) / NOISE**2 / precision
        with data_plate(x, -2):
            pyro.sample("z", dist.Normal(loc, precision**-0.5))

    exact = []
    for row, there in zip(x, present, strict=True):
        w = loadings[there]
        covariance = w[:, None] * w + NOISE**2 * torch.eye(len(w))
        exact.append(MultivariateNormal(torch.zeros(len(w)), covariance).log_prob(row[there]) if len(w) else row[0] * 0)
    x = x.masked_fill(~present, 1e6)
    for batch_size in (None, 4):
        bounds = evidence(model, guide, (x, present), num_samples=3, batch_size=batch_size)
        torch.testing.assert_close(bounds.elbo, torch.stack(exact), atol=1e-4, rtol=1e-4)


def test_masked_data_have_no_divergence():
    mask = torch.tensor([True, False, True, True])

    def masked(function):
        def call(x):
            with poutine.mask(mask=mask):
                function(x)

        return call

    x = torch.randn(4)
    for guide, site in ((chain_guide, None), (chain_guide, "z2"), (chain_guide, "z1"), (reversed_chain_guide, "z1")):
        kl = kl_divergence(masked(chain_model), masked(guide), x, site=site)
        full = kl_divergence(chain_model, guide, x, site=site)
        assert kl.values[1] == 0
        assert_within(kl.values[mask], full.values[mask], kl.standard_errors[mask] + full.standard_errors[mask])
    assert kl_per_dimension(masked(chain_model), masked(chain_guide), x, site="z2").values[1] == 0
