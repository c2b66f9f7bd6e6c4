"""How a sequential model makes sequences: draws, and the most probable ones for given points."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro.nn import pyro_method
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.models._given import Given
from pyro_ilvae.models._sequence_autoencoder import SequenceAutoencoder
from pyro_ilvae.sequences.generation import Exclusions, ancestral_sample, beam_search


class GeneratesSequences(SequenceAutoencoder):
    """A model whose decoder makes sequences of tokens."""

    end_token: int | None
    max_length: int

    @torch.no_grad()
    def sample_prior(
        self,
        num_samples: int = 1,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        max_length: int | None = None,
        min_length: int = 0,
        exclude: Sequence[int] = (),
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Draws from the prior predictive: tokens of shape (num_samples, max_length), padded with -1.

        Args:
            num_samples: the number of sequences to draw.
            context: as for :meth:`sample`.
            temperature: as for :meth:`sample`.
            max_length: as for :meth:`sample`.
            min_length: as for :meth:`sample`.
            exclude: as for :meth:`sample`.
            batch_size: the number of sequences drawn at a time; all at once if None.
            seed: as for :meth:`sample`.
        """
        shape = torch.Size([_checks.positive_int("num_samples", num_samples)])
        limits: dict[str, Any] = {"max_length": max_length, "min_length": min_length, "exclude": exclude}
        with seeded(seed):
            z = self._prior().sample(shape)
            return self.sample(z, context, temperature=temperature, batch_size=batch_size, **limits)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        max_length: int | None = None,
        min_length: int = 0,
        exclude: Sequence[int] = (),
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        r"""A draw of x for each z, token by token: :math:`x_t \sim \operatorname{softmax}(f(z; h_t) / \tau)`.

        Args:
            z: of shape (..., K).
            context: the context of each z, with the same batch dimensions, or one context for all, of shape (C,) or a
                label. None for a decoder without a context of covariates.
            temperature: :math:`\tau > 0`; 1 draws from the model, and smaller values prefer probable tokens.
            max_length: the number of tokens after which a sequence is cut off; the model's ``max_length`` if None.
            min_length: the number of tokens before which the end token does not come.
            exclude: tokens that do not come at all, such as the token of unknown words. The probabilities of the others
                are scaled to a sum of 1 in each place.
            batch_size: the number of sequences drawn at a time; all at once if None.
            seed: a seed for the draws; the global random state if None.

        Returns:
            Tokens of shape (..., max_length), padded with -1 after the end token.
        """
        function = partial(ancestral_sample, temperature=temperature, exclusions=Exclusions(exclude, min_length))
        with seeded(seed):
            return self._generated(z, context, batch_size, function, max_length)

    @torch.no_grad()
    def search(
        self,
        z: Tensor,
        context: Tensor | None = None,
        *,
        num_beams: int = 1,
        length_bonus: float = 0.0,
        max_length: int | None = None,
        min_length: int = 0,
        exclude: Sequence[int] = (),
        batch_size: int | None = None,
    ) -> Tensor:
        r"""The most probable x that a beam search finds for each z; a single beam is a greedy search.

        Args:
            z: of shape (..., K).
            context: as for :meth:`sample`.
            num_beams: the number of sequences kept at each length. They have the largest log probabilities.
            length_bonus: the nats that each token earns: without a bonus, the most probable sequences are short.
            max_length: the number of tokens after which a sequence is cut off; the model's ``max_length`` if None.
            min_length: the number of tokens before which the end token does not come.
            exclude: tokens that do not come at all, such as the token of unknown words.
            batch_size: the number of sequences searched for at a time; all at once if None.

        Returns:
            Tokens of shape (..., max_length), padded with -1 after the end token.

        Raises:
            ValueError: for tokens that are not in the vocabulary, if no token is left, and for ``min_length`` above
                ``max_length``.
        """
        exclusions = Exclusions(exclude, min_length)
        function = partial(beam_search, num_beams=num_beams, length_bonus=length_bonus, exclusions=exclusions)
        return self._generated(z, context, batch_size, function, max_length)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        context: Tensor | None = None,
        target_context: Tensor | None = None,
        *,
        num_beams: int = 1,
        length_bonus: float = 0.0,
        max_length: int | None = None,
        min_length: int = 0,
        exclude: Sequence[int] = (),
        batch_size: int | None = None,
    ) -> Tensor:
        """The sequences that :meth:`search` finds at the posterior means of z, of shape (N, max_length).

        Args:
            x: tokens of shape (N, T), or an iterable of batches, as for :meth:`encode`.
            context: as for the model.
            target_context: the context in which z is decoded, ``context`` if None; one for each datum, or one for all.
            num_beams: as for :meth:`search`.
            length_bonus: as for :meth:`search`.
            max_length: as for :meth:`search`.
            min_length: as for :meth:`search`.
            exclude: as for :meth:`search`.
            batch_size: the number of data treated at a time; all at once if None.
        """
        limits: dict[str, Any] = {"max_length": max_length, "min_length": min_length, "exclude": exclude}
        found = []
        for given in self._batches(x, context, target_context=target_context, batch_size=batch_size):
            z, _ = self._code(given)
            own = self._decoder_context(given)
            found.append(self.search(z, own, num_beams=num_beams, length_bonus=length_bonus, **limits))
        return torch.cat(found)

    @torch.no_grad()
    def interpolate(
        self,
        start: Tensor,
        end: Tensor,
        num_steps: int = 7,
        context: Tensor | None = None,
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
            context: one context for all, of shape (C,) or a label. None for a model without one.
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
        one = None if context is None else self._checked_context("context", context, 1, repeat=True)
        first, last = (self._code(self._given(value.unsqueeze(0), one))[0] for value in ends.values())
        weight = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device).unsqueeze(-1)
        limits: dict[str, Any] = {"max_length": max_length, "min_length": min_length, "exclude": exclude}
        z = torch.lerp(first, last, weight)
        return self.search(z, context, num_beams=num_beams, length_bonus=length_bonus, **limits)

    @pyro_method  # draws a weight with a prior once and not for each token
    def _generated(
        self,
        z: Tensor,
        context: Tensor | None,
        batch_size: int | None,
        function: Callable[..., Tensor],
        max_length: int | None,
    ) -> Tensor:
        """The sequences that a function of :mod:`pyro_ilvae.sequences.generation` returns for ``z``, in batches."""
        z = _checks.tensor("z", z, dtype=self._prior_loc.dtype)
        _checks.last_dim("z", z, self.latent_dim)
        if not z.isfinite().all():
            raise ValueError("Expected z to hold finite numbers, got others")
        length = self.max_length if max_length is None else _checks.positive_int("max_length", max_length)
        flat = z.reshape(-1, self.latent_dim).to(self._prior_loc)
        given = self._given_to_decode(context, z.shape[:-1])
        size = len(flat) if batch_size is None else _checks.positive_int("batch_size", batch_size)
        parts = []
        with evaluation_mode(self):
            for rows, part in zip(flat.split(size), given.batches(batch_size), strict=True):
                beside = self._context_of(self._decoder_context(part))
                parts.append(function(self.decoder, rows, length, self.end_token, context=beside))
        return torch.cat(parts).reshape(*z.shape[:-1], length)

    def _given_to_decode(self, context: Any, batch_shape: torch.Size) -> Given:
        """The context of each z of a batch shape, which one context may stand for."""
        count = batch_shape.numel()
        width = getattr(self.decoder, "context_dim", None)
        if width is None and context is not None and getattr(self.encoder, "context_dim", None) is None:
            raise ValueError("Expected context=None for a model without context_dim, got a context")
        if width is None:  # an encoder alone reads it
            return Given(count)
        if context is None:
            raise ValueError(f"Expected context of shape (..., {width}) for a decoder with context_dim, got None")
        if len(batch_shape) > 1 and getattr(context, "shape", ())[: len(batch_shape)] == batch_shape:
            context = _checks.tensor("context", context).flatten(0, len(batch_shape) - 1)
        return Given(count, context=self._checked_context("context", context, count, repeat=True))
