"""Models that mask latent sites, and guides that do not, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_within
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

import pyro_ilvae
from pyro_ilvae.diagnostics import (
    UnavailableError,
    active_units,
    collapse_summary,
    evidence,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    mutual_information,
    posterior_fisher_divergence,
)

X = torch.linspace(-1.5, 2.0, 8)
MASK = torch.tensor([True, True, False, True, False, True, False, True])
SCALE = 0.9
LOG_P = Normal(0.0, 2**0.5).log_prob(X) * MASK
KL = exact_kl(Normal(X / 2, torch.tensor(SCALE)), Normal(0.0, 1.0)) * MASK


def by_handler(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_distribution(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).mask(MASK))
        pyro.sample("x", dist.Normal(z, 1.0).mask(MASK), obs=x)


def by_both(x):
    first = torch.tensor([True, True, False, True, True, True, True, True])
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK | first):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).mask(MASK | ~first))
        pyro.sample("x", dist.Normal(z, 1.0).mask(MASK), obs=x)


def by_event(x):
    """A mask inside ``to_event``, which is the same for all entries of an event."""
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
        prior = dist.Normal(torch.zeros(len(x), 1), 1.0).mask(MASK[:, None]).to_event(1)
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def in_plate(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, SCALE))


def of_events(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None] / 2, SCALE).to_event(1))


def auto(kind, model, **options):
    pyro.clear_param_store()
    guide = kind(model, init_loc_fn=lambda site: X / 2 if site["name"] == "z" else torch.zeros(8), **options)
    guide(X)
    return guide


def pair(case):
    if case in ("mean field", "distribution in the guide"):
        return by_handler, auto(AutoNormal, by_handler, init_scale=SCALE) if case == "mean field" else masked_in_plate
    models = {"handler": by_handler, "distribution": by_distribution, "both": by_both, "event": by_event}
    return models[case], of_events if case == "event" else in_plate


def masked_in_plate(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, SCALE).mask(MASK))


CASES = ["handler", "distribution", "both", "event", "mean field", "distribution in the guide"]


@pytest.mark.parametrize("case", CASES)
def test_every_measure_leaves_out_what_the_model_masks(case):
    model, guide = pair(case)
    kept = MASK.float()
    bounds = evidence(model, guide, X, num_samples=4000, seed=0)
    assert_within(bounds.log_likelihood, LOG_P, bounds.log_likelihood_standard_errors)
    assert not bounds.elbo[~MASK].any()
    for measure in (kl_divergence, kl_per_dimension):
        values = measure(model, guide, X, seed=0).values.reshape(-1)
        torch.testing.assert_close(values, KL, atol=1e-5, rtol=1e-4)
    # The scores of N(m, s^2) and N(0, 1) differ by -(z - m) / s^2 + z.
    fisher = kept * (X.square() / 4 + (SCALE - 1 / SCALE) ** 2)
    values = guide_fisher_divergence(model, guide, X, seed=0).values.reshape(-1)
    torch.testing.assert_close(values, fisher, atol=1e-5, rtol=1e-4)
    # The posterior is N(x / 2, 1 / 2), and the score of the likelihood x - z.
    squares = posterior_fisher_divergence(model, guide, X, num_samples=4000, seed=0)
    assert_within(squares.values, kept * (X.square() / 4 + 0.5), squares.standard_errors, rtol=0.02)
    variance = active_units(model, guide, X, seed=0).variances.reshape(())
    torch.testing.assert_close(variance, (X[MASK] / 2).var())
    with pytest.raises(UnavailableError, match="mask"):
        mutual_information(model, guide, X)
    summary = collapse_summary(model, guide, X, num_samples=500, seed=0)
    assert float(summary.kl.item()) == pytest.approx(float(KL.mean()), abs=1e-4)
    assert float(summary.log_likelihood) == pytest.approx(float(LOG_P.mean()), abs=0.05)


@pytest.mark.parametrize("case", ["handler", "mean field"])
def test_the_joint_divergence_of_masked_sites(case):
    """Two sites in a chain, both masked."""

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + u, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, SCALE))
            pyro.sample("u", dist.LogNormal(0.5, SCALE))

    if case == "mean field":
        guide = AutoNormal(
            model,
            init_loc_fn=lambda site: X / 2 if site["name"] == "z" else torch.full((8,), math.exp(0.5)),
            init_scale=SCALE,
        )
        guide(X)
    own = exact_kl(Normal(0.5, SCALE), Normal(0.0, 1.0)) * MASK
    joint = kl_divergence(model, guide, X, num_samples=4000, seed=0)
    assert_within(joint.values, KL + own, joint.standard_errors)
    torch.testing.assert_close(kl_divergence(model, guide, X, site="u").values, own, atol=1e-5, rtol=1e-4)


def observed_in_part(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=MASK)


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_masks_of_observations(kind):
    guide = auto(kind, observed_in_part, init_scale=1.5)
    bounds = evidence(observed_in_part, guide, X, num_samples=20_000, seed=0)
    exact = LOG_P if kind is AutoNormal else LOG_P.sum().reshape(1)
    assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)


def test_masks_of_observations_in_a_conversion():
    guide = auto(AutoNormal, observed_in_part, init_scale=1.5)
    result = pyro_ilvae.from_pyro_svi(
        (observed_in_part, guide), X, num_samples=2, num_importance_samples=20_000, seed=0, posterior_predictive=False
    )
    (values,) = result.log_likelihood.data_vars.values()
    torch.testing.assert_close(torch.tensor(values.values[0, 0]).float(), LOG_P, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_joint_draws_of_guides_count_in_part(kind):
    guide = auto(kind, by_handler, init_scale=SCALE)
    bounds = evidence(by_handler, guide, X, num_samples=20_000, seed=0)
    assert_within(bounds.log_likelihood, LOG_P.sum().reshape(1), bounds.log_likelihood_standard_errors)
    torch.testing.assert_close(kl_per_dimension(by_handler, guide, X, site="z").values, KL, atol=1e-4, rtol=1e-4)


def test_joint_draws_without_a_density_in_part_are_refused():
    guide = AutoIAFNormal(by_handler)
    guide(X)
    with pytest.raises(ValueError, match=r"\['z'\] are masked"):
        evidence(by_handler, guide, X)


def unmasked(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("measure", [evidence, kl_divergence, kl_per_dimension, active_units, mutual_information])
@pytest.mark.parametrize("how", ["handler", "distribution"])
def test_masks_of_the_guide_alone_are_refused(measure, how):
    guide = poutine.mask(in_plate, mask=MASK) if how == "handler" else masked_in_plate
    with pytest.raises(ValueError, match="Expected the guide to mask site 'z' only where the model does"):
        measure(unmasked, guide, X)


def test_masks_within_events_are_those_of_both():
    entries = torch.tensor([True, False])

    def program(x, scale, mask, observe):
        with pyro.plate("data", len(x)):
            fn = dist.Normal(torch.zeros(len(x), 2), scale)
            z = pyro.sample("z", (fn.mask(entries) if mask else fn).to_event(1))
            if observe:
                pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def model(x):
        program(x, 1.0, True, True)

    with pytest.raises(ValueError, match="same mask of entries of site 'z'"):
        kl_divergence(model, lambda x: program(x, SCALE, False, False), X)
    values = kl_divergence(model, lambda x: program(x, SCALE, True, False), X, num_samples=4000, seed=0)
    exact = exact_kl(Normal(0.0, SCALE), Normal(0.0, 1.0)).expand(8)
    assert_within(values.values, exact, values.standard_errors)


def test_flat_priors():
    """A mask of a latent site on which data depend leaves it a flat prior, whose evidence is an integral."""

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=False):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    bounds = evidence(model, in_plate, X, num_samples=20_000, seed=0)
    exact = torch.full((8,), -math.log(2.0))  # the integral of N(x; 2 z, 1) over z
    assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
    for measure in (kl_divergence, kl_per_dimension, guide_fisher_divergence):
        with pytest.raises(UnavailableError, match="flat prior"):
            measure(model, in_plate, X)


@pytest.mark.parametrize("how", ["handler", "distribution"])
def test_masked_sites_that_are_summed_out(how):
    logits = torch.tensor([-1.0, 0.5, 1.0])
    means = torch.tensor([-1.0, 0.0, 3.0])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=MASK if how == "handler" else True):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Categorical(logits=logits.expand(len(x), 3))
            y = pyro.sample("y", fn if how == "handler" else fn.mask(MASK))
            fn = dist.Normal(means[y] + z, 1.0)
            pyro.sample("x", fn if how == "handler" else fn.mask(MASK), obs=x)

    bounds = evidence(model, in_plate, X, num_samples=20_000, seed=0)
    exact = (Normal(means, 2**0.5).log_prob(X[:, None]) + logits.log_softmax(-1)).logsumexp(-1)
    prior_only = bounds.log_likelihood[~MASK]
    assert_within(bounds.log_likelihood[MASK], exact[MASK], bounds.log_likelihood_standard_errors[MASK])
    torch.testing.assert_close(prior_only, torch.zeros(3), atol=0.05, rtol=0)
