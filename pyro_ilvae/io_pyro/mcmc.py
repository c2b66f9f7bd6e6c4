"""Conversion of Markov chains."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pyro.infer import MCMC, config_enumerate

from pyro_ilvae import _checks
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.io_pyro._export import convert
from pyro_ilvae.io_pyro._sampler import Arrays

__all__ = ["from_pyro_mcmc"]


def from_pyro_mcmc(
    mcmc: MCMC,
    model_args: ModelArgs | None = None,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    model: Program | None = None,
    samples_per_pass: int | None = None,
    prior: bool = True,
    posterior_predictive: bool = True,
    log_likelihood: bool | str = True,
    plate: str | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Any:
    r"""Convert Markov chains of any Pyro model to ArviZ, with dimensions named after the model's plates.

    Args:
        mcmc: a :class:`pyro.infer.MCMC` object that has run, with a NUTS or HMC kernel.
        model_args: what the model is called with, the observed data included: a tuple, or a single tensor. If neither
            ``model_args`` nor ``model_kwargs`` is given, the model is called with what ``mcmc.run`` was called with.
        model_kwargs: keyword arguments for the same call.
        model: the model, by default the model of the kernel. A kernel made from a ``potential_fn`` has none; its
            chains then have to be in the model's own space (``MCMC(transforms=...)``).
        samples_per_pass: the number of draws per run of the model, by default as many as fit in a bounded memory. Draws
            are made one at a time if the model gives other values for several draws at once than for each
            draw alone, for instance because it indexes values from the left or sums over a batch dimension.
        prior: whether to add the groups ``prior`` and ``prior_predictive``, of as many draws as the posterior.
        posterior_predictive: whether to add the group ``posterior_predictive``.
        log_likelihood: the group ``log_likelihood``, in nats. ``True`` or ``"integrated"``: log p(x_n) given the draws
            of the sites that data share, with discrete sites of each datum summed out. Other sites of each datum cannot
            be integrated out without a guide: with ``True`` the log likelihood is then conditional on their draws, with
            a warning; with ``"integrated"`` that is an error. ``"conditional"``: log p(x_n | z) for each draw z of all
            sites, discrete ones included. ``False``: no such group.
        plate: the plate whose elements are the data that the log likelihood is about, as in :func:`from_pyro_svi`.
        coords: coordinate values by dimension; they override the indices of the plates.
        dims: names by site or by entry of ``constant_data``, as in :func:`from_pyro_svi`.
        constant_data: as in :func:`from_pyro_svi`.
        seed: a seed for all draws that are made here, which then leave the global random state of PyTorch as it was.

    Returns:
        An ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1.x) with draws of shape
        (chain, draw, \*plates, \*event). Deterministic sites are in ``posterior`` and ``prior``. The group
        ``sample_stats`` has the variable ``diverging`` of shape (chain, draw) and the attribute ``acceptance_rate``
        with one number for each chain.

    Raises:
        TypeError: if ``mcmc`` or ``model_args`` has the wrong type.
        ValueError: if ``mcmc`` has not run, there is no model, ``samples_per_pass`` is not an int of at least 1,
            ``dims`` or ``coords`` do not fit the model, the model has no such ``plate`` of data,
            ``constant_data`` has the name of a site, the chains leave out a latent
            site of the model (``save_params``) or hold a value of it for each value of an enumerated site, draws are
            not finite, or the prior cannot be sampled.

    Note:
        - Discrete sites, which NUTS and HMC sum out, are drawn by :func:`pyro.infer.infer_discrete` given the
          chains' draw of the other sites and the data.
        - ``acceptance_rate`` is all that Pyro keeps: for HMC the fraction of proposals that were accepted, for NUTS
          the fraction of iterations that moved. It is not the mean acceptance probability that the progress bar
          shows, and there is none for each draw.
        - ``log_likelihood`` is without scales; masked elements are 0. The attribute ``log_likelihood_note`` says what
          each variable is, and given what.
        - For the prior and predictive groups the model runs with the same arguments and every observed site
          is sampled; what else the model computes from its data (teacher forcing) still sees the data.
        - A module given as model, or by a bound method, runs in evaluation mode and keeps its mode afterwards.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import MCMC, NUTS
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run(torch.zeros(3))
        >>> fit = from_pyro_mcmc(mcmc)
        >>> dict(fit["posterior_predictive"]["x"].sizes)
        {'chain': 1, 'draw': 20, 'data': 3}
        >>> fit["sample_stats"]["diverging"].dims
        ('chain', 'draw')
    """
    if not isinstance(mcmc, MCMC):
        raise TypeError(f"Expected mcmc to be a pyro.infer.MCMC object, got {mcmc!r}")
    if mcmc._samples is None:
        raise ValueError("Expected mcmc to have run, got one without samples")
    if model is None:
        model = mcmc.kernel.model
    if model is None:
        raise ValueError("Expected a model for a kernel that was made from a potential_fn, got model=None")
    _checks.function("model", model)
    if model_args is None and model_kwargs is None:
        model_args, model_kwargs = mcmc._args, mcmc._kwargs
    chains = {name: value.flatten(0, 1) for name, value in mcmc.get_samples(group_by_chain=True).items()}
    shape = (mcmc.num_chains, mcmc.num_samples)
    stats, stats_attrs = _sample_stats(mcmc, shape)
    return convert(
        config_enumerate(model),  # as HMC does
        _draws_nothing,
        () if model_args is None else model_args,
        model_kwargs,
        given=chains,
        source="the chains",
        shape=shape,
        samples_per_pass=samples_per_pass,
        seed=seed,
        coords=coords,
        dims=dims,
        constant_data=constant_data,
        sample_stats=stats,
        attrs={},
        stats_attrs=stats_attrs,
        prior=prior,
        posterior_predictive=posterior_predictive,
        log_likelihood=log_likelihood,
        num_importance_samples=1,
        plate=plate,
    )


def _draws_nothing(*_: Any, **__: Any) -> None:
    """A guide for a model whose latent sites all have given values."""


def _sample_stats(mcmc: MCMC, shape: tuple[int, int]) -> tuple[Arrays, dict[str, Any]]:
    # mcmc.diagnostics() would add R-hat, and fails for fewer than four draws.
    kept: list[Any] = mcmc._diagnostics
    if "divergences" not in kept[0]:  # of a kernel other than HMC
        return {}, {}
    diverging = np.zeros(shape, dtype=bool)
    for chain, diagnostics in enumerate(kept):
        diverging[chain, diagnostics["divergences"]] = True
    return {"diverging": diverging}, {"acceptance_rate": [float(chain["acceptance rate"]) for chain in kept]}
