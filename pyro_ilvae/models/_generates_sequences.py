"""How a sequential model makes sequences: draws, and the most probable ones for given points."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro.nn import pyro_method
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.models._autoencoder import Autoencoder, batches
from pyro_ilvae.sequences.decoder import SequenceDecoder
from pyro_ilvae.sequences.generation import Exclusions, ancestral_sample, beam_search


class GeneratesSequences(Autoencoder):
    """A model whose decoder makes sequences of tokens."""

    decoder: SequenceDecoder
    end_token: int | None
    max_length: int

    @torch.no_grad()
    def sample_prior(
        self,
        num_samples: int = 1,
        batch_size: int | None = None,
        *,
        temperature: float = 1.0,
        max_length: int | None = None,
        min_length: int = 0,
        exclude: Sequence[int] = (),
        seed: int | None = None,
    ) -> Tensor:
        """Draws from the prior predictive: tokens of shape (num_samples, max_length), padded with -1.

        Args:
            num_samples: the number of sequences to draw.
            batch_size: the number of sequences drawn at a time; all at once if None.
            temperature: as for :meth:`sample`.
            max_length: as for :meth:`sample`.
            min_length: as for :meth:`sample`.
            exclude: as for :meth:`sample`.
            seed: as for :meth:`sample`.
        """
        shape = torch.Size([_checks.positive_int("num_samples", num_samples)])
        limits: dict[str, Any] = {"max_length": max_length, "min_length": min_length, "exclude": exclude}
        with seeded(seed):
            return self.sample(self._prior().sample(shape), batch_size, temperature=temperature, **limits)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        batch_size: int | None = None,
        *,
        temperature: float = 1.0,
        max_length: int | None = None,
        min_length: int = 0,
        exclude: Sequence[int] = (),
        seed: int | None = None,
    ) -> Tensor:
        r"""A draw of x for each z, token by token: :math:`x_t \sim \operatorname{softmax}(f(z; h_t) / \tau)`.

        Args:
            z: of shape (..., K).
            batch_size: the number of sequences drawn at a time; all at once if None.
            temperature: :math:`\tau > 0`; 1 draws from the model, and smaller values prefer probable tokens.
            max_length: the number of tokens after which a sequence is cut off; the model's ``max_length`` if None.
            min_length: the number of tokens before which the end token does not come.
            exclude: tokens that do not come at all, such as the token of unknown words. The probabilities of the others
                are scaled to a sum of 1 in each place.
            seed: a seed for the draws; the global random state if None.

        Returns:
            Tokens of shape (..., max_length), padded with -1 after the end token.
        """
        function = partial(ancestral_sample, temperature=temperature, exclusions=Exclusions(exclude, min_length))
        with seeded(seed):
            return self._generated(z, batch_size, function, max_length)

    @torch.no_grad()
    def search(
        self,
        z: Tensor,
        batch_size: int | None = None,
        *,
        num_beams: int = 1,
        length_bonus: float = 0.0,
        max_length: int | None = None,
        min_length: int = 0,
        exclude: Sequence[int] = (),
    ) -> Tensor:
        r"""The most probable x that a beam search finds for each z; a single beam is a greedy search.

        Args:
            z: of shape (..., K).
            batch_size: the number of sequences searched for at a time; all at once if None.
            num_beams: the number of sequences kept at each length. They have the largest log probabilities.
            length_bonus: the nats that each token earns: without a bonus, the most probable sequences are short.
            max_length: the number of tokens after which a sequence is cut off; the model's ``max_length`` if None.
            min_length: the number of tokens before which the end token does not come.
            exclude: tokens that do not come at all, such as the token of unknown words.

        Returns:
            Tokens of shape (..., max_length), padded with -1 after the end token.

        Raises:
            ValueError: for tokens that are not in the vocabulary, if no token is left, and for ``min_length`` above
                ``max_length``.
        """
        exclusions = Exclusions(exclude, min_length)
        function = partial(beam_search, num_beams=num_beams, length_bonus=length_bonus, exclusions=exclusions)
        return self._generated(z, batch_size, function, max_length)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        batch_size: int | None = None,
        *,
        num_beams: int = 1,
        length_bonus: float = 0.0,
        max_length: int | None = None,
        min_length: int = 0,
        exclude: Sequence[int] = (),
    ) -> Tensor:
        """The sequences that :meth:`search` finds at the posterior means of z, of shape (N, max_length).

        Args:
            x: tokens of shape (N, T), or an iterable of batches, as for :meth:`encode`.
            batch_size: the number of data treated at a time; all at once if None.
            num_beams: as for :meth:`search`.
            length_bonus: as for :meth:`search`.
            max_length: as for :meth:`search`.
            min_length: as for :meth:`search`.
            exclude: as for :meth:`search`.
        """
        limits: dict[str, Any] = {"max_length": max_length, "min_length": min_length, "exclude": exclude}
        z, _ = self.encode(x, batch_size)
        return self.search(z, batch_size, num_beams=num_beams, length_bonus=length_bonus, **limits)

    @torch.no_grad()
    def interpolate(
        self,
        start: Tensor,
        end: Tensor,
        num_steps: int = 7,
        *,
        num_beams: int = 1,
        length_bonus: float = 0.0,
        max_length: int | None = None,
        min_length: int = 0,
        exclude: Sequence[int] = (),
    ) -> Tensor:
        """The sequences that :meth:`search` finds on the straight line between two posterior means.

        Args:
            start: the first sequence, tokens of shape (T,).
            end: the last sequence, tokens of shape (T',).
            num_steps: the number of points on the line, including both ends; at least 2.
            num_beams: as for :meth:`search`.
            length_bonus: as for :meth:`search`.
            max_length: as for :meth:`search`.
            min_length: as for :meth:`search`.
            exclude: as for :meth:`search`.

        Returns:
            Tokens of shape (num_steps, max_length), padded with -1 after the end token.
        """
        _checks.positive_int("num_steps", num_steps, at_least=2)
        ends = {name: _checks.tensor(name, value) for name, value in (("start", start), ("end", end))}
        for name, value in ends.items():
            if value.dim() != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                raise ValueError(
                    f"Expected {name} of shape (T,) and dtype torch.int64, got {tuple(value.shape)} and {value.dtype}"
                )
        first, last = (self.encode(value.unsqueeze(0))[0] for value in ends.values())
        weight = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device).unsqueeze(-1)
        limits: dict[str, Any] = {"max_length": max_length, "min_length": min_length, "exclude": exclude}
        z = torch.lerp(first, last, weight)
        return self.search(z, num_beams=num_beams, length_bonus=length_bonus, **limits)

    @pyro_method  # draws a weight with a prior once and not for each token
    def _generated(
        self, z: Tensor, batch_size: int | None, function: Callable[..., Tensor], max_length: int | None
    ) -> Tensor:
        """The sequences that a function of :mod:`pyro_ilvae.sequences.generation` returns for ``z``, in batches."""
        z = _checks.tensor("z", z, dtype=self._prior_loc.dtype)
        _checks.last_dim("z", z, self.latent_dim)
        if not z.isfinite().all():
            raise ValueError("Expected z to hold finite numbers, got others")
        length = self.max_length if max_length is None else _checks.positive_int("max_length", max_length)
        flat = z.reshape(-1, self.latent_dim).to(self._prior_loc)
        with evaluation_mode(self):
            parts = [function(self.decoder, batch, length, self.end_token) for batch in batches(flat, batch_size)]
        return torch.cat(parts).reshape(*z.shape[:-1], length)
