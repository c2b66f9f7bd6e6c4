"""A factor that asks the encoder to find z again in what the decoder makes of it."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import Any, Self

import pyro
import torch
from pyro.poutine.messenger import Messenger, unwrap
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.distributions import innermost
from pyro_ilvae.infer.remedies.wrapped_encoder import location_and_scale_of

__all__ = ["LatentReconstruction"]

# Distributions whose attribute "mean" is NaN.
_WITHOUT_MEAN = (torch.distributions.Categorical, torch.distributions.Cauchy, torch.distributions.HalfCauchy)


class LatentReconstruction(Messenger):
    r"""A handler for models: a loss where the encoder does not find the drawn z in the mean of the likelihood.

    .. math:: \log p_w(x, z) = \log p(x, z) - w \sum_n \sum_j (z_{nj} - \mu_j(E[x_n \mid z_n]))^2,

    with the location :math:`\mu` of the encoder. A decoder that maps different z to the same mean cannot make this
    small. The term is a factor named ``"<latent>_reconstruction"`` in the plates of the observed site, whose scale and
    masks it has. Gradients reach decoder, encoder and guide. Neutral: w = 0, without a factor.

    The unit of the weight is nats for each squared unit of z: the term is, up to a constant, the log density of z under
    a Normal around the encoder's location with the variance 1 / (2 w). For a prior N(0, I), w = 1 / 2 weighs a distance
    as the prior does. :class:`~pyro_ilvae.AnnealedELBO` does not scale it. ``svi.evaluate_loss`` has it, because it is
    part of the model: evaluate and diagnose the model without the handler.

    Use it as ``LatentReconstruction(...)(model)``. The encoder then gets the model's argument ``context``, if it takes
    one; as a context manager, the handler knows no arguments.

    Args:
        encoder: a module or function from data to location and scale, such as the guide's.
        weight: the weight :math:`w \ge 0`, in nats for each squared unit of z.
        latent: the name of the latent site z.
        observed: the name of the observed site x.

    Raises:
        ValueError: for a negative weight. The model raises it, with the name of the site, for a likelihood without a
            mean, for a location of another shape than z, if z is not drawn before x, and if the encoder needs a context
            that the model is not called with.
        TypeError: for an encoder that cannot be called, and names that are no strings.

    References:
        Song, Kim & Lee 2025, Toward architecture-agnostic local control of posterior collapse in VAEs,
        https://arxiv.org/abs/2508.12530 (the latent reconstruction loss; this form of it is our reading)

    Example:
        >>> from pyro.infer import SVI, TraceMeanField_ELBO
        >>> from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, likelihoods, remedies
        >>> decoder = MLPDecoder(latent_dim=2, event_shape=6, hidden_features=(8,))
        >>> encoder = MLPEncoder(latent_dim=2, event_shape=6, hidden_features=(8,))
        >>> vae = VAE(decoder, encoder, likelihoods.Normal(0.5))
        >>> model = remedies.LatentReconstruction(vae.encoder, weight=0.1)(vae.model)
        >>> svi = SVI(model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        >>> loss = svi.step(torch.randn(20, 6))
    """

    def __init__(self, encoder: Callable[..., Any], *, weight: float, latent: str = "z", observed: str = "x") -> None:
        super().__init__()
        self.encoder = _checks.function("encoder", encoder, "a module or a function, such as vae.encoder")
        self.weight = _checks.non_negative("weight", weight)
        self.latent = _checks.instance("latent", latent, str, "the name of a site")
        self.observed = _checks.instance("observed", observed, str, "the name of a site")
        self._drawn: tuple[Any, Tensor] | None = None
        self._context: Any = None

    def __repr__(self) -> str:
        names = f"latent={self.latent!r}, observed={self.observed!r}"
        return f"{type(self).__name__}({type(self.encoder).__name__}, weight={self.weight}, {names})"

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The model under the handler."""
        _checks.function("fn", fn, "a model")
        wrapped = partial(_run, self, fn)
        wrapped.__wrapped__ = wrapped.fn = fn  # type: ignore[attr-defined]
        return wrapped

    def __enter__(self) -> Self:
        super().__enter__()
        self._drawn = None
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._drawn = self._context = None

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if self.weight == 0:
            return
        if msg["name"] == self.latent:
            self._drawn = msg["fn"], msg["value"]
        elif msg["name"] == self.observed and msg["is_observed"]:
            if self._drawn is None:
                raise ValueError(
                    f"Expected latent site '{self.latent}' before site '{self.observed}', got a model without it"
                )
            fn, z = self._drawn
            distances = (z - self._location(msg["fn"], z)).square()
            for _ in range(fn.event_dim):
                distances = distances.sum(-1)
            pyro.factor(f"{self.latent}_reconstruction", -self.weight * distances)

    def _location(self, fn: Any, z: Tensor) -> Tensor:
        """The encoder's location for the mean of the likelihood."""
        kind = innermost(fn)
        try:
            mean = None if isinstance(kind, _WITHOUT_MEAN) else fn.mean
        except (NotImplementedError, AttributeError):
            mean = None
        if mean is None:
            raise ValueError(
                f"Expected a likelihood with a mean at site '{self.observed}', got a {type(kind).__name__} without"
            )
        output = self.encoder(mean) if self._context is None else self.encoder(mean, context=self._context)
        loc, _ = location_and_scale_of(output)
        if loc.shape[-1:] != z.shape[-1:] or loc.dim() > z.dim():
            raise ValueError(
                f"Expected encoder to return a location of shape {tuple(z.shape)}, as site '{self.latent}', got "
                f"{tuple(loc.shape)}"
            )
        return loc


def _run(handler: LatentReconstruction, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with handler:
        if handler.weight > 0 and getattr(handler.encoder, "context_dim", None) is not None:
            handler._context = _context_of(fn, args, kwargs)
        return fn(*args, **kwargs)


def _context_of(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The context that the encoder gets, from the arguments of a model."""
    model = unwrap(fn)
    given: Mapping[str, Any] = kwargs
    with suppress(TypeError, ValueError):  # no signature, or arguments that the model will refuse
        bound = signature(model).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
    context = given.get("context")
    if context is None:
        if "x" in given and given["x"] is None:
            return None  # draws of the prior have no term
        raise ValueError("Expected a model that is called with a context for an encoder with context_dim, got none")
    while isinstance(model, partial):
        model = model.func
    # A model of this package turns labels into what its encoder takes.
    own = getattr(getattr(model, "__self__", None), "_encoder_context", None)
    return context if own is None else own(context)
