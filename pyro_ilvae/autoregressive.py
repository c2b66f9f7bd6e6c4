"""What decoders of sequences share: the history of each position, steps from token to token, and one history alone."""

import math

import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.histories import State, make_history
from pyro_ilvae.networks import unused


class AutoregressiveDecoder(PyroModule):
    r"""What the decoders of sequences share: the history of each position, with teacher forcing and word dropout.

    .. math:: x_t \mid x_{<t}, z \sim \operatorname{Categorical}(\operatorname{softmax} f(z; h_t)).

    Subclasses say what :math:`f` is. The state :math:`h_t` depends on the tokens before t alone, not on z.

    Args:
        vocab_size: the number :math:`V` of tokens.
        latent_dim: the dimension :math:`K` of the latent variable.
        history: "gru", "lstm" or "transformer", or a module with the attribute ``features``, the width of its state,
            and the method ``forward`` of :class:`~pyro_ilvae.RecurrentHistory`, for inputs up to V + 1; to draw
            sequences it needs ``begin`` and ``step`` too.
        hidden_features: the width of the state, unless the history is a module, and of the hidden layer behind it.
        word_dropout: the probability with which, in training, a token is hidden from those after it.
    """

    def __init__(
        self, vocab_size: int, latent_dim: int, history: str | nn.Module, hidden_features: int, word_dropout: float
    ) -> None:
        super().__init__()
        self.vocab_size = _checks.positive_int("vocab_size", vocab_size)
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        self.event_shape = torch.Size([self.vocab_size])
        _checks.positive_int("hidden_features", hidden_features)
        self.history = unused(make_history(history, self.vocab_size, hidden_features))
        if not hasattr(self.history, "features"):
            raise ValueError(f"Expected history with the attribute features, the width of its state, got {history!r}")
        known = getattr(self.history, "vocab_size", self.vocab_size)
        if known != self.vocab_size:
            raise ValueError(f"Expected history of vocab_size {self.vocab_size}, got {known}")
        if not 0 <= _checks.constant("word_dropout", word_dropout) <= 1:
            raise ValueError(f"Expected word_dropout in [0, 1], got {word_dropout!r}")
        self.word_dropout = float(word_dropout)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        r"""Logits of shape (..., N, T, V), those of each token given the true ones before it.

        Args:
            z: of shape (..., N, K).
            x: the tokens, int64 of shape (..., N, T); what is not a token may follow them.
        """
        _checks.last_dim("z", z, self.latent_dim)
        start = torch.full_like(x[..., :1], self.vocab_size)
        inputs = torch.cat([start, x[..., :-1].clamp(min=0)], dim=-1)
        if self.training and self.word_dropout > 0:
            hidden = torch.rand(inputs.shape, device=inputs.device) < self.word_dropout
            hidden[..., 0] = False
            inputs = inputs.masked_fill(hidden, self.vocab_size + 1)
        states = self.history(inputs.reshape(-1, inputs.shape[-1]))
        return self._logits(states.reshape(*inputs.shape, -1), z.unsqueeze(-2))

    @pyro_method
    def begin(self, z: Tensor) -> tuple[Tensor, State]:
        """Logits of the first token, of shape (N, V) for ``z`` of shape (N, K), and the state for :meth:`step`."""
        _checks.last_dim("z", z, self.latent_dim)
        start = torch.full((len(z),), self.vocab_size, device=z.device)
        return self.step(start, (z, *self.history.begin(len(z))))  # type: ignore[operator]

    @pyro_method
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits of the token after ``tokens``, of shape (N, V), and the next state; ``tokens`` has shape (N,)."""
        z, *before = state
        history, after = self.history.step(tokens, tuple(before))  # type: ignore[operator]
        return self._logits(history.unsqueeze(-2), z.unsqueeze(-2)).squeeze(-2), (z, *after)

    def given(self, x: Tensor) -> "DecoderGiven":
        """The decoder of one sequence as a function of z alone, for :func:`~pyro_ilvae.diagnostics.lipschitz_audit`.

        Args:
            x: the tokens, int64 of shape (T,), none of them padding.

        Example:
            >>> from pyro_ilvae import ProjectedSequenceDecoder
            >>> from pyro_ilvae.diagnostics import lipschitz_audit
            >>> decoder = ProjectedSequenceDecoder(vocab_size=10, latent_dim=2, inverse_lipschitz=4.0)
            >>> audit = lipschitz_audit(decoder.given(torch.tensor([4, 5, 0])), num_samples=50, steps=5, seed=0)
            >>> round(audit.certified, 3), audit.smallest >= audit.certified
            (6.928, True)
        """
        return DecoderGiven(self, x)

    def _logits(self, history: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError


class DecoderGiven(nn.Module):
    r"""A decoder of sequences at one history, from z of shape (..., K) to logits of shape (..., T, V).

    Each of the T positions has the constant L of the decoder, and so all together :math:`\sqrt{T}\, L`.

    Args:
        decoder: a decoder of sequences.
        x: the tokens, int64 of shape (T,).

    Raises:
        ValueError: for tokens of another shape, and padding.
    """

    def __init__(self, decoder: AutoregressiveDecoder, x: Tensor) -> None:
        super().__init__()
        if x.dim() != 1 or len(x) == 0 or x.min() < 0:
            raise ValueError(f"Expected x of shape (T,) with T >= 1 tokens and no padding, got {x.tolist()}")
        self.decoder = decoder
        self.latent_dim = decoder.latent_dim
        self.event_shape = torch.Size([len(x), decoder.vocab_size])
        self.register_buffer("x", x, persistent=False)

    @property
    def inverse_lipschitz(self) -> float | None:
        r"""The constant of all positions together; None without one."""
        constant = getattr(self.decoder, "inverse_lipschitz", None)
        return None if constant is None else math.sqrt(len(self.x)) * constant

    def forward(self, z: Tensor) -> Tensor:
        """Logits of shape (..., T, V), for ``z`` of shape (..., K)."""
        return self.decoder(z.unsqueeze(-2), self.x.unsqueeze(0)).squeeze(-3)  # type: ignore[no-any-return]

    x: Tensor
