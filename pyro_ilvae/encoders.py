"""Networks for amortized guides: from a datum to the location and the positive scale of its latent variable."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae import _checks
from pyro_ilvae.networks import Module, mlp

__all__ = ["ConvEncoder", "MLPEncoder"]

# Softplus reaches exactly zero in float32, and a scale of zero has no log density.
_SMALLEST_SCALE = 1e-6


class MLPEncoder(Module):
    r"""A multilayer perceptron giving the location and scale of :math:`q(z \mid x) = N(\mu(x), \operatorname{diag}
    \sigma(x)^2)`.

    .. math:: (m, r) = \operatorname{MLP}(x), \qquad \mu = m, \qquad \sigma = \operatorname{softplus}(r + c) > 0,

    with :math:`c = \log(e - 1)`, so that the guide starts near the scale of a standard normal prior.

    Args:
        event_shape: the shape of one datum.
        latent_dim: the dimension :math:`K` of the latent variable.
        hidden_features: the widths of the hidden layers.
        input_transform: an elementwise function that is applied to the data first; ``torch.log1p`` suits counts.
        num_components: the number :math:`C` of components of a :class:`~pyro_ilvae.MixtureVAE`, if each component is to
            have its own posterior. ``forward`` then returns logits of :math:`q(y \mid x)`, of shape (..., C), and
            locations and scales of :math:`q(z \mid x, y)`, of shape (..., C, K).

    Raises:
        ValueError: for widths below 1. ``forward`` raises it for data of another shape.

    Example:
        >>> loc, scale = MLPEncoder(event_shape=(8, 8), latent_dim=2)(torch.zeros(5, 8, 8))
        >>> loc.shape, bool((scale > 0).all())
        (torch.Size([5, 2]), True)
    """

    _kind = "encoder"

    def __init__(
        self,
        *,
        event_shape: int | Sequence[int],
        latent_dim: int,
        hidden_features: Sequence[int] = (512, 512),
        input_transform: Callable[[Tensor], Tensor] | None = None,
        num_components: int | None = None,
    ) -> None:
        super().__init__()
        self.input_transform = None if input_transform is None else _checks.function("input_transform", input_transform)
        self.event_shape = _checks.event_shape(event_shape)
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        self.num_components = None if num_components is None else _checks.positive_int("num_components", num_components)
        self.network = mlp(
            self.event_shape.numel(), _checks.widths("hidden_features", hidden_features), _num_outputs(self)
        )

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return _sizes(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        r"""Location and scale, each of shape (..., K), for ``x`` of shape (..., \*event_shape).

        With ``num_components``, logits of shape (..., C), and location and scale of shape (..., C, K).
        """
        x = _checks.tensor("x", x)
        batch_shape = _batch_shape(x, self.event_shape)
        inputs = _as_input(x, self, self.input_transform).reshape((*batch_shape, self.event_shape.numel()))
        return _posterior(self.network(inputs), self)


class ConvEncoder(Module):
    r"""A small convolutional network giving the location and scale of :math:`q(z \mid x)` for images.

    Each convolution (kernel 3, stride 2) halves height and width. A multilayer perceptron reads the last feature map
    and returns location and scale as in :class:`MLPEncoder`.

    Args:
        event_shape: the shape (H, W) or (C, H, W) of one image.
        latent_dim: the dimension :math:`K` of the latent variable.
        channels: the numbers of channels of the convolutions.
        hidden_features: the widths of the perceptron's hidden layers.
        input_transform: as for :class:`MLPEncoder`.
        num_components: as for :class:`MLPEncoder`.

    Raises:
        ValueError: for an ``event_shape`` of another length and widths below 1. ``forward`` raises it for data of
            another shape.

    Example:
        >>> loc, scale = ConvEncoder(event_shape=(28, 28), latent_dim=2)(torch.zeros(5, 28, 28))
        >>> loc.shape, bool((scale > 0).all())
        (torch.Size([5, 2]), True)
    """

    _kind = "encoder"

    def __init__(
        self,
        *,
        event_shape: Sequence[int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden_features: Sequence[int] = (256,),
        input_transform: Callable[[Tensor], Tensor] | None = None,
        num_components: int | None = None,
    ) -> None:
        super().__init__()
        self.input_transform = None if input_transform is None else _checks.function("input_transform", input_transform)
        self.event_shape = _checks.event_shape(event_shape)
        if len(self.event_shape) not in (2, 3):
            raise ValueError(f"Expected event_shape (H, W) or (C, H, W), got {tuple(self.event_shape)}")
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        self.num_components = None if num_components is None else _checks.positive_int("num_components", num_components)
        self._image_shape = (1, *self.event_shape)[-3:]
        depths = [self._image_shape[0], *_checks.widths("channels", channels)]
        layers: list[nn.Module] = []
        for shallow, deep in pairwise(depths):
            convolution = PyroModule[nn.Conv2d](shallow, deep, 3, stride=2, padding=1)  # type: ignore[call-arg]
            layers += [convolution, PyroModule[nn.Softplus]()]
        self.convolutions = PyroModule[nn.Sequential](*layers)  # type: ignore[arg-type]
        height, width = (math.ceil(size / 2 ** len(channels)) for size in self._image_shape[1:])
        self.network = mlp(
            depths[-1] * height * width, _checks.widths("hidden_features", hidden_features), _num_outputs(self)
        )

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return _sizes(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        r"""Location and scale, each of shape (..., K), for ``x`` of shape (..., \*event_shape).

        With ``num_components``, logits of shape (..., C), and location and scale of shape (..., C, K).
        """
        x = _checks.tensor("x", x)
        batch_shape = _batch_shape(x, self.event_shape)
        images = _as_input(x, self, self.input_transform).reshape((batch_shape.numel(), *self._image_shape))
        output = self.network(self.convolutions(images).flatten(1))
        return _posterior(output.reshape((*batch_shape, output.shape[-1])), self)


def _sizes(encoder: MLPEncoder | ConvEncoder) -> str:
    sizes = f"event_shape={tuple(encoder.event_shape)}, latent_dim={encoder.latent_dim}"
    return sizes if encoder.num_components is None else f"{sizes}, num_components={encoder.num_components}"


def _batch_shape(x: Tensor, event_shape: torch.Size) -> torch.Size:
    split = x.dim() - len(event_shape)
    if split < 0 or x.shape[split:] != event_shape:
        expected = ", ".join(["...", *map(str, event_shape)])
        raise ValueError(f"Expected x of shape ({expected}), got {tuple(x.shape)}")
    return x.shape[:split]


def _as_input(x: Tensor, module: nn.Module, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    dtype = next(module.parameters()).dtype
    if x.dtype != dtype:
        # Counts and binary data may be integers, and a network's weights are floating point.
        x = _checks.tensor("x", x, dtype=dtype) if x.is_floating_point() or x.is_complex() else x.to(dtype)
    if transform is None:
        return x
    transformed = transform(x)
    if not isinstance(transformed, Tensor) or transformed.shape != x.shape:
        got = tuple(transformed.shape) if isinstance(transformed, Tensor) else f"a {type(transformed).__name__}"
        raise ValueError(f"Expected input_transform to return a tensor of shape {tuple(x.shape)}, got {got}")
    return transformed


def _num_outputs(encoder: MLPEncoder | ConvEncoder) -> int:
    numbers = 2 * encoder.latent_dim
    return numbers if encoder.num_components is None else encoder.num_components * (1 + numbers)


def _posterior(output: Tensor, encoder: MLPEncoder | ConvEncoder) -> tuple[Tensor, ...]:
    """Location and scale; with components, their logits come first."""
    logits: tuple[Tensor, ...] = ()
    if encoder.num_components is not None:
        logits = (output[..., : encoder.num_components],)
        output = output[..., encoder.num_components :].unflatten(-1, (encoder.num_components, -1))
    return *logits, *location_and_scale(output)


def location_and_scale(output: Tensor) -> tuple[Tensor, Tensor]:
    """Location and positive scale from the output of a network, of shape (..., 2 K); the scale starts near 1."""
    loc, raw = output.chunk(2, dim=-1)
    return loc, F.softplus(raw + math.log(math.e - 1)) + _SMALLEST_SCALE
