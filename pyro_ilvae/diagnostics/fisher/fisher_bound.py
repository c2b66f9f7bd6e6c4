"""The lower bound on the relative Fisher divergence that an inverse Lipschitz decoder guarantees."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded, uncompiled
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.batches import data_batches
from pyro_ilvae.diagnostics._engine.calls import check_programs
from pyro_ilvae.diagnostics._engine.decoded_sites import decoded_site, part_of
from pyro_ilvae.diagnostics._engine.decoding import (
    certified_constant,
    check_unconditional,
    has_context,
    lipschitz_constant,
)
from pyro_ilvae.diagnostics._engine.importance import weighted_mean
from pyro_ilvae.diagnostics._engine.moments import mean_over_data
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.scores import differentiable_sites
from pyro_ilvae.diagnostics._engine.sites import only_site
from pyro_ilvae.diagnostics._engine.summaries import Call, OfWhole
from pyro_ilvae.diagnostics._engine.weighted_scores import (
    PosteriorFisherDivergence,
    weighted_divergence,
    weighted_squares,
)
from pyro_ilvae.diagnostics.fisher.posterior_fisher_divergence import posterior_fisher_divergence

__all__ = ["FisherBound", "fisher_bound"]


class FisherBound(NamedTuple):
    """The divergence from true posterior to prior, its lower bound and their ratio, for each datum."""

    divergence: PosteriorFisherDivergence  #: the divergence, and how far to trust the importance weights
    bound: Tensor  #: the lower bound on the divergence, in one over squared units of z, of shape (N,)
    bound_standard_errors: Tensor  #: the Monte Carlo standard errors of the bound, of shape (N,)
    ratio: Tensor  #: divergence over bound, at least 1 up to rounding and without unit, of shape (N,)
    ratio_standard_errors: Tensor  #: the Monte Carlo standard errors of the ratio, of shape (N,)

    def __repr__(self) -> str:
        values, errors = self.divergence.values, self.divergence.standard_errors
        return printing.described(
            self,
            f"divergence {printing.mean(values, errors)}",
            f"bound {printing.mean(self.bound, self.bound_standard_errors)} over {printing.sizes(self.bound.shape)}",
            f"smallest ratio {printing.number(self.ratio.min())}",
            f"largest Pareto k {printing.number(self.divergence.pareto_k.max())}",
        )


def fisher_bound(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    decoder: nn.Module | None = None,
    site: str | None = None,
    num_samples: int = 1000,
    batch_size: int | None = None,
    samples_per_pass: int | None = None,
    seed: int | None = None,
    plate: str | None = None,
) -> FisherBound:
    r"""The relative Fisher divergence from the true posterior to the prior, and the decoder's lower bound on it.

    For a decoder :math:`f` with inverse Lipschitz constant L and as many latent dimensions as natural parameters,
    K = D, the theorem [1] says, with :math:`s = \partial \log p(x \mid \eta) / \partial \eta` at :math:`\eta = f(z)`,

    .. math:: F(p(z \mid x) \,\|\, p(z)) = E_{p(z \mid x)} \|J_f^\top s\|^2 \ge L^2 \, E_{p(z \mid x)} \|s\|^2,

    A decoder :math:`f = h \circ g` with K < D may have a ``bounded_part`` :math:`g` with
    :math:`\|J_g^\top v\| \ge L_1 \|v\|`, see :class:`~pyro_ilvae.protocols.Decoder`. Then

    .. math:: F(p(z \mid x) \,\|\, p(z)) \ge L_1^2 \, E_{p(z \mid x)} \|J_h^\top s\|^2,

    with :math:`J_h^\top s = B^\top J_{g_2} s` for the composition :math:`f = g_2 \circ B \circ g_1`, whose part is
    :math:`g_1`. Both sides are means over the same weighted draws of the guide, see
    :func:`~pyro_ilvae.diagnostics.posterior_fisher_divergence`, and the inequality holds at each draw: the ratio is at
    least 1 up to rounding, however many draws there are. A projected decoder with K < D has no such bound, since
    :math:`J_f^\top s` may vanish where s does not. For a decoder with K = D that carries ``lipschitz``, a constant
    :math:`M`, the ratio is at most :math:`M^2 / L^2`, since :math:`\|J_f^\top s\| \le M \|s\|`.

    With a context and K = D the bound holds for each datum in its own context; with missing entries s is the score of
    the entries that are there. A composition with a context has no ``bounded_part``, because z is then a part of what
    :math:`g_1` takes. In a hierarchy the bound is about the site that the decoder of x takes.

    Args:
        model: the model, in which data depend on the site through the decoder alone, which is checked.
        guide: its guide.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        decoder: the decoder; if None, the attribute ``decoder`` of the object whose method the model is, as in a
            :class:`~pyro_ilvae.VAE`.
        site: the name of the latent site that is decoded; if None, the only continuous latent site in the plate over
            the data.
        num_samples: the number of draws for each datum.
        batch_size: the number of data treated at a time; all at once if None.
        samples_per_pass: the number of draws treated at a time, which bounds the memory and changes nothing else; if
            None, as many as fit in bounded memory, and at least one draw of ``batch_size`` data.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        What :func:`~pyro_ilvae.diagnostics.posterior_fisher_divergence` returns for this site; the bound; and the
        ratio, which is infinite for L = 0 and NaN where divergence and bound are 0. Bound and ratio have standard
        errors by the delta method. Each has shape (N,). Divergence and bound are in one over squared units of z.

    Raises:
        ValueError: without a decoder, if ``site`` is None and there are several, and where
            :func:`~pyro_ilvae.diagnostics.posterior_fisher_divergence` raises it.
        TypeError: for a decoder that is no module.
        UnavailableError: if the decoder has no such bound, does not keep the constant that it carries, or needs more
            than z; if the model does not call it exactly once with the value of the site; and if the site reaches the
            data by another path or through another latent site, which may take back what the decoder's path adds.

    References:
        [1] Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder
        network, https://arxiv.org/abs/2304.12770

    Example:
        >>> from pyro_ilvae import VAE, InverseLipschitzDecoder, MLPEncoder, likelihoods
        >>> decoder = InverseLipschitzDecoder(latent_dim=2, event_shape=8, inverse_lipschitz=0.5, map_features=(32,))
        >>> vae = VAE(decoder, MLPEncoder(event_shape=8, latent_dim=2), likelihoods.Normal(1.0))
        >>> result = fisher_bound(vae.model, vae.guide, torch.randn(5, 8), num_samples=100)
        >>> bool((result.ratio >= 1 - 1e-4).all())
        True
    """
    _checks.positive_int("num_samples", num_samples)
    check_programs(model, guide)
    if decoder is None:
        decoder = part_of(model, "decoder")
        if decoder is None:
            raise ValueError("Expected decoder=..., or a model whose object has the attribute decoder, got neither")
    _checks.instance("decoder", decoder, nn.Module, "a module, whose calls can be watched")
    part, constant = _bounding_part(decoder)
    lipschitz = lipschitz_constant(decoder) if part is decoder else None
    results = []
    with seeded(seed), uncompiled(decoder):
        for batch in data_batches(model, guide, model_args, model_kwargs, batch_size, plate):
            names = differentiable_sites(batch, None if site is None else [only_site(batch, site)])
            if len(names) > 1:
                raise ValueError(f"Expected the argument site to name one of several latent sites, {names}, got None")
            weights, (squares, part_squares) = weighted_squares(
                batch, names, num_samples, samples_per_pass=samples_per_pass, batch_size=batch_size, watched=part
            )
            bounds = constant**2 * part_squares
            divergence = weighted_divergence(weights, squares)
            bound, bound_errors = weighted_mean(weights.values, bounds)
            ratio = divergence.values / bound
            _check_bound(decoder, ratio, math.inf if not lipschitz or not constant else (lipschitz / constant) ** 2)
            _, difference_errors = weighted_mean(weights.values, squares - ratio * bounds)
            results.append((*divergence, bound, bound_errors, ratio, difference_errors / bound))
    *fields, bound, bound_errors, ratio, ratio_errors = (torch.cat(part) for part in zip(*results, strict=True))
    return FisherBound(PosteriorFisherDivergence(*fields), bound, bound_errors, ratio, ratio_errors)


def _check_bound(decoder: nn.Module, ratio: Tensor, largest: float) -> None:
    """Raise if the ratio is beyond its limits by more than rounding: they do not hold, whatever the reason."""
    rounding = 10 * torch.finfo(ratio.dtype).eps ** 0.5
    if (ratio > largest * (1 + rounding)).any():
        raise UnavailableError(
            f"Expected a divergence of at most {largest:.3g} times its bound, got a ratio of {float(ratio.max()):.3g}: "
            f"{type(decoder).__name__} does not keep the constant lipschitz that it carries"
        )
    above = ratio < 1 - rounding
    if above.any():
        raise UnavailableError(
            f"Expected a divergence of at least its bound, got a ratio of {float(ratio.min()):.3g}, and below 1 for "
            f"{int(above.sum())} data: {type(decoder).__name__} does not keep the constant that it carries"
        )


def _bounding_part(decoder: nn.Module) -> tuple[nn.Module, float]:
    """The part of a decoder whose output's score is bounded, from the latent variable on, and its constant."""
    if not has_context(decoder):  # with one, the bound holds for each datum in its own context
        check_unconditional(decoder)
    latent_dim, event_shape = getattr(decoder, "latent_dim", None), getattr(decoder, "event_shape", None)
    features = None if event_shape is None else torch.Size(event_shape).numel()
    constant, kind = certified_constant(decoder), type(decoder).__name__
    if constant is not None and features is not None and features == latent_dim:
        return decoder, constant
    part: tuple[nn.Module, float] | None = getattr(decoder, "bounded_part", None)
    if part is not None:
        return part
    if latent_dim is None or features is None or constant is None:
        raise UnavailableError(
            f"Expected a decoder that carries latent_dim, event_shape and inverse_lipschitz, got {kind}"
        )
    raise UnavailableError(
        f"Expected a decoder with K = D or a bounded_part, got {kind} with K = {latent_dim} and "
        f"D = {features}, which has no bound for a single datum, only for the mean over the "
        "model's own data"
    )


def _variables(call: Call) -> dict[str, Any]:
    """The true posterior's divergence from the prior, and the decoder's bound if there is one."""
    bound, promised = None, False
    try:
        found = decoded_site(call.batch)
        if found and (certified_constant(found.decoder) is not None or getattr(found.decoder, "bounded_part", None)):
            promised = True
            bound = call(fisher_bound, decoder=found.decoder, site=found.site)
    except (TypeError, ValueError) as reason:
        call.notes.append(f"fisher_bound: {reason}")
    fisher = bound.divergence if bound else call(posterior_fisher_divergence)
    mean, error = mean_over_data(fisher.values, fisher.standard_errors)
    units = {"units": "1 / units of z squared"}
    result: dict[str, Any] = {
        "posterior_fisher": (float(mean), units),
        "posterior_fisher_se": float(error),
        "pareto_k": (float(fisher.pareto_k.max()), {"largest over": "the data"}),
    }
    if promised:
        smallest = float(bound.ratio.min()) if bound else math.nan
        result["fisher_bound"] = (float(bound.bound.double().mean()) if bound else math.nan, units)
        result["fisher_ratio"] = (smallest, {"smallest over": "the data"})
    return result


SUMMARY = OfWhole("posterior_fisher", _variables)
