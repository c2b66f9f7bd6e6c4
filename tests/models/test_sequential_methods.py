"""The methods of the sequential VAE: draws, searches and interpolations, in batches or at once, and free of traces."""

import itertools

import pytest
import torch
from helpers.decoders import perturb
from helpers.models import sequence_encoder, sequential_with
from helpers.sequence_decoders import DECODERS, EVERY_DECODER, LATENT, VOCAB, WIDTH, projected, tokens

from pyro_ilvae import SequentialVAE, TransformerHistory
from pyro_ilvae.distributions import PADDING

LENGTH = 4
X = tokens(7, 6)
GRU = [name for name in DECODERS if "gru" in name]


def vae_with(name=GRU[0], **options):
    """Perturbed, so that no two tokens or sequences are equally probable."""
    return perturb(sequential_with(name, **{"max_length": LENGTH} | options).double(), 0.7)


def codes(count=5):
    return torch.randn(count, LATENT, dtype=torch.float64)


METHODS = {
    "sample_prior": lambda vae, **options: vae.sample_prior(5, **options),
    "sample": lambda vae, **options: vae.sample(codes(), **options),
    "search": lambda vae, **options: vae.search(codes(), **options),
    "reconstruct": lambda vae, **options: vae.reconstruct(X[:5], **options),
    "interpolate": lambda vae, **options: vae.interpolate(X[0], X[1, :3], 5, **options),
}
IN_BATCHES = [name for name in METHODS if name != "interpolate"]
SEARCHES = ["search", "reconstruct", "interpolate"]


@pytest.mark.parametrize("name", EVERY_DECODER)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_returned_are_sequences_of_at_most_max_length(name, method):
    vae = vae_with(name)
    for end_token, max_length in itertools.product((None, 0), (1, LENGTH)):
        vae.end_token, vae.max_length = end_token, max_length
        x = METHODS[method](vae)
        assert (x.shape, x.dtype) == ((5, max_length), torch.long)
        assert x.min() >= PADDING
        assert x.max() < VOCAB
        ended = torch.zeros_like(x, dtype=torch.bool) if end_token is None else (x == end_token).cumsum(1) > 0
        # The end token is the last one before the padding.
        assert torch.equal(x == PADDING, torch.nn.functional.pad(ended, (1, -1)))
        # What is drawn are data again.
        assert vae.encode(x)[0].shape == (5, LATENT)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_DECODER)
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("end_token", [None, 0])
def test_searches_do_not_depend_on_the_batch(name, num_beams, end_token):
    # Far apart, where a decoder makes most of the difference between them.
    vae, z = vae_with(name, end_token=end_token), 10 * codes(7)
    searched, reconstructed = vae.search(z, num_beams=num_beams), vae.reconstruct(X, num_beams=num_beams)
    # With an end token, which is the most probable sequence for some of these decoders, all may be equal.
    assert end_token is not None or len(searched.unique(dim=0)) > 1
    for batch_size in (1, 3, 7, 100):
        assert torch.equal(vae.search(z, batch_size=batch_size, num_beams=num_beams), searched)
        assert torch.equal(vae.reconstruct(X, batch_size=batch_size, num_beams=num_beams), reconstructed)
    assert torch.equal(vae.search(vae.encode(X)[0], num_beams=num_beams), reconstructed)
    wider = torch.nn.functional.pad(X, (0, 3), value=PADDING)
    assert torch.equal(vae.reconstruct(wider, num_beams=num_beams), reconstructed)


@pytest.mark.parametrize("method", ["sample_prior", "sample"])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 100])
def test_shapes_and_seeds_of_draws_in_batches(method, batch_size):
    vae = vae_with()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(METHODS[method](vae, batch_size=batch_size))
    assert draws[0].shape == (5, LENGTH)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def frequencies(x):
    """The frequency of each token at the first place."""
    return torch.nn.functional.one_hot(x[:, 0], VOCAB).double().mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRU)
@pytest.mark.parametrize("batch_size", [None, 700])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@torch.no_grad()
def test_draws_have_the_probabilities_of_the_model(name, batch_size, temperature):
    vae, count = vae_with(name, max_length=1), 4000
    # One point many times, and the average over the prior.
    z, prior = codes(1).expand(count, -1), codes(count)
    for draws, points in (
        (vae.sample(z, batch_size=batch_size, temperature=temperature), z),
        (vae.sample_prior(count, batch_size=batch_size, temperature=temperature), prior),
    ):
        probs = (vae.decoder.begin(points)[0] / temperature).softmax(-1)
        exact = probs.mean(0)
        # Both sides are averages where the points are draws of the prior.
        variance = (exact * (1 - exact)).clamp(min=1 / count) / count + probs.var(0) / count
        assert ((frequencies(draws) - exact).abs() < 5 * variance.sqrt()).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_DECODER)
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("num_steps", [2, 5])
def test_interpolation_is_a_search_along_a_line_between_two_reconstructions(name, num_beams, num_steps):
    vae = vae_with(name, end_token=None)
    # Two sequences with different reconstructions, so that a path along another line shows.
    perturb(vae, 3.0)
    data = tokens(30, 6)
    rows = vae.reconstruct(data, num_beams=num_beams)
    start, end = data[0], data[(rows != rows[0]).any(1)][0]
    end = end[end >= 0]
    path = vae.interpolate(start, end, num_steps, num_beams=num_beams)
    assert path.shape == (num_steps, LENGTH)
    first, last = (vae.encode(row.unsqueeze(0))[0] for row in (start, end))
    for i, row in enumerate(path):
        point = first + i / (num_steps - 1) * (last - first)
        assert torch.equal(row, vae.search(point, num_beams=num_beams)[0])
    for row, sequence in ((path[0], start), (path[-1], end)):
        assert torch.equal(row, vae.reconstruct(sequence.unsqueeze(0), num_beams=num_beams)[0])
    assert torch.equal(vae.interpolate(end, start, num_steps, num_beams=num_beams), path.flip(0))


class Dropping(torch.nn.Module):
    """An encoder that drops units in training."""

    def __init__(self):
        super().__init__()
        self.encoder, self.dropout = sequence_encoder(), torch.nn.Dropout(0.5)

    def forward(self, x):
        loc, scale = self.encoder(x)
        return self.dropout(loc), scale


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_off_and_training_goes_on_as_before(method):
    def history():
        return TransformerHistory(VOCAB, hidden_features=WIDTH, num_heads=2, num_layers=1, dropout=0.5)

    decoder = projected(history, 0.5, word_dropout=0.9)
    vae = perturb(SequentialVAE(decoder, Dropping(), end_token=0, max_length=LENGTH).double(), 0.7)
    results = []
    for train in (vae.eval, vae.train, decoder.eval, vae.encoder.eval):
        train()
        modes = [module.training for module in vae.modules()]
        torch.manual_seed(0)
        results.append(METHODS[method](vae))
        assert [module.training for module in vae.modules()] == modes
    assert all(torch.equal(result, results[0]) for result in results)
    vae.train()
    with pytest.raises(ValueError, match="batch_size"):
        METHODS["search"](vae, batch_size=0)
    assert all(module.training for module in vae.modules())


@pytest.mark.parametrize("name", EVERY_DECODER)
@pytest.mark.parametrize("method", METHODS)
def test_no_gradients_are_recorded(name, method):
    vae, enabled = vae_with(name), []
    for part in (vae.decoder.history, vae.encoder):
        for module in part.modules():
            module.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    METHODS[method](vae)
    assert enabled
    assert not any(enabled)
    assert torch.is_grad_enabled()
    assert not any(part.requires_grad for part in vae.encode(X))
    with torch.inference_mode():
        METHODS[method](vae)


def test_data_of_the_caller_stay_as_they_are():
    vae, x, z = vae_with(), X.clone(), codes()
    before = z.clone()
    vae.reconstruct(x, num_beams=3)
    vae.interpolate(x[0], x[1])
    vae.search(z, num_beams=3)
    vae.sample(z)
    assert torch.equal(x, X)
    assert torch.equal(z, before)


def searched(name, value):
    """Each search with one option of another value."""
    return [pytest.param(method, {name: value}, name, id=f"{method}-{name}-{value}") for method in SEARCHES]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *[(method, {"batch_size": value}, "batch_size") for method in IN_BATCHES for value in (0, -1, 1.5)],
        *[param for value in (0, -1, 1.5) for param in searched("num_beams", value)],
        *[
            (method, {"temperature": value}, "temperature")
            for method in ("sample", "sample_prior")
            for value in (0, 0.0, -1.0, float("nan"), float("inf"), "1")
        ],
    ],
)
def test_refuses_options(method, options, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        METHODS[method](vae_with(), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.interpolate(X[0], X[1], 1), "Expected num_steps to be an int >= 2, got 1"),
        (lambda vae: vae.interpolate(X[0], X[1], 0), "num_steps"),
        (lambda vae: vae.interpolate(X[0], X[1], 2.5), "num_steps"),
        (lambda vae: vae.sample_prior(0), "num_samples"),
        *[
            (lambda vae, method=method, z=z: getattr(vae, method)(z), rf"Expected z of shape \({shape}")
            for method in ("sample", "search")
            for z, shape in (
                (torch.zeros(()), rf"..., {LATENT}"),
                (torch.zeros(4, LATENT + 1), rf"..., {LATENT}"),
            )
        ],
        (lambda vae: vae.reconstruct(X.double()), "of dtype torch.int64"),
        (lambda vae: vae.reconstruct(X[0]), r"of tokens of shape \(N, T\)"),
        (lambda vae: vae.reconstruct(X + VOCAB), "got values from"),
        (lambda vae: vae.interpolate(X[:1], X[1]), r"start of shape \(T,\)"),
        (lambda vae: vae.interpolate(X[0], X[1].clamp(max=-1)), "site 'x'.*row 0"),
    ],
)
def test_refuses_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(vae_with())


@pytest.mark.parametrize("name", EVERY_DECODER)
def test_z_may_have_any_left_dimensions_and_a_length_of_its_own(name):
    vae, z = vae_with(name), codes(6)
    found = vae.search(z, num_beams=2, max_length=4)
    assert found.shape == (6, 4)
    assert torch.equal(
        vae.search(z.reshape(2, 3, LATENT), batch_size=2, num_beams=2, max_length=4), found.reshape(2, 3, 4)
    )
    assert vae.search(z[0], max_length=4).shape == (4,)
    assert vae.sample(z.reshape(2, 3, LATENT)).shape == (2, 3, LENGTH)
    assert vae.search(z[:0]).shape == vae.sample(z[:0]).shape == (0, LENGTH)
    assert vae.sample_prior(2, max_length=3).shape == vae.reconstruct(X[:2], max_length=3).shape == (2, 3)
