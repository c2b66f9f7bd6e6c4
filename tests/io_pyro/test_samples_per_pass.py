"""Draws of a conversion are made together where that gives what each draw gives alone, and one by one elsewhere."""

import numpy as np
import pyro
import pytest
import torch
from helpers.arviz_groups import values
from helpers.plain_pyro_models import Regression, conjugate_guide, conjugate_model, hierarchical_model
from pyro import distributions as dist
from pyro.infer import HMC, MCMC, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.runtime import _PYRO_STACK

from pyro_ilvae import likelihoods
from pyro_ilvae.decoders import MLPDecoder
from pyro_ilvae.encoders import MLPEncoder
from pyro_ilvae.io_pyro import from_pyro_mcmc, from_pyro_svi
from pyro_ilvae.models import VAE

ONE_BY_ONE_OR_MORE = pytest.mark.parametrize("samples_per_pass", [1, 2, 5, None])


def watched(model, seen):
    """The model, which notes how many draws each run makes."""

    def watching(*args):
        plates = [handler for handler in _PYRO_STACK if getattr(handler, "name", None) == "_draws"]
        seen.append(plates[0].size if plates else 1)
        return model(*args)

    return watching


def vector_guide(x):
    pyro.sample("w", dist.Normal(torch.tensor([1.0, -2.0]), 1.0).to_event(1))


# Draws together where that is right


def test_draws_of_a_vae_are_made_together():
    vae = VAE(
        MLPDecoder(latent_dim=2, event_shape=3, hidden_features=(8,)),
        MLPEncoder(event_shape=3, latent_dim=2, hidden_features=(8,)),
        likelihoods.Normal(1.0),
    )
    seen = []
    fit = from_pyro_svi(
        (watched(vae.model, seen), vae.guide), torch.randn(10, 3), num_samples=200, log_likelihood="conditional"
    )
    assert seen.count(200) == 3  # for the posterior, its predictions and the prior
    assert sum(12 <= size <= 13 for size in seen) == 3 * 16  # each in parts, to compare with
    assert len(seen) < 80
    z, expected = torch.tensor(values(fit, "posterior")["z"]), values(fit, "log_likelihood")["x"]
    with torch.no_grad():
        log_prob = dist.Normal(vae.decoder(z), 1.0).log_prob(torch.tensor(values(fit, "observed_data")["x"])).sum(-1)
    np.testing.assert_allclose(expected, log_prob.numpy(force=True), rtol=1e-4)


@pytest.mark.parametrize("model", [conjugate_model, hierarchical_model])
def test_log_densities_together_and_alone_agree_at_the_same_draws(model):
    x = torch.randn(2, 3, 2) if model is hierarchical_model else torch.randn(5)
    mcmc = MCMC(HMC(model, step_size=0.1, num_steps=2, adapt_step_size=False), 12, 1, disable_progbar=True)
    mcmc.run(x)
    seen = []
    together = from_pyro_mcmc(mcmc, model=watched(model, seen), log_likelihood="conditional")
    assert max(seen) == 12
    alone = from_pyro_mcmc(mcmc, samples_per_pass=1, log_likelihood="conditional")
    for group in ["posterior", "log_likelihood"]:
        for name, array in values(alone, group).items():
            np.testing.assert_allclose(values(together, group)[name], array, rtol=1e-4, atol=1e-6)


def test_an_explicit_number_is_honored():
    seen = []
    from_pyro_svi((watched(conjugate_model, seen), conjugate_guide), torch.zeros(3), num_samples=11, samples_per_pass=4)
    # After a first comparison, in each of three passes: the posterior, its predictions and the prior, beside runs of
    # one draw to compare with.
    assert [size for size in seen if size > 1][-9:] == [4] * 3 + [4] * 3 + [3] * 3
    assert max(seen) == 4


@pytest.mark.parametrize("branch", [lambda z: (z > 2.3).any(), lambda z: z.numel() > 500], ids=["rare", "many"])
@pytest.mark.parametrize("samples_per_pass", [None, 1000])
def test_a_branch_that_two_draws_do_not_show_is_found_in_the_pass(branch, samples_per_pass):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 10.0 if branch(z) else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(scale * z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.randn(4)
    fit = from_pyro_svi((model, guide), x, num_samples=1000, samples_per_pass=samples_per_pass, prior=False, seed=0)
    z = torch.tensor(values(fit, "posterior")["z"]).flatten()
    scale = torch.tensor([10.0 if branch(one) else 1.0 for one in z])
    expected = dist.Normal((scale * z)[:, None], 1.0).log_prob(x).numpy(force=True)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"].reshape(1000, 4), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("pyro_ilvae.io_pyro._sampler.MOST_PAIRS", 20)
    seen = []
    from_pyro_svi((watched(conjugate_model, seen), conjugate_guide), torch.zeros(3), num_samples=11)
    assert max(seen) == 20 // 3

    @config_enumerate
    def mixture(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(kind.float(), 1.0), obs=x)

    seen.clear()
    from_pyro_svi((watched(mixture, seen), lambda x: None), torch.zeros(3), num_samples=11)
    assert max(seen) == 20 // 9
    seen.clear()
    from_pyro_svi((watched(conjugate_model, seen), conjugate_guide), torch.zeros(30), num_samples=3)
    assert max(seen[-3:]) == 1


# One by one where draws together would be wrong, also where no error says so


@ONE_BY_ONE_OR_MORE
def test_a_model_that_sums_over_draws(samples_per_pass):
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)

    x = torch.randn(3)
    fit = from_pyro_svi((model, vector_guide), x, num_samples=10, samples_per_pass=samples_per_pass)
    total = torch.tensor(values(fit, "posterior")["w"]).sum(-1, keepdim=True)
    np.testing.assert_allclose(
        values(fit, "log_likelihood")["x"], dist.Normal(total, 1.0).log_prob(x).numpy(force=True), rtol=1e-4
    )


@ONE_BY_ONE_OR_MORE
def test_a_guide_that_sums_over_draws(samples_per_pass):
    def model(x):
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("total", dist.Normal(0.0, 1.0))

    def guide(x):
        vector_guide(x)
        w = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("total", dist.Normal(w.sum(), 1e-4))

    fit = from_pyro_svi((model, guide), torch.zeros(3), num_samples=200, samples_per_pass=samples_per_pass)
    total = values(fit, "posterior")["total"]
    assert abs(total.mean()) < 5 * (2 / 200) ** 0.5
    assert abs(total.var() - 2) < 5 * 2 * (2 / 200) ** 0.5


@ONE_BY_ONE_OR_MORE
def test_a_deterministic_site_that_sums_over_draws(samples_per_pass):
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("total", w.sum())

    fit = from_pyro_svi((model, vector_guide), torch.zeros(3), num_samples=10, samples_per_pass=samples_per_pass)
    for group in ["posterior", "prior"]:
        draws = values(fit, group)
        np.testing.assert_allclose(draws["total"], draws["w"].sum(-1), rtol=1e-4, atol=1e-6)


@ONE_BY_ONE_OR_MORE
def test_predictions_that_sum_over_draws(samples_per_pass):
    def model(x):
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        first = pyro.sample("first", dist.Normal(0.0, 1.0), obs=x[0])
        pyro.sample("second", dist.Normal(first.sum(), 1e-4), obs=x[1])  # of one number, as long as it is observed

    fit = from_pyro_svi((model, vector_guide), torch.zeros(2), num_samples=10, samples_per_pass=samples_per_pass)
    for group in ["posterior_predictive", "prior_predictive"]:
        draws = values(fit, group)
        np.testing.assert_allclose(draws["second"], draws["first"], atol=1e-3)
    for left_out, group in [("prior", "posterior_predictive"), ("posterior_predictive", "prior_predictive")]:
        only = {left_out: False, "num_samples": 10, "samples_per_pass": samples_per_pass}
        draws = values(from_pyro_svi((model, vector_guide), torch.zeros(2), **only), group)
        np.testing.assert_allclose(draws["second"], draws["first"], atol=1e-3)


@ONE_BY_ONE_OR_MORE
def test_a_model_that_joins_its_batch_dimensions(samples_per_pass):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.deterministic("all", z.reshape(-1))

    arguments = {"num_samples": 4, "samples_per_pass": samples_per_pass}
    fit = from_pyro_svi((model, AutoNormal(model)), torch.zeros(3), **arguments)
    np.testing.assert_array_equal(values(fit, "posterior")["all"], values(fit, "posterior")["z"])


@ONE_BY_ONE_OR_MORE
def test_layers_with_random_weights(samples_per_pass):
    module = Regression()
    module.eval()
    x, y = torch.randn(5, 2), torch.randn(5)
    fit = from_pyro_svi((module, AutoNormal(module)), (x, y), num_samples=6, samples_per_pass=samples_per_pass)
    weight = torch.tensor(values(fit, "posterior")["linear.weight"])[0]
    with torch.no_grad():
        mean = (module.norm(x) @ weight.mT).squeeze(-1) + module.linear.bias
        expected = dist.Normal(mean, 1.0).log_prob(y).numpy(force=True)
    np.testing.assert_allclose(values(fit, "log_likelihood")["y"][0], expected, rtol=1e-4)


@ONE_BY_ONE_OR_MORE
def test_enumerated_sites_of_a_model_that_indexes_from_the_left(samples_per_pass):
    locs = torch.tensor([0.0, 10.0])

    @config_enumerate
    def model(x):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1e-3).to_event(1))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal((locs + shift)[kind], 1.0), obs=x)

    def guide(x):
        pyro.sample("shift", dist.Normal(torch.zeros(2), 1e-3).to_event(1))

    x = torch.tensor([0.0, 10.0, 9.0])
    fit = from_pyro_svi((model, guide), x, num_samples=10, samples_per_pass=samples_per_pass)
    np.testing.assert_array_equal(values(fit, "posterior")["kind"], np.broadcast_to([0, 1, 1], (1, 10, 3)))


@ONE_BY_ONE_OR_MORE
def test_a_model_that_is_wrong_for_several_draws_only_where_it_is_enumerated(samples_per_pass):
    @config_enumerate
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            own = shift.mean() if kind.dim() > 2 else shift
            pyro.sample("x", dist.Normal(own + 10.0 * kind, 0.1), obs=x)

    def guide(x):
        pyro.sample("shift", dist.Normal(0.0, 10.0))

    x = torch.zeros(3)
    fit = from_pyro_svi((model, guide), x, num_samples=20, samples_per_pass=samples_per_pass)
    shift, kind = (values(fit, "posterior")[name] for name in ["shift", "kind"])
    clear = abs(shift + 5) > 0.1  # where one of shift and shift + 10 is much closer to the data
    np.testing.assert_array_equal(kind[clear], np.broadcast_to((shift < -5)[..., None], kind.shape)[clear])


def test_memory_counts_the_entries_of_a_datum(monkeypatch):
    monkeypatch.setattr("pyro_ilvae.io_pyro._sampler._MOST_NUMBERS", 12 * 40 * 5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            # Logits are larger than the categories that are drawn from them.
            logits = z[..., None, None] * torch.linspace(-1.0, 1.0, 40 * x.shape[1]).reshape(x.shape[1], 40)
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for x, most in [(torch.zeros(12, 1), 5), (torch.zeros(12, 5), 1), (torch.zeros(3, 2), 10)]:
        seen = []
        from_pyro_svi((watched(model, seen), guide), x, num_samples=20)
        assert max(seen) == max(most, 1), (x.shape, seen)
