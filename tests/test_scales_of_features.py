"""Normal noise with a scale for each feature: densities, estimates, saving, priors, and what is guaranteed for it."""

import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroSample

from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, ProjectedDecoder, diagnostics, likelihoods

SCALE = torch.tensor([0.1, 0.5, 1.0, 3.0])
IMAGE = torch.tensor([[0.2, 0.5, 4.0], [1.0, 3.0, 0.1]])
DTYPES = [torch.float32, torch.float64]
ESTIMATES = ["fixed", "learned", "optimal"]


@pytest.fixture(params=[SCALE, IMAGE], ids=["vector", "matrix"])
def scale(request):
    return request.param


def random_decoder(event_shape, inverse_lipschitz=0.7, dtype=torch.float32):
    backbone = MLPDecoder(latent_dim=2, event_shape=event_shape, hidden_features=(4,))
    decoder = ProjectedDecoder(
        backbone, latent_dim=2, event_shape=event_shape, map_features=(4,), inverse_lipschitz=inverse_lipschitz
    )
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return decoder.to(dtype)


def model_of(likelihood, event_shape, **more):
    encoder = MLPEncoder(event_shape=event_shape, latent_dim=2, hidden_features=(4,))
    return VAE(random_decoder(event_shape), encoder, likelihood, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_is_the_normal_of_pytorch(scale, estimate, batch, dtype):
    likelihood = likelihoods.Normal(scale, estimate).eval().to(dtype)
    eta, x = torch.randn(2, *batch, *scale.shape, dtype=dtype)
    ours, theirs = likelihood(eta, x), dist.Normal(eta, scale.to(dtype))
    assert ours.batch_shape == eta.shape
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-5, atol=1e-5)
    assert ours.log_prob(x).dtype == ours.sample().dtype == dtype
    torch.testing.assert_close(ours.scale, scale.to(dtype).expand(eta.shape))
    torch.testing.assert_close(likelihood.mean(eta), eta)
    torch.testing.assert_close(likelihood.natural_parameters(eta), eta)
    torch.testing.assert_close(likelihood.noise_scale, scale.to(dtype))
    torch.testing.assert_close(likelihood.scale, scale.to(dtype))
    whole = ours.expand((3, *eta.shape)).to_event(scale.dim())
    expected = theirs.expand((3, *eta.shape)).to_event(scale.dim())
    torch.testing.assert_close(whole.log_prob(x), expected.log_prob(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_and_information_are_those_of_autograd_and_pytorch(scale, dtype):
    likelihood = likelihoods.Normal(scale, "learned").to(dtype)
    eta, other = torch.randn(2, 3, *scale.shape, dtype=dtype)
    divergence = likelihood.divergence(eta, other)
    assert (divergence.dtype, divergence.shape) == (torch.float64, eta.shape)
    expected = 0.5 * ((eta.double() - other.double()) / scale.double()).square()
    torch.testing.assert_close(divergence.detach(), expected, rtol=1e-5, atol=1e-9)
    x = torch.randn_like(eta)

    def log_density(at):
        return likelihood(at).log_prob(x[0]).sum()

    curvature = -torch.autograd.functional.hessian(log_density, eta[0]).reshape(scale.numel(), -1)
    smallest = likelihood.smallest_information(eta)
    assert (smallest.shape, smallest.dtype) == (eta.shape, dtype)
    torch.testing.assert_close(smallest[0].flatten().diag().detach(), curvature)
    tangent = torch.randn(6, *eta.shape, dtype=dtype)
    torch.testing.assert_close(likelihood.information_product(eta, tangent), tangent * smallest)


@pytest.mark.parametrize("kind", ["array", "list", "integers", "double", "gradients"])
def test_takes_arrays_of_the_shape_of_a_datum(kind):
    given = {
        "array": np.array([1.0, 2.0, 3.0]),
        "list": [1.0, 2.0, 3.0],
        "integers": torch.tensor([1, 2, 3]),
        "double": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        "gradients": torch.tensor([1.0, 2.0, 3.0], requires_grad=True).exp().log(),
    }[kind]
    likelihood = likelihoods.Normal(given, "learned")
    torch.testing.assert_close(likelihood.scale.detach(), torch.tensor([1.0, 2.0, 3.0]))
    assert not likelihoods.Normal(given).log_scale.requires_grad
    assert likelihoods.Normal(torch.tensor(2.0)).log_scale.shape == ()


@pytest.mark.parametrize("method", ["forward", "mean", "smallest_information"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (2, 2), (2,), ()])
def test_refuses_natural_parameters_of_other_features(method, shape):
    likelihood = likelihoods.Normal(IMAGE)
    with pytest.raises(ValueError, match=r"Expected scale of the shape of a datum, got \(2, 3\) for eta"):
        getattr(likelihood, method)(torch.zeros(shape))


def test_a_model_of_other_features_names_the_scale():
    vae = model_of(likelihoods.Normal(SCALE), 6)
    with pytest.raises(ValueError, match=r"Expected scale .* \(4,\)"):
        vae.model(torch.zeros(3, 6))


@pytest.mark.parametrize("batch", [(7,), (2, 7)])
def test_the_optimal_scales_maximize_the_likelihood_of_the_batch(scale, batch):
    likelihood = likelihoods.Normal(scale, "optimal").double()
    eta = torch.randn(*batch, *scale.shape, dtype=torch.float64)
    x = scale * torch.randn(7, *scale.shape, dtype=torch.float64)
    likelihood.log_scale.fill_(1.0)
    used = likelihood(eta, x).scale
    best = used.reshape(-1, *scale.shape)[0].clone().requires_grad_()
    assert torch.equal(used, best.detach().expand_as(used))
    dist.Normal(eta, best).log_prob(x).sum().backward()
    torch.testing.assert_close(best.grad, torch.zeros_like(best), rtol=0, atol=1e-9)
    torch.testing.assert_close(likelihood.scale, best.detach())  # the first step starts the average
    before = likelihood.log_scale.clone()
    second = likelihood(eta, 2 * x).scale.reshape(-1, *scale.shape)[0]
    torch.testing.assert_close(likelihood.log_scale, before + 0.05 * (second.log() - before))
    with torch.no_grad():
        torch.testing.assert_close(likelihood(eta, x).scale, likelihood.scale.expand_as(eta))
    with pyro.validation_enabled(False):
        after = likelihood.log_scale.clone()
        likelihood(eta, torch.where(torch.arange(x.numel()).reshape(x.shape) == 0, math.nan, x))
    assert torch.equal(likelihood.log_scale, after)


@pytest.mark.slow
@pytest.mark.parametrize("estimate", ["learned", "optimal"])
def test_scales_find_the_noise_of_each_feature(estimate):
    x = 2 + SCALE * torch.randn(400, 4)
    decoder = MLPDecoder(latent_dim=1, event_shape=4, hidden_features=(4,))
    encoder = MLPEncoder(event_shape=4, latent_dim=1, hidden_features=(4,))
    vae = VAE(decoder, encoder, likelihoods.Normal(torch.ones(4), estimate), data_size=len(x))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for step in range(800):
        svi.step(x[(step * 50) % 400 :][:50])
    found = vae.likelihood.scale.detach()
    assert ((found[1:] / SCALE[1:]).log().abs() < 0.3).all()
    assert found[0] < found[1:].min()


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_is_saved_and_restored(scale, estimate):
    likelihood = likelihoods.Normal(scale, estimate)
    likelihood(torch.randn(5, *scale.shape), torch.randn(5, *scale.shape))
    other = likelihoods.Normal(torch.ones_like(scale), estimate)
    other.load_state_dict(likelihood.state_dict())
    eta = torch.randn(3, *scale.shape)
    for restored in (other, pickle.loads(pickle.dumps(likelihood))):
        with torch.no_grad():
            assert torch.equal(restored(eta).scale, likelihood(eta).scale)
        assert torch.equal(restored.num_updates, likelihood.num_updates)
    names = [name for name, _ in likelihood.named_parameters()]
    assert names == (["log_scale"] if estimate == "learned" else [])


PRIORS = {
    "of features": lambda scale: dist.Normal(scale.log(), 0.5).to_event(scale.dim()),
    "of one number": lambda scale: dist.Normal(0.0, 1.0),
    "of one entry": lambda scale: dist.Normal(0.0, 1.0).expand([1]).to_event(1),
}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("num_draws", [4, 5])  # as many draws as data would broadcast along the data
@torch.no_grad()
def test_draws_of_scales_are_each_for_all_data(scale, num_draws, prior):
    vae = model_of(likelihoods.Normal(scale, "learned"), tuple(scale.shape))
    vae.likelihood.log_scale = PyroSample(PRIORS[prior](scale))
    together = poutine.trace(plate("draws", num_draws, dim=-2)(vae.model)).get_trace(num_data=4)
    together.compute_log_prob()
    values = {name: together.nodes[name]["value"] for name in ("z", "x", "likelihood.log_scale")}
    shape = poutine.trace(vae.model).get_trace(num_data=4).nodes["likelihood.log_scale"]["value"].shape
    assert shape == (scale.shape if prior == "of features" else shape)
    for i in range(num_draws):
        alone = {name: value[i] for name, value in values.items()}
        alone["likelihood.log_scale"] = alone["likelihood.log_scale"].reshape(shape)
        trace = poutine.trace(poutine.condition(vae.model, data=alone)).get_trace(num_data=4)
        trace.compute_log_prob()
        torch.testing.assert_close(together.nodes["x"]["log_prob"][i], trace.nodes["x"]["log_prob"])
        expected = dist.Normal(vae.decoder(alone["z"]), alone["likelihood.log_scale"].exp()).to_event(scale.dim())
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected.log_prob(alone["x"]))
    draws = Predictive(vae.model, num_samples=num_draws, parallel=True)(num_data=4)
    assert draws["x"].shape == (num_draws, 4, *scale.shape)
    assert "a prior" in repr(vae.likelihood)


@pytest.mark.parametrize("prior", ["none", "of features"])
def test_particles_side_by_side_are_those_one_after_the_other(scale, prior):
    vae = model_of(likelihoods.Normal(scale, "learned"), tuple(scale.shape))
    if prior == "of features":
        vae.likelihood.log_scale = PyroSample(PRIORS[prior](scale))
    x = torch.randn(6, *scale.shape)

    def guide(x):
        if prior == "of features":
            pyro.sample("likelihood.log_scale", dist.Normal(scale.log(), 1e-6).to_event(scale.dim()))
        vae.guide(x)

    beside = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1).loss(vae.model, guide, x)
    alone = np.array([Trace_ELBO().loss(vae.model, guide, x) for _ in range(200)])
    assert abs(beside - alone.mean()) <= 5 * alone.std() * (1 / 1000 + 1 / 200) ** 0.5


def test_priors_of_other_shapes_are_refused():
    likelihood = likelihoods.Normal(SCALE, "learned")
    likelihood.log_scale = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pytest.raises(
        ValueError, match=r"prior on log_scale with draws of the shape of a datum.* got draws of .*\(3,\)"
    ):
        likelihood(torch.zeros(5, 4))
    likelihood.log_scale = PyroSample(dist.Normal(torch.zeros(4), 1.0))
    for data in (5, 4):  # as many data as entries would broadcast
        with pytest.raises(ValueError, match=r"prior on log_scale of one draw.*\(4,\).*\.to_event\(1\)"):
            likelihood(torch.zeros(data, 4))


@pytest.mark.parametrize("num_pairs", [4, 50])  # as many pairs as features would broadcast
@pytest.mark.parametrize("learned", [False, True])
def test_separation_guarantees_the_largest_scale(scale, num_pairs, learned):
    decoder = random_decoder(tuple(scale.shape))
    likelihood = likelihoods.Normal(scale, "learned" if learned else "fixed")
    found = diagnostics.separation(decoder, likelihood, num_pairs=num_pairs, seed=0)
    expected = 0.5 * (0.7 * found.distances / scale.max()).square()
    torch.testing.assert_close(found.guaranteed, expected, rtol=1e-5, atol=1e-9)
    assert found.smallest_ratio >= 0.999
    one = diagnostics.separation(decoder, likelihoods.Normal(scale.max()), num_pairs=num_pairs, seed=0)
    assert (found.kl >= one.kl).all()
    torch.testing.assert_close(found.guaranteed, one.guaranteed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_divergence_and_its_floor_are_those_of_whitened_features(scale, dtype):
    decoder = random_decoder(tuple(scale.shape), dtype=dtype)
    found = diagnostics.mean_fisher_divergence(decoder, likelihoods.Normal(scale).to(dtype), num_samples=50, seed=0)

    class Whitened(torch.nn.Module):
        latent_dim = 2

        def forward(self, z):
            return decoder(z) / scale.to(dtype)

    whitened = Whitened()
    whitened.register_buffer("dtype_of_draws", torch.zeros((), dtype=dtype))
    expected = diagnostics.mean_fisher_divergence(whitened, likelihoods.Normal(1.0).to(dtype), num_samples=50, seed=0)
    torch.testing.assert_close(found.per_dimension, expected.per_dimension, rtol=1e-4, atol=1e-6)
    assert found.floor == pytest.approx(2 * 0.7**2 / float(scale.max()) ** 2, rel=1e-5)
    assert found.total >= found.floor


@pytest.mark.parametrize("prior", ["of features", "of one number"])
def test_measures_and_guarantees_are_of_the_same_draw_of_the_scales(prior):
    """A guarantee for one draw from the prior says nothing about another draw."""
    for seed in range(10):
        decoder = random_decoder(4)
        likelihood = likelihoods.Normal(SCALE, "learned")
        likelihood.log_scale = PyroSample(PRIORS[prior](SCALE))
        assert diagnostics.separation(decoder, likelihood, num_pairs=20, seed=seed).smallest_ratio >= 0.999
        found = diagnostics.mean_fisher_divergence(decoder, likelihood, num_samples=20, seed=seed)
        assert found.total >= 0.999 * found.floor


def test_a_linear_reference_wants_one_number_and_says_so():
    with pytest.raises(ValueError, match="noise_scale to be a finite number"):
        diagnostics.linear_reference(torch.randn(10, 4), likelihoods.Normal(SCALE).scale)


@pytest.mark.parametrize("value", [1e-60, 1e60])
def test_refuses_a_scale_that_rounds_to_zero_or_infinity(value):
    for scale in (value, torch.tensor([1.0, value], dtype=torch.float64)):
        with pytest.raises(ValueError, match="Expected scale within the range of torch"):
            likelihoods.Normal(scale)
