"""The relative Fisher divergence of the true posterior from the prior, from draws of MCMC."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae._programs import ModelArgs, Program, sample_sites
from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.arrays import check_finite
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.batches import batches, data_arguments
from pyro_ilvae.diagnostics._engine.densities import shared_sites
from pyro_ilvae.diagnostics._engine.scores import differentiable_sites, passes, squared_gradients

__all__ = ["FisherDivergenceOfDraws", "posterior_fisher_divergence_of_draws"]


class FisherDivergenceOfDraws(NamedTuple):
    """Relative Fisher divergences from true posterior to prior, from draws of the posterior."""

    values: Tensor  #: the divergence of each datum, in one over squared units of z, of shape (N,)
    standard_errors: Tensor  #: the Monte Carlo standard errors of the values, of shape (N,)
    effective_sample_sizes: Tensor  #: the number of independent draws that would be as good, of shape (N,)

    def __repr__(self) -> str:
        return printing.described(
            self,
            f"{printing.mean(self.values, self.standard_errors)} over {printing.sizes(self.values.shape)}",
            f"smallest effective sample size {printing.number(self.effective_sample_sizes.min())}",
        )


def posterior_fisher_divergence_of_draws(
    model: Program,
    draws: Mapping[str, Tensor],
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    num_chains: int = 1,
    batch_size: int | None = None,
    samples_per_pass: int | None = None,
    plate: str | None = None,
) -> FisherDivergenceOfDraws:
    r"""The relative Fisher divergence from the true posterior to the prior, for each datum, from draws of MCMC.

    .. math:: F(p(z \mid x) \,\|\, p(z)) = E_{p(z \mid x)} \|\nabla_z \log p(x \mid z)\|^2
        \approx \tfrac{1}{S} \sum_s \|\nabla_z \log p(x \mid z_s)\|^2,

    in one over squared units of z. Other latent sites are treated as in
    :func:`~pyro_ilvae.diagnostics.posterior_fisher_divergence`. Sites that all data share may be among the draws; the
    divergence is then the mean over their posterior.

    Args:
        model: the model.
        draws: a mapping from the names of sites to draws of shape (S, \*plates, \*event shape), as
            ``mcmc.get_samples()`` returns it. A site in no plate but that over the data has shape
            (S, N, \*event shape). Discrete sites may be left out; they are then summed over.
        model_args: what model and guide are called with: a tuple; a single tensor or array; or an iterable of batches,
            such as a ``DataLoader``, that are tensors, tuples or mappings of keyword arguments. Tensors whose first
            dimension is the number of data are taken in batches, all other arguments are passed as they are.
        model_kwargs: keyword arguments of the same calls.
        sites: the names of the latent sites :math:`z`; if None, all continuous ones in the plate over the data.
        num_chains: the number of chains, whose draws follow each other.
        batch_size: the number of data treated at a time; all at once if None.
        samples_per_pass: the number of draws treated at a time, which bounds the memory and changes nothing else; if
            None, as many as fit in bounded memory, and at least one draw of ``batch_size`` data.
        plate: the name of the plate over the data; if None, the only plate whose size is the number of data. Name it
            where tensors in ``model_args`` fit plates of different sizes.

    Returns:
        The divergences; their standard errors; and ArviZ's effective sample sizes for the mean, which account for
        autocorrelation in the standard errors. Each has shape (N,). Standard errors and effective sample sizes are NaN
        for fewer than four draws a chain.

    Raises:
        ValueError: for draws of a site that is not latent, draws without a continuous site, of another shape or not
            finite, and for a site that is not in the plate over the data.
        UnavailableError: for a discrete site, and a site whose support has no interior.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([0.0, 2.0])
        >>> draws = {"z": x / 2 + 0.5**0.5 * torch.randn(1000, 2)}
        >>> divergence = posterior_fisher_divergence_of_draws(model, draws, x)
        >>> exact = x**2 / 4 + 0.5
        >>> bool(((divergence.values - exact).abs() < 5 * divergence.standard_errors).all())
        True
    """
    _checks.function("model", model, "a function or a module")
    if not isinstance(draws, Mapping):
        raise TypeError(f"Expected draws to be a mapping from names of sites, got a {type(draws).__name__}")
    draws = {name: _checks.tensor(f"draws of site '{name}'", value) for name, value in draws.items()}
    num_samples = _num_samples(draws, num_chains)
    # The prior serves as a guide that has the sites of the draws.
    prior: Any = poutine.block(model, expose=list(draws))
    arguments = data_arguments(model, prior, model_args, model_kwargs, plate, batch_size).in_order()
    with seeded(1):  # another seed than below, so that a loader that shuffles does not give one order twice
        num_data = arguments.num_data
    columns, start = [], 0
    with seeded(0):  # the model draws to show its sites, and no result depends on it
        for batch in batches(model, prior, arguments, batch_size, plate):
            names = differentiable_sites(batch, sites)
            own = _own_draws(batch, draws, start, num_data)
            # Given the draws of a shared site, each datum has a density of its own; other shared sites join the data.
            rest = [node for node in sample_sites(batch.model_trace) if node["name"] not in draws]
            together = bool(shared_sites(batch, rest, batch_size))
            rows, position = [], 0
            for count in passes(batch, num_samples, samples_per_pass):
                part = {name: value[position : position + count] for name, value in own.items()}
                if count == 1:
                    part = {name: value[0] for name, value in part.items()}
                _, norms = squared_gradients(batch, part, count, names, together=together)
                rows += norms
                position += count
            columns.append(torch.cat(rows))
            start += batch.num_data
    squares = torch.cat(columns, 1)
    ess = _effective_sample_sizes(squares.reshape(num_chains, -1, num_data))
    spread = squares.std(0, correction=min(1, num_samples - 1))
    return FisherDivergenceOfDraws(squares.mean(0), spread / ess.sqrt(), ess)


def _num_samples(draws: Mapping[str, Tensor], num_chains: int) -> int:
    _checks.positive_int("num_chains", num_chains)
    sizes = {name: len(value) if value.dim() else 0 for name, value in draws.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"Expected draws of one number >= 1 for each site, got {sizes}")
    size = next(iter(sizes.values()))
    if size % num_chains:
        raise ValueError(f"Expected num_chains to divide the number of draws, {size}, got {num_chains}")
    for name, value in draws.items():
        check_finite(f"draws of site '{name}'", value)
    return size


def _own_draws(batch: Batch, draws: Mapping[str, Tensor], start: int, num_data: int) -> dict[str, Tensor]:
    """The draws of the batch's data, with a dimension for every plate: (S, *plates, *event)."""
    own = {}
    for name, value in draws.items():
        site = batch.site(batch.model_trace, name, "model")
        event_dim, dim = site["fn"].event_dim, batch.data_dim(site)
        shape = [len(value), *site["value"].shape]
        if dim is not None:
            shape[dim - event_dim] = num_data
        if list(value.shape) != shape:
            raise ValueError(f"Expected draws of site '{name}' of shape {tuple(shape)}, got {tuple(value.shape)}")
        if dim is not None:
            value = value.narrow(dim - event_dim, start, batch.num_data)
        padding = (1,) * (batch.nesting + 1 + event_dim - value.dim())
        own[name] = value.reshape(len(value), *padding, *value.shape[1:])
    return own


def _effective_sample_sizes(values: Tensor) -> Tensor:
    """ArviZ's effective sample size for the mean, from values of shape (chains, draws, N)."""
    import arviz  # here, because it takes seconds

    rows = values.double().movedim(2, 0).cpu().numpy()
    enough = values.shape[1] >= 4
    sizes = [float(arviz.ess(row, method="mean")) if enough else math.nan for row in rows]
    return torch.tensor(sizes, dtype=values.dtype, device=values.device)
