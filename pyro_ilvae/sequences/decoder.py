"""The autoregressive decoder of sequences: a history of the tokens, and a decoder with that history as its context."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.decoders.frame_arguments import check_centered
from pyro_ilvae.decoders.learned import LearnedConstant
from pyro_ilvae.decoders.nats import Nats
from pyro_ilvae.decoders.start import start_from_tokens
from pyro_ilvae.encoders import beside_context
from pyro_ilvae.networks import Module, public_method, unused
from pyro_ilvae.sequences._tokens import tokens_of
from pyro_ilvae.sequences.histories import State, make_history

__all__ = ["SequenceDecoder", "SequenceDecoderGiven"]


class SequenceDecoder(Module):
    r"""An autoregressive decoder: at each position, any decoder given the state of a history of the tokens before it.

    .. math:: x_t \mid x_{<t}, z \sim \operatorname{Categorical}(\operatorname{softmax} f(z; h_t)),

    with :math:`h_t` the state of the history before token t, which does not depend on z. With a plain decoder this is
    the decoder of an SVAE [1], which is free to ignore z. If f is L-inverse Lipschitz in z for every context, so are
    the logits at every position, and also what the softmax sees of them,

    .. math:: \|C f(z; h) - C f(z'; h)\| \ge L \|z - z'\|, \qquad C = I - \tfrac1V 1 1^\top,

    where the projected decoder and the composition have a centered frame, with columns orthogonal to the all-ones
    vector. The composition is the decoder of LIDSVAE [2] at L = 0, and of IL-LIDSVAE [3] above.

    Args:
        history: "gru", "lstm" or "transformer", of the width that the decoder's context has; or a module such as
            :class:`~pyro_ilvae.RecurrentHistory`, see :class:`~pyro_ilvae.protocols.History`.
        decoder: the map f from z and context to V logits, with ``event_shape=V``, ``context_dim`` the width of the
            state, and ``frame="centered"`` where it has a frame.
        word_dropout: the probability with which, in training, a token is hidden from the tokens after it.
        context_dim: the width C of a context of the whole sequence, such as covariates; None for none. The context of
            ``decoder`` is then the state and this context side by side, so that its width is H + C.

    Raises:
        ValueError: for a decoder without a context or with another event shape, a history of another width or
            vocabulary, a frame that is not centered, and a probability outside [0, 1].

    References:
        | [1] Bowman et al. 2016, Generating sentences from a continuous space, https://arxiv.org/abs/1511.06349
        | [2] Wang, Blei & Cunningham 2021, Posterior collapse and latent variable non-identifiability,
          https://arxiv.org/abs/2301.00537
        | [3] Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder
          network, https://arxiv.org/abs/2304.12770

    Example:
        >>> from pyro_ilvae import MLPDecoder, ProjectedDecoder
        >>> sizes = {"latent_dim": 2, "event_shape": 10, "context_dim": 32}
        >>> backbone = MLPDecoder(**sizes, hidden_features=(32,))
        >>> projected = ProjectedDecoder(backbone, **sizes, inverse_lipschitz=4.0, frame="centered")
        >>> decoder = SequenceDecoder("gru", projected)
        >>> decoder(torch.zeros(3, 2), torch.tensor([[4, 5, 0]] * 3)).shape, decoder.inverse_lipschitz
        (torch.Size([3, 3, 10]), 4.0)
    """

    _kind = "decoder"

    # forward needs the tokens beside z.
    conditional = True

    def __init__(
        self,
        history: str | nn.Module,
        decoder: nn.Module,
        *,
        word_dropout: float = 0.0,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        _checks.instance("decoder", decoder, nn.Module, "a module, such as MLPDecoder(...)")
        width = getattr(decoder, "context_dim", None)
        event_shape: tuple[int, ...] = getattr(decoder, "event_shape", ())
        if width is None:
            raise ValueError(f"Expected decoder with a context, as with context_dim=256, got {type(decoder).__name__}")
        if len(event_shape) != 1:
            raise ValueError(
                f"Expected decoder with event_shape (V,), V the number of tokens, got {tuple(event_shape)}"
            )
        self.context_dim = None if context_dim is None else _checks.positive_int("context_dim", context_dim)
        width = int(width) - (self.context_dim or 0)
        if width < 1:
            raise ValueError(
                f"Expected decoder with a context of the history's state and of {context_dim} numbers beside it, got "
                f"context_dim = {decoder.context_dim}"
            )
        self.vocab_size = int(event_shape[0])
        self.latent_dim = int(decoder.latent_dim)  # type: ignore[arg-type]
        self.event_shape = torch.Size(event_shape)
        self.history = unused(make_history(history, self.vocab_size, width))
        for name, own in (("features", width), ("vocab_size", self.vocab_size)):
            # A module of the user need not say what its vocabulary is.
            known = getattr(self.history, name, own if name == "vocab_size" else None)
            if known != own:
                raise ValueError(f"Expected history with the attribute {name} = {own}, as its decoder, got {known}")
        if hasattr(decoder, "frame"):
            check_centered(decoder.frame, self.vocab_size)  # type: ignore[arg-type]
        self.decoder = unused(decoder)
        self.word_dropout = _checks.fraction("word_dropout", word_dropout)

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        sizes = f"vocab_size={self.vocab_size}, latent_dim={self.latent_dim}, word_dropout={self.word_dropout:g}"
        return sizes if self.context_dim is None else f"{sizes}, context_dim={self.context_dim}"

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L of the decoder at each position, which may be set at any time; no attribute without one."""
        constant: float = self.decoder.inverse_lipschitz  # type: ignore[assignment]
        return constant

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float | tuple[float, float] | Nats | LearnedConstant) -> None:
        self.decoder.inverse_lipschitz = value  # type: ignore[assignment]

    @property
    def minimum_inverse_lipschitz(self) -> float | None:
        """The floor of a learned constant, which holds at every step; no attribute without a constant."""
        floor: float | None = self.decoder.minimum_inverse_lipschitz  # type: ignore[assignment]
        return floor

    @property
    def nats(self) -> float | None:
        """The nats per dimension by which the constant was given, as a reference; no attribute without a constant."""
        kappa: float | None = self.decoder.nats  # type: ignore[assignment]
        return kappa

    @nats.setter
    def nats(self, value: float) -> None:
        self.decoder.nats = value  # type: ignore[assignment]

    @property
    def _nats(self) -> Nats | None:
        return getattr(self.decoder, "_nats", None)

    @torch.no_grad()
    def initialize(self, x: Any, *, seed: int | None = None) -> None:
        r"""Start where the data are: directions of tokens that occur together, and the noise unit of a whole sequence.

        .. math:: u = \big( \operatorname{tr} I(b) / (T \operatorname{tr} I(b)^2) \big)^{1/2}, \qquad
            b_v = \log p_v - \tfrac1V \sum_w \log p_w,

        with :math:`p_v` the frequency of token v and T the mean length. The frame becomes that of
        :func:`~pyro_ilvae.principal_token_frame`, unless it was given, and the map starts with a fifth of a noise unit
        beside L z. The bias of the logits is left to be learned. Call it before training.

        Args:
            x: a sample of tokens, int64 of shape (N, T), padded with -1, or an iterable of batches. It is read once.
            seed: a seed for the weights that are drawn anew; the global random state if None.

        Raises:
            TypeError: for a decoder without a method ``initialize``.
            ValueError: for tokens outside the vocabulary, a sample without a token, and weights with priors.
        """
        decoder: Any = self.decoder
        if not hasattr(decoder, "_apply_start"):
            raise TypeError(
                f"Expected decoder with a start from data, such as ProjectedDecoder, got {type(decoder).__name__}"
            )
        with seeded(seed):
            decoder._apply_start(start_from_tokens(x, self.latent_dim, decoder._place(), seed))

    def forward(self, z: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Logits of shape (..., N, T, V), each token's given the true tokens before it.

        Args:
            z: of shape (..., N, K).
            x: the tokens, int64 of shape (..., N, T); padding may follow them.
            context: of shape (..., N, C); None without ``context_dim``.
        """
        z = _checks.tensor("z", z)
        _checks.last_dim("z", z, self.latent_dim)
        x = tokens_of("x", x, self.vocab_size)
        start = torch.full_like(x[..., :1], self.vocab_size)
        inputs = torch.cat([start, x[..., :-1].clamp(min=0)], dim=-1)
        if self.training and self.word_dropout > 0:
            hidden = torch.rand(inputs.shape, device=inputs.device) < self.word_dropout
            hidden[..., 0] = False
            inputs = inputs.masked_fill(hidden, self.vocab_size + 1)
        states = self.history(inputs.reshape(-1, inputs.shape[-1]))
        states = self._beside(states.reshape(*inputs.shape, -1), context)
        return self.decoder(z.unsqueeze(-2), states)  # type: ignore[no-any-return]

    def _beside(self, states: Tensor, context: Tensor | None) -> Tensor:
        """The states of positions, of shape (..., T, H), and the context of their sequence side by side."""
        if context is None:
            return beside_context(states, None, self.context_dim, "a decoder")
        context = _checks.tensor("context", context)
        return beside_context(states, context.unsqueeze(-2), self.context_dim, "a decoder")

    @public_method
    def begin(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits of the first token, of shape (N, V), and the state for :meth:`step`.

        Args:
            z: of shape (N, K).
            context: of shape (N, C); None without ``context_dim``.
        """
        z = _checks.tensor("z", z)
        _checks.last_dim("z", z, self.latent_dim)
        for name in ("begin", "step"):
            if not hasattr(self.history, name):
                raise TypeError(
                    f"Expected history with a method {name} to draw sequences, got a {type(self.history).__name__}"
                )
        start = torch.full((len(z),), self.vocab_size, device=z.device)
        context = None if context is None else _checks.tensor("context", context)
        _checks.context(context, self.context_dim)
        beside = () if context is None else (context,)
        return self.step(start, (z, *beside, *self.history.begin(len(z))))  # type: ignore[operator]

    @public_method
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits of the token after ``tokens``, of shape (N, V), and the next state; ``tokens`` has shape (N,)."""
        split = 1 if self.context_dim is None else 2
        own, before = state[:split], state[split:]
        history, after = self.history.step(tokens, before)  # type: ignore[operator]
        # With a dimension of positions, as in forward: a prior's draw of a weight has dimensions to the left.
        states = self._beside(history.unsqueeze(-2), *own[1:]) if own[1:] else history.unsqueeze(-2)
        return self.decoder(own[0].unsqueeze(-2), states).squeeze(-2), (*own, *after)

    def given(self, x: Tensor, context: Tensor | None = None) -> "SequenceDecoderGiven":
        """The decoder of one sequence as a function of z alone, for :func:`~pyro_ilvae.diagnostics.lipschitz_audit`.

        Args:
            x: the tokens, int64 of shape (T,), none of them padding.
            context: of shape (C,); None without ``context_dim``.

        Example:
            >>> from pyro_ilvae import InverseLipschitzDecoder
            >>> from pyro_ilvae.diagnostics import lipschitz_audit
            >>> composition = InverseLipschitzDecoder(
            ...     latent_dim=2, event_shape=10, inverse_lipschitz=4.0, context_dim=16, frame="centered"
            ... )
            >>> decoder = SequenceDecoder("gru", composition)
            >>> audit = lipschitz_audit(decoder.given(torch.tensor([4, 5, 0])), num_samples=50, steps=5, seed=0)
            >>> round(audit.certified, 3), audit.smallest >= audit.certified
            (6.928, True)
        """
        return SequenceDecoderGiven(self, x, context)


class SequenceDecoderGiven(nn.Module):
    r"""A decoder of sequences at one history, from z of shape (..., K) to logits of shape (..., T, V).

    Each of the T positions has the constant L of the decoder, so all together have :math:`\sqrt{T}\, L`.

    Args:
        decoder: a decoder of sequences.
        x: the tokens, int64 of shape (T,).
        context: the context of the sequence, of shape (C,); None for a decoder without one.

    Raises:
        ValueError: for tokens or a context of another shape, and padding.
    """

    conditional = False

    def __init__(self, decoder: SequenceDecoder, x: Tensor, context: Tensor | None = None) -> None:
        super().__init__()
        _checks.instance("decoder", decoder, SequenceDecoder, "a SequenceDecoder")
        x = tokens_of("x", x, decoder.vocab_size)
        if x.dim() != 1 or len(x) == 0 or x.min() < 0:
            raise ValueError(f"Expected x of shape (T,) with T >= 1 tokens and no padding, got {x.tolist()}")
        self.decoder = decoder
        self.latent_dim = decoder.latent_dim
        self.event_shape = torch.Size([len(x), decoder.vocab_size])
        if context is not None:
            context = _checks.tensor("context", context)
            if context.dim() != 1:
                raise ValueError(f"Expected context of shape ({decoder.context_dim},), got {tuple(context.shape)}")
        _checks.context(context, decoder.context_dim)
        self.register_buffer("x", x, persistent=False)
        self.register_buffer("context", context, persistent=False)

    def extra_repr(self) -> str:
        """The number of tokens and the constant, for ``print``."""
        return f"num_tokens={len(self.x)}, inverse_lipschitz={self.inverse_lipschitz}"

    @property
    def inverse_lipschitz(self) -> float | None:
        r"""The constant of all positions together; None without one."""
        constant = getattr(self.decoder, "inverse_lipschitz", None)
        return None if constant is None else math.sqrt(len(self.x)) * constant

    def forward(self, z: Tensor) -> Tensor:
        """Logits of shape (..., T, V), for ``z`` of shape (..., K)."""
        beside = () if self.context is None else (self.context.unsqueeze(0),)
        return self.decoder(z.unsqueeze(-2), self.x.unsqueeze(0), *beside).squeeze(-3)  # type: ignore[no-any-return]

    x: Tensor
    context: Tensor | None
