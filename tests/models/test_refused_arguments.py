"""Wrong arguments of the models and of their methods end in an error that names the argument."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import sequence_decoders
from helpers.decoders import EVENT, LATENT
from helpers.models import TOKENS, X, mixture_with, sequence_encoder, sequential_with, vae_with
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import Adam

from pyro_ilvae import VAE, AnnealedELBO, MixtureVAE, MLPDecoder, MLPEncoder, SequentialVAE, likelihoods

NAN = math.nan
VOCAB = sequence_decoders.VOCAB
Z = torch.zeros(2, LATENT)


def decoder(**options):
    return MLPDecoder(latent_dim=LATENT, event_shape=EVENT, hidden_features=(4,), **options)


def encoder(**options):
    return MLPEncoder(latent_dim=LATENT, event_shape=EVENT, hidden_features=(4,), **options)


def sequence_decoder():
    return sequence_decoders.DECODERS["plain-gru"]()


def factor(**options):
    return mixture_with("factor", encoder=encoder(), **options)


def refused(call, name):
    with pytest.raises((ValueError, TypeError), match=rf"Expected.*\b({name})\b"):
        call()


BUILD = {
    "vae": lambda parts: VAE(
        **{"decoder": decoder(), "encoder": encoder(), "likelihood": likelihoods.Normal()} | parts
    ),
    "mixture": lambda parts: MixtureVAE(
        **{"decoder": decoder(), "encoder": encoder(), "likelihood": likelihoods.Normal(), "num_components": 3} | parts
    ),
    "sequential": lambda parts: SequentialVAE(**{"decoder": sequence_decoder(), "encoder": sequence_encoder()} | parts),
}
NO_PARTS = [None, 3, "mlp", {}, MLPEncoder, MLPDecoder, likelihoods.Normal, dist.Poisson, dist.Normal(0.0, 1.0)]


@pytest.mark.parametrize("value", NO_PARTS, ids=repr)
@pytest.mark.parametrize(
    ("model", "part"),
    [
        *((model, part) for model in ("vae", "mixture") for part in ("decoder", "encoder", "likelihood")),
        *(("sequential", part) for part in ("decoder", "encoder")),
    ],
)
def test_parts_are_objects_that_can_be_called(model, part, value):
    refused(lambda: BUILD[model]({part: value}), part)


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        ("vae", {"decoder": encoder(), "encoder": decoder()}, "decoder"),
        ("mixture", {"decoder": encoder(), "encoder": decoder()}, "decoder"),
        ("sequential", {"decoder": sequence_encoder(), "encoder": sequence_decoder()}, "decoder"),
        ("vae", {"encoder": likelihoods.Normal(), "likelihood": encoder()}, "encoder"),
        ("vae", {"decoder": likelihoods.Normal()}, "decoder"),
        ("vae", {"likelihood": decoder()}, "likelihood"),
        ("vae", {"encoder": decoder()}, "encoder"),
        ("vae", {"decoder": sequence_decoder(), "event_shape": VOCAB}, "decoder"),
        ("sequential", {"decoder": MLPDecoder(latent_dim=LATENT, event_shape=VOCAB)}, "decoder"),
    ],
)
def test_parts_in_the_place_of_another(model, parts, message):
    refused(lambda: BUILD[model](parts), message)


def test_parts_of_the_user_that_return_something_else():
    swapped = VAE(
        torch.nn.Linear(LATENT, 8), torch.nn.Flatten(), likelihoods.Normal(), latent_dim=LATENT, event_shape=8
    )
    refused(lambda: swapped.guide(X), "encoder")
    refused(lambda: swapped.encode(X), "encoder")
    pair = VAE(lambda z: (z, z), encoder(), likelihoods.Normal(), event_shape=EVENT)
    refused(lambda: pair.model(X), "decoder")
    for likelihood in (lambda eta, x=None: eta, lambda eta, x=None: None):
        vae = VAE(decoder(), encoder(), likelihood)
        refused(lambda vae=vae: vae.model(X), "likelihood")
    decoder_at_one_context = decoder(context_dim=3).given(torch.zeros(3))
    assert VAE(decoder_at_one_context, encoder(), likelihoods.Normal()).reconstruct(X).shape == X.shape


WRONG_INTS = [0, -1, 2.5, "a", NAN, True, [3], None, torch.tensor(2.5)]
OF_INTS = {
    "data_size": lambda value: vae_with(data_size=value),
    "latent_dim": lambda value: VAE(
        torch.nn.Linear(3, 8), lambda x: x, likelihoods.Normal(), latent_dim=value, event_shape=8
    ),
    "max_length": lambda value: sequential_with(max_length=value),
    "batch_size": lambda value: vae_with().encode(X, batch_size=value),
    "num_components": lambda value: factor(num_components=value),
    "num_samples": lambda value: vae_with().sample_prior(value),
    "num_data": lambda value: vae_with().guide(num_data=value),
    "restarts": lambda value: factor().initialize_components(X, restarts=value),
    "num_beams": lambda value: sequential_with().search(Z, num_beams=value),
    "num_steps": lambda value: sequential_with().interpolate(TOKENS[0], TOKENS[1], value),
}
OPTIONAL = ("data_size", "max_length", "batch_size", "latent_dim")


@pytest.mark.parametrize("value", WRONG_INTS, ids=repr)
@pytest.mark.parametrize("name", OF_INTS)
def test_sizes(name, value):
    if value is None and name in OPTIONAL and name != "max_length":
        return
    refused(lambda: OF_INTS[name](value), name)


def event_shape_of(value):
    return VAE(torch.nn.Linear(3, 8), lambda x: x, likelihoods.Normal(), latent_dim=3, event_shape=value)


def options(name, values, *calls):
    return [pytest.param(call, name, value, id=f"{name}-{value!r}") for value in values for call in calls]


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        *options("event_shape", (0, -1, 2.5, "a", (0,), (), ("a",)), event_shape_of),
        *options("component", (-1, 3, 1.5, "a", [0], True, NAN, None), lambda v: factor().sample_component(v)),
        *options(
            "seed",
            ("a", 2.5, True, NAN, [1], torch.tensor(1.5), 2**70),
            lambda v: vae_with().sample_prior(2, seed=v),
            lambda v: factor().predict_component(X, seed=v),
            lambda v: mixture_with("summed-out").predict_component(X, seed=v),
            lambda v: factor().initialize_components(X, seed=v),
            lambda v: factor().sample_component(0, seed=v),
            lambda v: sequential_with().sample(Z, seed=v),
        ),
        *options(
            "mean",
            ("a", 1, None, [True]),
            lambda v: vae_with().sample_prior(2, mean=v),
            lambda v: factor().sample_component(0, mean=v),
        ),
        *options("weights", ("free", None, 1, True, {}), lambda v: factor(weights=v)),
        *options("scales", ("free", None, 1, True, {}), lambda v: factor(scales=v)),
        *options("end_token", (-1, VOCAB, 1.5, "a", [0], True), lambda v: sequential_with(end_token=v)),
        *options(
            "temperature", (0, -1, NAN, "a", None, math.inf, True), lambda v: sequential_with().sample(Z, temperature=v)
        ),
        *options(
            "z",
            ("a", None, [["a"] * LATENT], Z * NAN, Z + math.inf, Z + 0j, torch.zeros(2, LATENT + 1), torch.tensor(0.0)),
            lambda v: sequential_with().sample(v),
            lambda v: sequential_with().search(v),
        ),
        *options(
            "start|x", ("ab", None, TOKENS[0].float(), TOKENS[:, None]), lambda v: sequential_with().interpolate(v, v)
        ),
    ],
)
def test_options(call, name, value):
    refused(lambda: call(value), name)


OBJECTIVES = [Trace_ELBO, TraceGraph_ELBO, JitTrace_ELBO, RenyiELBO, ReweightedWakeSleep, TraceMeanField_ELBO]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.filterwarnings("ignore")
def test_y_of_the_model_needs_an_objective_that_enumerates(objective):
    mixture = mixture_with("summed-out")
    svi = SVI(mixture.model, mixture.guide, Adam({"lr": 1e-3}), objective())
    for call in (svi.step, svi.evaluate_loss):
        with pytest.raises(ValueError, match=f"enumerates site 'y', such as TraceEnum_ELBO, got {objective.__name__}"):
            call(X)


@pytest.mark.parametrize("form", ["factor", "components", "summed-out"])
def test_y_needs_an_objective_that_takes_what_is_not_reparameterized(form):
    mixture = mixture_with(form)
    for objective in (TraceMeanField_ELBO(), AnnealedELBO(TraceMeanField_ELBO(), beta=0.5)):
        with pytest.raises(ValueError, match="enumerates site 'y', such as TraceEnum_ELBO, got TraceMeanField_ELBO"):
            objective.loss(mixture.model, mixture.guide, X)
    assert TraceEnum_ELBO().loss(mixture.model, mixture.guide, X) > 0


def test_y_of_the_model_may_be_given_or_drawn_by_a_guide_of_the_user():
    mixture, y = mixture_with("summed-out"), torch.zeros(len(X), dtype=torch.long)
    known = poutine.condition(mixture.model, data={"y": y})
    assert Trace_ELBO().loss(known, mixture.guide, X) > 0

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*mixture.encoder(x)).to_event(1))
            pyro.sample("y", dist.Categorical(logits=torch.zeros(3)))

    assert Trace_ELBO().loss(mixture.model, guide, X) > 0
