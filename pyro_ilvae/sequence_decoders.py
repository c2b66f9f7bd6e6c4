"""Decoders of sequences whose logits are an inverse Lipschitz function of z at every position, and a plain one."""

from collections.abc import Sequence

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae import _checks
from pyro_ilvae.autoregressive import AutoregressiveDecoder
from pyro_ilvae.decoders import INITIAL_SCALE, InverseLipschitzDecoder
from pyro_ilvae.frames import OrthonormalFrame, centred_matrix
from pyro_ilvae.maps import BrenierMap
from pyro_ilvae.networks import unused

# PyroModule[...] makes classes at run time, which type checkers cannot follow.
_Linear: type[nn.Linear] = PyroModule[nn.Linear]  # type: ignore[assignment]


class Readout(PyroModule):
    r"""A network with one hidden layer from history and latent variable to logits.

    .. math:: \eta_t = W\,a(A h_t + B z + b) + c, \qquad a = \operatorname{softplus}.

    Args:
        history_features: the width of :math:`h_t`.
        latent_dim: the dimension :math:`K` of z.
        vocab_size: the number :math:`V` of tokens.
        hidden_features: the width of the hidden layer.
    """

    def __init__(self, history_features: int, latent_dim: int, vocab_size: int, hidden_features: int) -> None:
        super().__init__()
        self.from_history = _Linear(history_features, hidden_features)
        self.from_latent = _Linear(latent_dim, hidden_features, bias=False)
        self.output = _Linear(hidden_features, vocab_size)

    def forward(self, history: Tensor, z: Tensor) -> Tensor:
        """Logits of shape (..., T, V), for ``history`` of shape (..., T, H) and ``z`` of shape (..., 1, K)."""
        # By parts rather than of (h, z) side by side: z is the same at each position, h for each draw of z.
        logits: Tensor = self.output(F.softplus(self.from_history(history) + self.from_latent(z)))
        return logits


class SequenceDecoder(AutoregressiveDecoder):
    r"""The plain decoder of an ordinary sequential VAE (SVAE), which is free to ignore z.

    .. math:: f(z; h_t) = W\,a(A h_t + B z + b) + c.

    Args:
        vocab_size: the number :math:`V` of tokens.
        latent_dim: the dimension :math:`K` of the latent variable.
        history: "gru", "lstm" or "transformer", or a module such as :class:`~pyro_ilvae.RecurrentHistory`.
        hidden_features: the width of the state, unless the history is a module, and of the hidden layer behind it.
        word_dropout: the probability with which, in training, a token is hidden from those after it.

    References:
        Bowman et al. 2016, Generating sentences from a continuous space, https://arxiv.org/abs/1511.06349

    Example:
        >>> decoder = SequenceDecoder(vocab_size=10, latent_dim=2)
        >>> decoder(torch.zeros(3, 2), torch.tensor([[4, 5, 0]] * 3)).shape
        torch.Size([3, 3, 10])
    """

    def __init__(
        self,
        vocab_size: int,
        latent_dim: int,
        *,
        history: str | nn.Module = "gru",
        hidden_features: int = 256,
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, latent_dim, history, hidden_features, word_dropout)
        self.readout = Readout(self.history.features, latent_dim, vocab_size, hidden_features)  # type: ignore[arg-type]

    def _logits(self, history: Tensor, z: Tensor) -> Tensor:
        return self.readout(history, z)  # type: ignore[no-any-return]


class InverseLipschitzSequenceDecoder(AutoregressiveDecoder):
    r"""The composition of two Brenier maps on history and z side by side, the decoder of LIDSVAE and IL-LIDSVAE.

    .. math:: f(z; h_t) = g_2(B\, g_1(A h_t, z)), \qquad
        \|C f(z; h) - C f(z'; h)\| \ge L_1 L_2 \|z - z'\|, \qquad C = I - \tfrac1V 1 1^\top,

    with B of shape (V, F + K) with orthonormal columns orthogonal to the all-ones vector, so that the bound holds for
    the logits and also for what the softmax sees of them, C f. A reduces the history to F numbers, because a
    composition of this form can only widen: F + K <= V - 1. With ``inverse_lipschitz=0`` this is LIDSVAE [2].

    Args:
        vocab_size: the number :math:`V` of tokens.
        latent_dim: the dimension :math:`K` of the latent variable.
        inverse_lipschitz: the constant :math:`L = L_1 L_2 \ge 0`, split evenly, or the pair :math:`(L_1, L_2)`.
        history: "gru", "lstm" or "transformer", or a module such as :class:`~pyro_ilvae.RecurrentHistory`.
        hidden_features: the width of the state, unless the history is a module.
        history_features: the number :math:`F` of numbers the history is reduced to; the largest that is allowed, up to
            the width of the state, if None.
        map_features: the widths of the hidden layers of both maps.
        frame: "centred" (random), or B itself, of shape (V, F + K) with orthonormal columns that sum to 0.
        word_dropout: the probability with which, in training, a token is hidden from those after it.

    Raises:
        ValueError: for F + K > V - 1, a frame that is not orthonormal and centred, a negative or non-finite constant.

    References:
        | [1] Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder
          network, https://arxiv.org/abs/2304.12770
        | [2] Wang, Blei & Cunningham 2021, Posterior collapse and latent variable non-identifiability,
          https://arxiv.org/abs/2301.00537

    Example:
        >>> decoder = InverseLipschitzSequenceDecoder(vocab_size=30, latent_dim=2, inverse_lipschitz=0.5)
        >>> decoder(torch.zeros(3, 2), torch.tensor([[4, 5, 0]] * 3)).shape
        torch.Size([3, 3, 30])
    """

    def __init__(
        self,
        vocab_size: int,
        latent_dim: int,
        inverse_lipschitz: float | tuple[float, float] = 1.0,
        *,
        history: str | nn.Module = "gru",
        hidden_features: int = 256,
        history_features: int | None = None,
        map_features: Sequence[int] = (256, 256),
        frame: str | Tensor = "centred",
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, latent_dim, history, hidden_features, word_dropout)
        largest = self.vocab_size - 1 - self.latent_dim
        if largest < 1:
            raise ValueError(
                f"Expected vocab_size >= latent_dim + 2 = {self.latent_dim + 2}, so that centred logits have room for "
                f"z and some history, got {vocab_size}"
            )
        width: int = self.history.features  # type: ignore[assignment]
        reduced = min(width, largest) if history_features is None else history_features
        if _checks.positive_int("history_features", reduced) > largest:
            raise ValueError(
                f"Expected history_features <= {largest} = vocab_size - 1 - latent_dim, got {history_features}: the "
                "composition can only widen"
            )
        self.from_history = _Linear(width, reduced)
        joint = reduced + self.latent_dim
        self.composition = InverseLipschitzDecoder(
            joint, self.vocab_size, inverse_lipschitz, map_features, centred_matrix(frame, self.vocab_size, joint)
        )

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L of the whole decoder, see :class:`~pyro_ilvae.InverseLipschitzDecoder`."""
        return self.composition.inverse_lipschitz

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float | tuple[float, float]) -> None:
        self.composition.inverse_lipschitz = value  # type: ignore[assignment]

    def _logits(self, history: Tensor, z: Tensor) -> Tensor:
        reduced = self.from_history(history)
        batch_shape = torch.broadcast_shapes(reduced.shape[:-1], z.shape[:-1])
        joint = torch.cat([reduced.expand(*batch_shape, -1), z.expand(*batch_shape, -1)], dim=-1)
        return self.composition(joint)  # type: ignore[no-any-return]


class ProjectedSequenceDecoder(AutoregressiveDecoder):
    r"""Any network of history and z, made inverse Lipschitz in z by a map of K dimensions.

    .. math:: f(z; h_t) = Q\,\bigl(g(z) + A h_t + b\bigr) + (I - Q Q^\top)\, r(h_t, z), \qquad
        \|C f(z; h) - C f(z'; h)\| \ge L \|z - z'\|, \qquad C = I - \tfrac1V 1 1^\top,

    with :math:`r` any network, Q of shape (V, K) with orthonormal columns orthogonal to the all-ones vector, :math:`g`
    a :class:`~pyro_ilvae.BrenierMap`. What the history adds in brackets is the same for every z, so it costs nothing in
    the bound; without it the K directions of Q would know nothing of the history, and the tokens that they tell apart
    could not be predicted from it.

    Args:
        vocab_size: the number :math:`V` of tokens.
        latent_dim: the dimension :math:`K <= V - 1` of the latent variable.
        inverse_lipschitz: the constant :math:`L \ge 0`, in units of logits.
        history: "gru", "lstm" or "transformer", or a module such as :class:`~pyro_ilvae.RecurrentHistory`.
        hidden_features: the width of the state, unless the history is a module, and of the hidden layer behind it.
        map_features: the widths of the hidden layers of :math:`g`.
        frame: "centred" (random), or Q itself, of shape (V, K) with orthonormal columns that sum to 0;
            :func:`~pyro_ilvae.principal_token_frame` computes a good one from data.
        word_dropout: the probability with which, in training, a token is hidden from those after it.
        readout: the network :math:`r`, called with the history (..., T, H) and z (..., 1, K), to finite logits
            (..., T, V); one hidden layer if None.

    Raises:
        ValueError: for K > V - 1, a frame that is not orthonormal and centred, a negative or non-finite constant, and
            from ``forward`` for a readout that returns another shape.

    Example:
        >>> decoder = ProjectedSequenceDecoder(vocab_size=10, latent_dim=2, inverse_lipschitz=4.0)
        >>> decoder(torch.zeros(3, 2), torch.tensor([[4, 5, 0]] * 3)).shape
        torch.Size([3, 3, 10])
    """

    def __init__(
        self,
        vocab_size: int,
        latent_dim: int,
        inverse_lipschitz: float = 1.0,
        *,
        history: str | nn.Module = "gru",
        hidden_features: int = 256,
        map_features: Sequence[int] = (64, 64),
        frame: str | Tensor = "centred",
        word_dropout: float = 0.0,
        readout: nn.Module | None = None,
    ) -> None:
        super().__init__(vocab_size, latent_dim, history, hidden_features, word_dropout)
        width: int = self.history.features  # type: ignore[assignment]
        self.frame = OrthonormalFrame(centred_matrix(frame, self.vocab_size, self.latent_dim))
        self.map = BrenierMap(self.latent_dim, inverse_lipschitz, map_features)
        self.map.icnn.reset_parameters(gradient_scale=INITIAL_SCALE)
        self.from_history = _Linear(width, self.latent_dim)
        if readout is None:
            readout = Readout(width, self.latent_dim, self.vocab_size, hidden_features)
        self.readout = unused(readout)

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L of the whole decoder, which is that of its map g; it may be set at any time."""
        return self.map.inverse_lipschitz

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float) -> None:
        self.map.inverse_lipschitz = value

    def _logits(self, history: Tensor, z: Tensor) -> Tensor:
        logits = self.readout(history, z)
        expected = (*torch.broadcast_shapes(history.shape[:-1], z.shape[:-1]), self.vocab_size)
        if logits.shape != expected:
            raise ValueError(f"Expected readout to return shape {expected}, got {tuple(logits.shape)}")
        return self.frame.replace(logits, self.map(z) + self.from_history(history))
