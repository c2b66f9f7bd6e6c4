"""Guaranteed information in the summary of collapse: for models that decode a latent site, by their own prior."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from helpers.informations import information

from pyro_ilvae import (
    VAE,
    InverseLipschitzDecoder,
    MixtureVAE,
    MLPEncoder,
    ProjectedDecoder,
    diagnostics,
    likelihoods,
    mlp,
)
from pyro_ilvae.diagnostics import collapse_summary, guaranteed_information

N, K, D = 30, 2, 6
COLUMNS = ["guaranteed_nats", "guaranteed_nats_se", "guaranteed_floor"]


def decoder():
    return perturb(ProjectedDecoder(mlp(K, (8,), D), latent_dim=K, event_shape=D, inverse_lipschitz=0.5), 0.5)


def encoder(features=D):
    return MLPEncoder(event_shape=features, latent_dim=K, hidden_features=(8,))


def of_site(model, guide, x=None, **more):
    more = {"measures": ["guaranteed_information"], "num_samples": 300, "seed": 0} | more
    return collapse_summary(model, guide, torch.randn(N, D) if x is None else x, **more).sel(site="z")


def test_of_a_model_is_below_its_information_and_beside_the_measured_one():
    model = VAE(decoder(), encoder(), likelihoods.Normal(0.7, estimate="learned"))
    summary = of_site(model.model, model.guide, measures=["kl", "mutual_information", "guaranteed_information"])
    exact = information(model.decoder, 0.7, model.prior)
    assert summary.guaranteed_floor < summary.guaranteed_nats < exact.value + 4 * exact.error
    assert {"mutual_information", "kl_total"} <= set(summary.data_vars)
    model.likelihood.log_scale.data -= 1.0
    assert of_site(model.model, model.guide).guaranteed_floor > summary.guaranteed_floor


@pytest.mark.parametrize("form", ["guide", "model"])
def test_of_a_mixture_is_by_its_components(form):
    mixture = MixtureVAE(decoder(), encoder(), likelihoods.Normal(0.7), 3, data_size=N, enumerate_in=form)
    mixture.component_loc.data.mul_(3)
    mixture.component_log_scale.data.normal_()
    summary = of_site(mixture.model, mixture.guide)
    expected = guaranteed_information(mixture, num_samples=2000)
    assert float(summary.guaranteed_floor) == pytest.approx(expected.floor, rel=1e-6)
    error = math.hypot(float(summary.guaranteed_nats_se), expected.by_jacobian_se)
    assert abs(float(summary.guaranteed_nats) - expected.by_jacobian) < 4 * error
    scales = mixture.component_log_scale.detach().double().exp()
    by_hand = (1 + 0.25 / 0.49 * scales.prod(1)).log().mean()
    assert expected.floor == pytest.approx(float(by_hand), rel=1e-5)


class Written(torch.nn.Module):
    """A model in plain Pyro, without the attributes of ours."""

    def __init__(self, loc, scale):
        super().__init__()
        self.decode, self.loc, self.scale = decoder(), loc, scale

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc.expand(len(x), K), self.scale).to_event(1))
            pyro.sample("x", self.noise(self.decode(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))

    noise = likelihoods.Normal(0.7)


def test_of_a_model_in_plain_pyro_is_by_the_prior_of_its_site():
    written = Written(torch.tensor([0.0, 1.0]), 2.0)
    written.likelihood = written.noise
    summary = of_site(written.model, written.guide)
    assert float(summary.guaranteed_floor) == pytest.approx(math.log(1 + 0.25 * 4 / 0.49), rel=1e-5)
    assert summary.note.item() == ""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VAE(decoder(), encoder(), likelihoods.Bernoulli()), "Normal noise, got Bernoulli"),
        (
            lambda: VAE(decoder(), encoder(), likelihoods.Normal(1.0, estimate="learned")),
            "drawn from a prior",
        ),
    ],
    ids=["Bernoulli", "drawn noise"],
)
def test_is_absent_with_a_note(build, message):
    model = build()
    if message == "drawn from a prior":
        model.likelihood.log_scale = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

    def guide(x):
        if message == "drawn from a prior":
            pyro.sample("likelihood.log_scale", dist.Normal(0.0, 0.1))
        return model.guide(x)

    summary = of_site(model.model, guide, torch.rand(N, D).round())
    assert np.isnan([summary[name] for name in COLUMNS]).all()
    assert summary.note.item().startswith("guaranteed_information: ")


def test_is_absent_with_a_note_where_data_have_priors_of_their_own():
    written = Written(torch.randn(N, K), 1.0)
    written.likelihood = written.noise
    summary = of_site(written.model, written.guide)
    assert np.isnan(summary.guaranteed_nats)
    assert "the same for all data, or a model with a prior" in summary.note.item()


def test_is_absent_without_a_note_where_nothing_is_promised():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), D]).to_event(1), obs=x)

    summary = of_site(model, Written(torch.zeros(K), 1.0).guide)
    assert np.isnan(summary.guaranteed_nats)
    assert summary.note.item() == ""


@pytest.mark.slow
def test_a_fit_meets_what_is_guaranteed():
    z = torch.randn(400, K)
    x = z @ torch.randn(K, D) + 0.3 * torch.randn(400, D)
    composed = InverseLipschitzDecoder(latent_dim=K, event_shape=D, inverse_lipschitz=0.5, map_features=(16,))
    model = VAE(composed, encoder(), likelihoods.Normal(0.5, estimate="learned"), data_size=400)
    svi = pyro.infer.SVI(model.model, model.guide, pyro.optim.Adam({"lr": 5e-3}), pyro.infer.TraceMeanField_ELBO())
    for _ in range(400):
        svi.step(x)
    own = model.sample_prior(400, seed=0)
    summary = of_site(model.model, model.guide, own)
    exact = information(model.decoder, model.likelihood.scale.detach(), model.prior, nodes=241)
    assert summary.guaranteed_floor < summary.guaranteed_nats < exact.value + 4 * exact.error
    # I(x; z) = -h(noise) - E log p(x), and importance weights bound log p(x) from below.
    evidence = diagnostics.evidence(model.model, model.guide, own, num_samples=500, seed=0).log_likelihood.double()
    entropy = D / 2 * math.log(2 * math.pi * math.e * float(model.likelihood.scale.detach()) ** 2)
    assert float(summary.guaranteed_nats) < -entropy - float(evidence.mean() - 4 * evidence.std() / 400**0.5)
