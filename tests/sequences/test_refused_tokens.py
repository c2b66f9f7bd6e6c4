"""Wrong arguments of the networks of sequences end in an error that names the argument."""

import math

import pytest
import torch
from helpers.sequence_decoders import DECODERS, LATENT, VOCAB
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pyro_ilvae import MLPDecoder, RecurrentHistory, SequenceDecoder, SequenceEncoder, TransformerHistory

NAN = math.nan
WRONG_INTS = [0, -1, 2.5, "a", NAN, True, [3], None]
HISTORIES = {
    "gru": lambda: RecurrentHistory(VOCAB, hidden_features=4),
    "lstm": lambda: RecurrentHistory(VOCAB, "lstm", hidden_features=4),
    "transformer": lambda: TransformerHistory(VOCAB, hidden_features=4),
}
EVERY_HISTORY = pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES.keys())


def decoder_of(history="gru", decoder=None, **options):
    plain = MLPDecoder(latent_dim=LATENT, event_shape=VOCAB, context_dim=4)
    return SequenceDecoder(history, decoder or plain, **options)


def encoder():
    return SequenceEncoder(vocab_size=VOCAB, latent_dim=LATENT, embedding_features=4, hidden_features=4)


def refused(call, name):
    with pytest.raises((ValueError, TypeError), match=rf"Expected.*\b({name})\b"):
        call()


def calls(name, values, *functions):
    return [pytest.param(f, name, v, id=f"{name}-{v!r}") for v in values for f in functions]


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        *calls("decoder", [3, "mlp", {1}, MLPDecoder, nn.Linear(2, 3)], lambda v: decoder_of(decoder=v)),
        *calls("history", [None, 3, "rnn", [], RecurrentHistory, nn.GRU], lambda v: decoder_of(v)),
        *calls("word_dropout", [1.5, -0.1, NAN, "a", None, True], lambda v: decoder_of(word_dropout=v)),
        *calls("dropout", [1.5, -0.1, NAN, "a", None, True], lambda v: TransformerHistory(VOCAB, dropout=v)),
        *calls("kind", ["rnn", None, 1, []], lambda v: RecurrentHistory(VOCAB, v)),
        *calls("vocab_size", WRONG_INTS, RecurrentHistory, TransformerHistory),
        *calls(
            "num_layers",
            WRONG_INTS,
            lambda v: RecurrentHistory(VOCAB, num_layers=v),
            lambda v: TransformerHistory(VOCAB, num_layers=v),
        ),
        *calls(
            "hidden_features",
            WRONG_INTS,
            lambda v: RecurrentHistory(VOCAB, hidden_features=v),
            lambda v: TransformerHistory(VOCAB, hidden_features=v),
            lambda v: SequenceEncoder(vocab_size=VOCAB, latent_dim=2, hidden_features=v),
        ),
        *calls("num_heads", WRONG_INTS, lambda v: TransformerHistory(VOCAB, num_heads=v)),
        *calls("embedding_features", WRONG_INTS, lambda v: RecurrentHistory(VOCAB, embedding_features=v)),
        *calls("z", ["a", None, [["a"] * LATENT], torch.zeros(2, LATENT + 1)], lambda v: decoder_of().begin(v)),
        *calls("z", ["a", None, torch.zeros(2, LATENT + 1)], lambda v: decoder_of()(v, torch.tensor([[1]]))),
    ],
)
def test_constructors_and_codes(function, name, value):
    refused(lambda: function(value), name)


NO_TOKENS = {
    "None": None,
    "string": "abc",
    "strings": [["a", "b"]],
    "ragged": [[1, 2], [1]],
    "float": torch.tensor([[1.0, 2.0]]),
    "bool": torch.tensor([[True, False]]),
    "complex": torch.tensor([[1, 2]]) + 0j,
    "outside": torch.tensor([[1, VOCAB]]),
    "start token": torch.tensor([[VOCAB, 1]]),
    "hidden token": torch.tensor([[VOCAB + 1, 1]]),
    "below padding": torch.tensor([[1, -2]]),
    "gap": torch.tensor([[1, -1, 2]]),
    "padding first": torch.tensor([[-1, 1, 2]]),
}


@pytest.mark.parametrize("x", NO_TOKENS.values(), ids=NO_TOKENS.keys())
def test_tokens(x):
    decoder = decoder_of()
    refused(lambda: encoder()(x), "x")
    refused(lambda: decoder(torch.zeros(1, LATENT), x), "x")
    refused(lambda: decoder.given(x[0] if isinstance(x, torch.Tensor) else x), "x")


@pytest.mark.parametrize("x", [torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long), [[-1, -1]]])
def test_sequences_without_tokens(x):
    refused(lambda: encoder()(x), "x")
    refused(lambda: decoder_of().given(torch.as_tensor(x).flatten()), "x")


@EVERY_HISTORY
@pytest.mark.parametrize(
    "inputs",
    ["a", None, torch.zeros(1, 3), torch.tensor([[VOCAB + 2]]), torch.tensor([[-1]]), torch.tensor(1),
     torch.zeros(1, 0, dtype=torch.long)],
    ids=str,
)  # fmt: skip
def test_inputs_of_histories(history, inputs):
    history = history()
    refused(lambda: history(inputs), "inputs")
    rows = inputs[0] if isinstance(inputs, torch.Tensor) and inputs.dim() == 2 and inputs.numel() else inputs
    refused(lambda: history.step(rows, history.begin(1)), "inputs")


@EVERY_HISTORY
@pytest.mark.parametrize("number", [-1, 2.5, "a", None, True])
def test_numbers_of_sequences(history, number):
    refused(lambda: history().begin(number), "num_sequences")


@given(st.lists(st.integers(-3, VOCAB + 3), min_size=1, max_size=5))
def test_a_row_is_taken_exactly_if_tokens_come_first_and_padding_ends_them(row):
    tokens = [token for token in row if token != -1]
    valid = all(0 <= token < VOCAB for token in tokens) and row[: len(tokens)] == tokens and bool(tokens)
    if valid:
        assert encoder()([row])[0].shape == (1, LATENT)
    else:
        refused(lambda: encoder()([row]), "x")


@pytest.mark.parametrize("name", DECODERS)
def test_lists_and_arrays_of_tokens_are_taken(name):
    decoder, x, z = DECODERS[name]().eval(), torch.tensor([[1, 2], [3, -1]]), torch.zeros(2, LATENT)
    for other in (x.tolist(), x.numpy(), x.int(), x.numpy().astype("int16")):
        assert torch.equal(decoder(z, other), decoder(z, x))
        assert torch.equal(decoder.given(other[0])(z), decoder.given(x[0])(z))
