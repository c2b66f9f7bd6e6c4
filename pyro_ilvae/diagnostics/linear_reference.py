"""What a linear VAE does with the data: which directions it collapses, and what divergence L leads to."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.arrays import check_finite

__all__ = ["LinearReference", "linear_reference"]

_ROWS = 4096  # the data treated at a time in double precision


class LinearReference(NamedTuple):
    """What a linear VAE at its optimum does with each principal direction, largest variance first."""

    variances: Tensor  #: the variances of the data along the principal directions, in squared units of x, of shape (J,)
    collapsed: Tensor  #: which directions a linear VAE collapses, booleans of shape (J,)
    kl: Tensor  #: the average KL per dimension of a linear VAE without a constraint, in nats, of shape (J,)
    noise_scale: float  #: the standard deviation sigma of the noise, in units of x
    inverse_lipschitz: float | None  #: the constant L, in units of x, given or computed from ``nats``
    nats: float | None  #: the average KL per dimension to expect for L, in nats, given or computed from L

    @property
    def num_collapsed(self) -> int:
        """The number of principal directions that a linear VAE collapses."""
        return int(self.collapsed.sum())

    def __repr__(self) -> str:
        expected = f"{printing.number(self.nats)} nats for L = {printing.number(self.inverse_lipschitz)}"
        return printing.described(
            self,
            f"{self.num_collapsed} of {len(self.variances)} directions collapsed",
            f"mean KL {printing.number(self.kl.mean())} nats without a constraint",
            None if self.nats is None else expected,
            f"noise scale {printing.number(self.noise_scale)}",
        )


def linear_reference(
    x: Tensor,
    noise_scale: float | Tensor,
    *,
    latent_dim: int | None = None,
    inverse_lipschitz: float | None = None,
    nats: float | None = None,
) -> LinearReference:
    r"""What to expect of the latent dimensions before any training, from a linear VAE on the same data.

    .. math:: \overline{\mathrm{KL}}_j = \tfrac12 \log \max(\lambda_j / \sigma^2, 1), \qquad
        \overline{\mathrm{KL}}(L) = \tfrac12 \log (1 + L^2 / \sigma^2), \qquad
        L(\kappa) = \sigma \sqrt{e^{2 \kappa} - 1},

    with :math:`\lambda_j` the variances of the data along their principal directions. The linear VAE is probabilistic
    PCA [1], :math:`x = \mu + W z + \sigma \epsilon` with :math:`z \sim N(0, I)`. At the optimum for a given
    :math:`\sigma`, its j-th latent dimension has :math:`\|w_j\|^2 = \lambda_j - \sigma^2` and the divergence
    :math:`\overline{\mathrm{KL}}_j` on average over the data, and is collapsed where :math:`\lambda_j \le \sigma^2`
    [2]. :math:`\overline{\mathrm{KL}}(L)` is the divergence of each dimension of the model
    :math:`x = L Q z + \sigma \epsilon` with orthonormal columns :math:`Q`, averaged over the model's own data, and
    :math:`L(\kappa)` is the constant for which this divergence is :math:`\kappa` nats.

    The numbers are a reference and no bound: a nonlinear decoder, an approximate posterior or another likelihood may
    have divergences above or below them.

    Args:
        x: a data sample of shape (N, \*event_shape), N >= 2.
        noise_scale: the standard deviation :math:`\sigma > 0` of the decoder's noise, in units of x: a number, or a
            tensor of one number such as ``likelihood.scale``. With a scale for each entry, pass ``x / scale`` and 1.
        latent_dim: the number of principal directions, at most D, the number of entries of a datum; all D if None.
        inverse_lipschitz: a constant :math:`L \ge 0` in units of x (z has none), to get its divergence.
        nats: a divergence :math:`\kappa \ge 0` per dimension, to get its constant, in place of ``inverse_lipschitz``.

    Returns:
        For each of the J = ``latent_dim`` principal directions the variance (with denominator N), whether the direction
        collapses and the divergence in nats; and the constant L and its divergence in nats, both None if neither was
        given.

    Raises:
        ValueError: for fewer than two data, data that are not finite, a ``noise_scale`` that is not positive, a
            ``latent_dim`` above D, a negative constant or divergence, and both a constant and a divergence.
        TypeError: for data that are neither a tensor nor an array nor a data frame.

    References:
        | [1] Tipping & Bishop 1999, Probabilistic principal component analysis, Journal of the Royal Statistical
          Society B 61
        | [2] Lucas et al. 2019, Don't blame the ELBO!, https://arxiv.org/abs/1911.02469

    Example:
        >>> x = torch.tensor([[2.0, 0.1], [-2.0, 0.1], [2.0, -0.1], [-2.0, -0.1]])
        >>> reference = linear_reference(x, noise_scale=0.5, nats=1.0)
        >>> reference.variances, reference.collapsed, reference.kl
        (tensor([4.0000, 0.0100]), tensor([False,  True]), tensor([1.3863, 0.0000]))
        >>> round(reference.inverse_lipschitz, 3)
        1.264
    """
    noise = _checks.positive("noise_scale", noise_scale)  # type: ignore[arg-type]  # a tensor of one number counts
    x = _checks.tensor("x", x)
    if x.is_complex():
        raise ValueError(f"Expected x to be real, got {x.dtype}")
    if x.dim() == 0 or len(x) < 2 or x[0].numel() == 0:
        raise ValueError(f"Expected x of shape (N, *event_shape) with N >= 2 data, got {tuple(x.shape)}")
    check_finite("x", x)
    features = x[0].numel()
    count = features if latent_dim is None else _checks.positive_int("latent_dim", latent_dim)
    if count > features:
        raise ValueError(f"Expected latent_dim <= {features}, the number of entries of a datum, got {latent_dim}")
    if inverse_lipschitz is not None and nats is not None:
        raise ValueError(f"Expected one of inverse_lipschitz or nats, got both: {inverse_lipschitz!r} and {nats!r}")
    if inverse_lipschitz is not None:
        inverse_lipschitz = _checks.non_negative("inverse_lipschitz", inverse_lipschitz)
        nats = 0.5 * math.log1p((inverse_lipschitz / noise) * (inverse_lipschitz / noise))
    elif nats is not None:
        nats = _checks.non_negative("nats", nats)
        inverse_lipschitz = noise * math.exp(nats) * math.sqrt(-math.expm1(-2 * nats))

    variances = torch.nn.functional.pad(_principal_variances(x.reshape(len(x), -1)), (0, features))[:count]
    check_finite("variances of x", variances)
    ratio = variances / noise / noise
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return LinearReference(
        variances=variances.to(dtype),
        collapsed=ratio <= 1,
        kl=0.5 * ratio.clamp(min=1).log().to(dtype),
        noise_scale=noise,
        inverse_lipschitz=inverse_lipschitz,
        nats=nats,
    )


def _principal_variances(flat: Tensor) -> Tensor:
    """The min(N, D) largest eigenvalues of the covariance of ``flat`` of shape (N, D), largest first, in double."""
    num_data, features = flat.shape
    mean = sum(rows.double().sum(0) for rows in flat.split(_ROWS)) / num_data
    if num_data <= features:
        return torch.linalg.svdvals(flat.double() - mean).square() / num_data
    # For 60,000 images the scatter matrix is quick to decompose and the data matrix is slow.
    scatter = torch.zeros(features, features, dtype=torch.float64, device=flat.device)
    for rows in flat.split(_ROWS):
        centered = rows.double() - mean
        scatter.addmm_(centered.mT, centered)
    return torch.linalg.eigvalsh(scatter / num_data).flip(-1).clamp(min=0)
