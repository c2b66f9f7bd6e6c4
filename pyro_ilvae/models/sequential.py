"""The variational autoencoder over sequences of tokens: a Pyro model and its amortized guide in one PyroModule."""

from functools import partial
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae.distributions import PADDING, TokenSequence
from pyro_ilvae.likelihoods import Categorical
from pyro_ilvae.models._data import as_tokens
from pyro_ilvae.models._generates_sequences import GeneratesSequences
from pyro_ilvae.models._parts import agreed, check_roles
from pyro_ilvae.sequences.decoder import SequenceDecoder
from pyro_ilvae.sequences.generation import ancestral_sample

__all__ = ["SequentialVAE"]


class SequentialVAE(GeneratesSequences):
    r"""A variational autoencoder over sequences of tokens: an SVAE, LIDSVAE or IL-LIDSVAE.

    .. math:: z_n \sim N(0, I_K), \qquad x_{nt} \mid x_{n,<t}, z_n \sim \operatorname{Categorical}\bigl(
        \operatorname{softmax} f(z_n; h_{nt})\bigr), \qquad q(z_n \mid x_n) = N(\mu(x_n), \operatorname{diag}
        \sigma(x_n)^2),

    for data :math:`n = 1, \dots, N` in the plate ``data``; the sites are ``z`` and ``x``, and :math:`h_{nt}` summarizes
    the tokens before t. With a plain decoder this is an SVAE, with an inverse Lipschitz decoder a LIDSVAE (L = 0) or an
    IL-LIDSVAE (L > 0).

    Data are tokens, int64 of shape (N, T), as :mod:`pyro_ilvae.datasets.text` makes them: each row is a sequence, and
    -1 fills the row after the last token. Padding adds nothing to a density, and columns that hold only padding are cut
    off.

    Args:
        decoder: a :class:`~pyro_ilvae.SequenceDecoder`. The model takes its vocabulary and latent dimension from it.
        encoder: a module from tokens (..., T) to the location and scale of z, each (..., K), such as
            :class:`~pyro_ilvae.SequenceEncoder`.
        data_size: the number N of data in the data set, see :class:`~pyro_ilvae.VAE`.
        context_network: as for :class:`~pyro_ilvae.VAE`, for a decoder with a ``context_dim`` of covariates.
        end_token: the token at which a drawn or searched sequence ends; if None, all these sequences have
            ``max_length`` tokens. In data it is a token like any other, except that only padding may follow it.
        max_length: the number of tokens after which a drawn or searched sequence is cut off.

    Raises:
        ValueError: if the parts disagree on a dimension. ``model`` and ``guide`` raise it, naming the site, for data
            that are not tokens, for rows without a token, for a token after padding or after the end token, and for
            more data than ``data_size``.

    References:
        | Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder
          network, https://arxiv.org/abs/2304.12770
        | Wang, Blei & Cunningham 2021, Posterior collapse and latent variable non-identifiability,
          https://arxiv.org/abs/2301.00537
        | Bowman et al. 2016, Generating sentences from a continuous space, https://arxiv.org/abs/1511.06349

    Example:
        >>> import pyro
        >>> from pyro.infer import SVI, TraceMeanField_ELBO
        >>> from pyro_ilvae import MLPDecoder, ProjectedDecoder, SequenceDecoder, SequenceEncoder
        >>> from pyro_ilvae.datasets import text
        >>> data = text.words()
        >>> vocab_size = len(data.vocabulary)
        >>> sizes = {"latent_dim": 2, "event_shape": vocab_size, "context_dim": 32}
        >>> backbone = MLPDecoder(**sizes, hidden_features=(32,))
        >>> decoder = ProjectedDecoder(backbone, **sizes, inverse_lipschitz=4.0, frame="centered")
        >>> vae = SequentialVAE(
        ...     SequenceDecoder("gru", decoder),
        ...     SequenceEncoder(vocab_size=vocab_size, latent_dim=2, hidden_features=32),
        ...     data_size=len(data.train),
        ...     end_token=data.vocabulary.end,
        ... )
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        >>> losses = [svi.step(batch) for batch in data.train[:100].split(20)]
        >>> vae.encode(data.test)[0].shape == (len(data.test), 2)
        True
        >>> samples = data.vocabulary.decode(vae.sample_prior(3))
    """

    decoder: SequenceDecoder

    def __init__(
        self,
        decoder: SequenceDecoder,
        encoder: nn.Module,
        *,
        data_size: int | None = None,
        context_network: nn.Module | None = None,
        end_token: int | None = None,
        max_length: int = 100,
    ) -> None:
        check_roles(decoder, encoder, Categorical(2))
        sizes = {
            "decoder.vocab_size": getattr(decoder, "vocab_size", None),
            "encoder.vocab_size": getattr(encoder, "vocab_size", None),
        }
        vocab_size = _checks.positive_int("vocab_size", agreed("vocab_size", sizes))
        super().__init__(
            decoder,
            encoder,
            Categorical(vocab_size),
            data_size=data_size,
            context_network=context_network,
            event_shape=vocab_size,
        )
        self.vocab_size = vocab_size
        self.max_length = _checks.positive_int("max_length", max_length)
        self.end_token = None if end_token is None else _checks.index_below("end_token", end_token, self.vocab_size)

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return (
            f"latent_dim={self.latent_dim}, vocab_size={self.vocab_size}, data_size={self.data_size}, "
            f"end_token={self.end_token}, max_length={self.max_length}"
        )

    @pyro_method
    def model(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        index: Tensor | None = None,
        num_data: int = 1,
    ) -> Tensor:
        """The generative model, conditioned on the data ``x`` if they are given.

        Args:
            x: a batch of tokens of shape (N, T), or None for a draw from the prior predictive.
            context: as for :meth:`~pyro_ilvae.VAE.model`.
            index: as for :meth:`~pyro_ilvae.VAE.model`.
            num_data: as for :meth:`~pyro_ilvae.VAE.model`.

        Returns:
            The value of site ``x``: the data, or a draw of shape (num_data, max_length).
        """
        given = self._given(x, context, num_data=num_data)
        x = given.x
        plate = self._data_plate(given, index)
        with plate:
            z = pyro.sample("z", self._prior())
        context = self._context_of(self._decoder_context(given))
        # Some handlers (uncondition) draw even if there are data: such draws have the length of the data.
        draw = partial(self._drawn, z, context, self.max_length if x is None else x.shape[1])
        # The decoder runs outside the plate, so that a weight with a prior is drawn once and not for each datum.
        tokens, logits = draw(z.shape[:-1]) if x is None else (x, self._logits(z, x, context))
        logits_of = partial(self._logits_of_others, z, context)
        distribution = TokenSequence(logits, tokens, draw, logits_of, drawn=x is None)
        with plate:
            value: Tensor = pyro.sample("x", distribution, obs=x)
        return value

    def _logits(self, z: Tensor, tokens: Tensor, context: Tensor | None) -> Tensor:
        logits: Tensor = self.decoder(z, tokens) if context is None else self.decoder(z, tokens, context)
        if logits.shape[-2:] != (tokens.shape[-1], self.vocab_size):
            raise ValueError(
                f"Expected decoder to return shape (..., {tokens.shape[-1]}, {self.vocab_size}), "
                f"got {tuple(logits.shape)}"
            )
        return logits

    @pyro_method
    def _drawn(
        self, z: Tensor, context: Tensor | None, max_length: int, batch_shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Independent draws given z, of shape (..., max_length), and their logits."""
        z = z.expand(*batch_shape, self.latent_dim)
        # Draws and their density come from the model in evaluation mode, without dropout.
        with evaluation_mode(self.decoder):
            with torch.no_grad():
                beside = None if context is None else context.expand(*batch_shape, -1).flatten(0, -2)
                rows = z.reshape(-1, self.latent_dim)
                flat = ancestral_sample(self.decoder, rows, max_length, self.end_token, context=beside)
            tokens = flat.reshape(*batch_shape, max_length)
            return tokens, self._logits(z, tokens, context)

    def _logits_of_others(self, z: Tensor, context: Tensor | None, tokens: Tensor) -> Tensor:
        """The logits at tokens that a handler puts in place of the data before it asks for their density."""
        if any(isinstance(part, PyroModule) and part._pyro_samples for part in self.decoder.modules()):
            raise ValueError(
                "Expected data as the argument x of a model whose decoder has a prior on a weight, got data from a "
                "handler at site 'x', for which the draw of the weight is no longer known"
            )
        return self._logits(z, tokens, context)

    def _check_decoder(self, decoder: nn.Module) -> None:
        if not all(hasattr(decoder, name) for name in ("vocab_size", "begin", "step")):
            raise TypeError(f"Expected decoder to be a SequenceDecoder, got a {type(decoder).__name__}")

    def _datum_shapes(self) -> set[torch.Size]:
        """None: sequences have any length."""
        return set()

    def _checked_data(self, x: Any, mask: Any = None) -> tuple[Tensor, None]:
        """The tokens, checked, without the columns that hold only padding."""
        x = as_tokens(x, self._prior_loc.device)
        if x.numel() and not (x.min() >= PADDING and x.max() < self.vocab_size):
            raise ValueError(
                f"Expected tokens at site 'x' from 0 to {self.vocab_size - 1}, or {PADDING} as padding, "
                f"got values from {int(x.min())} to {int(x.max())}"
            )
        present = x >= 0
        lengths = present.sum(-1)
        # A token after padding would be read as if the padding were not there.
        wrong = (lengths == 0) | (present[:, 1:] & ~present[:, :-1]).any(-1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"Expected at least one token in each row at site 'x', and padding only after its last token, got "
                f"{int(wrong.sum())} other rows, first row {row}: {x[row].tolist()}"
            )
        if self.end_token is not None:
            after = (x[:, :-1] == self.end_token) & present[:, 1:]
            if after.any():
                row = int(after.any(-1).nonzero()[0])
                raise ValueError(
                    f"Expected only padding ({PADDING}) after the end token {self.end_token} at site 'x', got "
                    f"{int(after.any(-1).sum())} other rows, first row {row}: {x[row].tolist()}"
                )
        return x[:, : int(lengths.max())], None
