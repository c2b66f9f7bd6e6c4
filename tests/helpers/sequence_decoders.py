"""The decoders of sequences over which the laws are parametrized, and random tokens."""

import pytest
import torch

from pyro_ilvae import (
    InverseLipschitzDecoder,
    MLPDecoder,
    ProjectedDecoder,
    RecurrentHistory,
    SequenceDecoder,
    TransformerHistory,
)

VOCAB, LATENT, WIDTH = 9, 3, 8
SIZES = {"latent_dim": LATENT, "event_shape": VOCAB, "context_dim": WIDTH}
HISTORIES = {
    "gru": lambda: RecurrentHistory(VOCAB, embedding_features=4, hidden_features=WIDTH),
    "lstm": lambda: RecurrentHistory(VOCAB, "lstm", embedding_features=4, hidden_features=WIDTH, num_layers=2),
    "transformer": lambda: TransformerHistory(VOCAB, hidden_features=WIDTH, num_heads=2, num_layers=1),
}


def plain(history, word_dropout=0.0, **options):
    decoder = MLPDecoder(**SIZES, **{"hidden_features": (WIDTH,)} | options)
    return SequenceDecoder(history(), decoder, word_dropout=word_dropout)


def composition(history, c=0.7, word_dropout=0.0, **options):
    options = {"context_features": 4, "map_features": (12, 8), "frame": "centered"} | options
    decoder = InverseLipschitzDecoder(**SIZES, inverse_lipschitz=c, **options)
    return SequenceDecoder(history(), decoder, word_dropout=word_dropout)


def projected(history, c=0.7, word_dropout=0.0, backbone=None, **options):
    options = {"map_features": (12, 8), "frame": "centered"} | options
    backbone = MLPDecoder(**SIZES, hidden_features=(WIDTH,)) if backbone is None else backbone
    decoder = ProjectedDecoder(backbone, **SIZES, inverse_lipschitz=c, **options)
    return SequenceDecoder(history(), decoder, word_dropout=word_dropout)


INVERSE_LIPSCHITZ_DECODERS = {
    f"{kind.__name__}-{name}": lambda c=0.7, kind=kind, history=history, **options: kind(history, c, **options)
    for kind in (composition, projected)
    for name, history in HISTORIES.items()
}
DECODERS = {
    f"plain-{name}": lambda history=history, **options: plain(history, **options) for name, history in HISTORIES.items()
} | INVERSE_LIPSCHITZ_DECODERS

# For parametrized tests: all of them, and in a fast run the ones with a GRU.
EVERY_DECODER, EVERY_INVERSE_LIPSCHITZ_DECODER = (
    [name if "gru" in name else pytest.param(name, marks=pytest.mark.slow) for name in names]
    for names in (DECODERS, INVERSE_LIPSCHITZ_DECODERS)
)


def tokens(num_sequences, length, seed=0):
    """Random rows of different lengths, one of them of the whole, some ended by token 0, padded with -1."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    x = torch.randint(1, VOCAB, (num_sequences, length), generator=generator)
    lengths = torch.randint(1, length + 1, (num_sequences, 1), generator=generator)
    lengths[0] = length
    ended = torch.rand(num_sequences, generator=generator) < 0.5
    x[torch.arange(num_sequences), lengths.squeeze(1) - 1] *= ~ended
    return x.masked_fill(torch.arange(length) >= lengths, -1)
