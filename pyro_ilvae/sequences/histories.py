"""Networks that summarize the tokens before each position: what an autoregressive decoder knows besides z."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.networks import Module
from pyro_ilvae.sequences._tokens import inputs_of

__all__ = ["RecurrentHistory", "TransformerHistory"]

State: TypeAlias = tuple[Tensor, ...]  # each tensor with the sequences in its first dimension


class RecurrentHistory(Module):
    r"""A recurrent network over the tokens before each position.

    .. math:: h_t = \operatorname{GRU}(h_{t-1}, e_{x_{t-1}}), \qquad x_0 = \text{start},

    with :math:`e` a learned embedding, or the same with an LSTM. The layer is PyTorch's own, whose weights take no
    priors.

    Args:
        vocab_size: the number :math:`V` of tokens. An input of V is the start of a sequence, and V + 1 is a token that
            word dropout has hidden.
        kind: "gru" or "lstm".
        embedding_features: the width of the embedding.
        hidden_features: the width :math:`H` of the state.
        num_layers: the number of layers.

    Example:
        >>> history = RecurrentHistory(vocab_size=10, hidden_features=32)
        >>> history(torch.tensor([[10, 3, 4]])).shape
        torch.Size([1, 3, 32])
    """

    _kind = "history"

    def __init__(
        self,
        vocab_size: int,
        kind: Literal["gru", "lstm"] = "gru",
        *,
        embedding_features: int = 64,
        hidden_features: int = 256,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        self.vocab_size = _checks.positive_int("vocab_size", vocab_size)
        self.kind = _checks.choice("kind", kind, ("gru", "lstm"))
        self.features = _checks.positive_int("hidden_features", hidden_features)
        width = _checks.positive_int("embedding_features", embedding_features)
        self.embedding = nn.Embedding(self.vocab_size + 2, width)
        layer = nn.GRU if kind == "gru" else nn.LSTM
        self.recurrent = layer(width, self.features, _checks.positive_int("num_layers", num_layers), batch_first=True)

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"vocab_size={self.vocab_size}, features={self.features}"

    def forward(self, inputs: Tensor) -> Tensor:
        """States of shape (N, T, H) after each of the ``inputs``, int64 of shape (N, T)."""
        inputs = inputs_of(inputs, self.vocab_size, dim=2)
        states: Tensor = self.recurrent(self.embedding(inputs))[0]
        return states

    def begin(self, num_sequences: int) -> State:
        """The state before any input."""
        _checks.positive_int("num_sequences", num_sequences, at_least=0)
        weight = self.embedding.weight
        zeros = weight.new_zeros(num_sequences, self.recurrent.num_layers, self.features)
        return (zeros,) if self.kind == "gru" else (zeros, zeros)

    def step(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """The state of shape (N, H) after one more input for each sequence, of shape (N,), and all of the state."""
        inputs = inputs_of(inputs, self.vocab_size, dim=1)
        # PyTorch puts the layers first, even with batch_first.
        before = tuple(part.transpose(0, 1).contiguous() for part in state)
        output, after = self.recurrent(self.embedding(inputs[:, None]), before[0] if self.kind == "gru" else before)
        parts = (after,) if self.kind == "gru" else after
        return output[:, 0], tuple(part.transpose(0, 1) for part in parts)


class TransformerHistory(Module):
    r"""A small causal Transformer over the tokens before each position, with sinusoidal positions.

    .. math:: h = \operatorname{Transformer}(\sqrt{H}\, e_{x_{0:T-1}} + p_{1:T}), \qquad x_0 = \text{start},

    where each position attends to itself and to the positions before it. The layers are PyTorch's own, with
    normalization first. When tokens are drawn one by one, each step runs over all tokens so far.

    Args:
        vocab_size: as for :class:`RecurrentHistory`.
        hidden_features: the width :math:`H`, an even number.
        num_heads: the number of heads of attention, a divisor of H.
        num_layers: the number of layers.
        dropout: the probability with which each layer drops a unit in training.

    Raises:
        ValueError: for an odd width, or a width that the heads do not divide.

    References:
        Vaswani et al. 2017, Attention is all you need, https://arxiv.org/abs/1706.03762

    Example:
        >>> history = TransformerHistory(vocab_size=10, hidden_features=32)
        >>> history(torch.tensor([[10, 3, 4]])).shape
        torch.Size([1, 3, 32])
    """

    _kind = "history"

    def __init__(
        self,
        vocab_size: int,
        *,
        hidden_features: int = 128,
        num_heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.vocab_size = _checks.positive_int("vocab_size", vocab_size)
        self.features = features = _checks.positive_int("hidden_features", hidden_features)
        if features % 2 or features % _checks.positive_int("num_heads", num_heads):
            raise ValueError(
                f"Expected hidden_features to be an even number that the {num_heads} heads of num_heads divide, got "
                f"{features}"
            )
        _checks.fraction("dropout", dropout)
        self.embedding = nn.Embedding(vocab_size + 2, features)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(features))
        layer = nn.TransformerEncoderLayer(
            features, num_heads, 4 * features, dropout, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(
            layer, _checks.positive_int("num_layers", num_layers), nn.LayerNorm(features), enable_nested_tensor=False
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"vocab_size={self.vocab_size}, features={self.features}"

    def forward(self, inputs: Tensor) -> Tensor:
        """States of shape (N, T, H) after each of the ``inputs``, int64 of shape (N, T)."""
        inputs = inputs_of(inputs, self.vocab_size, dim=2)
        embedded = math.sqrt(self.features) * self.embedding(inputs)
        length = inputs.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, embedded.device, embedded.dtype)
        states: Tensor = self.transformer(embedded + _positions(length, embedded), mask=mask, is_causal=True)
        return states

    def begin(self, num_sequences: int) -> State:
        """The state before any input: no tokens."""
        _checks.positive_int("num_sequences", num_sequences, at_least=0)
        device = self.embedding.weight.device
        return (torch.empty(num_sequences, 0, dtype=torch.long, device=device),)

    def step(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """The state of shape (N, H) after one more input for each sequence, of shape (N,), and all inputs so far."""
        inputs = inputs_of(inputs, self.vocab_size, dim=1)
        inputs = torch.cat([state[0], inputs[:, None]], dim=1)
        return self(inputs)[:, -1], (inputs,)


def _positions(length: int, like: Tensor) -> Tensor:
    """Sines and cosines of each position, of shape (length, H)."""
    frequency = torch.exp(-math.log(1e4) * torch.arange(0, like.shape[-1], 2, device=like.device) / like.shape[-1])
    angle = torch.arange(length, device=like.device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(like.dtype)


def make_history(history: str | nn.Module, vocab_size: int, hidden_features: int) -> nn.Module:
    """The network that a decoder's ``history`` argument asks for."""
    if isinstance(history, nn.Module):
        return history
    if history == "transformer":
        return TransformerHistory(vocab_size, hidden_features=hidden_features)
    if history in ("gru", "lstm"):
        return RecurrentHistory(vocab_size, history, hidden_features=hidden_features)  # type: ignore[arg-type]
    raise ValueError(f"Expected history to be 'gru', 'lstm', 'transformer' or a module, got {history!r}")
