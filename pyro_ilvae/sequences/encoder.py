"""The network for guides over sequences: from tokens to the location and scale of the latent variable."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from pyro_ilvae import _checks
from pyro_ilvae._recording import is_recording
from pyro_ilvae.encoders import beside_context, location_and_scale
from pyro_ilvae.networks import Module, mlp
from pyro_ilvae.sequences._tokens import tokens_of

__all__ = ["SequenceEncoder"]


class SequenceEncoder(Module):
    r"""A bidirectional GRU giving the location and scale of :math:`q(z \mid x)` for sequences of any length.

    .. math:: (m, r) = \operatorname{MLP}(\overrightarrow{h}_T, \overleftarrow{h}_1), \qquad \mu = m, \qquad
        \sigma = \operatorname{softplus}(r + c) > 0,

    with :math:`c = \log(e - 1)`. Padding after the last token of a sequence is never read.

    Args:
        vocab_size: the number :math:`V` of tokens.
        latent_dim: the dimension :math:`K` of the latent variable.
        embedding_features: the width of the embedding.
        hidden_features: the width of the state in each direction, and of the perceptron's hidden layer.
        num_layers: the number of layers of the GRU.
        context_dim: the width of a context, such as covariates, that the perceptron reads too; None for x alone.

    Raises:
        ValueError: for widths below 1, and from ``forward`` for sequences without a token, for tokens outside the
            vocabulary, for tokens after padding, and for a context of another width.

    Example:
        >>> encoder = SequenceEncoder(vocab_size=10, latent_dim=2)
        >>> loc, scale = encoder(torch.tensor([[4, 5, 0], [7, 0, -1]]))
        >>> loc.shape, bool((scale > 0).all())
        (torch.Size([2, 2]), True)
    """

    _kind = "encoder"

    def __init__(
        self,
        *,
        vocab_size: int,
        latent_dim: int,
        embedding_features: int = 64,
        hidden_features: int = 256,
        num_layers: int = 1,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = _checks.positive_int("vocab_size", vocab_size)
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        width = _checks.positive_int("embedding_features", embedding_features)
        hidden = _checks.positive_int("hidden_features", hidden_features)
        layers = _checks.positive_int("num_layers", num_layers)
        self.embedding = nn.Embedding(self.vocab_size, width)
        self.recurrent = nn.GRU(width, hidden, layers, batch_first=True, bidirectional=True)
        self.context_dim = None if context_dim is None else _checks.positive_int("context_dim", context_dim)
        self.network = mlp(2 * hidden + (self.context_dim or 0), (hidden,), 2 * self.latent_dim)

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        sizes = f"vocab_size={self.vocab_size}, latent_dim={self.latent_dim}"
        return sizes if self.context_dim is None else f"{sizes}, context_dim={self.context_dim}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Location and scale, each of shape (..., K).

        Args:
            x: tokens of shape (..., T), int64, padded with -1.
            context: of shape (..., context_dim); batch dimensions of ``x`` and context broadcast.
        """
        x = tokens_of("x", x, self.vocab_size)
        flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        lengths = (flat >= 0).sum(-1)
        if not len(lengths) or not lengths.all():
            raise ValueError(f"Expected x with at least one token in each row, got {int((lengths == 0).sum())} without")
        embedded = self.embedding(flat.clamp(min=0))
        if is_recording():
            summary = self._summary_of_padded(embedded, lengths)
        else:
            packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
            _, last = self.recurrent(packed)
            # The last layer's two directions.
            summary = torch.cat([last[-2], last[-1]], dim=-1)
        summary = beside_context(summary.reshape(*x.shape[:-1], -1), context, self.context_dim)
        return location_and_scale(self.network(summary))

    def _summary_of_padded(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """The same from padded sequences, by operations that are the same for all lengths."""
        recurrent = self.recurrent
        steps = torch.arange(embedded.shape[1], device=lengths.device)
        # Each sequence from its last token to its first; what lies behind it stays where it is.
        reverse = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)[..., None]
        last = (lengths - 1)[:, None, None]
        value, summaries = embedded, list[Tensor]()
        for layer in range(recurrent.num_layers):
            outputs, summaries = [], []
            for suffix in ("", "_reverse"):
                given = value.gather(1, reverse.expand_as(value)) if suffix else value
                names = (f"{kind}_l{layer}{suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
                weights = [getattr(recurrent, name) for name in names]
                start = given.new_zeros(1, len(given), recurrent.hidden_size)
                output, _ = torch.gru(given, start, weights, True, 1, 0.0, self.training, False, True)
                summaries.append(output.gather(1, last.expand(-1, 1, output.shape[-1])).squeeze(1))
                outputs.append(output.gather(1, reverse.expand_as(output)) if suffix else output)
            value = torch.cat(outputs, dim=-1)
        return torch.cat(summaries, dim=-1)
