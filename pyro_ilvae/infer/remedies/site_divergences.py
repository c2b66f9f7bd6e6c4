"""The KL divergences of latent sites under one run of an objective, by a handler around both guide and model."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta, MaskedDistribution, constraints
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_ilvae.distributions import innermost, without_event

__all__ = ["SiteDivergence", "SiteDivergences"]

_PARTICLES = "num_particles_vectorized"  # Pyro's plate over the particles of an objective


class _Drawn(NamedTuple):
    """A site that the guide drew, or that the model alone has."""

    fn: Any
    value: Any
    infer: dict[str, Any]
    scale: Any
    mask: Any
    plates: tuple[Any, ...]
    position: int  #: in the order of drawing


class SiteDivergence(NamedTuple):
    """The divergence of a site, summed over its plates with their weights, in nats."""

    weight: Tensor  #: the sum of the weights (scale and mask) of all data, of shape ()
    divergences: Tensor  #: the weighted sum of the divergences of each event dimension, of shape (E,); (1,) of a whole


class SiteDivergences(Messenger):
    r"""Adds up the weighted divergences of latent sites while guide and model run inside of it.

    .. math:: S_j = \sum_n w_n\,E_{q(y \mid x_n)} \mathrm{KL}(q(z_{nj} \mid x_n, y) \| p(z_{nj} \mid y)), \qquad
        W = \sum_n w_n,

    with the weights :math:`w_n` that plates, scales, masks and annealing give the site in the guide, and components y
    that the guide enumerates. Several runs add up.

    Args:
        sites: the names of the sites; None for all latent sites in a plate.
        whole: whether a site is one whole, and not its event dimensions.
    """

    def __init__(self, sites: Collection[str] | None, *, whole: bool) -> None:
        super().__init__()
        self._sites = sites
        self._whole = whole
        self._drawn: dict[str, _Drawn] = {}
        self._replayed: set[str] = set()
        self.found: dict[str, SiteDivergence] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or site_is_subsample(msg):  # type: ignore[arg-type]
            return
        name, prior = msg["name"], msg["infer"].get("prior")
        drawn = self._drawn.get(name)
        if drawn is None or msg["value"] is not drawn.value:
            if drawn is not None:  # the next particle
                self._drawn.clear()
                self._replayed.clear()
            _check_enumeration(name, msg["infer"])
            plates = tuple(frame for frame in msg["cond_indep_stack"] if frame.name != _PARTICLES)
            drawn = _Drawn(msg["fn"], msg["value"], msg["infer"], msg["scale"], msg["mask"], plates, len(self._drawn))
            self._drawn[name] = drawn
            if prior is None:
                return
        # The model takes the guide's value, or, with Pyro's GuideMessenger, both run at once.
        if self._counts(name, drawn):
            self._add(name, drawn, msg["fn"] if prior is None else prior, msg["cond_indep_stack"])
        self._replayed.add(name)

    def _counts(self, name: str, drawn: _Drawn) -> bool:
        if self._sites is not None:
            return name in self._sites
        if any(not frame.vectorized for frame in drawn.plates):
            raise ValueError(
                f"Expected plates that are vectorized, got a sequential one at site '{name}', whose data are sites of "
                "their own: name the sites that are meant"
            )
        return bool(drawn.plates)

    def _add(self, name: str, drawn: _Drawn, prior: Any, frames: tuple[Any, ...]) -> None:
        later = [other for other in self._replayed if self._drawn[other].position > drawn.position]
        if later:
            raise ValueError(
                f"Expected a guide that draws its sites in the order of the model, got site '{name}' before {later}: "
                "its divergence has no formula if its prior depends on them"
            )
        values = _divergences(name, self._posterior(name, drawn, prior), prior, self._whole)
        values = self._expected(name, drawn, values)
        sizes = [(frame.dim - 1, frame.size) for frame in frames if frame.vectorized]
        shape = torch.broadcast_shapes(values.shape, *((size, *(1,) * (-1 - dim)) for dim, size in sizes))
        scale, mask = (
            part.unsqueeze(-1) if isinstance(part, Tensor) and part.dim() > 0 else part
            for part in (drawn.scale, drawn.mask)
        )
        parts = [part.shape for part in (scale, mask) if isinstance(part, Tensor) and part.dim() > 0]
        if torch.broadcast_shapes((*shape[:-1], 1), *parts).numel() != shape[:-1].numel():
            raise ValueError(
                f"Expected scale and mask of site '{name}' that have the shape {tuple(shape[:-1])} of its plates, got "
                f"{[tuple(part[:-1]) for part in parts]}"
            )
        # Where a mask is False, a divergence may be no number.
        total = scale_and_mask(values.expand(shape), scale, mask)
        weights = scale_and_mask(values.new_ones((*shape[:-1], 1)), scale, mask)
        new = SiteDivergence(weights.sum(), total.reshape(-1, shape[-1]).sum(0))
        before = self.found.get(name)
        self.found[name] = new if before is None else SiteDivergence(*(a + b for a, b in zip(before, new, strict=True)))

    def _posterior(self, name: str, drawn: _Drawn, prior: Any) -> Any:
        """The guide's distribution of a site; of one of AutoNormal, the auxiliary site's, if both are the same."""
        auxiliary = self._drawn.get(f"{name}_unconstrained")
        if auxiliary is None or not auxiliary.infer.get("is_auxiliary") or not isinstance(innermost(drawn.fn), Delta):
            return drawn.fn
        support = prior.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        return auxiliary.fn if support is constraints.real else drawn.fn

    def _expected(self, name: str, drawn: _Drawn, values: Tensor) -> Tensor:
        """The mean over the components that the guide enumerates, of divergences given each of them."""
        enumerated = [(other, site) for other, site in self._drawn.items() if "_enumerate_dim" in site.infer]
        dims = [site.infer["_enumerate_dim"] for _, site in enumerated]
        # The last one first, because its probabilities may depend on those before.
        for other, site in reversed(enumerated):
            dim = site.infer["_enumerate_dim"] - 1
            if other == name or values.dim() < -dim or values.shape[dim] == 1:
                continue
            if site.position > drawn.position or dims.count(dim + 1) > 1:
                raise ValueError(
                    f"Expected a prior of site '{name}' that depends on enumerated sites of the guide before it alone, "
                    f"got one that depends on '{other}', and so a divergence without a formula"
                )
            probs = site.fn.log_prob(site.value).exp().unsqueeze(-1)
            values = (probs * values).sum(dim, keepdim=True)
        return values


def _check_enumeration(name: str, infer: dict[str, Any]) -> None:
    if "_enum_total" in infer or ("_enumerate_dim" in infer and infer.get("num_samples") is not None):
        raise ValueError(
            f"Expected sites that are enumerated in parallel, over all values, got site '{name}' with "
            f"enumerate={infer.get('enumerate')!r} and num_samples={infer.get('num_samples')}"
        )


def _divergences(name: str, q: Any, p: Any, whole: bool) -> Tensor:
    """The divergences of shape (..., E), for each event dimension, or of shape (..., 1) for a whole."""
    parts = [q, p] if whole else [without_event(q), without_event(p)]
    inside = [without_event(part) for part in parts]
    kinds = " and ".join(dict.fromkeys(type(part).__name__ for part in inside))
    if isinstance(innermost(q), Delta) or any(isinstance(part, MaskedDistribution) for part in inside):
        raise ValueError(
            f"Expected distributions with densities at site '{name}', got {kinds}; poutine.mask says what is missing"
        )
    if not whole and any(part.event_shape for part in parts):
        raise ValueError(
            f"Expected distributions that factorize over the dimensions at site '{name}', got {kinds}: take "
            "groups='site'"
        )
    try:
        values = kl_divergence(*parts)
    except NotImplementedError:
        raise ValueError(f"Expected a divergence with a formula at site '{name}', got {kinds}") from None
    batch_shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    if whole:
        return values.expand(batch_shape).unsqueeze(-1)
    return values.expand(batch_shape + q.event_shape).reshape(*batch_shape, q.event_shape.numel())
