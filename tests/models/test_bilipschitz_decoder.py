"""A bi-Lipschitz map as the decoder of a model with K = D, through Pyro's objectives, handlers and recorded steps."""

import copy
import pickle

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO

from pyro_ilvae import (
    VAE,
    AnnealedELBO,
    BiLipschitzMap,
    GraphSVI,
    InverseLipschitzScheduler,
    JointOptim,
    MixtureVAE,
    MLPEncoder,
    likelihoods,
    schedules,
)
from pyro_ilvae.diagnostics import collapse_summary, guaranteed_information, mutual_information

K = 3
X = 4 + torch.randn(60, K, generator=torch.Generator(torch.get_default_device()).manual_seed(0)) * torch.tensor(
    [2.0, 1.0, 0.7]
)


def vae(kind=VAE, *more, **options):
    decoder = BiLipschitzMap(K, 0.5, 4.0, hidden_features=8)
    encoder = MLPEncoder(event_shape=K, latent_dim=K, hidden_features=(16,))
    return kind(decoder, encoder, likelihoods.Normal(0.5, "learned"), *more, **options)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO,
        TraceMeanField_ELBO,
        lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
        lambda: AnnealedELBO(TraceMeanField_ELBO(), beta=0.5),
    ],
)
def test_is_trained_and_keeps_its_constants(objective, local):
    with pyro.settings.context(module_local_params=local):
        model = vae()
        model.initialize(X, seed=0)
        before = [parameter.clone() for parameter in model.parameters()]
        loss_fn = objective()(model.model, model.guide)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = loss_fn(X)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-10:]) < sum(losses[:10])
        assert not any(map(torch.equal, before, model.parameters()))
        values = torch.linalg.svdvals(model.decoder.jacobian(torch.randn(50, K)))
        assert (values >= 0.5 * (1 - 1e-4)).all()
        assert (values <= 4 * (1 + 1e-4)).all()


def test_what_is_found_is_between_what_is_guaranteed():
    model = vae()
    model.initialize(X)
    assert (model.decoder(torch.randn(2000, K)).mean(0) - X.mean(0)).abs().max() < 0.5
    svi = SVI(model.model, model.guide, JointOptim(torch.optim.Adam, {"lr": 1e-2}), TraceMeanField_ELBO())
    for _ in range(200):
        svi.step(X)
    guaranteed = guaranteed_information(model, seed=0)
    drawn = model.sample_prior(300, mean=False, seed=0)
    found = mutual_information(model.model, model.guide, drawn, seed=0)
    assert 0 < guaranteed.floor < guaranteed.by_jacobian < guaranteed.ceiling
    assert found.mutual_information < guaranteed.ceiling
    assert "guaranteed_nats" in collapse_summary(model.model, model.guide, X)


def test_draws_copies_and_parallel_predictions():
    model = vae()
    expected = model.sample_prior(5, seed=0)
    assert expected.shape == (5, K)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.sample_prior(5, seed=0), expected)
    drawn = Predictive(model.model, guide=model.guide, num_samples=7, parallel=True)(X)
    assert drawn["z"].shape[-2:] == (60, K)
    assert drawn["z"].shape[0] == 7


def test_components_of_a_mixture_start_where_the_data_are():
    model = vae(MixtureVAE, 3, enumerate_in="model")
    model.initialize(X, seed=0)
    assert (model.sample_prior(2000, seed=0).mean(0) - X.mean(0)).abs().max() < 1.5


def test_a_recorded_step_follows_both_constants():
    model = vae()
    optim = JointOptim(torch.optim.SGD, {"lr": 1e-4})
    svi = GraphSVI(model.model, model.guide, optim, TraceMeanField_ELBO(), compile=False)
    for low, high in ((0.5, 4.0), (0.5, 4.0), (0.1, 20.0), (3.0, 20.0), (0.0, 1.0), (1.0, 1.0)):
        model.decoder.inverse_lipschitz = 0.0
        model.decoder.lipschitz, model.decoder.inverse_lipschitz = high, low
        state = torch.get_rng_state()
        expected = TraceMeanField_ELBO().differentiable_loss(model.model, model.guide, X).item()
        torch.set_rng_state(state)
        assert float(svi.step(X)) == pytest.approx(expected, rel=1e-4)
    assert svi.runs == "graph"
    assert len(svi._cache.graphs) == 1


def test_schedulers_set_both_constants_in_their_order():
    decoder = BiLipschitzMap(2, 0.5, 4.0)
    scheduler = InverseLipschitzScheduler(decoder, schedules.linear(4.0, 1.0, num_steps=3))
    seen = [decoder.inverse_lipschitz]
    for _ in range(3):
        scheduler.step()
        seen.append(decoder.inverse_lipschitz)
    assert seen == [4.0, 3.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="schedule to give inverse_lipschitz from 0 to 4, got 5"):
        InverseLipschitzScheduler(decoder, schedules.constant(5.0))
