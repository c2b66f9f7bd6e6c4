"""What the package asks of a decoder, an encoder, a likelihood and a history, and how to write one.

These are descriptions for readers and type checkers. Nothing here is a base class, and nothing checks for one: whatever
has the attributes that a function needs can be passed to it. Attributes marked *optional* may be left out.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Decoder", "Encoder", "History", "Likelihood"]


def __dir__() -> list[str]:
    return __all__


class Decoder(Protocol):
    r"""A map f from the latent variable to natural parameters.

    How to write one: derive from ``PyroModule``, set ``latent_dim`` and ``event_shape``, and let ``forward`` treat all
    dimensions of z but the last as batch dimensions, from the right. With nothing else it is a plain decoder. A decoder
    with an ``inverse_lipschitz`` that holds by construction is audited, bounded and scheduled as ours are. Save the
    constant with the module (``get_extra_state`` and ``set_extra_state`` do). A parameter drawn from a prior may have
    more dimensions on the left: index it from the right, and give a scalar the shape (1,).

    In a :class:`~pyro_ilvae.SequenceDecoder` the guarantee has to hold for C f too, with C f the logits without their
    mean. Our decoders do that by a centered frame; a decoder of yours has to see to it by itself.

    Attributes:
        latent_dim: the dimension K of z.
        event_shape: the shape of the natural parameters of one datum.
        context_dim: optional; the width of a context, if ``forward`` takes one.
        conditional: optional; True if ``forward`` needs more than z, so that f is no function of z alone.
        inverse_lipschitz: optional; the constant L of the whole map, with a setter if L may change.
        minimum_inverse_lipschitz: optional; the floor of a constant that is trained, which schedulers and controllers
            leave alone; None for a constant that is not trained.
        lipschitz: optional; a constant :math:`M` with :math:`\|f(z) - f(z')\| \le M \|z - z'\|`, which gives a
            ceiling beside the floor.
        frame: optional; an object with ``coordinates(y)``, Q^T y, by which a ``SequenceDecoder`` checks that Q is
            centered.
        coordinates: optional; a linear map P from outputs y of shape (..., \*event_shape) to (..., K), with z -> P f(z)
            one to one wherever its Jacobian is not singular. It is what
            :func:`~pyro_ilvae.diagnostics.guaranteed_information` rests on for K < D.
        channel_constant: optional; the inverse Lipschitz constant of z -> P f(z), if that is not ``inverse_lipschitz``.
        coordinate_constant: optional; a lower bound on the derivatives of (P f(z))_j along z_j, the same for all j.
        bounded_part: optional; a part g of f = h(g(z)), g from R^K to itself, and a constant :math:`L_1` with
            :math:`\|J_g^\top v\| \ge L_1 \|v\|`. It bounds the Fisher divergence of each datum. For K = D, f itself
            does.
    """

    latent_dim: int
    event_shape: torch.Size
    context_dim: int | None
    conditional: bool
    inverse_lipschitz: float
    lipschitz: float
    frame: Any
    coordinates: Callable[[Tensor], Tensor]
    channel_constant: float
    coordinate_constant: float
    bounded_part: tuple[nn.Module, float] | None

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Natural parameters of shape (..., \*event_shape), for ``z`` of shape (..., K) and a context (..., C)."""

    def given(self, context: Tensor | None = None, *, offset: Tensor | float | None = None) -> nn.Module:
        """Optional: the decoder at one context and one offset, as a function of z alone."""

    def initialize(self, x: Any, likelihood: Any, *, seed: int | None = None) -> None:
        """Optional: a start from data, which ``initialize`` of a model calls.

        Where there is a context, an offset or a mask, a decoder of yours is given data without them, on the scale of
        means, which need not be in the support of the likelihood.
        """


class Encoder(Protocol):
    """A network from data to the location and scale of q(z | x).

    How to write one: return a pair of tensors of shape (..., K), the scale positive. For a mixture with a posterior for
    each component, return logits of shape (..., C) before them, and set ``num_components``. An encoder whose
    ``forward`` has an argument ``context``, or ``mask``, is called with it by name where there is one.

    Attributes:
        latent_dim: optional; the dimension K of z, which has to be the decoder's.
        num_components: optional; the number C of components with a posterior of their own.
        context_dim: optional; the width of a context, None for an encoder that reads none.
        takes_mask: optional; whether it reads which entries are missing.
    """

    latent_dim: int
    num_components: int | None
    context_dim: int | None
    takes_mask: bool

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        r"""Location and scale, each of shape (..., K).

        Args:
            x: data of shape (..., \*data shape), with some other value where entries are missing.
            context: optional; of shape (..., C).
            mask: optional; booleans of the shape of ``x``, False where an entry is missing; None where none can be.
        """


class Likelihood(Protocol):
    r"""A family of distributions over data, indexed by natural parameters.

    How to write one: any callable that returns a Pyro distribution will do, a lambda too. Each optional attribute adds
    something: data checked on entry (``support``), guarantees and exact numbers in place of draws (the rest). Mark
    methods that read a parameter with ``pyro_method``, so that a prior on the parameter is seen. A class that derives
    from one of our likelihoods and overrides ``forward`` has to override ``mean``, ``natural_parameters``,
    ``divergence``, ``information_product`` and ``smallest_information`` too, because these are formulas for our
    density.

    Attributes:
        support: optional; the constraint that data must meet; finite numbers if left out.
        support_hint: optional; what to do about data outside of the support, as the end of an error message.
        integer_data: optional; True if data stay integers, as categories do.
        depends_on_batch: optional; True if the density of a datum depends on the other data of its batch. It is then
            called with a third argument where entries may be missing: booleans of the shape of ``x``, False where one
            is.
        noise_scale: optional; sigma, if x is eta plus independent Normal noise: one number for all entries of a datum,
            or a tensor of its shape with a scale for each.
    """

    support: Any
    support_hint: str
    integer_data: bool
    depends_on_batch: bool
    noise_scale: Tensor | float

    def __call__(self, eta: Tensor, x: Tensor | None = None) -> Any:
        """The distribution, whose batch shape ends in the shape of one datum; ``x`` are the data, if any."""

    def mean(self, eta: Tensor) -> Tensor:
        """Optional: E[x | eta]; the distribution's own mean if left out."""

    def natural_parameters(self, mean: Tensor) -> Tensor:
        """Optional: the eta with E[x | eta] = mean, for means inside of their range; a start from data needs it."""

    def divergence(self, eta: Tensor, other: Tensor) -> Tensor:
        """Optional: KL(p(x | eta) || p(x | other)) of each entry, in nats; PyTorch's formula or draws if left out."""

    def information_product(self, eta: Tensor, tangent: Tensor) -> Tensor:
        """Optional: the Fisher information at eta times a vector, whose shape ends in the shape of eta."""

    def smallest_information(self, eta: Tensor) -> Tensor:
        """Optional: the smallest eigenvalue of the Fisher information of each entry of a datum."""


class History(Protocol):
    """A network that summarizes the tokens before each position.

    How to write one: token V starts a sequence and token V + 1 is a hidden one. ``forward`` alone is enough for
    training; drawing sequences needs ``begin`` and ``step`` too.

    Attributes:
        features: the width H of the state.
        vocab_size: optional; the number V of tokens, which has to be the decoder's.
    """

    features: int
    vocab_size: int

    def forward(self, inputs: Tensor) -> Tensor:
        """States of shape (N, T, H) after each of the ``inputs``, int64 of shape (N, T)."""

    def begin(self, num_sequences: int) -> tuple[Tensor, ...]:
        """The state before any input: tensors with the sequences in their first dimension."""

    def step(self, inputs: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What ``forward`` returns at the next position, of shape (N, H), and the next state."""
