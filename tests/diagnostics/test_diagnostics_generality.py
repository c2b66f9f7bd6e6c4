"""The diagnostics on models with plates in plates, several sites and shared ones, against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.known_models import (
    NOISE,
    assert_errors_are_right,
    assert_within,
    chain_guide,
    chain_joint_kl,
    chain_model,
    compared,
    data_plate,
    exact_chain_guide,
    exact_shared_guide,
    nested,
    nested_kl,
    nested_log_marginal,
    reversed_chain_guide,
    shared_guide,
    shared_log_marginal,
    shared_model,
)
from pyro import poutine
from torch.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import active_units, evidence, kl_divergence, kl_per_dimension

# Plates.


@pytest.mark.parametrize("data_dim", [-1, -2])
@pytest.mark.parametrize("full_size", [None, 1000])
def test_nested_plates(data_dim, full_size):
    x = torch.randn(5, 3, 2)
    model, guide = nested(data_dim, full_size)
    z, w = nested_kl(x)
    for batch_size in (None, 2):
        options = {"num_samples": 400, "batch_size": batch_size}
        assert_within(*compared(kl_per_dimension(model, guide, x, site="z", **options), z))
        assert_within(*compared(kl_per_dimension(model, guide, x, site="w", **options), w))
        assert_within(*compared(kl_divergence(model, guide, x, site="w", **options), w.sum((1, 2))))
        assert_within(*compared(kl_divergence(model, guide, x, **options), z + w.sum((1, 2))))
    means = 0.7 * x + 0.1 * x.mean((1, 2), keepdim=True)
    units = active_units(model, guide, x, site="w", num_samples=4000)
    assert units.variances.shape == (3, 2)
    torch.testing.assert_close(units.variances, means.var(0), atol=0.01, rtol=0.01)
    torch.testing.assert_close(active_units(model, guide, x, site="z").variances, x.mean((1, 2)).var(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_evidence_in_nested_plates(data_dim):
    x = torch.randn(7, 3, 2)
    model, _ = nested(data_dim)

    def exact_guide(x):
        precision = 1 + x[0].numel() / 1.25
        loc = x.sum((1, 2)) / 1.25 / precision
        with data_plate(x, data_dim):
            z = pyro.sample("z", dist.Normal(loc if data_dim == -1 else loc[:, None], precision**-0.5))
            with pyro.plate("inner", 3, dim=-3 - data_dim):
                placed = x.transpose(0, 1) if data_dim == -1 else x
                pyro.sample("w", dist.Normal((0.25 * z[..., None] + placed) / 1.25, 0.2**0.5).to_event(1))

    for batch_size in (None, 4):  # the last batch is as small as the inner plate
        bounds = evidence(model, exact_guide, x, num_samples=7, batch_size=batch_size)
        torch.testing.assert_close(bounds.log_likelihood, nested_log_marginal(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bounds.elbo, nested_log_marginal(x), atol=1e-4, rtol=1e-4)


def test_two_plates_of_one_size_need_a_name():
    x = torch.randn(3, 3, 2)
    model, guide = nested(-2)
    with pytest.raises(ValueError, match=r"one plate over the 3 data, got \['data', 'inner'\].*plate="):
        kl_divergence(model, guide, x)
    z, w = nested_kl(x)
    assert_within(*compared(kl_divergence(model, guide, x, site="z", plate="data"), z))
    assert_within(*compared(kl_per_dimension(model, guide, x, site="w", plate="data", num_samples=1000), w))
    assert evidence(model, guide, x, plate="data").elbo.shape == (3,)
    with pytest.raises(ValueError, match=r"plate to be one of \['data', 'inner'\], got 'other'"):
        evidence(model, guide, x, plate="other")
    with pytest.raises(ValueError, match="plate 'inner' to hold the data, got size 3 for 2 data"):
        evidence(model, guide, x[:2], plate="inner")


def test_a_model_that_subsamples_itself_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="2 of the 6 data"):
        evidence(model, guide, torch.randn(6))


def test_dimensions_outside_plates_are_refused():
    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(2, len(x)), 1.0))

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.sum(0), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"site 'z' .*in plates.*\(2, 4\)"):
        kl_divergence(model, guide, torch.randn(4))


def test_sequential_plates():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for m in pyro.plate("steps", 3):
                w = pyro.sample(f"w{m}", dist.Normal(z, 1.0))
                pyro.sample(f"x{m}", dist.Normal(w, 0.5), obs=x[:, m])

    def guide(x):
        precision = 1 + 3 / 1.25
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.sum(1) / 1.25 / precision, precision**-0.5))
            for m in pyro.plate("steps", 3):
                pyro.sample(f"w{m}", dist.Normal((0.25 * z + x[:, m]) / 1.25, 0.2**0.5))

    x = torch.randn(5, 3)
    exact = MultivariateNormal(torch.zeros(3), torch.ones(3, 3) + 1.25 * torch.eye(3)).log_prob(x)
    torch.testing.assert_close(evidence(model, guide, x, num_samples=4).elbo, exact)
    gap = (x[:, 1] - x.sum(1) / 1.25 / 3.4) / 1.25
    expected = 0.5 * (0.2 + gap**2 + 1 / 3.4 / 1.25**2 - 1 - torch.tensor(0.2).log())
    assert_within(*compared(kl_divergence(model, guide, x, site="w1", num_samples=3000), expected))


# Several sites.


@pytest.mark.parametrize("guide", [chain_guide, reversed_chain_guide])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_joint_kl_of_a_hierarchy(guide, batch_size):
    x = torch.randn(7)
    kl = kl_divergence(chain_model, guide, x, num_samples=3000, batch_size=batch_size)
    assert_within(*compared(kl, chain_joint_kl(guide, x)))
    parts = [kl_divergence(chain_model, guide, x, site=site, num_samples=3000) for site in ("z1", "z2")]
    errors = sum(part.standard_errors for part in parts)
    assert_within(parts[0].values + parts[1].values, chain_joint_kl(guide, x), errors)


def test_kl_of_one_site_of_a_hierarchy():
    x = torch.randn(7)
    gap = (0.5 - 0.4 * 0.3) * x
    expected = exact_kl(Normal(gap, 0.5), Normal(torch.zeros(7), 0.6)) + 0.5 * (0.4 * 0.9 / 0.6) ** 2
    for measure in (kl_divergence, kl_per_dimension):
        kl = measure(chain_model, chain_guide, x, site="z1", num_samples=2000)
        assert_within(*compared(kl, expected))
        top = measure(chain_model, chain_guide, x, site="z2", num_samples=3)
        assert top.estimator == "analytic"
        torch.testing.assert_close(top.values, exact_kl(Normal(0.3 * x, 0.9), Normal(0.0, 1.0)))
    units = active_units(chain_model, chain_guide, x, site="z1", num_samples=5000)
    assert abs(units.variances - 0.62**2 * x.var()) < 0.05


def test_kl_of_a_site_that_the_guide_draws_in_another_order():
    # Its prior depends on a site that the guide draws after it: no formula for the mean of the log ratio.
    x = torch.randn(7)
    kl = kl_divergence(chain_model, reversed_chain_guide, x, site="z1", num_samples=3000)
    assert kl.estimator == "sampled"
    joint = MultivariateNormal(torch.zeros(2), torch.tensor([[0.25, 0.1], [0.1, 0.4**2 * 0.25 + 0.49]]))
    # E log q(z1) - E log p(z1 | z2), with z1 - 0.8 z2 of this mean and variance.
    weights = torch.tensor([1.0, -0.8])
    mean = x * (0.5 - 0.8 * 0.4)
    variance = weights @ joint.covariance_matrix @ weights
    expected = -Normal(0.0, 0.5).entropy() + 0.5 * (mean**2 + variance) / 0.36 + torch.tensor(0.6).log() + 0.9189385
    assert_within(*compared(kl, expected))


@pytest.mark.parametrize("guide", [chain_guide, reversed_chain_guide])
def test_standard_errors_of_divergences(guide):
    x = torch.randn(6)

    def call(seed, site):
        kl = kl_divergence(chain_model, guide, x, site=site, num_samples=50, seed=seed)
        return kl.values, kl.standard_errors

    for site in (None, "z1"):
        assert_errors_are_right(lambda seed, site=site: call(seed, site))


def test_evidence_of_a_hierarchy():
    x = torch.randn(7)
    exact = Normal(0.0, 1.25**0.5).log_prob(x)
    torch.testing.assert_close(evidence(chain_model, exact_chain_guide, x, num_samples=3).log_likelihood, exact)
    for guide in (chain_guide, reversed_chain_guide):
        bounds = evidence(chain_model, guide, x, num_samples=20000)
        assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
        expected = -chain_joint_kl(guide, x) + _expected_log_likelihood(guide, x)
        assert_within(bounds.elbo, expected, bounds.elbo_standard_errors)


def _expected_log_likelihood(guide, x):
    loc, variance = ((0.5 + 0.12) * x, 0.25 + 0.16 * 0.81) if guide is chain_guide else (0.5 * x, torch.tensor(0.25))
    return Normal(loc, 0.5).log_prob(x) - 0.5 * variance / 0.25


# Sites that all data share.


def test_evidence_of_all_data_together():
    x = torch.randn(6)
    bounds = evidence(shared_model, exact_shared_guide, x, num_samples=5)
    assert bounds.elbo.shape == (1,)
    torch.testing.assert_close(bounds.log_likelihood, shared_log_marginal(x)[None])
    torch.testing.assert_close(bounds.elbo, shared_log_marginal(x)[None])
    rough = evidence(shared_model, shared_guide, x, num_samples=50000, samples_per_pass=5000)
    assert_within(rough.log_likelihood, shared_log_marginal(x)[None], rough.log_likelihood_standard_errors)


def test_kl_of_shared_and_local_sites():
    x = torch.randn(6)
    shared = exact_kl(Normal(0.4, 0.6), Normal(0.0, 1.0))[None]
    a = kl_divergence(shared_model, shared_guide, x, site="a")
    assert a.estimator == "analytic"
    assert_within(*compared(a, shared))
    torch.testing.assert_close(kl_per_dimension(shared_model, shared_guide, x, site="a").values, shared)
    local = exact_kl(Normal(0.5 * x + (0.3 - 1) * 0.4, 0.6), Normal(0.0, 1.0)) + 0.5 * 0.49 * 0.36
    assert_within(*compared(kl_divergence(shared_model, shared_guide, x, site="z", num_samples=2000), local))
    assert_within(*compared(kl_per_dimension(shared_model, shared_guide, x, site="z", batch_size=4), local))
    total = kl_divergence(shared_model, shared_guide, x, num_samples=5000)
    assert_within(*compared(total, shared + local.sum()))
    with pytest.raises(ValueError, match="batch_size=None"):
        kl_divergence(shared_model, shared_guide, x, batch_size=3)
    assert_errors_are_right(
        lambda seed: tuple(kl_divergence(shared_model, shared_guide, x, num_samples=40, seed=seed)[::2]), 120, 0.3
    )


# What else stands in a model.


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
