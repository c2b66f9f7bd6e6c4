"""Covariates of sequences: the model by hand, the guarantee, draws and searches in a context, and what is refused."""

import pyro
import pytest
import torch
from helpers.decoders import LATENT, perturb
from helpers.sequence_decoders import VOCAB, tokens
from pyro import poutine
from torch.nn import functional as F

from pyro_ilvae import MLPDecoder, ProjectedDecoder, SequenceDecoder, SequenceEncoder, SequentialVAE
from pyro_ilvae.diagnostics import guaranteed_information, lipschitz_audit

N, C, H, LENGTH = 8, 2, 8, 5
X = tokens(N, LENGTH)
LABELS = torch.arange(N) % C
CONTEXT = F.one_hot(LABELS, C).float()
HISTORIES = pytest.mark.parametrize("history", ["gru", "lstm", "transformer"])


def decoder(history="gru", *, projected=False):
    sizes = {"latent_dim": LATENT, "event_shape": VOCAB, "context_dim": H + C}
    readout = MLPDecoder(**sizes, hidden_features=(12,))
    if projected:
        readout = ProjectedDecoder(readout, **sizes, map_features=(8,), frame="centered", inverse_lipschitz=0.7)
    return SequenceDecoder(history, readout, context_dim=C)


def encoder(**options):
    options = {"context_dim": C} | options
    return SequenceEncoder(vocab_size=VOCAB, latent_dim=LATENT, embedding_features=4, hidden_features=8, **options)


def model(history="gru", **options):
    pyro.clear_param_store()
    own = options.pop("decoder", None) or decoder(history)
    return perturb(SequentialVAE(own, encoder(), end_token=0, max_length=LENGTH, **options), 0.3)


def log_prob(vae, x, z, context):
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x, context)
    trace.compute_log_prob()
    return trace.nodes["x"]["log_prob"]


@HISTORIES
def test_each_position_has_the_context_of_its_sequence(history):
    vae, z = model(history), torch.randn(N, LATENT)
    found = vae.decoder(z, X, CONTEXT)
    start = torch.full((N, 1), VOCAB)
    states = vae.decoder.history(torch.cat([start, X[:, :-1].clamp(min=0)], 1))
    beside = torch.cat([states, CONTEXT[:, None].expand(-1, LENGTH, -1)], -1)
    torch.testing.assert_close(found, vae.decoder.decoder(z[:, None], beside))
    nats = F.cross_entropy(found.flatten(0, 1), X.flatten(), ignore_index=-1, reduction="none").reshape(N, -1).sum(1)
    torch.testing.assert_close(log_prob(vae, X, z, LABELS), -nats)
    particles = vae.decoder(torch.randn(3, N, LATENT), X.expand(3, N, LENGTH), CONTEXT)
    assert particles.shape == (3, N, LENGTH, VOCAB)


@HISTORIES
def test_steps_give_the_logits_of_forward(history):
    vae, z = model(history), torch.randn(N, LATENT)
    whole = vae.decoder(z, X, CONTEXT)
    logits, state = vae.decoder.begin(z, CONTEXT)
    for t in range(LENGTH):
        there = X[:, t] >= 0
        torch.testing.assert_close(logits[there], whole[there, t], rtol=1e-4, atol=1e-5)
        logits, state = vae.decoder.step(X[:, t].clamp(min=0), state)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_searches_in_contexts_are_the_searches_one_by_one(num_beams):
    vae, z = model(), 2 * torch.randn(N, LATENT)
    together = vae.search(z, LABELS, num_beams=num_beams)
    for i in range(N):
        for one in (LABELS[i : i + 1], int(LABELS[i]), CONTEXT[i]):
            assert torch.equal(vae.search(z[i : i + 1], one, num_beams=num_beams)[0], together[i])
    assert torch.equal(vae.search(z, CONTEXT, num_beams=num_beams, batch_size=3), together)
    assert torch.equal(vae.search(z.reshape(2, 4, -1), CONTEXT.reshape(2, 4, C), num_beams=num_beams)[1], together[4:])
    z = vae.encode(X, LABELS)[0]
    assert torch.equal(vae.reconstruct(X, LABELS, num_beams=num_beams), vae.search(z, LABELS, num_beams=num_beams))
    other = vae.reconstruct(X, LABELS, 1 - LABELS, num_beams=num_beams, batch_size=3)
    assert torch.equal(other, vae.search(z, 1 - LABELS, num_beams=num_beams))


def test_draws_have_the_probabilities_of_their_context():
    vae = model()
    z = torch.randn(1, LATENT)
    drawn = vae.sample(z.expand(20_000, -1), 1, max_length=1, seed=0)[:, 0]
    probabilities = vae.decoder.begin(z, CONTEXT[1:2])[0].softmax(-1)[0]
    frequencies = F.one_hot(drawn, VOCAB).double().mean(0)
    assert (frequencies - probabilities).abs().max() < 5 * 0.5 / 20_000**0.5
    other = vae.decoder.begin(z, CONTEXT[:1])[0].softmax(-1)[0]
    assert (frequencies - other).abs().max() > 5 * 0.5 / 20_000**0.5
    assert vae.sample_prior(4, LABELS[:4]).shape == vae.sample_prior(4, 1).shape == (4, LENGTH)
    assert vae.interpolate(X[0], X[1], 3, 1).shape == (3, LENGTH)
    assert vae.model(None, LABELS).shape == (N, LENGTH)


def test_the_guarantee_holds_at_each_history_and_context():
    own = perturb(decoder(projected=True))
    for label in range(C):
        given = own.given(torch.tensor([3, 1, 2]), CONTEXT[label])
        audit = lipschitz_audit(given, num_samples=30, steps=2, seed=0)
        assert audit.smallest >= audit.certified * (1 - 1e-4)
        assert audit.certified == pytest.approx(0.7 * 3**0.5)
    assert "Categorical" in guaranteed_information(model(decoder=own)).reason


def test_parts_that_disagree_and_contexts_that_are_wrong():
    vae, z = model(), torch.randn(N, LATENT)
    wrong = {
        "context of shape": lambda: vae.model(X),
        "labels from 0 to 1": lambda: vae.encode(X, LABELS + 1),
        "context": lambda: vae.search(z),
        r"context of shape \(8, 2\)": lambda: vae.sample(z, CONTEXT[:3]),
        "target_context": lambda: vae.reconstruct(X, LABELS, CONTEXT[:3]),
        "each batch to have x and other arguments": lambda: vae.encode([{"x": X, "context": LABELS, "mask": X > 0}]),
        "one context_dim": lambda: SequentialVAE(decoder(), encoder(context_dim=3)),
        "context=None for a model": lambda: SequentialVAE(
            SequenceDecoder("gru", MLPDecoder(latent_dim=LATENT, event_shape=VOCAB, context_dim=H)),
            encoder(context_dim=None),
        ).search(z, LABELS),
        "context=None": lambda: SequentialVAE(
            SequenceDecoder("gru", MLPDecoder(latent_dim=LATENT, event_shape=VOCAB, context_dim=H)),
            encoder(context_dim=None),
        ).encode(X, LABELS),
        "no context for a decoder": lambda: SequenceDecoder(
            "gru", MLPDecoder(latent_dim=LATENT, event_shape=VOCAB, context_dim=H)
        )(z, X, CONTEXT),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=f"Expected.*{message}"):
            call()


def test_a_context_of_the_encoder_alone_is_not_needed_to_decode():
    own = SequenceDecoder("gru", MLPDecoder(latent_dim=LATENT, event_shape=VOCAB, context_dim=H))
    vae = SequentialVAE(own, encoder(), end_token=0, max_length=LENGTH)
    assert vae.sample_prior(3).shape == vae.sample_prior(3, 1).shape == (3, LENGTH)
    assert vae.model(num_data=3).shape == (3, LENGTH)
    assert vae.reconstruct(X, LABELS).shape == (N, LENGTH)
    with pytest.raises(ValueError, match="Expected context of shape"):
        vae.encode(X)
