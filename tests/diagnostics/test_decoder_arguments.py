"""Diagnostics of decoders: what is no decoder, likelihood or sampler, and a derivative that got lost."""

import math

import numpy as np
import pytest
import torch

from pyro_ilvae import InverseLipschitzDecoder, MLPEncoder, likelihoods
from pyro_ilvae.diagnostics import lipschitz_audit, mean_fisher_divergence, separation

K, D, L = 2, 4, 1.5
MATRIX = torch.linalg.qr(torch.randn(D, K, generator=torch.Generator("cpu").manual_seed(0), device="cpu"))[0]
QUICK = {"num_samples": 20, "seed": 0}


def linear(z):
    return L * z @ MATRIX.to(z).T


def audit(decoder=linear, **options):
    return lipschitz_audit(decoder, num_worst=2, steps=2, **QUICK | {"latent_dim": K} | options).smallest


def fisher(decoder=linear, likelihood=None, **options):
    return mean_fisher_divergence(
        decoder, likelihood or likelihoods.Normal(), **QUICK | {"latent_dim": K} | options
    ).total


def spread(decoder=linear, likelihood=None, **options):
    return separation(decoder, likelihood or likelihoods.Normal(), **QUICK | {"latent_dim": K} | options).spread


FUNCTIONS = {"audit": audit, "fisher": fisher, "spread": spread}
OF_LIKELIHOODS = {"fisher": fisher, "spread": spread}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


class Detached(torch.nn.Module):
    def forward(self, z):
        with torch.no_grad():
            return linear(z).clone().detach()


NO_DECODERS = {
    "class": (
        InverseLipschitzDecoder,
        TypeError,
        "decoder to be .*, got the class InverseLipschitzDecoder: pass an object",
    ),
    "matrix": (MATRIX, TypeError, "decoder to be .*, got a Tensor"),
    "string": ("decoder", TypeError, "decoder to be .*, got a str"),
    "nothing": (None, TypeError, "decoder to be .*, got None"),
    "encoder": (
        MLPEncoder(event_shape=K, latent_dim=K),
        TypeError,
        "decoder to return a floating-point tensor, got a tuple",
    ),
    "likelihood": (likelihoods.Normal(), TypeError, "decoder to return a floating-point tensor, got a IsotropicNormal"),
    "array": (lambda z: linear(z).numpy(force=True), TypeError, "decoder to return .*, got a ndarray"),
    "integers": (lambda z: linear(z).long(), TypeError, "decoder to return .*, got torch.int64"),
    "other width": (
        torch.nn.Linear(K + 1, D),
        ValueError,
        r"decoder to take z, float32 of shape \(.*2\), got RuntimeError",
    ),
    "two arguments": (lambda z, c: linear(z), ValueError, "decoder to take z, .*, got TypeError"),
    "of other things": (lambda z: linear(z.logits), ValueError, "decoder to take z, .*, got AttributeError"),
    "no entries": (
        lambda z: linear(z)[:, :0],
        ValueError,
        r"decoder to return shape \(.*\*event_shape\), got \(.*, 0\)",
    ),
    "too few": (lambda z: linear(z)[1:], ValueError, "decoder to return shape"),
    "NaN": (lambda z: linear(z) * math.nan, ValueError, "decoder to return finite values"),
    "infinite": (lambda z: linear(z) / 0, ValueError, "decoder to return finite values"),
}


@pytest.mark.parametrize(("decoder", "error", "message"), NO_DECODERS.values(), ids=NO_DECODERS)
def test_what_is_no_decoder(function, decoder, error, message):
    with pytest.raises(error, match=f"Expected {message}"):
        function(decoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": None}, "latent_dim or a sampler for a decoder without the attribute latent_dim"),
        ({"latent_dim": 0}, "latent_dim to be an int >= 1"),
        ({"latent_dim": "a"}, "latent_dim to be an int >= 1"),
        ({"latent_dim": 2.0}, "latent_dim to be an int >= 1"),
        ({"num_samples": 0}, "num_samples to be an int >="),
        ({"num_samples": "a"}, "num_samples to be an int >="),
        ({"num_samples": 2.5}, "num_samples to be an int >="),
        ({"samples_per_pass": 0}, "samples_per_pass to be an int >= 1"),
        ({"samples_per_pass": "a"}, "samples_per_pass to be an int >= 1"),
        ({"scale": math.nan}, "scale to be a finite number > 0"),
        ({"scale": -1.0}, "scale to be a finite number > 0"),
        ({"scale": "a"}, "scale to be a finite number > 0"),
        ({"seed": "a"}, "seed to be an int or None"),
        ({"seed": 2.5}, "seed to be an int or None"),
        ({"sampler": lambda n: torch.randn(n, K), "scale": 2.0}, "a sampler or a scale, got both"),
        ({"sampler": lambda n: torch.randn(n, K), "scale": math.nan}, "a sampler or a scale, got both"),
        ({"sampler": lambda n: torch.randn(n, K + 1)}, "sampler to return shape"),
        ({"sampler": lambda n: torch.randn(n - 1, K)}, "sampler to return shape"),
        ({"sampler": lambda n: torch.full((n, K), math.nan)}, "draws of sampler to be finite"),
    ],
)
def test_options_that_are_refused(function, options, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        function(**options)


@pytest.mark.parametrize("sampler", [3, "normal", torch.nn.Linear, torch.randn(5, K)])
def test_what_is_no_sampler(function, sampler):
    with pytest.raises(TypeError, match="Expected sampler to be a function"):
        function(sampler=sampler)


@pytest.mark.parametrize("draws", [None, "draws", {"z": 1}, [[0.0, 1.0], [0.0]]])
def test_what_a_sampler_does_not_return(function, draws):
    with pytest.raises(TypeError, match="Expected draws of sampler to be a tensor"):
        function(sampler=lambda n: draws)


def test_a_latent_dimension_other_than_the_decoder_s(function):
    decoder = InverseLipschitzDecoder(latent_dim=K, event_shape=D, inverse_lipschitz=L, map_features=(4,))
    assert function(decoder) == function(decoder, latent_dim=None)
    with pytest.raises(ValueError, match="Expected latent_dim to be 2, as the decoder's own, got 3"):
        function(decoder, latent_dim=3)


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize(
    "convert", [lambda z: z.tolist(), lambda z: z.numpy(force=True), lambda z: z.double(), lambda z: z.float()]
)
def test_draws_of_a_sampler_are_converted(function, module, convert):
    decoder = torch.nn.Linear(K, D) if module else linear
    fixed = torch.randn(2000, K)
    expected = function(decoder, sampler=lambda n: fixed[:n])
    assert function(decoder, sampler=lambda n: convert(fixed[:n])) == pytest.approx(expected, rel=1e-4)
    whole = function(decoder, sampler=lambda n: torch.arange(n * K).reshape(n, K))
    assert whole == pytest.approx(
        function(decoder, sampler=lambda n: np.arange(n * K, dtype=float).reshape(n, K)), rel=1e-4
    )


DETACHED = {
    "detached": lambda z: linear(z).detach(),
    "module": Detached(),
    "array": lambda z: torch.as_tensor(linear(z).numpy(force=True)),
    "rounded": lambda z: (linear(z) * 1000).round() / 1000,
}


@pytest.mark.parametrize("name", ["audit", "fisher"])
@pytest.mark.parametrize("decoder", DETACHED.values(), ids=DETACHED)
def test_a_lost_derivative_is_not_a_collapsed_latent_variable(name, decoder):
    with pytest.raises(ValueError, match="Expected decoder to be differentiable, got"):
        FUNCTIONS[name](decoder)


FLAT = {
    "constant": lambda z: z[:, :1] * 0 + 1.0,
    "dead": lambda z: (z - 100).relu(),
    "relu": lambda z: z.relu(),
    "saturated": lambda z: (100 * z).clamp(-1, 1),
    "one coordinate": lambda z: z[:, :1],
    "large": lambda z: 1e6 + linear(z),
}


@pytest.mark.parametrize("decoder", FLAT.values(), ids=FLAT)
def test_flat_parts_are_no_lost_derivative(decoder):
    for seed in range(20):
        assert fisher(decoder, seed=seed) >= 0
    assert audit(decoder, seed=3) >= 0


def test_an_edge_beside_a_flat_part_is_no_lost_derivative():
    z = torch.tensor([[-1e-3], [1.0]])
    assert fisher(torch.relu, latent_dim=1, num_samples=2, sampler=lambda n: z) == pytest.approx(0.5)


@pytest.mark.parametrize("name", OF_LIKELIHOODS)
@pytest.mark.parametrize(
    ("likelihood", "error", "message"),
    [
        (likelihoods.Normal, TypeError, "likelihood to be a function .*, got the class Normal: pass an object"),
        (3.0, TypeError, "likelihood to be a function .*, got a float"),
        ("normal", TypeError, "likelihood to be a function .*, got a str"),
        (linear, ValueError, "likelihood to take the decoder's output, got RuntimeError"),
        (lambda eta: eta, TypeError, "likelihood to return a distribution, got a Tensor"),
        (lambda eta: None, TypeError, "likelihood to return a distribution, got a NoneType"),
        (
            lambda eta: torch.distributions.Normal(eta.missing, 1.0),
            ValueError,
            "likelihood to take .*, got AttributeError",
        ),
    ],
)
def test_what_is_no_likelihood(name, likelihood, error, message):
    with pytest.raises(error, match=f"Expected {message}"):
        OF_LIKELIHOODS[name](likelihood=likelihood)


@pytest.mark.parametrize("name", OF_LIKELIHOODS)
def test_the_class_of_a_distribution_is_a_likelihood(name):
    function = OF_LIKELIHOODS[name]
    found = function(lambda z: linear(z).exp(), torch.distributions.Poisson)
    assert found == function(lambda z: linear(z).exp(), lambda rate: torch.distributions.Poisson(rate))


@pytest.mark.parametrize(
    ("name", "value", "error"), [("audit", L, 1e-5), ("fisher", K * L**2, 1e-5), ("spread", K * L**2, 0.1)]
)
def test_right_values_still_come_out(name, value, error):
    assert FUNCTIONS[name]() == pytest.approx(value, rel=error)


def test_divergences_that_are_no_numbers():
    class Broken(likelihoods.Normal):
        def divergence(self, eta, other):
            return super().divergence(eta, other) * math.nan

    with pytest.raises(ValueError, match="Expected likelihood to have divergences, got NaN for 1000 pairs"):
        spread(likelihood=Broken())


@pytest.mark.parametrize("steps", [-1, 1.5, "a", None, False])
def test_steps_of_the_audit(steps):
    with pytest.raises(ValueError, match="Expected steps to be an int >= 0"):
        lipschitz_audit(linear, latent_dim=K, steps=steps)
