"""Bi-Lipschitz maps: they stretch no distance by less than one constant and none by more than another."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._recording import is_recording
from pyro_ilvae.decoders.activations import ACTIVATIONS
from pyro_ilvae.decoders.arguments import dtype_of, points, without_autocast
from pyro_ilvae.decoders.brenier import LARGEST_CONSTANT, constant
from pyro_ilvae.decoders.conditional import ConditionalDecoder
from pyro_ilvae.decoders.frames import TrainedFrame
from pyro_ilvae.decoders.inversion import default_tolerance, invert
from pyro_ilvae.decoders.start import Place, Start, check_weights, start_from_data
from pyro_ilvae.networks import linear, public_method

__all__ = ["BiLipschitzMap"]

SMALLEST_SHARPNESS = 0.01  # in units of the sharpness at the start
SOFTPLUS = ACTIVATIONS["softplus"]
ENTRY = 0.125  # of a free matrix at the start, as a root mean square: an optimizer's steps then turn it by small angles


class BiLipschitzMap(ConditionalDecoder):
    r"""A map of :math:`\mathbb{R}^K` to itself that stretches each distance by at least L and at most :math:`M`.

    .. math:: L \|z - z'\| \le \|g(z) - g(z')\| \le M \|z - z'\|, \qquad
        g(z) = b + (g_n \circ \dots \circ g_1)(Q z), \qquad g_i(z) = \lambda z + (\mu - \lambda)\, W_i^\top s_i(W_i z),

    with :math:`\lambda = L^{1/n}`, :math:`\mu = M^{1/n}`, :math:`W_i^\top W_i \preceq I` and the elementwise
    :math:`s(u) = (\operatorname{softplus}(t u + c) - \operatorname{softplus}(c)) / t`, whose slopes are from 0 to 1.
    Since :math:`0 \preceq W_i^\top \operatorname{diag}(s_i') W_i \preceq I`, each :math:`g_i` is the gradient of a
    convex function with a Hessian whose eigenvalues are from :math:`\lambda` to :math:`\mu`. Both inequalities hold for
    such a gradient, and the constants of a composition multiply. The gradient of a convex function turns no difference
    by 90 degrees or more, so one rotation Q with :math:`Q^\top Q = I` in front turns for all layers. The constants
    cannot be improved: large shifts c make g(z) as near to :math:`b + L Q z` or :math:`b + M Q z` as rounding allows.
    With :math:`L = M` the map is :math:`b + L Q z`.

    W is made from a free matrix A with the columns scaled by :math:`(\sum_k |A^\top A|_{jk})^{-1/2}`, which makes all
    singular values at most 1 whatever A is [2], and one step :math:`W \mapsto \tfrac12 W (3 I - W^\top W)` [3], which
    leaves them at most 1 and brings them nearer to 1. No factorization is needed, and orthogonal columns stay so. Q is
    the orthonormal factor of a free matrix, I at the start. Other bi-Lipschitz maps find their values by an
    optimization [1]; this one is in closed form.

    The map is a decoder with K = D too. Under Normal noise of scale :math:`\sigma` and the prior N(0, I) it has

    .. math:: \tfrac K2 \log(1 + L^2 / \sigma^2) \le I(x; z) \le \tfrac K2 \log(1 + M^2 / \sigma^2)

    nats, see :func:`~pyro_ilvae.diagnostics.guaranteed_information`.

    Args:
        latent_dim: the dimension :math:`K`.
        inverse_lipschitz: the constant :math:`L`, from 0 to :math:`M`. ``Nats(kappa, likelihood).constant()`` is
            the number for nats per dimension under noise that is fixed.
        lipschitz: the constant :math:`M > 0`.
        hidden_features: the width of each layer, at least K; the larger of 64 and K if None.
        num_layers: the number of layers :math:`n`. More layers can do more.

    Raises:
        ValueError: for constants that are negative, not finite or not in this order, and a width below K.

    References:
        | [1] Kinoshita & Toyoizumi 2024, A provable control of sensitivity of neural networks through a direct
          parameterization of the overall bi-Lipschitzness, https://arxiv.org/abs/2404.09821
        | [2] Prach & Lampert 2022, Almost-orthogonal layers for efficient general-purpose Lipschitz networks,
          https://arxiv.org/abs/2208.03160
        | [3] Anil, Lucas & Grosse 2019, Sorting out Lipschitz function approximation, https://arxiv.org/abs/1811.05381

    Example:
        >>> bilipschitz = BiLipschitzMap(latent_dim=2, inverse_lipschitz=0.5, lipschitz=4.0)
        >>> near, far = torch.randn(100, 2), torch.randn(100, 2)
        >>> ratio = (bilipschitz(near) - bilipschitz(far)).norm(dim=-1) / (near - far).norm(dim=-1)
        >>> bool((ratio >= 0.5 - 1e-4).all() and (ratio <= 4 + 1e-4).all())
        True
    """

    # What a graph reads from ``_factors`` instead.
    _tensors_when_recorded = frozenset({"_inverse_lipschitz", "_lipschitz"})
    _factors: Tensor

    def __init__(
        self,
        latent_dim: int,
        inverse_lipschitz: float = 1.0,
        lipschitz: float = 10.0,
        *,
        hidden_features: int | None = None,
        num_layers: int = 2,
    ) -> None:
        latent_dim = _checks.positive_int("latent_dim", latent_dim)
        super().__init__(latent_dim, latent_dim, None)
        self.features = latent_dim
        width = max(64, latent_dim) if hidden_features is None else hidden_features
        self.hidden_features = _checks.positive_int("hidden_features", width, at_least=latent_dim)
        self.num_layers = _checks.positive_int("num_layers", num_layers)
        self.register_buffer("_factors", torch.zeros(2), persistent=False)
        self._set_constants(*_constants(inverse_lipschitz, lipschitz))
        shape = (self.num_layers, self.hidden_features)
        self.rotation = TrainedFrame(torch.eye(latent_dim))
        self.free_matrix = nn.Parameter(torch.empty(*shape, latent_dim))
        self.sharpness_raw = nn.Parameter(torch.full(shape, math.log(math.e - 1)))  # of softplus 1
        self.hidden_shift = nn.Parameter(torch.empty(shape))
        self.shift = nn.Parameter(torch.zeros(latent_dim))
        with torch.no_grad():
            for matrix in self.free_matrix:
                nn.init.orthogonal_(matrix, ENTRY * math.sqrt(self.hidden_features))
            self.hidden_shift.normal_(self._hidden_shift_at_start(), 0.5)

    def _hidden_shift_at_start(self) -> float:
        """The shift c for which slopes are between the constants: their geometric mean, or at most 1 for L = 0."""
        low, high = self._per_layer(self._inverse_lipschitz, self._lipschitz)
        if not low < high:
            return 0.0
        between = math.sqrt(low * high) or min(1.0, self._lipschitz / 2) ** (1 / self.num_layers)
        share = (between - low) / (high - low)
        return math.log(share / (1 - share))

    def extra_repr(self) -> str:
        """Dimension and constants, for ``print``."""
        return (
            f"latent_dim={self.latent_dim}, inverse_lipschitz={self.inverse_lipschitz:g}, "
            f"lipschitz={self.lipschitz:g}, hidden_features={self.hidden_features}, num_layers={self.num_layers}"
        )

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L; it is saved in ``state_dict()`` and may be set to a number up to ``lipschitz``."""
        return self._inverse_lipschitz

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float) -> None:
        self._set_constants(*_constants(value, self._lipschitz))

    @property
    def lipschitz(self) -> float:
        """The constant M; it is saved in ``state_dict()`` and may be set to a number from ``inverse_lipschitz``."""
        return self._lipschitz

    @lipschitz.setter
    def lipschitz(self, value: float) -> None:
        self._set_constants(*_constants(self._inverse_lipschitz, value))

    def _set_constants(self, inverse_lipschitz: float, lipschitz: float) -> None:
        # Python floats stay exact when the module's dtype changes.
        self._inverse_lipschitz, self._lipschitz = inverse_lipschitz, lipschitz
        self._fill_factors()

    def _per_layer(self, *constants: float) -> tuple[float, ...]:
        return tuple(value ** (1 / self.num_layers) for value in constants)

    def _fill_factors(self) -> None:
        """Put the constants of a layer into a tensor for recorded graphs."""
        constants = self._per_layer(self._inverse_lipschitz, self._lipschitz)
        with torch.no_grad():
            self._factors.copy_(torch.tensor(constants, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._factors.dtype in (torch.float16, torch.bfloat16):
            self._factors = self._factors.float()
        if not self._factors.is_meta:
            self._fill_factors()  # the old dtype may have been a shorter one
        return self

    def get_extra_state(self) -> Tensor:
        # A tensor, because some formats of checkpoints hold only tensors.
        return torch.tensor([self._inverse_lipschitz, self._lipschitz], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self._set_constants(*_constants(*state.tolist()))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        key = f"{prefix}_extra_state"
        if key in state_dict:  # checked here, where the error can name the key
            state = torch.as_tensor(state_dict[key])
            if state.shape != (2,):
                raise ValueError(f"Expected {key} to be the two constants, got shape {tuple(state.shape)}")
            try:
                _constants(*state.tolist())
            except ValueError as error:
                raise ValueError(f"Expected {key} to be the two constants of the map: {error}") from error
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _layers(self, dtype: torch.dtype) -> "_Layers":
        """What each layer is made of, from the parameters, each of which is read once."""
        if is_recording():
            low, high = self._factors.to(dtype)
        else:
            low, high = self._per_layer(self._inverse_lipschitz, self._lipschitz)  # type: ignore[assignment]
        weight = _contraction(self.free_matrix)
        sharpness = F.softplus(self.sharpness_raw) + SMALLEST_SHARPNESS
        # The rows of W become short where there are many, and what they see would have no curvature.
        sharpness = (math.sqrt(self.hidden_features / self.latent_dim) * sharpness).unsqueeze(-1)
        return _Layers(low, weight * sharpness, self.hidden_shift, (high - low) * weight / sharpness)

    def forward(self, z: Tensor) -> Tensor:
        """The map at ``z`` of shape (..., K), of the same shape."""
        z = points("z", z, self.latent_dim, self._dtype)
        with without_autocast(z.device.type):
            layers, z = self._layers(z.dtype), self.rotation.embed(z)
            for i in range(self.num_layers):
                z, _ = layers.value(i, z)
            return z + self.shift

    @public_method
    def jacobian(self, z: Tensor) -> Tensor:
        r"""The Jacobian at ``z`` of shape (..., K): (..., K, K), with singular values from L to :math:`M`."""
        z = points("z", z, self.latent_dim, self._dtype)
        with without_autocast(z.device.type):
            layers, rotation = self._layers(z.dtype), self.rotation.fixed()
            z, total = rotation.embed(z), rotation.matrix
            for i in range(self.num_layers):
                z, seen = layers.value(i, z)
                total = layers.slope(i, seen) @ total
            return total

    @public_method
    def inverse(self, y: Tensor, *, tolerance: float | None = None, max_iterations: int = 100) -> Tensor:
        r"""The point :math:`z` with :math:`g(z) = y`, as :meth:`BrenierMap.inverse` finds it.

        .. math:: z_{t+1} = z_t - \lambda_t \, J_g(z_t)^{-1} (g(z_t) - y), \qquad
            \|z_t - g^{-1}(y)\| \le \|g(z_t) - y\| / L.

        Args:
            y: values of shape (..., K).
            tolerance: as for :meth:`BrenierMap.inverse`.
            max_iterations: the number of Newton steps allowed.

        Returns:
            The points, of shape (..., K), which can be differentiated twice.

        Raises:
            ValueError: if ``y`` is not finite or has the wrong width, and for a tolerance that is not positive.
            RuntimeError: if some residual stays above the tolerance; with L = 0 the map need not reach every point, nor
                be one to one, which a singular Jacobian shows.

        Example:
            >>> bilipschitz = BiLipschitzMap(latent_dim=3).double()
            >>> z = torch.randn(10, 3, dtype=torch.double)
            >>> bool((bilipschitz.inverse(bilipschitz(z)) - z).norm(dim=-1).max() < 1e-6)
            True
        """
        y = points("y", y, self.latent_dim, self._dtype)
        tolerance = default_tolerance(y.dtype) if tolerance is None else _checks.positive("tolerance", tolerance)
        return invert(self, y, tolerance, _checks.positive_int("max_iterations", max_iterations))

    @torch.no_grad()
    def initialize(self, x: Any, likelihood: Any, *, seed: int | None = None) -> None:
        r"""Start where the data are: the shift b, from a sample and its likelihood.

        .. math:: b = \eta(\bar x) - E\,(g(z) - b), \qquad z \sim N(0, I),

        with :math:`\eta(\bar x)` the natural parameters of the mean of the data. All other weights keep their values.

        Args:
            x: a data sample, or an iterable of batches, as for :meth:`ProjectedDecoder.initialize`.
            likelihood: the likelihood of the data, with the methods ``natural_parameters`` and
                ``information_product``.
            seed: a seed for the draws of z; the global random state if None.

        Raises:
            ValueError: for data outside of the likelihood's support or of another shape, and weights with priors.
            TypeError: for a likelihood without these methods.

        Example:
            >>> from pyro_ilvae import likelihoods
            >>> bilipschitz = BiLipschitzMap(latent_dim=2)
            >>> bilipschitz.initialize(5 + torch.randn(100, 2), likelihoods.Normal(1.0), seed=0)
            >>> bool((bilipschitz(torch.randn(10_000, 2)).mean(0) - 5).abs().max() < 1)
            True
        """
        with seeded(seed):
            self._apply_start(self._start_of(x, likelihood, seed))

    def _start_of(self, x: Any, likelihood: Any, seed: int | None) -> Start:
        check_weights(self)
        return start_from_data(x, likelihood, Place(self.event_shape, self.latent_dim, self.shift), seed)

    @torch.no_grad()
    def _apply_start(self, start: Start) -> None:
        if start.bias is not None:
            self.shift.add_(start.bias - self._mean_over_prior())

    @property
    def _dtype(self) -> torch.dtype | None:
        return dtype_of(self)


class _Layers:
    """The layers of a map: lambda, the rows t W and shifts c of what they see, and the rows (mu - lambda) W / t."""

    def __init__(self, low: float | Tensor, inside: Tensor, shift: Tensor, outside: Tensor) -> None:
        self.low, self.inside, self.shift, self.outside = low, inside, shift, outside
        self.at_zero = SOFTPLUS.value(shift)

    def value(self, i: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """The value of layer i at ``z`` of shape (..., K), and what its hidden units see, of shape (..., H)."""
        seen = linear(z, self.inside[..., i, :, :], self.shift[..., i, :])
        hidden = SOFTPLUS.value(seen) - self.at_zero[..., i, :]
        return self.low * z + linear(hidden, self.outside[..., i, :, :].mT), seen

    def slope(self, i: int, seen: Tensor) -> Tensor:
        """The Jacobian of layer i, of shape (..., K, K)."""
        rows = SOFTPLUS.derivative(seen).unsqueeze(-1) * self.inside[..., i, :, :]
        eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        return self.low * eye + self.outside[..., i, :, :].mT @ rows


def _contraction(matrix: Tensor) -> Tensor:
    """A matrix with singular values of at most 1, from any matrix of shape (..., H, K)."""
    gram = (matrix.mT @ matrix).abs().sum(-1)
    scaled = matrix * gram.clamp(min=torch.finfo(gram.dtype).tiny).rsqrt().unsqueeze(-2)
    # s -> s (3 - s^2) / 2 maps [0, 1] to itself. Its slope is 0 at 1, where |A^T A| has a kink that it smooths.
    return 1.5 * scaled - 0.5 * (scaled @ (scaled.mT @ scaled))


def _constants(inverse_lipschitz: Any, lipschitz: Any) -> tuple[float, float]:
    """The two constants as numbers, or an error."""
    low, high = constant("inverse_lipschitz", inverse_lipschitz), _checks.positive("lipschitz", lipschitz)
    if high > LARGEST_CONSTANT:
        raise ValueError(f"Expected lipschitz <= {LARGEST_CONSTANT:g}, got {high:g}")
    if low > high:
        raise ValueError(f"Expected inverse_lipschitz <= lipschitz, got {low:g} and {high:g}")
    return low, high
