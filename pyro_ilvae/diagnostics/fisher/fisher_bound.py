"""The lower bound on the relative Fisher divergence that an inverse Lipschitz decoder guarantees, beside its value."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import Arguments, ModelArgs, Program
from pyro_ilvae.decoders.composition import InverseLipschitzDecoder
from pyro_ilvae.diagnostics._engine.batches import batches
from pyro_ilvae.diagnostics._engine.importance import weighted_mean
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.scores import differentiable_sites
from pyro_ilvae.diagnostics._engine.weighted_scores import (
    PosteriorFisherDivergence,
    weighted_divergence,
    weighted_squares,
)
from pyro_ilvae.sequences.decoder import SequenceDecoder


class FisherBound(NamedTuple):
    """A divergence, its lower bound and their ratio for each datum, of shape (N,), with Monte Carlo errors."""

    divergence: PosteriorFisherDivergence
    bound: Tensor
    bound_standard_errors: Tensor
    ratio: Tensor
    ratio_standard_errors: Tensor


def fisher_bound(
    model: Program,
    guide: Program,
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    decoder: nn.Module | None = None,
    site: str = "z",
    num_samples: int = 1000,
    batch_size: int | None = None,
    samples_per_pass: int | None = None,
    seed: int | None = None,
    plate: str | None = None,
) -> FisherBound:
    r"""The relative Fisher divergence from the true posterior to the prior, beside the decoder's floor under it.

    For a decoder :math:`f` with inverse Lipschitz constant L and as many latent dimensions as natural parameters,
    K = D, the theorem [1] says, with :math:`s = \partial \log p(x \mid \eta) / \partial \eta` at :math:`\eta = f(z)`,

    .. math:: F(p(z \mid x) \,\|\, p(z)) = E_{p(z \mid x)} \|J_f^\top s\|^2 \ge L^2 \, E_{p(z \mid x)} \|s\|^2,

    and for the composition :math:`f = g_2 \circ B \circ g_1` with K < D, where L_1 is the constant of :math:`g_1`,

    .. math:: F(p(z \mid x) \,\|\, p(z)) \ge L_1^2 \, E_{p(z \mid x)} \|B^\top J_{g_2} s\|^2.

    Both sides are means over the same weighted draws of the guide, see
    :func:`~pyro_ilvae.diagnostics.posterior_fisher_divergence`, and the inequality holds at each draw: the ratio is at
    least 1 up to rounding, however many draws there are. A projected decoder with K < D has no such bound, since
    :math:`J_f^\top s` may vanish where s does not.

    Args:
        model: the model, called with the data, which depends on the site through the decoder alone.
        guide: its guide.
        model_args: what model and guide are called with: a tuple, or a single tensor. Tensors whose first dimension is
            the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        decoder: the decoder; if None, the attribute ``decoder`` of the object whose method the model is, as in a
            :class:`~pyro_ilvae.VAE`.
        site: the name of the latent site that is decoded.
        num_samples: the number of draws for each datum.
        batch_size: the number of data treated at a time; all at once if None.
        samples_per_pass: the number of draws treated at a time, which bounds the memory and changes nothing else; if
            None, as many as make at most 20,000 pairs of a draw and a datum.
        seed: a seed for the draws, which then leave the global random state as it was.
        plate: the name of the plate over the data; if None, the one plate of their number.

    Returns:
        The divergence, as of :func:`~pyro_ilvae.diagnostics.posterior_fisher_divergence` for this site; its bound and
        their ratio, which is infinite for L = 0 and NaN where both are 0, each with its standard error by the delta
        method. Each is of shape (N,), in one over the unit of z squared but for the ratio, which has none.

    Raises:
        ValueError: without a decoder, and as :func:`~pyro_ilvae.diagnostics.posterior_fisher_divergence`.
        UnavailableError: if the decoder has no such bound, or is not called once, with the value of the site.

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
    if decoder is None:
        function: Any = unwrap(model)
        decoder = getattr(getattr(function, "__self__", function), "decoder", None)
        if decoder is None:
            raise ValueError("Expected decoder=..., or a model whose object has the attribute decoder, got neither")
    part, constant = _bounding_part(decoder)
    results = []
    with seeded(seed), _uncompiled(decoder):
        for batch in batches(model, guide, Arguments.of(model_args, model_kwargs), batch_size, plate):
            names = differentiable_sites(batch, [site])
            weights, (squares, part_squares) = weighted_squares(
                batch, names, num_samples, samples_per_pass=samples_per_pass, batch_size=batch_size, watched=part
            )
            bounds = constant**2 * part_squares
            divergence = weighted_divergence(weights, squares)
            bound, bound_errors = weighted_mean(weights.values, bounds)
            ratio = divergence.values / bound
            _, difference_errors = weighted_mean(weights.values, squares - ratio * bounds)
            results.append((*divergence, bound, bound_errors, ratio, difference_errors / bound))
    *fields, bound, bound_errors, ratio, ratio_errors = (torch.cat(part) for part in zip(*results, strict=True))
    return FisherBound(PosteriorFisherDivergence(*fields), bound, bound_errors, ratio, ratio_errors)


def _bounding_part(decoder: nn.Module) -> tuple[nn.Module, float]:
    """The part of a decoder whose output's score is bounded, from the latent variable on, and its constant."""
    latent_dim, event_shape = getattr(decoder, "latent_dim", None), getattr(decoder, "event_shape", None)
    constant = getattr(decoder, "inverse_lipschitz", None)
    kind = type(decoder).__name__
    if latent_dim is None or event_shape is None or constant is None:
        raise UnavailableError(
            f"Expected a decoder that carries latent_dim, event_shape and inverse_lipschitz, got {kind}"
        )
    if isinstance(decoder, SequenceDecoder):
        raise UnavailableError(f"Expected a decoder of z alone, got {kind}, which reads the data before each position")
    if torch.Size(event_shape).numel() == latent_dim:
        return decoder, constant
    if isinstance(decoder, InverseLipschitzDecoder):
        # B^T J_{g_2} s is the gradient of log p(x | z) by u = g_1(z), of which eta is a function.
        return decoder.inner, decoder.inner.inverse_lipschitz
    raise UnavailableError(
        f"Expected a decoder with K = D or an InverseLipschitzDecoder, got {kind} with K = {latent_dim} and "
        f"D = {torch.Size(event_shape).numel()}, which has no bound for a single datum, only for the mean over the "
        "model's own data"
    )


@contextmanager
def _uncompiled(decoder: nn.Module) -> Iterator[None]:
    """Runs the modules of a decoder as they are written: compiled code does not report its parts."""
    modules = list(decoder.modules())
    calls = [module._compiled_call_impl for module in modules]
    try:
        for module in modules:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in zip(modules, calls, strict=True):
            module._compiled_call_impl = call
