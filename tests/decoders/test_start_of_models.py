"""The start from data: what it refuses and leaves alone, of models, of sequences and with contexts."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import sequence_decoders
from helpers.decoders import perturb
from helpers.sequence_decoders import VOCAB, tokens
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroSample
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ilvae import (
    VAE,
    InverseLipschitzDecoder,
    JointOptim,
    MLPDecoder,
    MLPEncoder,
    Nats,
    ProjectedDecoder,
    SequenceDecoder,
    SequenceEncoder,
    SequentialVAE,
    likelihoods,
    mlp,
    principal_token_frame,
)

LATENT, FEATURES = 3, 12
SIZES = {"latent_dim": LATENT, "event_shape": FEATURES}
DECODERS = {
    "plain": lambda **options: MLPDecoder(**SIZES | {"hidden_features": (8,), "linear_path": True} | options),
    "projected": lambda backbone=None, **options: ProjectedDecoder(
        backbone or mlp(LATENT, (8,), FEATURES), **SIZES | {"map_features": (8,)} | options
    ),
    "composition": lambda **options: InverseLipschitzDecoder(**SIZES | {"map_features": (8,)} | options),
}
FRAMED = ["projected", "composition"]


def data(num_data=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 4 + torch.randn(num_data, FEATURES, generator=generator) * torch.linspace(0.5, 3, FEATURES)


def mean_over_prior(decoder, *context, count=100_000):
    with torch.no_grad():
        return decoder(torch.randn(count, decoder.latent_dim), *context).mean(0)


# What is refused.


class OfUser:
    """A likelihood of a user: unit Normal noise with the natural parameters that a test asks for."""

    def __init__(self, natural_parameters=lambda mean: mean):
        self.natural_parameters = natural_parameters

    def __call__(self, eta, x=None):
        return dist.Normal(eta, 1.0)

    def information_product(self, eta, tangent):
        return tangent


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("x", "likelihood", "error", "message"),
    [
        (data().fill_(math.nan), likelihoods.Normal(), ValueError, "finite data at site 'x'"),
        (data(), likelihoods.Bernoulli(), ValueError, "data at site 'x' in the support of Bernoulli"),
        (data(), likelihoods.Poisson(), ValueError, "data at site 'x' in the support of Poisson"),
        (data()[:, :5], likelihoods.Normal(), ValueError, r"x of shape \(N, 12\), got \(100, 5\)"),
        (data()[0], likelihoods.Normal(), ValueError, "Expected x of shape"),
        (data()[:0], likelihoods.Normal(), ValueError, "x with at least one datum, got none"),
        ([], likelihoods.Normal(), ValueError, "Expected x of shape"),
        (iter([]), likelihoods.Normal(), ValueError, "x with at least one datum, got none"),
        ([data(), data()[:, :5]], likelihoods.Normal(), ValueError, r"x of shape \(N, 12\), got \(100, 5\)"),
        (data().cfloat(), likelihoods.Normal(), ValueError, "real"),
        (data().to_sparse(), likelihoods.Normal(), TypeError, "x to be a dense tensor"),
        ("data", likelihoods.Normal(), TypeError, "Expected x"),
        (None, likelihoods.Normal(), TypeError, "Expected x"),
        (data(), likelihoods.Normal, TypeError, "likelihood to be an object with the method natural_parameters"),
        (data(), None, TypeError, "likelihood to be an object with the method natural_parameters, got None"),
        (data(), lambda eta, x=None: dist.Normal(eta, 1.0), TypeError, "the method natural_parameters"),
        (torch.zeros(5, dtype=torch.long), likelihoods.Categorical(4), ValueError, "num_categories = 12.*got 4"),
        (torch.full((5,), 12), likelihoods.Categorical(12), ValueError, "support of Categorical"),
        (torch.full((5,), 0.5), likelihoods.Categorical(12), ValueError, "support of Categorical"),
        (data(), OfUser(lambda mean: mean[:5]), ValueError, r"natural_parameters have the shape \(12,\).*\(5,\)"),
        (data(), OfUser(lambda mean: 3), ValueError, "natural_parameters have the shape"),
        (data(), OfUser(lambda mean: mean * math.inf), ValueError, "finite natural_parameters for the mean of x"),
    ],
)
def test_refuses(name, x, likelihood, error, message):
    decoder = DECODERS[name]()
    before = copy.deepcopy(decoder.state_dict())
    with pytest.raises(error, match=message):
        decoder.initialize(x, likelihood)
    assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("seed", ["a", 2.5, -(2**70)])
def test_refuses_seeds(name, seed):
    with pytest.raises((ValueError, TypeError), match="seed"):
        DECODERS[name]().initialize(data(), likelihoods.Normal(), seed=seed)


@pytest.mark.parametrize("name", DECODERS)
def test_refuses_weights_with_priors(name):
    decoder = DECODERS[name]()
    part = decoder.network[-1] if name == "plain" else decoder
    part.bias = PyroSample(dist.Normal(0.0, 1.0).expand([FEATURES]).to_event(1))
    with pytest.raises(ValueError, match="Expected decoder whose weights are parameters for a start from data"):
        decoder.initialize(data(), likelihoods.Normal())


@pytest.mark.parametrize("name", DECODERS)
def test_likelihood_of_a_user(name):
    decoder = DECODERS[name]()
    decoder.initialize(data(), OfUser(), seed=0)
    torch.testing.assert_close(mean_over_prior(decoder), data().mean(0), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", DECODERS)
def test_likelihood_with_a_prior(name):
    likelihood = likelihoods.NegativeBinomial(3.0)
    del likelihood.log_total_count
    likelihood.log_total_count = PyroSample(dist.Normal(1.0, 1e-3).expand([1]).to_event(1))
    decoder, x = DECODERS[name](), torch.poisson(data().abs())
    decoder.initialize(x, likelihood, seed=0)
    expected = ((x.sum(0) + 0.5) / 101).log() - 1.0
    torch.testing.assert_close(mean_over_prior(decoder), expected, rtol=0, atol=0.1)


# What stays as it is.


@pytest.mark.parametrize("name", DECODERS)
def test_seeds(name):
    decoder = DECODERS[name]()
    states = []
    for seed in (0, 0, 1, None):
        other, before = copy.deepcopy(decoder), torch.get_rng_state()
        other.initialize(data(), likelihoods.Normal(0.1), seed=seed)
        assert torch.equal(torch.get_rng_state(), before) == (seed is not None)
        states.append(torch.cat([parameter.detach().flatten() for parameter in other.parameters()]))
    assert torch.equal(states[0], states[1])
    if name != "plain":  # which starts with nothing beside its linear path, and draws nothing
        assert not torch.equal(states[0], states[2])
        assert not torch.equal(states[0], states[3])


class WithBatchNorm(PyroModule):
    def __init__(self):
        super().__init__()
        self.first = PyroModule[torch.nn.Linear](LATENT, 8)
        self.norm = PyroModule[torch.nn.BatchNorm1d](8)
        self.dropout = PyroModule[torch.nn.Dropout](0.5)
        self.last = PyroModule[torch.nn.Linear](8, FEATURES)

    def forward(self, z):
        return self.last(self.dropout(self.norm(self.first(z))))


@pytest.mark.parametrize("training", [True, False])
def test_backbone_mode_statistics_and_gradients_stay(training):
    decoder = DECODERS["projected"](WithBatchNorm()).train(training)
    decoder.backbone.dropout.eval()
    decoder(torch.randn(5, LATENT)).sum().backward()
    gradients = {name: value.grad.clone() for name, value in decoder.named_parameters() if value.grad is not None}
    kept = {key: value.clone() for key, value in decoder.state_dict().items() if "backbone" in key or "linear" in key}
    decoder.initialize(data(), likelihoods.Normal())
    assert (decoder.training, decoder.backbone.norm.training, decoder.backbone.dropout.training) == (
        (training, training, False)
    )
    for key, value in kept.items():
        assert torch.equal(decoder.state_dict()[key], value)
    for name, parameter in decoder.named_parameters():
        assert parameter.requires_grad
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


@pytest.mark.parametrize("name", DECODERS)
def test_files_and_copies_after_a_start(name):
    decoder = DECODERS[name]()
    decoder.initialize(data(), likelihoods.Normal(), seed=0)
    z = torch.randn(5, LATENT)
    restored = DECODERS[name]()
    restored.load_state_dict(decoder.state_dict())
    for other in (restored, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(other(z), decoder(z))
    # A second start, on other data, forgets the first.
    decoder.initialize(-data(seed=1), likelihoods.Normal(), seed=0)
    torch.testing.assert_close(mean_over_prior(decoder), -data(seed=1).mean(0), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", DECODERS)
def test_a_start_from_within_inference_mode_or_no_grad(name):
    for context in (torch.no_grad(), torch.enable_grad()):
        decoder = DECODERS[name]()
        with context:
            decoder.initialize(data(), likelihoods.Normal(), seed=0)
        decoder(torch.randn(5, LATENT)).sum().backward()


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor) and not part._is_view():
                self.entries = max(self.entries, part.numel())
        return result


@pytest.mark.parametrize("form", ["whole", "one batch", "of a model"])
def test_memory_does_not_grow_with_the_data(form):
    features, largest = 12, []
    for count in (2_000, 50_000):
        x = torch.arange(count * features // 4).reshape(count, features // 4) % 4
        decoder = MLPDecoder(latent_dim=2, event_shape=(features // 4, 4), hidden_features=(4,))
        encoder = MLPEncoder(event_shape=features // 4, latent_dim=2, hidden_features=(4,))
        vae = VAE(decoder, encoder, likelihoods.Categorical(4))
        with LargestTensor() as mode:
            if form == "of a model":
                vae.initialize(x, seed=0)
            else:
                decoder.initialize(x if form == "whole" else iter([x]), likelihoods.Categorical(4), seed=0)
        largest.append(mode.entries)
    # A model checks its data all at once; what is made of them afterwards is not larger than they are.
    assert largest[1] <= (x.numel() if form == "of a model" else largest[0])


# Models.


def vae_with(decoder, likelihood=None, **options):
    encoder = MLPEncoder(event_shape=FEATURES, latent_dim=LATENT, hidden_features=(8,))
    return VAE(decoder, encoder, likelihood or likelihoods.Normal(0.5, "learned"), **options)


@pytest.mark.parametrize("name", DECODERS)
def test_a_model_starts_as_its_decoder(name, local_params):
    decoder = DECODERS[name]()
    alone = copy.deepcopy(decoder)
    vae = vae_with(decoder, data_size=100)
    vae.initialize(data(), seed=0)
    alone.initialize(data(), vae.likelihood, seed=0)
    for batches in (list(data().split(30)), torch.utils.data.DataLoader(data(), batch_size=40), data().double()):
        other = vae_with(DECODERS[name]())
        other.decoder.load_state_dict(decoder.state_dict())
        other.initialize(batches, seed=0)
        torch.testing.assert_close(mean_over_prior(other.decoder), data().mean(0), rtol=0, atol=0.1)
    for key, value in decoder.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[key])
    if not local_params:
        svi = SVI(vae.model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 0.01}), TraceMeanField_ELBO())
        before = copy.deepcopy(dict(decoder.named_parameters()))
        svi.step(data())
        assert not all(torch.equal(before[key], value) for key, value in decoder.named_parameters())
    for wrong in (data()[:, :3], data().fill_(math.nan), "a", None):
        with pytest.raises((ValueError, TypeError)):
            vae.initialize(wrong)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_that_was_started_alone_becomes_part_of_a_model(name):
    decoder = DECODERS[name]()
    decoder(torch.zeros(2, LATENT))
    decoder.initialize(data(), likelihoods.Normal(), seed=0)
    vae = vae_with(decoder)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    before = {key: value.clone() for key, value in vae.named_parameters()}
    svi.step(data())
    svi.step(data())
    assert all(not torch.equal(before[key], value) for key, value in vae.named_parameters() if value.numel() > 3)


def test_a_start_shortens_the_training():
    """By the loss, which is ten times lower."""
    losses = []
    for start in (False, True):
        torch.manual_seed(0)
        pyro.clear_param_store()
        vae = vae_with(DECODERS["projected"]())
        if start:
            vae.initialize(20 + data())
        losses.append(TraceMeanField_ELBO(num_particles=20).loss(vae.model, vae.guide, 20 + data()))
    assert losses[1] < losses[0] / 10


def test_models_whose_decoder_has_no_start():
    vae = vae_with(torch.nn.Linear(LATENT, FEATURES), latent_dim=LATENT, event_shape=FEATURES)
    with pytest.raises(TypeError, match="Expected decoder with a method initialize, got Linear"):
        vae.initialize(data())


@pytest.mark.parametrize("name", FRAMED)
def test_prior_and_nats_of_a_model(name):
    likelihood = likelihoods.Normal(0.5, "learned")
    vae = vae_with(DECODERS[name](inverse_lipschitz=Nats(0.5, likelihood)), likelihood)
    vae.initialize(data(), seed=0)
    assert vae.decoder.inverse_lipschitz == pytest.approx(0.5 * math.sqrt(math.expm1(1.0)), rel=1e-5)
    assert (vae.prior.batch_shape, vae.prior.event_shape) == ((), (LATENT,))
    assert vae.double().prior.sample().dtype == torch.float64


# Contexts and sequences.


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_with_a_context(name):
    options = {"context_dim": 4}
    if name == "projected":
        options["backbone"] = MLPDecoder(**SIZES, hidden_features=(8,), context_dim=4)
    decoder = DECODERS[name](**options)
    decoder.initialize(data(), likelihoods.Normal(), seed=0)
    torch.testing.assert_close(mean_over_prior(decoder, torch.zeros(4)), data().mean(0), rtol=0, atol=0.1)
    if name == "composition":
        # The leading directions are for z, which comes after the context.
        leading = torch.linalg.svd(data() - data().mean(0)).Vh[:LATENT]
        overlap = leading @ decoder.frame.matrix[:, -LATENT:]
        torch.testing.assert_close(overlap.abs(), torch.eye(LATENT), rtol=0, atol=1e-4)


X = tokens(60, 8)


@pytest.mark.parametrize("name", sequence_decoders.EVERY_DECODER)
def test_sequences_start_in_the_directions_of_their_tokens(name):
    decoder = sequence_decoders.DECODERS[name]()
    inner = decoder.decoder
    bias = (inner.bias if hasattr(inner, "bias") else inner.network[-1].bias).detach().clone()
    decoder.initialize(X, seed=0)
    assert torch.equal(inner.bias if hasattr(inner, "bias") else inner.network[-1].bias, bias)
    if hasattr(inner, "frame"):
        q = inner.frame.matrix
        assert q.sum(0).abs().max() < 1e-5
        overlap = principal_token_frame(X, vocab_size=VOCAB, latent_dim=LATENT).T @ q[:, -LATENT:]
        torch.testing.assert_close(overlap.abs(), torch.eye(LATENT), rtol=0, atol=1e-4)
        assert decoder.inverse_lipschitz == pytest.approx(0.7)
        perturb(decoder, 0.5)
        z, other = torch.randn(2, 50, LATENT)
        context = torch.randn(inner.context_dim)
        difference = inner(z, context) - inner(other, context)
        difference = (difference - difference.mean(-1, keepdim=True)).norm(dim=-1)
        assert (difference >= 0.7 * (z - other).norm(dim=-1) * (1 - 1e-4)).all()


GRU = [name for name in sequence_decoders.DECODERS if "gru" in name]


@pytest.mark.parametrize("name", GRU)
def test_batches_of_sequences_of_different_lengths(name):
    decoder = sequence_decoders.DECODERS[name]()
    lengths = (X >= 0).sum(1)
    order = lengths.argsort()
    parts = [X[rows][:, : int(lengths[rows].max())] for rows in order.split(16)]
    assert len({part.shape[1] for part in parts}) > 1
    states = []
    for x in (X[order], parts, iter(parts), [(part, 0) for part in parts]):
        other = copy.deepcopy(decoder)
        other.initialize(x, seed=0)
        states.append(other.state_dict())
    for state in states[1:]:
        for key, value in state.items():
            torch.testing.assert_close(value, states[0][key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GRU)
@pytest.mark.parametrize("x", [X[:1], X[:2], torch.full((5, 4), 2)])
def test_sequences_that_hardly_differ(name, x):
    decoder = sequence_decoders.DECODERS[name]()
    decoder.initialize(x, seed=0)
    assert all(value.isfinite().all() for value in decoder.parameters())
    if hasattr(decoder.decoder, "frame"):
        q = decoder.decoder.frame.matrix
        torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1]), rtol=0, atol=1e-5)
        assert q.sum(0).abs().max() < 1e-5


def test_a_frame_of_tokens_that_was_given_stays():
    frame = principal_token_frame(tokens(60, 8, seed=1), vocab_size=VOCAB, latent_dim=LATENT)
    decoder = sequence_decoders.projected(sequence_decoders.HISTORIES["gru"], frame=frame)
    before = decoder.decoder.frame.matrix.clone()
    decoder.initialize(X, seed=0)
    assert torch.equal(decoder.decoder.frame.matrix, before)


def test_reference_nats_of_a_whole_sequence():
    nats = Nats(0.5, likelihoods.Categorical(VOCAB))
    decoder = sequence_decoders.projected(sequence_decoders.HISTORIES["gru"], nats)
    decoder.initialize(X, seed=0)
    p = torch.bincount(X[X >= 0], minlength=VOCAB) + 1 / VOCAB
    p = p / p.sum()
    information = p.diag() - torch.outer(p, p)
    length = float((X >= 0).sum() / len(X))
    unit = math.sqrt(float(information.trace() / (information @ information).trace()) / length)
    expected = decoder.inverse_lipschitz
    assert expected == pytest.approx(math.sqrt(math.expm1(1.0)) * unit, rel=0.1)  # by 64 probes
    assert decoder.nats == 0.5
    decoder.nats = 1.0
    assert decoder.inverse_lipschitz == pytest.approx(expected * math.sqrt(math.expm1(2.0) / math.expm1(1.0)), rel=1e-4)


@pytest.mark.parametrize("name", GRU)
def test_models_of_sequences(name):
    vae = SequentialVAE(
        sequence_decoders.DECODERS[name](),
        SequenceEncoder(vocab_size=VOCAB, latent_dim=LATENT, embedding_features=4, hidden_features=8),
    )
    alone = copy.deepcopy(vae.decoder)
    vae.initialize(list(X.split(20)), seed=0)
    alone.initialize(X, seed=0)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(vae.decoder.state_dict()[key], value, rtol=1e-4, atol=1e-4)
    for wrong in (X.float() + 0.5, X + VOCAB, X[0], None):
        with pytest.raises((ValueError, TypeError)):
            vae.initialize(wrong)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X + VOCAB, "tokens below 9"),
        (X.float(), "tokens below 9"),
        (torch.full((3, 4), -1), "at least one token, got none"),
        (X[:0], "at least one token, got none"),
        (iter([]), "at least one token, got none"),
    ],
)
def test_refuses_tokens(x, message):
    with pytest.raises(ValueError, match=message):
        sequence_decoders.DECODERS[GRU[0]]().initialize(x)


class Readout(torch.nn.Module):
    latent_dim, event_shape, context_dim = LATENT, (VOCAB,), 8

    def forward(self, z, context):
        return torch.zeros(*torch.broadcast_shapes(z.shape[:-1], context.shape[:-1]), VOCAB)


def test_decoders_of_sequences_without_a_start():
    with pytest.raises(TypeError, match="decoder with a start from data, such as ProjectedDecoder, got Readout"):
        SequenceDecoder("gru", Readout()).initialize(X)
