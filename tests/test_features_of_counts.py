"""Counts with a dispersion and a gate for each feature: single features, saving, priors, and what is refused."""

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

VECTOR = torch.tensor([0.2, 1.0, 3.0, 20.0])
MATRIX = torch.tensor([[0.2, 0.5, 4.0], [1.0, 3.0, 20.0]])
ESTIMATES = ["fixed", "learned"]


def gates(total_count):
    """As many numbers in (0, 1), in another order."""
    return (total_count / (total_count + 1)).flip(0)


KINDS = {
    "negative_binomial": lambda r, gate, *estimate: likelihoods.NegativeBinomial(r, *estimate),
    "zero_inflated_poisson": lambda r, gate, *estimate: likelihoods.ZeroInflatedPoisson(gate, *estimate),
    "zero_inflated_negative_binomial": likelihoods.ZeroInflatedNegativeBinomial,
}
EVERY_KIND = pytest.mark.parametrize("name", KINDS)
PARAMETERS = {
    "negative_binomial": ["log_total_count"],
    "zero_inflated_poisson": ["gate_logits"],
    "zero_inflated_negative_binomial": ["gate_logits", "log_total_count"],
}
EVERY_PARAMETER = pytest.mark.parametrize(
    ("name", "parameter"), [(name, parameter) for name, own in PARAMETERS.items() for parameter in own]
)
ARGUMENTS = {"log_total_count": "total_count", "gate_logits": "gate"}


@pytest.fixture(params=[VECTOR, MATRIX], ids=["vector", "matrix"])
def total_count(request):
    return request.param


def with_features(name, total_count, *estimate):
    return KINDS[name](total_count, gates(total_count), *estimate)


def model_of(likelihood, event_shape, **more):
    sizes = {"event_shape": event_shape, "latent_dim": 2, "hidden_features": (4,)}
    return VAE(MLPDecoder(**sizes), MLPEncoder(**sizes, input_transform=torch.log1p), likelihood, **more)


@EVERY_KIND
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
@torch.no_grad()
def test_each_feature_is_a_likelihood_of_its_own(name, total_count, estimate, dtype, batch):
    likelihood = with_features(name, total_count, estimate).to(dtype)
    eta, other = torch.randn(2, *batch, *total_count.shape, dtype=dtype)
    x = torch.poisson(3 * torch.rand_like(eta))
    found = {
        "log_prob": likelihood(eta).log_prob(x),
        "mean": likelihood.mean(eta),
        "variance": likelihood(eta).variance,
        "natural_parameters": likelihood.natural_parameters(eta.exp()),
        "divergence": likelihood.divergence(eta, other),
        "information": likelihood.smallest_information(eta),
        "product": likelihood.information_product(eta, other),
    }
    for value in found.values():
        assert value.shape == eta.shape
    for entry in np.ndindex(*total_count.shape):
        at = (..., *entry)
        one = KINDS[name](float(total_count[at]), float(gates(total_count)[at]), estimate).to(dtype)
        expected = {
            "log_prob": one(eta[at]).log_prob(x[at]),
            "mean": one.mean(eta[at]),
            "variance": one(eta[at]).variance,
            "natural_parameters": one.natural_parameters(eta[at].exp()),
            "divergence": one.divergence(eta[at], other[at]),
            "information": one.smallest_information(eta[at]),
            "product": one.information_product(eta[at], other[at]),
        }
        for key, value in expected.items():
            torch.testing.assert_close(found[key][at], value, rtol=1e-5, atol=1e-6)


@EVERY_KIND
@pytest.mark.parametrize("kind", ["array", "list", "double", "gradients"])
def test_takes_arrays_of_the_shape_of_a_datum(name, kind):
    numbers = {
        "array": np.array([0.1, 0.2, 0.3]),
        "list": [0.1, 0.2, 0.3],
        "double": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
        "gradients": torch.tensor([0.1, 0.2, 0.3], requires_grad=True).exp().log(),
    }[kind]
    likelihood = KINDS[name](numbers, numbers, "learned")
    for parameter in PARAMETERS[name]:
        value = getattr(likelihood, ARGUMENTS[parameter])
        torch.testing.assert_close(value.detach(), torch.tensor([0.1, 0.2, 0.3]))
        assert not getattr(KINDS[name](numbers, numbers, "fixed"), parameter).requires_grad
        assert getattr(KINDS[name](torch.tensor(0.5), torch.tensor(0.5)), parameter).shape == ()


@EVERY_PARAMETER
@pytest.mark.parametrize("method", ["forward", "mean", "smallest_information", "natural_parameters"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (2, 2), (2,), ()])
def test_refuses_natural_parameters_of_other_features(name, parameter, method, shape):
    values = {"log_total_count": 1.0, "gate_logits": 0.5} | {parameter: torch.full((2, 3), 0.5)}
    likelihood = KINDS[name](values["log_total_count"], values["gate_logits"])
    argument = ARGUMENTS[parameter]
    with pytest.raises(ValueError, match=rf"Expected {argument} of the shape of a datum, got \(2, 3\) for eta"):
        getattr(likelihood, method)(torch.ones(shape))


@EVERY_KIND
def test_a_model_of_other_features_names_the_argument(name):
    vae = model_of(with_features(name, VECTOR), 6)
    with pytest.raises(ValueError, match=r"Expected (total_count|gate) of the shape of a datum.* \(4,\)"):
        vae.model(torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"Expected (total_count|gate) of the shape of a datum.* \(4,\)"):
        vae.initialize(torch.zeros(3, 6))


@EVERY_KIND
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_is_saved_and_restored(name, total_count, estimate):
    likelihood = with_features(name, total_count, estimate)
    other = KINDS[name](torch.ones_like(total_count), torch.full_like(total_count, 0.5), estimate)
    assert sorted(likelihood.state_dict()) == PARAMETERS[name]
    other.load_state_dict(likelihood.state_dict())
    eta, x = torch.randn(3, *total_count.shape), torch.randint(5, (3, *total_count.shape)).float()
    for restored in (other, pickle.loads(pickle.dumps(likelihood))):
        with torch.no_grad():
            assert torch.equal(restored(eta).log_prob(x), likelihood(eta).log_prob(x))
        assert repr(restored) == repr(likelihood)
    names = sorted(name for name, _ in likelihood.named_parameters())
    assert names == (PARAMETERS[name] if estimate == "learned" else [])


PRIORS = {
    "of features": lambda like: dist.Normal(torch.linspace(-1, 1, like.numel()).reshape(like.shape), 0.5).to_event(
        like.dim()
    ),
    "of one number": lambda like: dist.Normal(0.0, 1.0),
    "of one entry": lambda like: dist.Normal(0.0, 1.0).expand([1]).to_event(1),
}


@EVERY_KIND
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("num_draws", [4, 5])  # as many draws as data would broadcast along the data
@torch.no_grad()
def test_draws_of_parameters_are_each_for_all_data(name, total_count, num_draws, prior):
    vae = model_of(with_features(name, total_count), tuple(total_count.shape))
    sites = [f"likelihood.{parameter}" for parameter in PARAMETERS[name]]
    for parameter in PARAMETERS[name]:
        setattr(vae.likelihood, parameter, PyroSample(PRIORS[prior](total_count)))
    together = poutine.trace(plate("draws", num_draws, dim=-2)(vae.model)).get_trace(num_data=4)
    together.compute_log_prob()
    values = {name: together.nodes[name]["value"] for name in ("z", "x", *sites)}
    single = poutine.trace(vae.model).get_trace(num_data=4).nodes
    for i in range(num_draws):
        alone = {name: value[i] for name, value in values.items()}
        alone |= {site: alone[site].reshape(single[site]["value"].shape) for site in sites}
        trace = poutine.trace(poutine.condition(vae.model, data=alone)).get_trace(num_data=4)
        trace.compute_log_prob()
        torch.testing.assert_close(together.nodes["x"]["log_prob"][i], trace.nodes["x"]["log_prob"])
        given = {key: alone[f"likelihood.{key}"] for key in PARAMETERS[name]}
        r, gate = given.get("log_total_count", total_count.log()).exp(), given.get("gate_logits", total_count).sigmoid()
        plain = KINDS[name](r.expand(total_count.shape), gate.expand(total_count.shape), "fixed")
        expected = plain(vae.decoder(alone["z"])).to_event(total_count.dim()).log_prob(alone["x"])
        torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected, rtol=1e-4, atol=1e-4)
    draws = Predictive(vae.model, num_samples=num_draws, parallel=True)(num_data=4)
    assert draws["x"].shape == (num_draws, 4, *total_count.shape)
    assert repr(vae.likelihood).count("a prior") == len(sites)


@EVERY_PARAMETER
def test_particles_side_by_side_are_those_one_after_the_other(name, parameter, total_count):
    vae = model_of(with_features(name, total_count), tuple(total_count.shape))
    setattr(vae.likelihood, parameter, PyroSample(PRIORS["of features"](total_count)))
    x = torch.poisson(2 * torch.rand(6, *total_count.shape))

    def guide(x):
        pyro.sample(f"likelihood.{parameter}", dist.Normal(total_count.log(), 1e-6).to_event(total_count.dim()))
        vae.guide(x)

    beside = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1).loss(vae.model, guide, x)
    alone = np.array([Trace_ELBO().loss(vae.model, guide, x) for _ in range(100)])
    assert abs(beside - alone.mean()) <= 5 * alone.std() * (1 / 500 + 1 / 100) ** 0.5


@EVERY_KIND
@pytest.mark.parametrize("method", ["forward", "mean", "smallest_information", "natural_parameters", "divergence"])
@torch.no_grad()
def test_each_method_reads_one_draw(name, method):
    likelihood = with_features(name, VECTOR)
    for parameter in PARAMETERS[name]:
        setattr(likelihood, parameter, PyroSample(PRIORS["of features"](VECTOR)))
    eta = torch.rand(3, 4)
    arguments = (eta, eta + 1) if method == "divergence" else (eta,)
    if method == "forward":
        trace = poutine.trace(lambda eta: likelihood(eta).log_prob(torch.ones(4))).get_trace(eta)
    else:
        trace = poutine.trace(getattr(likelihood, method)).get_trace(*arguments)
    values = {site: trace.nodes[site]["value"] for site in PARAMETERS[name]}
    plain = KINDS[name](
        values.get("log_total_count", VECTOR.log()).exp(), values.get("gate_logits", VECTOR).sigmoid(), "fixed"
    )
    expected = plain(eta).log_prob(torch.ones(4)) if method == "forward" else getattr(plain, method)(*arguments)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected, rtol=1e-4, atol=1e-5)


@EVERY_PARAMETER
def test_priors_of_other_shapes_are_refused(name, parameter):
    likelihood = with_features(name, VECTOR)
    setattr(likelihood, parameter, PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1)))
    with pytest.raises(ValueError, match=rf"prior on {parameter} with draws of the shape of a datum.*\(3,\)"):
        likelihood(torch.zeros(5, 4))
    setattr(likelihood, parameter, PyroSample(dist.Normal(torch.zeros(4), 1.0)))
    for data in (5, 4):  # as many data as entries would broadcast
        with pytest.raises(ValueError, match=rf"prior on {parameter} of one draw.*\(4,\).*\.to_event\(1\)"):
            likelihood(torch.zeros(data, 4))


@EVERY_KIND
@pytest.mark.parametrize("prior", ["of features", "of one number"])
def test_measures_are_of_one_draw_of_the_parameters(name, prior):
    """A divergence between densities with different draws would not be 0 where eta is the same."""
    likelihood = with_features(name, VECTOR)
    for parameter in PARAMETERS[name]:
        setattr(likelihood, parameter, PyroSample(PRIORS[prior](VECTOR)))
    eta = torch.randn(3, 4)
    torch.testing.assert_close(likelihood.divergence(eta, eta), torch.zeros(3, 4).double(), rtol=0, atol=1e-9)
    backbone = MLPDecoder(latent_dim=2, event_shape=4, hidden_features=(4,))
    decoder = ProjectedDecoder(backbone, latent_dim=2, event_shape=4, map_features=(4,))
    assert diagnostics.separation(decoder, likelihood, num_pairs=20, seed=0).estimator == "analytic"
    found = diagnostics.mean_fisher_divergence(decoder, likelihood, num_samples=20, seed=0)
    assert found.total >= 0.999 * found.floor


@pytest.mark.slow
@EVERY_KIND
def test_estimates_find_the_parameters_of_each_feature(name):
    """Of data whose eta the decoder's last bias can fit."""
    truth = KINDS[name](torch.tensor([0.3, 1.0, 1.0, 5.0]), torch.tensor([0.1, 0.3, 0.6, 0.2]), "fixed")
    eta = truth.natural_parameters(torch.tensor([4.0, 5.0, 6.0, 8.0]))
    x = truth(eta).sample((2000,))
    likelihood = KINDS[name](torch.ones(4), torch.full((4,), 0.5), "learned")
    vae = model_of(likelihood, 4, data_size=len(x))
    vae.initialize(x)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for step in range(500):
        svi.step(x[(step * 200) % 2000 :][:200])
    # Where two estimates trade off, and z takes a part of the variance, they are right within a factor of two.
    for parameter in PARAMETERS[name]:
        assert ((getattr(likelihood, parameter) - getattr(truth, parameter)).abs() < math.log(2)).all()
