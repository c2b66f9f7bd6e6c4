"""Wrong arguments of encoders, likelihoods, networks and distributions end in an error that names the argument."""

import math

import pyro.distributions as dist
import pytest
import torch
from helpers.models import NUM_DATA, vae_with
from pyro import plate, poutine
from pyro.infer import Predictive
from pyro.nn import PyroSample

from pyro_ilvae import ConvEncoder, MLPEncoder, SequenceEncoder, likelihoods, mlp
from pyro_ilvae.distributions import (
    IsotropicNormal,
    NaturalContinuousBernoulli,
    NaturalNegativeBinomial,
    NaturalPoisson,
    TokenSequence,
    ZeroInflated,
)

NAN = math.nan
WRONG_INTS = [0, -1, 2.5, "a", NAN, True, [3], None]
LIKELIHOODS = [
    likelihoods.Normal(),
    likelihoods.Bernoulli(),
    likelihoods.ContinuousBernoulli(),
    likelihoods.Poisson(),
    likelihoods.NegativeBinomial(),
    likelihoods.NegativeBinomial(torch.ones(3)),
    likelihoods.ZeroInflatedPoisson(),
    likelihoods.ZeroInflatedNegativeBinomial(),
    likelihoods.ZeroInflatedNegativeBinomial(torch.ones(3), torch.full((3,), 0.5)),
    likelihoods.Categorical(3),
]


def refused(call, name):
    with pytest.raises((ValueError, TypeError), match=rf"Expected.*\b({name})\b"):
        call()


def calls(name, values, *functions):
    return [pytest.param(f, name, v, id=f"{name}-{v!r}") for v in values for f in functions]


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        *calls(
            "latent_dim",
            WRONG_INTS,
            lambda v: MLPEncoder(event_shape=8, latent_dim=v),
            lambda v: ConvEncoder(event_shape=(8, 8), latent_dim=v),
            lambda v: SequenceEncoder(vocab_size=5, latent_dim=v),
        ),
        *calls("event_shape", [0, 2.5, "a", (), (0,), ("a",), None], lambda v: MLPEncoder(event_shape=v, latent_dim=2)),
        *calls("num_components", WRONG_INTS[:-1], lambda v: MLPEncoder(event_shape=8, latent_dim=2, num_components=v)),
        *calls(
            "hidden_features",
            ["a", (0,), (2.5,), 5, None, ("a",), (True,)],
            lambda v: MLPEncoder(event_shape=8, latent_dim=2, hidden_features=v),
            lambda v: mlp(2, v, 2),
        ),
        *calls("in_features", WRONG_INTS, lambda v: mlp(v, (4,), 2)),
        *calls("out_features", WRONG_INTS, lambda v: mlp(2, (4,), v)),
        *calls(
            "channels", ["a", (), (0,), 5, None], lambda v: ConvEncoder(event_shape=(8, 8), latent_dim=2, channels=v)
        ),
        *calls(
            "input_transform",
            [3, "log1p", torch.nn.ReLU, ["log1p"]],
            lambda v: MLPEncoder(event_shape=8, latent_dim=2, input_transform=v),
            lambda v: ConvEncoder(event_shape=(8, 8), latent_dim=2, input_transform=v),
        ),
        *calls("vocab_size", WRONG_INTS, lambda v: SequenceEncoder(vocab_size=v, latent_dim=2)),
        *calls("num_layers", WRONG_INTS, lambda v: SequenceEncoder(vocab_size=5, latent_dim=2, num_layers=v)),
        *calls("scale", [0, -1, NAN, "a", None, math.inf, True, [], [1.0, 0.0], ["a"], {1.0}], likelihoods.Normal),
        *calls(
            "scale", [torch.zeros(3), torch.tensor([1.0, NAN]), torch.ones(3, dtype=torch.cfloat)], likelihoods.Normal
        ),
        *calls(
            "total_count",
            [0, -1, NAN, "a", None, 1e60, [], [1.0, 0.0], torch.tensor([1.0, NAN]), torch.ones(3, dtype=torch.cfloat)],
            likelihoods.NegativeBinomial,
            likelihoods.ZeroInflatedNegativeBinomial,
        ),
        *calls(
            "gate",
            [0, 1, -1, 2, NAN, "a", None, True, [], [0.5, 0.0], [0.5, 1.0], torch.tensor([0.5, NAN]), {0.5}],
            likelihoods.ZeroInflatedPoisson,
            lambda v: likelihoods.ZeroInflatedNegativeBinomial(1.0, v),
        ),
        *calls(
            "estimate",
            ["leraned", None, 1, True, ["fixed"], {}],
            lambda v: likelihoods.Normal(1.0, v),
            lambda v: likelihoods.NegativeBinomial(1.0, v),
            lambda v: likelihoods.ZeroInflatedPoisson(0.5, v),
            lambda v: likelihoods.ZeroInflatedNegativeBinomial(1.0, 0.5, v),
        ),
        *calls("num_categories", WRONG_INTS, likelihoods.Categorical),
        *calls("scale", ["a", torch.tensor(-1.0)], lambda v: IsotropicNormal(torch.zeros(3), v)),
        *calls("eta", ["a", None, torch.tensor(NAN)], NaturalPoisson, NaturalContinuousBernoulli),
        *calls("logits", ["a", None, torch.tensor(NAN)], lambda v: NaturalNegativeBinomial(torch.ones(()), v)),
        *calls("total_count", ["a", None, torch.tensor(-1.0)], lambda v: NaturalNegativeBinomial(v, torch.zeros(3))),
        *calls(
            "gate_logits", ["a", None, torch.tensor(NAN)], lambda v: ZeroInflated(NaturalPoisson(torch.zeros(3)), v)
        ),
        *calls(
            "counts",
            ["a", None, dist.Poisson(1.0), NaturalPoisson(torch.zeros(2)).to_event(1)],
            lambda v: ZeroInflated(v, torch.zeros(())),
        ),
        *calls("logits", ["a", None], lambda v: TokenSequence(v, torch.zeros(2, 3, dtype=torch.long))),
        *calls(
            "tokens",
            ["a", None, torch.zeros(2, 3), torch.full((2, 3), 4), torch.full((2, 3), -2)],
            lambda v: TokenSequence(torch.zeros(2, 3, 4), v),
        ),
    ],
)
def test_constructors(function, name, value):
    refused(lambda: function(value), name)


@pytest.mark.parametrize(
    "x", ["a", None, torch.zeros(3, 9), torch.rand(3, 8, 8, dtype=torch.double), torch.zeros(3, 8, 8) + 0j, [["a"]]],
    ids=lambda x: str(getattr(x, "dtype", x)),
)  # fmt: skip
@pytest.mark.parametrize("encoder", [MLPEncoder, ConvEncoder])
def test_input_of_encoders(encoder, x):
    refused(lambda: encoder(event_shape=(8, 8), latent_dim=2)(x), "x")


@pytest.mark.parametrize("encoder", [MLPEncoder, ConvEncoder])
def test_encoders_convert_without_loss(encoder):
    encoder, x = encoder(event_shape=(8, 8), latent_dim=2), torch.randint(100, (3, 8, 8))
    for other in (x, x.double(), x.numpy(), x.tolist(), x.double().numpy()):
        assert torch.equal(encoder(other)[0], encoder(x.float())[0])
    assert encoder(x.float()[:0])[0].shape == (0, 2)


@pytest.mark.parametrize("transform", [lambda x: None, lambda x: x.sum(), lambda x: x.numpy()])
@pytest.mark.parametrize("encoder", [MLPEncoder, ConvEncoder])
def test_input_transforms_are_elementwise(encoder, transform):
    encoder = encoder(event_shape=(8, 8), latent_dim=2, input_transform=transform)
    refused(lambda: encoder(torch.zeros(3, 8, 8)), "input_transform")


@pytest.mark.parametrize("eta", ["a", None, torch.zeros(3) + 0j, ["a"], torch.Tensor], ids=repr)
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: type(one).__name__)
def test_natural_parameters(likelihood, eta):
    zeros = torch.zeros(3)
    refused(lambda: likelihood(eta), "eta")
    refused(lambda: likelihood.mean(eta), "eta")
    refused(lambda: likelihood.smallest_information(eta), "eta")
    refused(lambda: likelihood.information_product(eta, zeros), "eta")
    refused(lambda: likelihood.information_product(zeros, eta), "tangent")
    refused(lambda: likelihood.divergence(eta, zeros), "eta")
    refused(lambda: likelihood.divergence(zeros, eta), "other")


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: type(one).__name__)
def test_shapes_of_natural_parameters(likelihood):
    eta = torch.randn(2, 3)
    refused(lambda: likelihood.information_product(eta, torch.zeros(2, 2)), "tangent")
    refused(lambda: likelihood.information_product(eta, torch.zeros(3)), "tangent")
    refused(lambda: likelihood.divergence(eta, torch.zeros(5, 3)), "other")
    for other in (eta.numpy(), eta.tolist()):
        assert torch.equal(likelihood.mean(other), likelihood.mean(eta))


PRIORS = {
    "scalar": dist.Normal(0.0, 1.0),
    "one entry": dist.Normal(0.0, 1.0).expand([1]).to_event(1),
    "function": lambda self: dist.Normal(0.0, 1.0),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
@pytest.mark.parametrize("num_draws", [NUM_DATA, 5])  # as many draws as data would broadcast along the data
@pytest.mark.parametrize(
    ("likelihood", "name"),
    [
        (lambda: likelihoods.Normal(2.0, "learned"), "log_scale"),
        (lambda: likelihoods.NegativeBinomial(2.0), "log_total_count"),
        (lambda: likelihoods.ZeroInflatedNegativeBinomial(2.0), "log_total_count"),
        (lambda: likelihoods.ZeroInflatedNegativeBinomial(2.0), "gate_logits"),
        (likelihoods.ZeroInflatedPoisson, "gate_logits"),
    ],
)
@torch.no_grad()
def test_draws_of_a_scalar_parameter_are_each_for_all_data(likelihood, name, num_draws, prior):
    vae = vae_with(likelihood=likelihood())
    setattr(vae.likelihood, name, PyroSample(prior))
    program = plate("draws", num_draws, dim=-2)(vae.model)
    together = poutine.trace(program).get_trace(num_data=NUM_DATA)
    together.compute_log_prob()
    site = f"likelihood.{name}"
    values = {key: together.nodes[key]["value"] for key in ("z", "x", site)}
    shape = poutine.trace(vae.model).get_trace(num_data=NUM_DATA).nodes[site]["value"].shape
    for i in range(num_draws):
        alone = {key: value[i] for key, value in values.items()}
        alone[site] = alone[site].reshape(shape)
        trace = poutine.trace(poutine.condition(vae.model, data=alone)).get_trace(num_data=NUM_DATA)
        trace.compute_log_prob()
        torch.testing.assert_close(together.nodes["x"]["log_prob"][i], trace.nodes["x"]["log_prob"])
    draws = Predictive(vae.model, num_samples=num_draws, parallel=True)(num_data=NUM_DATA)
    assert draws["x"].shape == (num_draws, NUM_DATA, *vae.event_shape)
    assert "a prior" in repr(vae.likelihood)


def test_draws_beside_data_of_an_unknown_shape_are_refused():
    likelihood = likelihoods.Normal(1.0, "learned")
    likelihood.log_scale = PyroSample(dist.Normal(0.0, 1.0))
    assert likelihood(torch.zeros(4, 3)).scale.unique().numel() == 1
    with plate("draws", 4, dim=-2), pytest.raises(ValueError, match=r"prior on log_scale .*\.expand\(\[1\]\)"):
        likelihood(torch.zeros(4, 4, 3))
