"""The decoders of sequences over which the laws are parametrised, and random tokens."""

import torch

from pyro_ilvae import (
    InverseLipschitzSequenceDecoder,
    ProjectedSequenceDecoder,
    RecurrentHistory,
    SequenceDecoder,
    TransformerHistory,
)

VOCAB, LATENT = 9, 3
HISTORIES = {
    "gru": lambda: RecurrentHistory(VOCAB, embedding_features=4, hidden_features=8),
    "lstm": lambda: RecurrentHistory(VOCAB, "lstm", embedding_features=4, hidden_features=8, num_layers=2),
    "transformer": lambda: TransformerHistory(VOCAB, features=8, num_heads=2, num_layers=1),
}


def composition(history, c=0.7, **options):
    options = {"history_features": 4, "map_features": (12, 8)} | options
    return InverseLipschitzSequenceDecoder(VOCAB, LATENT, c, history=history(), hidden_features=8, **options)


def projected(history, c=0.7, **options):
    options = {"map_features": (12, 8)} | options
    return ProjectedSequenceDecoder(VOCAB, LATENT, c, history=history(), hidden_features=8, **options)


INVERSE_LIPSCHITZ_DECODERS = {
    f"{kind.__name__}-{name}": lambda c=0.7, kind=kind, history=history, **options: kind(history, c, **options)
    for kind in (composition, projected)
    for name, history in HISTORIES.items()
}
DECODERS = {
    f"plain-{name}": lambda history=history, **options: SequenceDecoder(
        VOCAB, LATENT, history=history(), hidden_features=8, **options
    )
    for name, history in HISTORIES.items()
} | INVERSE_LIPSCHITZ_DECODERS


def tokens(num_sequences, length, seed=0):
    """Random rows of different lengths, one of them of the whole, some ended by token 0, padded with -1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, VOCAB, (num_sequences, length), generator=generator)
    lengths = torch.randint(1, length + 1, (num_sequences, 1), generator=generator)
    lengths[0] = length
    ended = torch.rand(num_sequences, generator=generator) < 0.5
    x[torch.arange(num_sequences), lengths.squeeze(1) - 1] *= ~ended
    return x.masked_fill(torch.arange(length) >= lengths, -1)
