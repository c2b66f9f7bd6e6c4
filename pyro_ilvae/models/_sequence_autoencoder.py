"""Models of sequences of tokens: guide, posterior and start."""

from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.nn import pyro_method
from torch import Tensor

from pyro_ilvae.models._autoencoder import Autoencoder
from pyro_ilvae.models._data import parts
from pyro_ilvae.sequences.decoder import SequenceDecoder


class SequenceAutoencoder(Autoencoder):
    """A model of sequences of tokens; see :class:`~pyro_ilvae.SequentialVAE` for the arguments."""

    decoder: SequenceDecoder
    _arguments = ("x", "context")

    @pyro_method
    def guide(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> Tensor:
        """The amortized posterior, or the prior without data; the arguments are as for the model.

        Returns:
            The value of site ``z``.
        """
        given = self._given(x, context, num_data=num_data)
        self._warn_of_another_model()
        return self._sample_z(given, self._data_plate(given, index))

    def create_plates(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> pyro.plate:
        """The plate over the data, as :meth:`~pyro_ilvae.VAE.create_plates`."""
        return self._plate_of_guide(self._given(x, context, num_data=num_data), index)

    @torch.no_grad()
    def encode(
        self, x: Tensor, context: Tensor | None = None, *, batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Location and scale of q(z | x), each of shape (N, K).

        Args:
            x: tokens of shape (N, T), or an iterable of batches, as for :meth:`~pyro_ilvae.VAE.encode`.
            context: as for the model.
            batch_size: the number of data encoded at a time; all, or all of a batch, at once if None.
        """
        return self._encoded(self._batches(x, context, batch_size=batch_size))

    @torch.no_grad()
    def initialize(self, x: Any, *, seed: int | None = None) -> None:
        """Start where the data are: the start of the decoder, see :meth:`~pyro_ilvae.SequenceDecoder.initialize`.

        A context is not taken off: the start is from the tokens alone.

        Args:
            x: a sample of tokens of shape (N, T), or an iterable of batches, which is read once.
            seed: a seed for the weights that are drawn anew; the global random state if None.

        Raises:
            TypeError: for a decoder without a method ``initialize``.
            ValueError: as for the model.
        """
        self._check_initializes()
        self.decoder.initialize(self._tokens(x), seed=seed)

    def _tokens(self, x: Any) -> Iterator[Tensor]:
        """The tokens of a sample or its batches, checked."""
        for part, of_iterable in parts(x, set(), 1):
            yield self._checked_data(self._of_batch(part)["x"] if of_iterable else part)[0]
