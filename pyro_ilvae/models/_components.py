"""Mixtures of Gaussians with diagonal covariances: densities, products and moments for C components in R^K."""

import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor


def checked(output: tuple[Tensor, ...], num_components: int, latent_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of an encoder if its parts have shapes (..., C), (..., C, K) and (..., C, K)."""
    if not all(isinstance(part, Tensor) for part in output):
        raise TypeError(f"Expected encoder to return tensors, got {[type(part).__name__ for part in output]}")
    logits, loc, scale = output
    shape = (*logits.shape[:-1], num_components, latent_dim)
    shapes = (shape[:-1], shape, shape)
    if tuple(part.shape for part in output) != shapes:
        raise ValueError(
            f"Expected encoder to return logits, locations and scales of shapes {shapes}, got "
            f"{tuple(tuple(part.shape) for part in output)}"
        )
    return logits, loc, scale


def of_component(values: Tensor, y: Tensor) -> Tensor:
    """The row of ``values`` (..., C, K) for the component ``y``; dimensions to the left broadcast."""
    return Vindex(values)[..., y, :]  # type: ignore[no-any-return]


def responsibilities(z: Tensor, logits: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The probability p(y | z) of each component, of shape (..., C)."""
    return (logits + dist.Normal(loc, scale).log_prob(z.unsqueeze(-2)).sum(-1)).softmax(-1)  # type: ignore[no-any-return]


def times_factor(
    logits: Tensor, loc: Tensor, scale: Tensor, factor_loc: Tensor, factor_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixture times a Normal factor of shape (..., K): logits (..., C), locations and scales (..., C, K)."""
    factor_loc, factor_scale = factor_loc.unsqueeze(-2), factor_scale.unsqueeze(-2)
    total = torch.hypot(factor_scale, scale)
    fit = dist.Normal(loc, total).log_prob(factor_loc).sum(-1)
    # The mean of the two locations, weighted by precisions. This form divides by no small scale.
    share = (scale / total).square()
    return logits + fit, loc + share * (factor_loc - loc), factor_scale * scale / total


def mean_and_scale(probs: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a mixture with ``probs`` (..., C), each of shape (..., K)."""
    mean = (probs[..., None] * loc).sum(-2)
    variance = (probs[..., None] * (scale.square() + (loc - mean.unsqueeze(-2)).square())).sum(-2)
    return mean, variance.sqrt()
