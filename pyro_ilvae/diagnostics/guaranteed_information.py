"""The mutual information, in nats, that a decoder guarantees under Normal noise on the model's own data."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.decoded_sites import check_likelihood_of_model, decoded_site, part_of
from pyro_ilvae.diagnostics._engine.decoding import at_any_context, certified_constant, check_likelihood, state_of
from pyro_ilvae.diagnostics._engine.hierarchies import (
    Hierarchy,
    bounds_in_hierarchy,
    check_hierarchy_of_model,
    hierarchy_of,
)
from pyro_ilvae.diagnostics._engine.information_bounds import bounds_for_prior
from pyro_ilvae.diagnostics._engine.latent_priors import check_prior, own_prior, prior_of_site
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.summaries import Call, OfSite

__all__ = ["GuaranteedInformation", "guaranteed_information"]


class GuaranteedInformation(NamedTuple):
    """Bounds on the mutual information of data and latent variable, in nats; NaN where nothing is guaranteed."""

    floor: float  #: what L and the noise guarantee by themselves, in nats
    floor_se: float  #: its standard error, 0 unless the entropy of the prior has no formula
    nats_per_dimension: float  #: ``floor`` / K, in nats
    by_jacobian: float  #: what the decoder's Jacobian over draws of the prior guarantees, at least ``floor``, in nats
    by_jacobian_se: float  #: its standard error, by the delta method; NaN for one draw
    #: for a projected decoder, what is guaranteed for each coordinate given all others, in nats, of shape (K,)
    per_coordinate: Tensor | None
    #: the entropy power of the prior, in squared units of z: 1 for N(0, I); a lower bound for a site with one above
    entropy_power: float
    entropy_power_se: float  #: its standard error, 0 in closed form
    #: the most information that there can be, in nats; None for a decoder without ``lipschitz``
    ceiling: float | None
    ceiling_reason: str | None  #: why there is no ceiling; None where there is one
    reason: str | None  #: why no nats are guaranteed; None where the numbers are guaranteed

    def __repr__(self) -> str:
        if self.reason is not None:
            return printing.described(self, f"no nats are guaranteed: {self.reason}")
        return printing.described(
            self,
            f"floor {printing.number(self.floor, self.floor_se or None)} nats",
            f"{printing.number(self.nats_per_dimension)} per dimension",
            f"by the Jacobian {printing.number(self.by_jacobian, self.by_jacobian_se)} nats",
            f"entropy power of the prior {printing.number(self.entropy_power, self.entropy_power_se or None)}",
            *([] if self.ceiling is None else [f"ceiling {printing.number(self.ceiling)} nats"]),
        )


def guaranteed_information(
    model_or_decoder: Any,
    likelihood: Callable[[Tensor], Any] | None = None,
    *,
    site: str | None = None,
    prior: Any = None,
    num_samples: int = 1000,
    samples_per_pass: int | None = None,
    seed: int | None = None,
) -> GuaranteedInformation:
    r"""The nats of information about z that a decoder guarantees under Normal noise, with no posterior and no fit.

    .. math:: I(x; z) \ge \tfrac K2 \log\Bigl(1 + \frac{e^{\frac2K (h(z) + E \log |\det \nabla m(z)|)}}{2 \pi e\,
        (\det C)^{1/K}}\Bigr) \ge \tfrac K2 \log\Bigl(1 + \frac{L^2 N_z}{\sigma^2}\Bigr), \qquad
        N_z = \frac{e^{2 h(z) / K}}{2 \pi e},

    for x = f(z) + noise and z from the prior, whose entropy is h(z) and whose entropy power :math:`N_z` is 1 for
    N(0, I). With ``Nats(kappa)`` as the constant and this prior, the right-hand side is K kappa. For other likelihoods
    a noise unit is a reference, and no such bound is known.

    I(x; z) is the information of the model on its own data, which is -h(noise) - E log p(x). What a guide finds,
    :func:`~pyro_ilvae.diagnostics.mutual_information` and the mean KL, may be lower: on data that the model fits badly,
    where the guide is far from the posterior, and because an estimate from N data is at most log N. It is about
    complete data: entries that are missing tell nothing.

    Proof. Let :math:`P x` be the decoder's K coordinates of a datum (:math:`P = Q^\top` for a frame Q). Then
    :math:`P x = m(z) + e` with :math:`m = P f` and Normal noise e of covariance :math:`C = P S^2 P^\top`, which is
    :math:`\sigma^2 I` if all entries have the scale :math:`\sigma`. For the projected decoder m is the gradient of a
    strongly convex function, up to a shift; for the composition it is the composition of two of them, because
    :math:`u \mapsto B^\top g_2(B u)` is one; and for K = D it may be f itself. In each case m is one to one with
    :math:`|\det \nabla m| \ge L^K`. So :math:`h(m(z)) = h(z) + E \log |\det \nabla m(z)| \ge h(z) + K \log L` by the
    change of variables. The entropy power inequality [1, 2, 3] says of the independent m(z) and e that
    :math:`e^{2 h(m(z) + e) / K} \ge e^{2 h(m(z)) / K} + 2 \pi e\, (\det C)^{1/K}`. Take :math:`\tfrac K2 \log` of both
    sides and subtract :math:`h(e) = \tfrac K2 \log(2 \pi e\, (\det C)^{1/K})`. The left-hand side becomes
    :math:`h(P x) - h(P x \mid z) = I(P x; z) \le I(x; z)`, and the right-hand side the bound. With L = 0, m is one to
    one where its Jacobian is not singular, and a singular one makes the bound 0.

    A mixture with components y has :math:`I(x; z) = I(x; y) + I(x; z \mid y)`, so the average of the components'
    bounds, by their weights, is a bound too. The floor is this average, in closed form. ``by_jacobian`` is the larger
    of this average and the bound by the entropy of the whole mixture, which is sampled.

    For a projected decoder :math:`\partial m_j / \partial z_j \ge L` for each j, since :math:`\nabla m` is symmetric
    with eigenvalues of at least L. Given all other coordinates, the same proof in one dimension says
    :math:`I(z_j; x \mid z_{-j}) \ge \tfrac12 \log(1 + L^2 N_j / C_{jj})`, with :math:`N_j` the entropy power of
    :math:`z_j` given the others: its variance for a Normal prior with independent coordinates, and one over the j-th
    diagonal entry of the precision matrix for any other Normal prior. Mixtures average over components as above.

    A model with layers, such as a :class:`~pyro_ilvae.HierarchicalVAE`, is a chain of such channels, from
    :math:`z_{t+1}` with noise of scales :math:`\sigma_{t,d}` to :math:`z_t`. The bound for ``site`` :math:`z_{t+1}` is
    on :math:`I(z_{t+1}; z_t)`, and that for z1 on :math:`I(z_1; x)`. Below the top the prior has no formula, but its
    entropy is what the noise has and what the site above adds,

    .. math:: h(z_t) = h(z_t \mid z_{t+1}) + I(z_t; z_{t+1}) \ge \tfrac{K_t}2 \log\bigl(2 \pi e\,
        (\textstyle\prod_d \sigma_{t,d}^2)^{1/K_t}\bigr) + I_t,

    for the bound :math:`I_t` on :math:`I(z_{t+1}; z_t)` by L or by the Jacobian, 0 if there is none. With one scale the
    entropy power is at least :math:`N_t = \bigl((L_t^2 N_{t+1} + \sigma_t^2)^{K_{t+1}} \sigma_t^{2 (K_t - K_{t+1})}
    \bigr)^{1/K_t}`, with :math:`N_T = 1`. Of a coordinate given all others at least the noise is left:
    :math:`N_j \ge \sigma_{t,j}^2`.

    A decoder that carries ``lipschitz``, a constant :math:`M` with
    :math:`\|f(z) - f(z')\| \le M \|z - z'\|`, has a ceiling as well. Twice the summed variance of f(z) is the
    mean of :math:`\|f(z) - f(z')\|^2` over independent draws, so

    .. math:: \operatorname{tr} \operatorname{Cov} f(z) \le P = M^2 \operatorname{tr} \operatorname{Cov} z, \qquad
        I(x; z) \le \tfrac D2 \log\Bigl(1 + \frac{P}{D \sigma^2}\Bigr),

    because Normal x have the largest entropy for their covariance. This is the capacity of D Normal channels that share
    the power P; with a scale for each entry the power is shared by water-filling [3]. It holds for every prior
    with a variance, and is :math:`\tfrac K2 \log(1 + M^2 / \sigma^2)` for K = D and N(0, I).

    Args:
        model_or_decoder: a model with the attributes ``decoder``, ``likelihood`` and ``prior``, the distribution of the
            z that the decoder takes, such as a :class:`~pyro_ilvae.VAE`, or its method ``model``, which is not run; or
            a decoder. With a context c, a :class:`~pyro_ilvae.ProjectedDecoder` guarantees the same
            :math:`I(x; z \mid c)` for every c; for any other decoder with a context, pass ``decoder.given(context)``.
            A known shift of its value changes nothing. For K < D the decoder needs the method ``coordinates``, see
            :class:`~pyro_ilvae.protocols.Decoder`.
        likelihood: for a decoder, a function from its value to the distribution of the data. It has to be Normal around
            this value, with one scale :math:`\sigma` or a scale for each entry, the same for all z.
        site: the latent site of a model with layers, which has the attributes ``layers``, each with ``decoder`` and
            ``noise``, and ``latent_sites``, the names from the bottom up; None for any other.
        prior: the distribution of z, of event shape (K,); if None, the model's, and N(0, I) for a decoder. An entropy
            without a formula is the mean of -log p(z) over the draws. With layers it is that of the top site.
        num_samples: the number of draws of the prior, of a mixture at least 2 of each component.
        samples_per_pass: the number of draws treated at a time; if None, as many as fit in bounded memory.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.

    Returns:
        The floor from L, noise and prior; the tighter bound by the Jacobian; what is guaranteed for each coordinate, or
        None; the entropy power of the prior; and the ceiling, or None and why: a decoder without ``lipschitz``, or a
        prior whose variance is infinite or has no formula, as it has none below another layer. Where nothing is
        guaranteed, the numbers are NaN and ``reason`` says why: noise that is not Normal, differs between draws of z,
        or has a prior on its scale; a decoder without a constant, without K coordinates (a composition has more with a
        context), with a context that is not given, or that breaks its constant at a draw; a prior without a density or
        draws, or with a mask.

    Raises:
        ValueError: for a model with a ``likelihood`` beside its own, or without a prior; for another ``site``, or none
            with layers; for a prior of another shape; for a decoder whose output is not finite, differs between two
            calls, or has lost its derivative, and for arguments out of range.
        TypeError: for what is no model, decoder, likelihood or distribution.

    References:
        | [1] Shannon 1948, A mathematical theory of communication, Bell System Technical Journal 27
        | [2] Stam 1959, Some inequalities satisfied by the quantities of information of Fisher and Shannon, Information
          and Control 2
        | [3] Cover & Thomas 2006, Elements of Information Theory, Theorem 17.7.3, and Section 9.4 for the ceiling

    Example:
        >>> from pyro_ilvae import ProjectedDecoder, likelihoods, mlp
        >>> decoder = ProjectedDecoder(mlp(2, (16,), 8), latent_dim=2, event_shape=8, inverse_lipschitz=0.5)
        >>> guaranteed = guaranteed_information(decoder, likelihoods.Normal(0.5), seed=0)
        >>> round(guaranteed.floor, 4), guaranteed.by_jacobian > guaranteed.floor  # log(1 + 0.5^2 / 0.5^2)
        (0.6931, True)
        >>> guaranteed_information(decoder, likelihoods.Bernoulli()).reason
        'Expected a likelihood with Normal noise, got Bernoulli, whose noise unit is a reference, not a bound'
    """
    _checks.positive_int("num_samples", num_samples)
    if samples_per_pass is not None:
        _checks.positive_int("samples_per_pass", samples_per_pass)
    _checks.function("model_or_decoder", model_or_decoder, "a model or a decoder")
    # Outside of inference mode, which has no derivatives.
    with torch.inference_mode(False), torch.no_grad(), evaluation_mode(model_or_decoder, likelihood), seeded(seed):
        try:
            hierarchy = _checked_hierarchy(model_or_decoder, site)
            decoder, likelihood, prior = _parts(model_or_decoder, likelihood, prior, hierarchy)
            if hierarchy is None:
                decoder = at_any_context(decoder)
                bounds = bounds_for_prior(decoder, likelihood, prior, num_samples, samples_per_pass)
            else:
                bounds = bounds_in_hierarchy(hierarchy, str(site), prior, num_samples, samples_per_pass)
        except UnavailableError as reason:
            numbers = dict.fromkeys(GuaranteedInformation._fields, math.nan)
            words = dict.fromkeys(("ceiling_reason", "reason"), str(reason))
            return GuaranteedInformation(**numbers | {"per_coordinate": None, "ceiling": None} | words)  # type: ignore
    return GuaranteedInformation(**bounds._asdict(), reason=None)


def _checked_hierarchy(model: Any, site: Any) -> Hierarchy | None:
    """The layers of the model, if it has some; raises unless ``site`` is one of their latent sites."""
    hierarchy = hierarchy_of(model)
    if hierarchy is None and site is not None:
        raise ValueError(f"Expected site=None for a decoder, or a model without layers, got {site!r}")
    if hierarchy is not None and site not in hierarchy.sites:
        raise ValueError(f"Expected site to be one of {hierarchy.sites} of a model with layers, got {site!r}")
    return hierarchy


def _parts(model_or_decoder: Any, likelihood: Any, prior: Any, hierarchy: Hierarchy | None) -> tuple[Any, Any, Any]:
    """The decoder, the likelihood and the prior."""
    own = {name: part_of(model_or_decoder, name) for name in ("decoder", "likelihood")}
    if all(part is not None for part in own.values()):
        if likelihood is not None:
            raise ValueError("Expected likelihood=None for a model, which has a likelihood, got another one")
        decoder, likelihood = own.values()
        if prior is None:
            prior = own_prior(model_or_decoder)
            if prior is None:
                raise ValueError("Expected prior=..., or a model with the attribute prior, a distribution, got neither")
            _check_fixed(prior, part_of(model_or_decoder, "prior"))
    else:
        decoder = model_or_decoder
        check_likelihood(likelihood)
    taken_by = decoder if hierarchy is None else hierarchy.channels[-1][0]
    latent_dim = getattr(taken_by, "latent_dim", None)
    if prior is None:
        if latent_dim is None:
            raise ValueError("Expected prior=..., or a decoder with the attribute latent_dim, got neither")
        like = state_of(decoder)
        loc = (torch.empty(0) if like is None else like).new_zeros(latent_dim)
        prior = dist.Normal(loc, torch.ones_like(loc)).to_event(1)
    check_prior(prior, latent_dim)
    return decoder, likelihood, prior


def _check_fixed(prior: Any, again: Any) -> None:
    """Raise if a model's prior is another one when it is read again, as with components drawn from a prior."""
    with seeded(0):  # so that no draw of the caller's is used up
        point = prior.sample()
    if not torch.equal(prior.log_prob(point), again.log_prob(point)):
        raise UnavailableError("Expected a prior whose parameters are fixed, got ones that are drawn from a prior")


def information_of_site(call: Call, site: str, **more: Any) -> GuaranteedInformation | None:
    """What the decoder of a site guarantees about it; None for a site without a decoder that promises something."""
    options = {"num_samples": call.options["num_samples"], "seed": call.options["seed"]} | more
    hierarchy = hierarchy_of(call.model)
    if hierarchy is not None:
        decoders = {name: decoder for name, (decoder, _) in zip(hierarchy.sites, hierarchy.channels, strict=True)}
        if certified_constant(decoders.get(site)) is None:
            return None
        check_hierarchy_of_model(call.batch, hierarchy, own_prior(call.model))
        result = guaranteed_information(call.model, site=site, **options)
    else:
        try:
            found = decoded_site(call.batch)
        except UnavailableError:
            return None
        if found is None or found.site != site or certified_constant(found.decoder) is None:
            return None
        check_likelihood_of_model(call.batch, found)
        prior = prior_of_site(call.batch, site, found.trace)
        result = guaranteed_information(found.decoder, found.likelihood, prior=prior, **options)
    if result.reason is not None:
        raise UnavailableError(result.reason)
    return result


def _columns(call: Call, site: str) -> dict[str, Any]:
    result = information_of_site(call, site)
    if result is None:
        return {}
    return {
        "guaranteed_nats": result.by_jacobian,
        "guaranteed_nats_se": result.by_jacobian_se,
        "guaranteed_floor": result.floor,
    }


SUMMARY = OfSite(
    "guaranteed_information",
    _columns,
    missing=dict.fromkeys(("guaranteed_nats", "guaranteed_nats_se", "guaranteed_floor"), math.nan),
)
