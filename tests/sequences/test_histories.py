"""Histories and the encoder of sequences: step by step as all at once, what they read, and the contract of modules."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from helpers.decoders import perturb
from helpers.models import sequential_with
from helpers.sequence_decoders import DECODERS, EVERY_DECODER, HISTORIES, LATENT, VOCAB, tokens
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Trace_ELBO

from pyro_ilvae import MLPDecoder, RecurrentHistory, SequenceDecoder, SequenceEncoder, TransformerHistory

START, HIDDEN = VOCAB, VOCAB + 1
LENGTH = 5


def encoder(**options):
    return SequenceEncoder(
        vocab_size=VOCAB,
        latent_dim=LATENT,
        **{"embedding_features": 4, "hidden_features": 6, "num_layers": 2} | options,
    )


def inputs(num_sequences, length=LENGTH):
    """Any tokens, with the start and the hidden one among them."""
    return torch.randint(VOCAB + 2, (num_sequences, length))


def one_by_one(decoder, z, x):
    """The logits along the tokens ``x``, each from a step of its own."""
    logits, state = decoder.begin(z)
    collected = [logits]
    for column in x.T[:-1]:
        logits, state = decoder.step(column, state)
        collected.append(logits)
    return torch.stack(collected, dim=1)


@pytest.mark.parametrize("name", EVERY_DECODER)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 6), count=st.integers(1, 4))
def test_step_by_step_is_teacher_forcing(name, seed, length, count):
    torch.manual_seed(seed)
    # Steps hide no tokens, in training either.
    decoder = perturb(DECODERS[name](word_dropout=1.0).double(), 0.5)
    x, z = torch.randint(VOCAB, (count, length)), torch.randn(count, LATENT, dtype=torch.float64)
    drawn = one_by_one(decoder, z, x)
    torch.testing.assert_close(drawn, decoder.eval()(z, x), rtol=1e-10, atol=1e-10)
    # PyTorch runs attention by other kernels where no gradient is asked for.
    with torch.no_grad():
        torch.testing.assert_close(one_by_one(decoder, z, x), drawn, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(decoder(z, x), drawn, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HISTORIES)
@given(st.integers(0, 2**31))
def test_rows_of_the_state_are_the_sequences(name, seed):
    """So that a search can keep some of them, drop others and have a third sort several times."""
    torch.manual_seed(seed)
    history = perturb(HISTORIES[name]().double(), 0.5)
    x, more, rows = inputs(4), inputs(6, 2), torch.randint(4, (6,))
    state = history.begin(4)
    for column in x.T:
        output, state = history.step(column, state)
    torch.testing.assert_close(output, history(x)[:, -1], rtol=1e-10, atol=1e-10)
    state = tuple(part[rows] for part in state)
    for column in more.T:
        output, state = history.step(column, state)
    torch.testing.assert_close(output, history(torch.cat([x[rows], more], dim=1))[:, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HISTORIES)
def test_states_read_all_inputs_so_far_and_none_after(name):
    history = perturb(HISTORIES[name]().double(), 0.5)
    x = inputs(20)
    before = history(x)
    for t in range(LENGTH):
        changed = x.clone()
        changed[:, t] = (x[:, t] + torch.randint(1, VOCAB + 2, (20,))) % (VOCAB + 2)
        difference = (history(changed) - before).abs().amax(-1)
        assert difference[:, :t].max() <= 1e-12 if t else True
        assert (difference[:, t:].amax(1) > 1e-9).all()
        torch.testing.assert_close(history(x[:, : t + 1]), before[:, : t + 1], rtol=1e-12, atol=1e-12)
        # The last state has seen each of them.
        assert (difference[:, -1] > 1e-9).double().mean() > 0.9
    # The order of the inputs counts too.
    assert ((history(x.flip(1)) - before)[:, -1].abs().amax(-1) > 1e-9).double().mean() > 0.8


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_gru_is_its_recursion(seed, num_layers):
    torch.manual_seed(seed)
    history = RecurrentHistory(VOCAB, embedding_features=4, hidden_features=3, num_layers=num_layers).double()
    x = inputs(2)
    below = history.embedding(x)
    for layer in range(num_layers):
        weights = (getattr(history.recurrent, f"{part}_l{layer}") for part in ("weight_ih", "weight_hh"))
        biases = (getattr(history.recurrent, f"{part}_l{layer}") for part in ("bias_ih", "bias_hh"))
        (from_below, from_before), (bias, bias_before) = weights, biases
        h, states = torch.zeros(2, 3, dtype=torch.float64), []
        for t in range(LENGTH):
            r, u, n = (below[:, t] @ from_below.T + bias).chunk(3, -1)
            r_h, u_h, n_h = (h @ from_before.T + bias_before).chunk(3, -1)
            update = torch.sigmoid(u + u_h)
            h = (1 - update) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + update * h
            states.append(h)
        below = torch.stack(states, dim=1)
    torch.testing.assert_close(history(x), below)


@pytest.mark.parametrize("features", [2, 8, 12])
def test_transformer_adds_sinusoids_to_the_embedding(features):
    history = TransformerHistory(VOCAB, hidden_features=features, num_heads=1, num_layers=1).double()
    seen = []
    history.transformer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    x = inputs(3)
    history(x)
    position = torch.tensor(
        [
            [(math.cos if j % 2 else math.sin)(t / 1e4 ** (2 * (j // 2) / features)) for j in range(features)]
            for t in range(LENGTH)
        ],
        dtype=torch.float64,
    )
    expected = math.sqrt(features) * history.embedding.weight[x] + position
    torch.testing.assert_close(seen[0], expected, rtol=1e-6, atol=1e-6)


class Counts(torch.nn.Module):
    """A history of a user's own, which says no more than its width."""

    features = VOCAB + 2

    def forward(self, x):
        return torch.nn.functional.one_hot(x, self.features).float().cumsum(1)


def test_a_decoder_takes_any_history():
    plain = MLPDecoder(latent_dim=LATENT, event_shape=VOCAB, context_dim=Counts.features, hidden_features=(8,))
    decoder = SequenceDecoder(Counts(), plain)
    x, z = tokens(4, LENGTH), torch.randn(4, LATENT)
    seen = Counts()(torch.cat([torch.full((4, 1), START), x[:, :-1].clamp(min=0)], dim=1))
    torch.testing.assert_close(decoder(z, x), plain(z.unsqueeze(1), seen))


def test_a_history_without_steps_serves_for_all_but_drawing():
    """It computes densities, is trained and encodes; to draw token by token it would need begin and step."""
    plain = MLPDecoder(latent_dim=LATENT, event_shape=VOCAB, context_dim=Counts.features, hidden_features=(8,))
    vae = sequential_with(decoder=SequenceDecoder(Counts(), plain))
    x = tokens(4, LENGTH)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    before = plain.network[0].weight.clone()
    assert math.isfinite(svi.step(x))
    assert not torch.equal(plain.network[0].weight, before)
    assert vae.encode(x)[0].shape == (4, LATENT)
    for draw in (vae.sample_prior, lambda: vae.reconstruct(x), lambda: vae.decoder.begin(torch.zeros(4, LATENT))):
        with pytest.raises(TypeError, match="Expected history with a method begin to draw sequences, got a Counts"):
            draw()


@pytest.mark.parametrize(("name", "kind"), [("gru", "GRU"), ("lstm", "LSTM"), ("transformer", "TransformerEncoder")])
def test_history_by_name(name, kind):
    decoder = MLPDecoder(latent_dim=LATENT, event_shape=VOCAB, context_dim=8)
    history = SequenceDecoder(name, decoder).history
    network = history.transformer if name == "transformer" else history.recurrent
    assert (type(network).__name__, history.features, history.vocab_size) == (kind, 8, VOCAB)


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(0, 4))
def test_encoder_is_a_loop_over_sequences_without_their_padding(seed, length, padding):
    torch.manual_seed(seed)
    network = perturb(encoder().double(), 0.3)
    x = tokens(5, length, seed)
    wider = torch.cat([x, torch.full((5, padding), -1)], dim=1)
    alone = [network(row[row >= 0].unsqueeze(0)) for row in x]
    for batched, expected in zip(network(wider), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.cat(expected), rtol=1e-10, atol=1e-10)


def test_encoder_reads_every_token_and_its_place():
    network = perturb(encoder().double(), 0.3)
    x = tokens(30, LENGTH)
    lengths = (x >= 0).sum(1)
    loc, scale = network(x)
    for t in range(LENGTH):
        changed = torch.where((x >= 0) & (torch.arange(LENGTH) == t), (x + 1) % VOCAB, x)
        for before, after in zip((loc, scale), network(changed), strict=True):
            assert ((after - before).abs().amax(1) > 1e-9).equal(lengths > t)
    full = x[lengths == LENGTH]
    asymmetric = (full != full.flip(1)).any(1)
    assert ((network(full.flip(1))[0] - network(full)[0]).abs().amax(1) > 1e-9).equal(asymmetric)


@pytest.mark.parametrize("batch_shape", [(), (1,), (4,), (3, 4), (2, 1, 3)])
def test_encoder_takes_left_dimensions(batch_shape):
    network = encoder().double()
    x = tokens(math.prod(batch_shape), LENGTH)
    loc, scale = network(x.reshape(*batch_shape, LENGTH))
    assert loc.shape == scale.shape == (*batch_shape, LATENT)
    for part, flat in zip((loc, scale), network(x), strict=True):
        torch.testing.assert_close(part.reshape(-1, LATENT), flat)


@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encoder_scale_is_positive_with_a_finite_log(dtype, size):
    _, scale = perturb(encoder().to(dtype), size)(tokens(50, LENGTH))
    assert scale.dtype == dtype
    assert scale.log().isfinite().all()


MODULES = HISTORIES | {"encoder": encoder}


def output(module, x):
    """The network's output as one tensor."""
    value = module(x)
    return torch.cat(value, dim=-1) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_files_dtypes_and_no_grad(name, dtype):
    module = perturb(MODULES[name]().to(dtype), 0.3)
    x = tokens(4, LENGTH).clamp(min=0)
    expected = output(module, x)
    assert expected.dtype == dtype
    restored = MODULES[name]().to(dtype)
    restored.load_state_dict(module.state_dict())
    for other in (restored, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(output(other, x), expected)
    with torch.no_grad():
        for mode in (module.train(), module.eval()):
            torch.testing.assert_close(output(mode, x), expected, rtol=1e-5, atol=1e-5)
    if name in HISTORIES:
        state = module.begin(4)
        assert all(len(part) == 4 for part in state)
        assert module.step(x[:, 0], state)[0].dtype == dtype


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_has_a_gradient(name):
    module = MODULES[name]()
    output(module, tokens(30, LENGTH).clamp(min=0)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_transformer_drops_units_in_training_only():
    history = TransformerHistory(VOCAB, hidden_features=8, num_heads=2, num_layers=1, dropout=0.5)
    x = inputs(4)
    assert not torch.equal(history.train()(x), history(x))
    assert torch.equal(history.eval()(x), history(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RecurrentHistory(0), "vocab_size"),
        (lambda: RecurrentHistory(VOCAB, "rnn"), "Expected kind to be one of 'gru', 'lstm', got 'rnn'"),
        (lambda: RecurrentHistory(VOCAB, embedding_features=0), "embedding_features"),
        (lambda: RecurrentHistory(VOCAB, hidden_features=0), "hidden_features"),
        (lambda: RecurrentHistory(VOCAB, num_layers=0), "num_layers"),
        (lambda: TransformerHistory(0), "vocab_size"),
        (lambda: TransformerHistory(VOCAB, hidden_features=0), "hidden_features"),
        (lambda: TransformerHistory(VOCAB, hidden_features=7, num_heads=7), "hidden_features .* 7 heads .* got 7"),
        (lambda: TransformerHistory(VOCAB, hidden_features=8, num_heads=3), "hidden_features .* 3 heads .* got 8"),
        (lambda: TransformerHistory(VOCAB, num_heads=0), "num_heads"),
        (lambda: TransformerHistory(VOCAB, num_layers=0), "num_layers"),
        (lambda: SequenceEncoder(vocab_size=0, latent_dim=LATENT), "vocab_size"),
        (lambda: SequenceEncoder(vocab_size=VOCAB, latent_dim=0), "latent_dim"),
        (lambda: encoder(embedding_features=0), "embedding_features"),
        (lambda: encoder(hidden_features=0), "hidden_features"),
        (lambda: encoder(num_layers=0), "num_layers"),
        (
            lambda: encoder()(torch.tensor([[1, 2], [-1, -1], [0, -1]])),
            "Expected x with at least one token in each row, got 1 without",
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
