"""Conversion of variational fits."""

from collections.abc import Mapping, Sequence
from typing import Any

from pyro.infer import SVI

from pyro_ilvae import _checks
from pyro_ilvae._programs import ModelArgs, Program
from pyro_ilvae.io_pyro._export import convert

__all__ = ["from_pyro_svi"]


def from_pyro_svi(
    svi_or_pair: SVI | tuple[Program, Program],
    model_args: ModelArgs = (),
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    samples_per_pass: int | None = None,
    prior: bool = True,
    posterior_predictive: bool = True,
    log_likelihood: bool | str = True,
    num_importance_samples: int = 100,
    plate: str | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Any:
    r"""Convert a variational fit of any Pyro model to ArviZ, with dimensions named after the model's plates.

    R-hat and effective sample size say nothing about a variational fit: the draws are independent draws from
    the guide, stored as one chain, so both look perfect however far the guide is from the posterior.

    Args:
        svi_or_pair: a :class:`pyro.infer.SVI` object or a pair ``(model, guide)``.
        model_args: what the model and the guide are called with, the observed data included: a tuple, or a single
            tensor.
        model_kwargs: keyword arguments for the same calls.
        num_samples: the number of draws in each group.
        samples_per_pass: the number of draws per run of the model, by default as many as fit in a bounded memory. Draws
            are made one at a time if the model or the guide gives other values for several draws at once than for each
            draw alone, for instance because it indexes values from the left or sums over a batch dimension. In each
            run the first and the last draw are compared with these draws alone, and every draw with itself among one
            in sixteen draws. Draws from a seed depend on this number.
        prior: whether to add the groups ``prior`` and ``prior_predictive``.
        posterior_predictive: whether to add the group ``posterior_predictive``.
        log_likelihood: the group ``log_likelihood``, in nats, without the scale of subsampling or annealing.
            ``True`` or ``"integrated"``: log p(x_n), integrated over the latent sites of each datum by importance
            sampling from the guide, for each draw of the sites that data share; ``"integrated"`` raises where that
            cannot be had. ``"conditional"``: log p(x_n | z) for each draw z of all sites, discrete ones included, which
            ranks models by how closely each datum's own z fits it. ``False``: no such group.
        num_importance_samples: the number of draws of the sites of each datum, for each draw of the shared sites, where
            the log likelihood is integrated. At least 30 give a Pareto k.
        plate: the plate whose elements are the data that the log likelihood is about; all latent sites in it are
            integrated out, also those of plates inside of it. By default the plates of an observed site, if latent
            sites are in them too.
        coords: coordinate values by dimension; they override the indices of the plates.
        dims: names by site, either of the event dimensions or of all dimensions. By default
            dimensions of plates are named after the plates, and all others ``<site>_dim_0``, ``<site>_dim_1``, ...
            For an entry of ``constant_data``, names of all its dimensions.
        constant_data: arrays by name for the group ``constant_data``, such as covariates. The arguments ``context`` and
            ``offset`` of the model are there by themselves, where they have a row for each datum.
        seed: a seed for the draws, which then leave the global random state of PyTorch as it was.

    Returns:
        An ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1.x) with draws of shape
        (chain=1, draw, \*plates, \*event). Deterministic sites are in ``posterior`` and ``prior``. The group
        ``sample_stats`` has log densities of the draws, and the group ``importance_sampling`` the effective sample size
        and Pareto k of the importance weights of each datum.

    Raises:
        TypeError: if ``svi_or_pair``, ``model_args``, ``coords``, ``dims`` or ``constant_data`` has the wrong type.
        ValueError: if ``num_samples``, ``samples_per_pass`` or ``num_importance_samples`` is not an int of at least 1,
            ``dims`` or ``coords`` do not fit the model, ``constant_data`` has the name of a site, the model has no
            such ``plate`` of data, the guide leaves out a latent site of the model that is not marked for parallel
            enumeration, draws are not finite, or the prior cannot be sampled.

    Warns:
        UserWarning: if a log likelihood is left out because the guide draws the latent sites of the data at points or
            all together, or is conditional on sites that several elements of an observed site share.

    Note:
        - Sites that are marked for parallel enumeration and that the guide leaves out (``TraceEnum_ELBO`` sums
          them out) are drawn by :func:`pyro.infer.infer_discrete` given the guide's draw of the other sites and
          the data of the call, without the scale of subsampling. The guide draws sites that it enumerates itself.
        - ``log_likelihood`` has one variable for each observed site, or ``joint_<plate>`` for all observed sites of a
          datum together. The attribute ``log_likelihood_note`` says what each variable is. Enumerated sites of a datum
          are summed out exactly; masked elements are 0.
        - If no site is shared, log p(x_n) is the same in all draws. Draws then differ by less than 1e-9 relatively, in
          such a way that the Pareto k of ``arviz.loo`` and ``arviz.compare`` is the one of the importance weights.
        - ``sample_stats`` has ``lp``, the log joint density log p(x, z) with enumerated sites summed out, and
          ``lp_approx``, the log density log q(z) of the guide. ``lp_global`` and ``lp_approx_global`` are of the shared
          sites alone, with the others integrated out, and go with the integrated log likelihood:
          ``loo_approximate_posterior(fit, log_p=stats["lp_global"], log_q=stats["lp_approx_global"])`` of arviz_stats
          corrects for the guide (Magnusson et al. 2019, https://arxiv.org/abs/1904.10679); with the conditional one,
          ``lp`` and ``lp_approx`` do. ArviZ 0 has no such function: there ``arviz.psislw`` of
          ``stats.lp_global - stats.lp_approx_global - log_likelihood``, draws last, gives the same log weights.
        - Entries of a datum that a mask leaves out are NaN in ``observed_data`` and do not enter ``log_likelihood``, so
          that fits with different gaps cannot be compared by it; ``posterior_predictive`` has draws of them.
        - For the prior and predictive groups the model runs with the same arguments and every observed site
          is sampled; what else the model computes from its data (teacher forcing) still sees the data.
        - A plate that subsamples at random is held at its first ``subsample_size`` indices in every draw.
        - A module given as model or guide, or by a bound method, runs in evaluation mode and keeps its mode afterwards.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0).expand([2]).to_event(1), obs=x)
        >>> fit = from_pyro_svi((model, AutoNormal(model)), torch.zeros(3, 2), num_samples=10)
        >>> dict(fit["posterior_predictive"]["x"].sizes)
        {'chain': 1, 'draw': 10, 'data': 3, 'x_dim_0': 2}
        >>> fit["log_likelihood"]["x"].dims
        ('chain', 'draw', 'data')
    """
    model, guide = _model_and_guide(svi_or_pair)
    _checks.positive_int("num_samples", num_samples)
    note = (
        "Independent draws from a variational approximation, stored as one chain: "
        "R-hat and effective sample size say nothing about the quality of the fit."
    )
    return convert(
        model,
        guide,
        model_args,
        model_kwargs,
        given={},
        source="the guide",
        shape=(1, num_samples),
        samples_per_pass=samples_per_pass,
        seed=seed,
        coords=coords,
        dims=dims,
        constant_data=constant_data,
        attrs={"sample_note": note},
        prior=prior,
        posterior_predictive=posterior_predictive,
        log_likelihood=log_likelihood,
        num_importance_samples=num_importance_samples,
        plate=plate,
    )


def _model_and_guide(svi_or_pair: Any) -> tuple[Program, Program]:
    if isinstance(svi_or_pair, SVI):
        return svi_or_pair.model, svi_or_pair.guide
    if not isinstance(svi_or_pair, tuple) or len(svi_or_pair) != 2:
        raise TypeError(f"Expected svi_or_pair to be an SVI object or a pair (model, guide), got {svi_or_pair!r}")
    model, guide = svi_or_pair
    return _checks.function("the model in svi_or_pair", model), _checks.function("the guide in svi_or_pair", guide)
