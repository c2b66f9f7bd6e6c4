"""Measures for controllers: what training batches say about collapse, as numbers whose running mean is followed."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics import evidence, guide_fisher_divergence, kl_divergence, kl_per_dimension

__all__ = ["Measure", "distortion", "fisher_divergence", "smallest_kl", "total_kl"]

Program = Callable[..., Any]


def __dir__() -> list[str]:
    return __all__


class Measure:
    r"""A function of a batch whose running mean a controller compares with its target.

    The running mean :math:`\bar m` is taken of ``function(batch)``, and the estimate is ``summary(mean)``. The smallest
    of several running means is a better estimate than a running mean of smallest values, which is too small.

    Args:
        function: a function of the arguments of model and guide that returns a number or a tensor.
        name: what ``print``, warnings and errors call it.
        unit: its unit, for the same.
        summary: a function from the running mean, a tensor of the shape that ``function`` returns, to one positive
            number; the mean itself if None.
        rises: whether more information between data and latent variable makes the measure rise.

    Raises:
        TypeError: for a ``function`` or ``summary`` that cannot be called.

    Example:
        >>> mean_of_data = Measure(torch.mean, name="mean", unit="")
        >>> mean_of_data(torch.tensor([1.0, 3.0]))
        tensor(2., dtype=torch.float64)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        unit: str = "nats",
        summary: Callable[[Tensor], Any] | None = None,
        rises: bool = True,
    ) -> None:
        self.function = _checks.function("function", function, "a function of the arguments of model and guide")
        self.name = str(name)
        self.unit = str(unit)
        self.summary = None if summary is None else _checks.function("summary", summary, "a function of a tensor")
        self.rises = _checks.boolean("rises", rises)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.unit})"

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The value for a batch, on the host and in double precision."""
        with torch.no_grad():
            value = self._numbers("", self.function(*args, **kwargs))
        if not value.isfinite().all():
            raise ValueError(f"Expected the measure '{self.name}' to be finite, got {value.tolist()}")
        return value

    def _numbers(self, which: str, value: Any) -> Tensor:
        """What a function returned, in double precision, as Python's numbers are."""
        try:
            found = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            found = None
        if found is None or found.is_complex():
            raise TypeError(f"Expected {which}the measure '{self.name}' to be real numbers, got {value!r}")
        return found.detach().to("cpu", torch.float64)

    def estimate(self, mean: Tensor) -> float:
        """The estimate at a running mean."""
        value = mean if self.summary is None else self._numbers("the summary of ", self.summary(mean))
        if value.numel() != 1:
            raise ValueError(
                f"Expected the measure '{self.name}' to be one number, got shape {tuple(value.shape)}: give it a "
                "summary"
            )
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"Expected the measure '{self.name}' to be finite, got {number}")
        return number


class _OfPrograms:
    """A diagnostic of a model and a guide as a function of a batch; a class, so that controllers can be pickled."""

    def __init__(
        self, compute: Callable[..., Tensor], model: Program, guide: Program, *, num_samples: int, **options: Any
    ) -> None:
        self.compute = compute
        self.model = _checks.function("model", model, "a model")
        self.guide = _checks.function("guide", guide, "a guide")
        self.options = {"num_samples": _checks.positive_int("num_samples", num_samples), **options}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.compute(self.model, self.guide, args, model_kwargs=kwargs or None, **self.options)


def _mean_kl_per_dimension(*args: Any, **options: Any) -> Tensor:
    return kl_per_dimension(*args, **options).values.mean(0)


def _mean_kl(*args: Any, **options: Any) -> Tensor:
    return kl_divergence(*args, **options).values.mean()


def _mean_fisher_divergence(*args: Any, **options: Any) -> Tensor:
    return guide_fisher_divergence(*args, **options).values.mean()


def _mean_distortion(*args: Any, **options: Any) -> Tensor:
    return -_mean_kl(*args, **options) - evidence(*args, **options).elbo.mean()


def smallest_kl(
    model: Program, guide: Program, *, site: str | None = None, num_samples: int = 10, plate: str | None = None
) -> Measure:
    r"""The smallest of the latent dimensions' mean KL divergences, in nats: "so many nats in each dimension".

    .. math:: \min_j \tfrac{1}{N} \sum_n \mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j)).

    Args:
        model: the model.
        guide: its guide.
        site: the name of a latent site; if None, the only one that the guide samples.
        num_samples: the number of draws where there is no formula, see
            :func:`~pyro_ilvae.diagnostics.kl_per_dimension`.
        plate: the name of the plate over the data; found if None.

    Returns:
        the measure.

    Example:
        >>> from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, likelihoods
        >>> decoder = MLPDecoder(latent_dim=2, event_shape=6, hidden_features=(8,))
        >>> encoder = MLPEncoder(event_shape=6, latent_dim=2, hidden_features=(8,))
        >>> vae = VAE(decoder, encoder, likelihoods.Normal(0.5))
        >>> smallest_kl(vae.model, vae.guide)(torch.randn(20, 6)).shape
        torch.Size([2])
    """
    function = _OfPrograms(_mean_kl_per_dimension, model, guide, site=site, num_samples=num_samples, plate=plate)
    return Measure(function, name="smallest KL", summary=torch.min)


def total_kl(
    model: Program, guide: Program, *, site: str | None = None, num_samples: int = 10, plate: str | None = None
) -> Measure:
    r"""The mean KL divergence of a datum's posterior from the prior, in nats: "so many nats in total".

    .. math:: \tfrac{1}{N} \sum_n \mathrm{KL}(q(z \mid x_n) \,\|\, p(z)).

    Args:
        model: the model.
        guide: its guide.
        site: the name of a latent site; if None, all latent sites together that the guide samples.
        num_samples: as for :func:`smallest_kl`.
        plate: as for :func:`smallest_kl`.

    Returns:
        the measure.
    """
    return Measure(
        _OfPrograms(_mean_kl, model, guide, site=site, num_samples=num_samples, plate=plate), name="total KL"
    )


def fisher_divergence(
    model: Program, guide: Program, *, site: str | None = None, num_samples: int = 10, plate: str | None = None
) -> Measure:
    r"""The mean relative Fisher divergence of a datum's posterior in the guide from the prior.

    .. math:: \tfrac{1}{N} \sum_n F(q(z \mid x_n) \,\|\, p(z)).

    For the posterior of the model, pass a function of your own around
    :func:`~pyro_ilvae.diagnostics.posterior_fisher_divergence` to :class:`Measure`.

    Args:
        model: the model.
        guide: its guide.
        site: as for :func:`smallest_kl`.
        num_samples: as for :func:`smallest_kl`.
        plate: as for :func:`smallest_kl`.

    Returns:
        the measure, in one over squared units of z.
    """
    function = _OfPrograms(_mean_fisher_divergence, model, guide, site=site, num_samples=num_samples, plate=plate)
    return Measure(function, name="Fisher divergence", unit="per squared unit of z")


def distortion(model: Program, guide: Program, *, num_samples: int = 1, plate: str | None = None) -> Measure:
    r"""The mean reconstruction error of a datum, in nats, which falls as information rises.

    .. math:: -\tfrac{1}{N} \sum_n E_{q(z \mid x_n)} \log p(x_n \mid z).

    Args:
        model: the model.
        guide: its guide.
        num_samples: the number of draws of z for each datum.
        plate: as for :func:`smallest_kl`.

    Returns:
        the measure.
    """
    function = _OfPrograms(_mean_distortion, model, guide, num_samples=num_samples, plate=plate)
    return Measure(function, name="distortion", rises=False)
