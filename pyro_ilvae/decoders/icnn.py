"""The input convex neural network: its value, its gradient and its Hessian, all as forward operations."""

import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from pyro.nn import PyroModule, PyroModuleList
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae import _checks
from pyro_ilvae.decoders.activations import ACTIVATIONS, Activation
from pyro_ilvae.decoders.arguments import dtype_of, points
from pyro_ilvae.decoders.frames import Frame
from pyro_ilvae.networks import Module, linear, public_method

__all__ = ["ICNN"]

_PROBE_SIZE = 256


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


def _log_normal_like(tensor: Tensor) -> Tensor:
    """Log-normal draws of the mean and variance that Hoedt & Klambauer 2023 derive for this fan-in."""
    fan_in = tensor.shape[-1]
    correlation = (fan_in - 1) * (3 * math.sqrt(3) + 2 * math.pi - 6)
    squared_mean = 6 * math.pi / (fan_in * (6 * (math.pi - 1) + correlation))
    log_variance = math.log1p(1 / fan_in / squared_mean)
    return torch.exp(
        0.5 * math.log(squared_mean) - 0.5 * log_variance + math.sqrt(log_variance) * torch.randn_like(tensor)
    )


def _activation_names(activation: str | Sequence[str], depth: int) -> tuple[str, ...]:
    names = (activation,) * depth if isinstance(activation, str) else ()
    if isinstance(activation, Sequence) and not isinstance(activation, str):
        names = tuple(activation)
    if len(names) != depth or any(not isinstance(name, str) or name not in ACTIVATIONS for name in names):
        raise ValueError(
            f"Expected activation to be one of {sorted(ACTIVATIONS)}, or one for each of the {depth} hidden layers, "
            f"got {activation!r}"
        )
    for position, name in enumerate(names):
        if position > 0 and not ACTIVATIONS[name].monotone:
            raise ValueError(
                f"Expected activation of hidden layer {position + 1} to be non-decreasing, got {name!r}, which only "
                "the first layer may use"
            )
    if not all(ACTIVATIONS[name].smooth for name in names):
        warnings.warn(
            f"The activation {activation!r} is piecewise, so the map is not differentiable everywhere; its inverse "
            "Lipschitz constant still holds. Use 'softplus' for a smooth map.",
            stacklevel=3,
        )
    return names


class _HiddenWeight(PyroModule):
    """The non-negative weight softplus(raw) of shape (out_features, in_features) between two hidden layers."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.empty(out_features, in_features))

    @property
    def weight(self) -> Tensor:
        return F.softplus(self.raw)


class ICNN(Module):
    r"""Input convex neural network: a scalar potential :math:`\psi: \mathbb{R}^D \to \mathbb{R}` that is convex.

    .. math::
        h_1 &= a_1(A_1 x + b_1), \qquad h_{i+1} = a_{i+1}(W_{i+1} h_i + A_{i+1} x + b_{i+1}), \\
        \psi(x) &= w^\top h_n + v^\top x, \qquad W_i, w \ge 0.

    The weights between hidden layers are softplus of free parameters, so :math:`\psi` is convex for *every* value of
    the parameters, also under a prior put on them. The linear term :math:`v` is the free bias of the gradient and does
    not touch convexity.

    :meth:`gradient` and :meth:`hessian` are reverse and forward sweeps written with ordinary operations. They need no
    ``requires_grad_``, work under ``torch.no_grad()``, and can be differentiated for training at the usual price.

    **Initialization.** :math:`A` is Normal with a standard deviation that gives pre-activations of variance 1 for
    inputs of norm :math:`\sqrt{D}`. :math:`W` is log-normal with variance 1/width, as in [2]; biases cancel the mean
    that non-negative weights accumulate. The closed-form constants of [2] hold for ReLU without skips, so each layer is
    instead scaled to unit variance on Normal inputs. Finally the output weight and :math:`v` are set so that the
    gradient has mean 0 and root mean square 1 per coordinate on these inputs, for every width, dimension and
    activation.

    Args:
        in_features: the dimension :math:`D` of the input.
        hidden_features: the widths of the hidden layers.
        activation: a name in :data:`pyro_ilvae.decoders.activations.ACTIVATIONS`, or one for each hidden layer.
        input_skips: whether every hidden layer sees the input (:math:`A_i, i > 1`) or only the first layer.

    Raises:
        ValueError: for widths below 1, an unknown activation, or an activation that a layer cannot use.

    References:
        | [1] Amos, Xu & Kolter 2017, Input convex neural networks, https://arxiv.org/abs/1609.07152
        | [2] Hoedt & Klambauer 2023, Principled weight initialisation for input-convex neural networks,
          https://arxiv.org/abs/2312.12474

    Example:
        >>> icnn = ICNN(in_features=3, hidden_features=(32, 32))
        >>> x = torch.randn(5, 3)
        >>> icnn(x).shape, icnn.gradient(x).shape, icnn.hessian(x).shape
        (torch.Size([5]), torch.Size([5, 3]), torch.Size([5, 3, 3]))
        >>> left, right = torch.randn(5, 3), torch.randn(5, 3)
        >>> bool((icnn((left + right) / 2) <= (icnn(left) + icnn(right)) / 2 + 1e-5).all())
        True
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: str | Sequence[str] = "softplus",
        input_skips: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = _checks.positive_int("in_features", in_features)
        self.hidden_features = _checks.widths("hidden_features", hidden_features)
        self._activation_names = _activation_names(activation, len(self.hidden_features))
        self.activation = activation if isinstance(activation, str) else self._activation_names
        self.input_skips = _checks.boolean("input_skips", input_skips)

        # One stacked matrix [A_1; A_2; ...]: the input enters by one product, and the gradient leaves by one.
        self.input_weight = nn.Parameter(torch.empty(sum(self._skipped_features), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.hidden_features)))
        self.hidden_weights = PyroModuleList(
            [
                _HiddenWeight(out_features, in_features)
                for in_features, out_features in zip(self.hidden_features[:-1], self.hidden_features[1:], strict=True)
            ]
        )
        self.output_weight_raw = nn.Parameter(torch.empty(self.hidden_features[-1]))
        self.slope = nn.Parameter(torch.empty(in_features))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Dimension, widths and activation, for ``print``."""
        return (
            f"in_features={self.in_features}, hidden_features={self.hidden_features}, activation={self.activation!r}, "
            f"input_skips={self.input_skips}"
        )

    @torch.no_grad()
    def reset_parameters(self, input_norm: float | None = None, gradient_scale: float = 1.0) -> None:
        r"""Draw the parameters anew, as described under "Initialization" above.

        Args:
            input_norm: the norm of a typical input; :math:`\sqrt{D}` if None.
            gradient_scale: the root mean square of a coordinate of the gradient on inputs of that norm.
        """
        norm = math.sqrt(self.in_features) if input_norm is None else _checks.positive("input_norm", input_norm)
        _checks.positive("gradient_scale", gradient_scale)
        self.slope.zero_()
        self.input_weight.normal_(std=1 / norm)
        self.bias.zero_()
        biases = self.bias.split(self.hidden_features)
        biases[0].normal_()
        activations = self._activations

        probe = torch.randn_like(self.input_weight[:1].expand(_PROBE_SIZE, -1))
        probe *= norm / math.sqrt(self.in_features)
        products = probe @ self.input_weight.mT
        skips = products.split(self._skipped_features, dim=-1)
        hidden = activations[0].value(skips[0] + biases[0])
        for i, layer in enumerate(self.hidden_weights, start=1):
            raw: Tensor = layer.raw  # type: ignore[assignment]
            weight = _log_normal_like(raw)
            terms = hidden @ weight.mT
            weight /= terms.std(0).square().mean().sqrt().clamp(min=1e-12)
            raw.copy_(_inverse_softplus(weight))
            terms = hidden @ weight.mT
            biases[i].copy_(-terms.mean(0))
            hidden = activations[i].value(terms + biases[i] + (skips[i] if self.input_skips else 0.0))

        weight = torch.full_like(self.output_weight_raw, 1 / len(self.output_weight_raw))
        self.output_weight_raw.copy_(_inverse_softplus(weight))
        gradient = self._gradient(products + self._input_bias(), self.input_weight)
        scale = gradient_scale / gradient.std(0).square().mean().sqrt().clamp(min=1e-12)
        self.output_weight_raw.copy_(_inverse_softplus(weight * scale))
        self.slope.copy_(-scale * gradient.mean(0))

    @property
    def _activations(self) -> list[Activation]:
        # Looked up by name, because some of the functions do not pickle.
        return [ACTIVATIONS[name] for name in self._activation_names]

    @property
    def smooth(self) -> bool:
        """Whether the gradient is differentiable everywhere; the activations alone decide it."""
        return all(activation.smooth for activation in self._activations)

    def forward(self, x: Tensor) -> Tensor:
        r"""The potential :math:`\psi(x)`, of shape (...), for ``x`` of shape (..., D)."""
        x = points("x", x, self.in_features, dtype_of(self))
        preactivations, _ = self._forward_sweep(linear(x, self.input_weight, self._input_bias()))
        last = self._activations[-1].value(preactivations[-1])
        return (last * F.softplus(self.output_weight_raw)).sum(-1) + (x * self.slope).sum(-1)

    @public_method
    def gradient(self, x: Tensor) -> Tensor:
        r"""The gradient :math:`\nabla\psi(x)`, of shape (..., D), for ``x`` of shape (..., D).

        .. math:: \nabla\psi(x) = v + \sum_i A_i^\top \delta_i, \qquad \delta_n = w \odot a_n'(s_n), \qquad
            \delta_{i} = (W_{i+1}^\top \delta_{i+1}) \odot a_i'(s_i),

        with :math:`s_i` the pre-activations. At a kink of a piecewise activation the result is one of the subgradients.
        """
        x = points("x", x, self.in_features, dtype_of(self))
        input_weight = self.input_weight
        return self._gradient(linear(x, input_weight, self._input_bias()), input_weight)

    @public_method
    def gradient_in_frame(self, u: Tensor, frame: Frame) -> Tensor:
        r"""The gradient :math:`\nabla\psi(B u)`, of shape (..., D), for ``u`` of shape (..., K), without forming B u.

        The frame is folded into the input weights, :math:`A_i (B u) = (A_i B) u`, so only the result is D wide.
        """
        u = points("u", u, frame.latent_dim, dtype_of(self))
        input_weight = self.input_weight
        return self._gradient(linear(u, frame.fold(input_weight), self._input_bias()), input_weight)

    @public_method
    def hessian(self, x: Tensor) -> Tensor:
        r"""The Hessian of the potential at ``x`` of shape (..., D): (..., D, D), symmetric, positive semi-definite.

        .. math:: \nabla^2\psi(x) = \sum_i P_i^\top \operatorname{diag}(c_i) P_i, \qquad P_1 = A_1, \quad
            P_{i+1} = W_{i+1} \operatorname{diag}(a_i'(s_i)) P_i + A_{i+1}, \qquad c_i = \bar h_i \odot a_i''(s_i),

        with :math:`\bar h_i = \partial\psi / \partial h_i`. Memory is (..., width, D).
        """
        x = points("x", x, self.in_features, dtype_of(self))
        input_weight = self.input_weight
        preactivations, weights = self._forward_sweep(linear(x, input_weight, self._input_bias()))
        adjoints = [adjoint for adjoint, _ in self._reverse_sweep(list(preactivations), list(weights))][::-1]
        skips = input_weight.split(self._skipped_features, dim=-2)
        total = x.new_zeros(())
        factor = skips[0]
        activations = self._activations
        for i, (activation, s, adjoint) in enumerate(zip(activations, preactivations, adjoints, strict=True)):
            if i > 0:
                derivative = activations[i - 1].derivative(preactivations[i - 1])
                factor = weights[i - 1] @ (derivative.unsqueeze(-1) * factor)
                if self.input_skips:
                    factor = factor + skips[i]
            curvature = (adjoint * activation.second_derivative(s)).unsqueeze(-2)
            total = total + (factor.mT * curvature) @ factor
        return 0.5 * (total + total.mT)

    @property
    def _skipped_features(self) -> tuple[int, ...]:
        """The widths of the hidden layers that see the input."""
        return self.hidden_features if self.input_skips else self.hidden_features[:1]

    def _input_bias(self) -> Tensor:
        """The biases of the hidden layers that see the input."""
        return self.bias if self.input_skips else self.bias[..., : self.hidden_features[0]]

    def _forward_sweep(self, inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Pre-activations s_1 ... s_n and hidden weights W_2 ... W_n, from the stacked A x + b of the input."""
        skips = inputs.split(self._skipped_features, dim=-1)
        weights: list[Tensor] = [layer.weight for layer in self.hidden_weights]  # type: ignore[misc]
        preactivations = [skips[0]]
        biases = self.bias.split(self.hidden_features, dim=-1)
        for i, (activation, weight) in enumerate(zip(self._activations[:-1], weights, strict=True), start=1):
            hidden = activation.value(preactivations[-1])
            preactivations.append(linear(hidden, weight) + (skips[i] if self.input_skips else biases[i]))
        return preactivations, weights

    def _reverse_sweep(self, preactivations: list[Tensor], weights: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Adjoints of each hidden layer's value and of its pre-activation, last layer first.

        Empties its arguments, so that their memory is freed as early as possible where no graph holds them.
        """
        adjoint = F.softplus(self.output_weight_raw)
        for activation in reversed(self._activations):
            delta = adjoint * activation.derivative(preactivations.pop())
            yield adjoint, delta
            if weights:
                adjoint = linear(delta, weights.pop().mT)

    def _gradient(self, inputs: Tensor, input_weight: Tensor) -> Tensor:
        preactivations, weights = self._forward_sweep(inputs)
        del inputs  # the pre-activations are views of it
        deltas = [delta for _, delta in self._reverse_sweep(preactivations, weights)][::-1]
        stacked = torch.cat(deltas, dim=-1) if self.input_skips else deltas[0]
        return linear(stacked, input_weight.mT, self.slope)
