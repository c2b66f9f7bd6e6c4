"""Free bits: nats of each latent dimension that an objective does not charge."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.util import torch_item
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.infer.loss_module import LossModule
from pyro_ilvae.infer.remedies.site_divergences import SiteDivergence, SiteDivergences
from pyro_ilvae.infer.wrapped_elbo import WrappedELBO

__all__ = ["FreeBitsELBO"]

Stochastic: TypeAlias = Callable[..., Any]

# TraceMeanField_ELBO derives from Trace_ELBO.
_SUPPORTED = (Trace_ELBO, TraceEnum_ELBO)
_REFUSED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceMeanField_ELBO, TraceTailAdaptive_ELBO)


class FreeBitsELBO(WrappedELBO):
    r"""One of Pyro's ELBO objectives, in which a number of nats of each latent dimension is free.

    .. math:: \mathcal{L}_\lambda = E_q[\log p(x \mid z)] - W \sum_g \max(\lambda, \overline{\mathrm{KL}}_g), \qquad
        \overline{\mathrm{KL}}_g = \frac{1}{W} \sum_n w_n \sum_{j \in g}
        \mathrm{KL}(q(z_{nj} \mid x_n) \| p(z_{nj})), \qquad W = \sum_n w_n,

    with the weights :math:`w_n` of the data (the scale of a subsampled plate, masks, beta). A group g whose divergence,
    averaged over the minibatch and the particles, is below :math:`\lambda` has no reason to lower it. Neutral:
    :math:`\lambda = 0`.

    Training (``loss_and_grads``, ``differentiable_loss``) uses this objective; evaluation (``loss``, and so
    ``svi.evaluate_loss``) uses the ELBO itself, and so does the module ``elbo(model, guide)`` in evaluation mode. For
    annealing, pass this objective to :class:`~pyro_ilvae.AnnealedELBO`: beta then multiplies the maximum.

    The divergences have formulas, given the draws of sites that the guide draws before, whatever ``elbo`` does. Those
    given components that the guide enumerates (:class:`~pyro.infer.TraceEnum_ELBO`) are weighted by
    :math:`q(y \mid x)`. The guide's scales and masks of the site count. The divergence of a site in several plates
    is averaged over all of them. Of Pyro's AutoGuides, AutoNormal has formulas for sites of real numbers.

    Args:
        elbo: a Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO.
        nats: the free nats :math:`\lambda \ge 0` of each group; a mapping from names of sites to numbers gives each
            named site its own and leaves the other sites alone.
        groups: "dimension" for each event dimension, "site" for all dimensions of a site as one group, or the number of
            consecutive dimensions of a group (the last group may have fewer).
        sites: the names of the sites; if None, all latent sites in a plate, or those that ``nats`` names.

    Raises:
        ValueError: for another objective, and for nats that are negative or not finite. A training step raises it, with
            the name of the site, for a divergence without a formula, a distribution that does not factorize over its
            dimensions, a guide that draws sites in another order than the model, a prior that depends on a component
            which only the model enumerates, and a name that is not a latent site of both model and guide.
        TypeError: for names that are no strings.

    References:
        Kingma et al. 2016, Improving variational inference with inverse autoregressive flow,
        https://arxiv.org/abs/1606.04934

    Example:
        >>> import pyro, torch
        >>> from pyro.infer import SVI, TraceMeanField_ELBO
        >>> from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, likelihoods, remedies
        >>> decoder = MLPDecoder(latent_dim=2, event_shape=6, hidden_features=(8,))
        >>> encoder = MLPEncoder(latent_dim=2, event_shape=6, hidden_features=(8,))
        >>> vae = VAE(decoder, encoder, likelihoods.Normal(0.5))
        >>> elbo = remedies.FreeBitsELBO(TraceMeanField_ELBO(), nats=0.5)
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> loss = svi.step(torch.randn(20, 6))
        >>> elbo
        FreeBitsELBO(TraceMeanField_ELBO, nats=0.5, groups='dimension')
    """

    def __init__(
        self,
        elbo: ELBO,
        nats: float | Mapping[str, float],
        *,
        groups: Literal["dimension", "site"] | int = "dimension",
        sites: Sequence[str] | None = None,
    ) -> None:
        if not isinstance(elbo, _SUPPORTED) or isinstance(elbo, _REFUSED):
            got = f"the class {elbo.__name__}" if isinstance(elbo, type) else f"a {type(elbo).__name__}"
            hint = "; write AnnealedELBO(FreeBitsELBO(...), beta)" if hasattr(elbo, "beta") else ""
            raise ValueError(
                f"Expected elbo to be a Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO, got {got}{hint}"
            )
        super().__init__(elbo)
        self.nats = _checked_nats(nats)
        self.groups = _checked_groups(groups)
        self.sites = None if sites is None else _checked_sites(sites)
        if self.sites is not None and isinstance(nats, Mapping):
            raise ValueError(f"Expected sites=None for nats that name sites, got {list(self.sites)}")

    def __call__(self, model: Stochastic, guide: Stochastic) -> LossModule:
        """The loss as a module, as :meth:`AnnealedELBO.__call__ <pyro_ilvae.AnnealedELBO.__call__>`: with free bits in
        training mode, and without in evaluation mode.

        Args:
            model: a module, a method of a module, or any other model.
            guide: a module, a method of a module, or any other guide.

        Returns:
            a module whose result is a tensor of shape (), in nats.

        Raises:
            TypeError: for a model or guide that cannot be called, or that is a class.
        """
        return LossModule(_checks.function("model", model), _checks.function("guide", guide), self)

    def __repr__(self) -> str:
        sites = "" if self.sites is None else f", sites={list(self.sites)}"
        return f"{type(self).__name__}({type(self.elbo).__name__}, nats={self.nats}, groups={self.groups!r}{sites})"

    def loss_and_grads(self, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any) -> float:
        """The negative objective with free bits, in nats; its gradients are added to the parameters' gradients."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.elbo.retain_graph)  # type: ignore[no-untyped-call]
        return float(torch_item(loss))

    def differentiable_loss(self, model: Stochastic, guide: Stochastic, *args: Any, **kwargs: Any) -> Tensor:
        """The negative objective with free bits, in nats, as a tensor to differentiate."""
        compute: Callable[..., Tensor] = self.elbo.differentiable_loss
        names = self.nats if isinstance(self.nats, Mapping) else self.sites
        if not any(self.nats.values() if isinstance(self.nats, Mapping) else [self.nats]):
            return compute(model, guide, *args, **kwargs)
        with SiteDivergences(names, whole=self.groups == "site") as divergences:
            loss = compute(model, guide, *args, **kwargs)
        missing = sorted(set(names or ()) - set(divergences.found))
        if missing or not divergences.found:
            kind = "name latent sites of both model and guide" if missing else "have a latent site in a plate"
            raise ValueError(
                f"Expected {'nats' if isinstance(self.nats, Mapping) else 'sites'} to {kind}, got "
                f"{missing or 'none: name the sites of other models'}"
            )
        return loss + sum(self._shortfall(name, found) for name, found in divergences.found.items())

    def _shortfall(self, name: str, found: SiteDivergence) -> Tensor:
        """What the divergences of a site's groups lack of the free nats, with the weight of all data."""
        weight, divergences = (part / self.elbo.num_particles for part in found)
        nats = self.nats[name] if isinstance(self.nats, Mapping) else self.nats
        if isinstance(self.groups, int):
            divergences = torch.stack([group.sum() for group in divergences.split(self.groups)])
        return (nats * weight - divergences).relu().sum()


def _checked_nats(nats: Any) -> float | dict[str, float]:
    if not isinstance(nats, Mapping):
        return _checks.non_negative("nats", nats)
    if not nats:
        raise ValueError("Expected nats to name at least one site, got {}")
    return {name: _checks.non_negative(f"nats of site '{_name('nats', name)}'", value) for name, value in nats.items()}


def _checked_groups(groups: Any) -> Any:
    if isinstance(groups, str):
        return _checks.choice("groups", groups, ("dimension", "site"))
    if not _checks.is_int(groups):
        raise ValueError(f"Expected groups to be 'dimension', 'site' or an int >= 1, got {groups!r}")
    return _checks.positive_int("groups", groups)


def _checked_sites(sites: Any) -> tuple[str, ...]:
    if isinstance(sites, str) or not isinstance(sites, Sequence):
        raise TypeError(f"Expected sites to be a list of names of sites, got {sites!r}")
    if not sites:
        raise ValueError("Expected sites to name at least one site, got none")
    return tuple(_name("sites", name) for name in sites)


def _name(argument: str, name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"Expected {argument} to name sites, got the name {name!r}")
    return name
