"""The relative Fisher divergence of the true posterior from the prior, by weighted draws of the guide."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_ilvae._programs import sample_sites
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.densities import check_numbers, log_density, shared_sites
from pyro_ilvae.diagnostics._engine.importance import Weights, smoothed_weights, weighted_mean
from pyro_ilvae.diagnostics._engine.scores import passes, squared_gradients
from pyro_ilvae.diagnostics._engine.sites import check_no_points


class PosteriorFisherDivergence(NamedTuple):
    """Relative Fisher divergences from true posterior to prior, and how far to trust their importance weights."""

    values: Tensor  #: the divergence of each datum, in one over squared units of z, of shape (N,)
    standard_errors: Tensor  #: the Monte Carlo standard errors of the values, of shape (N,); NaN for one draw
    effective_sample_sizes: Tensor  #: the number of equal weights that would be as good, of shape (N,)
    #: Pareto k-hat of the weights, of shape (N,): do not trust values where it exceeds 0.7; NaN for fewer than 30 draws
    pareto_k: Tensor

    def __repr__(self) -> str:
        return printing.described(
            self,
            f"{printing.mean(self.values, self.standard_errors)} over {printing.sizes(self.values.shape)}",
            f"smallest effective sample size {printing.number(self.effective_sample_sizes.min())}",
            f"largest Pareto k {printing.number(self.pareto_k.max())}",
        )


def weighted_squares(
    batch: Batch,
    names: list[str],
    num_samples: int,
    *,
    samples_per_pass: int | None,
    batch_size: int | None,
    watched: nn.Module | None = None,
) -> tuple[Weights, list[Tensor]]:
    """Weights of draws of the guide, and the squared gradients at the draws, see :func:`squared_gradients`."""
    shared = shared_sites(batch, [*sample_sites(batch.guide_trace), *sample_sites(batch.model_trace)], batch_size)
    check_no_points(batch, "no weights make a point the posterior")
    log_weights, squares = [], []
    for count in passes(batch, num_samples, samples_per_pass):
        with torch.no_grad():
            guide_trace, _ = batch.traces(count)
            own = sample_sites(guide_trace)
            log_guide = log_density(batch, own, count, bool(shared))
            check_numbers(log_guide, own)
        draws: dict[str, Any] = {name: guide_trace.nodes[name]["value"] for name in batch.latent_sites}
        log_joint, norms = squared_gradients(batch, draws, count, names, together=bool(shared), watched=watched)
        log_weights.append(log_joint - log_guide)
        squares.append(norms)
    weights = smoothed_weights(_checked(torch.cat(log_weights)))
    return weights, [torch.cat(parts) for parts in zip(*squares, strict=True)]


def weighted_divergence(weights: Weights, squares: Tensor) -> PosteriorFisherDivergence:
    """The divergence, which is the weighted mean of squared gradients."""
    values, errors = weighted_mean(weights.values, squares)
    # Data that share a site share their weights.
    ess, pareto_k = (part.expand_as(values) for part in (weights.effective_sample_sizes, weights.pareto_k))
    return PosteriorFisherDivergence(values, errors, ess, pareto_k)


def _checked(log_weights: Tensor) -> Tensor:
    unbounded = (log_weights == math.inf).any(0)
    if unbounded.any():
        raise ValueError(f"Expected finite log densities, got infinite weights for {int(unbounded.sum())} data")
    impossible = (log_weights == -math.inf).all(0)
    if impossible.any():
        raise ValueError(f"Expected draws that the model allows, got none for {int(impossible.sum())} data")
    return log_weights
