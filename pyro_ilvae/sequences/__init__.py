"""Parts for sequences of tokens: histories, decoders over them, an encoder, and generation."""

from pyro_ilvae.sequences.decoder import SequenceDecoder
from pyro_ilvae.sequences.encoder import SequenceEncoder
from pyro_ilvae.sequences.histories import RecurrentHistory, TransformerHistory

__all__ = [
    "RecurrentHistory",
    "SequenceDecoder",
    "SequenceEncoder",
    "TransformerHistory",
]
