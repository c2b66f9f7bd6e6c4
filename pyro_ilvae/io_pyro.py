"""Conversion of Pyro's variational fits to ArviZ, for any Pyro model and guide."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_ilvae import _checks
from pyro_ilvae._modes import evaluation_mode

Function: TypeAlias = Callable[..., Any]


def from_pyro_svi(
    svi_or_pair: SVI | tuple[Function, Function],
    *,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    prior: bool = True,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    batch_size: int = 1,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = None,
) -> Any:
    r"""Convert a variational fit of any Pyro model to ArviZ, with dimensions named after the model's plates.

    R-hat and effective sample size say nothing about a variational fit: the draws are independent draws from
    the guide, stored as one chain, so both look perfect however far the guide is from the posterior.

    Args:
        svi_or_pair: a :class:`pyro.infer.SVI` object or a pair ``(model, guide)``.
        model_args: what the model and the guide are called with, the observed data included.
        model_kwargs: keyword arguments for the same calls.
        num_samples: the number of draws in each group.
        prior: whether to add the groups ``prior`` and ``prior_predictive``.
        posterior_predictive: whether to add the group ``posterior_predictive``.
        log_likelihood: whether to add the group ``log_likelihood``.
        batch_size: the number of draws per run of the model. With 1 the model runs as it is written, once per
            draw. More is faster and takes more memory, but needs a model that allows an outermost plate, as
            ``Predictive(parallel=True)`` does: batch dimensions in plates, and indexing from the right.
        coords: coordinate values by dimension; they override the indices of the plates.
        dims: names by site, either of the event dimensions or of all dimensions. By default those of the
            plates are named after the plates, and the others ``<site>_dim_0``, ``<site>_dim_1``, ...
        seed: a seed for the draws, which then leave the global random state of PyTorch as it was.

    Returns:
        An ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1.x) with draws of shape
        (chain=1, draw, \*plates, \*event). Deterministic sites are in ``posterior`` and ``prior``.

    Raises:
        TypeError: if ``svi_or_pair`` or ``model_args`` has the wrong type.
        ValueError: if ``num_samples`` or ``batch_size`` is not an int of at least 1, ``dims`` does not fit
            the model, the guide leaves out a latent site of the model (enumeration is not supported), draws
            are not finite, or the model does not allow a ``batch_size`` above 1.

    Note:
        - ``log_likelihood`` is log p(x_n | z) for each draw z of the guide and each element n of the plates,
          without the scale of subsampling or annealing; masked elements are 0. Leave-one-out estimates take
          the guide's draws for posterior draws, and are unreliable if each datum has its own latent variable.
        - For the prior and predictive groups the model runs with the same arguments and every observed site
          is sampled; what else the model computes from its data (teacher forcing) still sees the data.
        - A plate that subsamples at random is held at its first ``subsample_size`` indices in every draw.
        - A module given as model or guide, or by a bound method, runs in evaluation mode and is put back.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0).expand([2]).to_event(1), obs=x)
        >>> fit = from_pyro_svi((model, AutoNormal(model)), model_args=(torch.zeros(3, 2),), num_samples=10)
        >>> dict(fit["posterior_predictive"]["x"].sizes)
        {'chain': 1, 'draw': 10, 'data': 3, 'x_dim_0': 2}
        >>> fit["log_likelihood"]["x"].dims
        ('chain', 'draw', 'data')
    """
    model, guide = _model_and_guide(svi_or_pair)
    if not isinstance(model_args, tuple):
        raise TypeError(f"Expected model_args to be a tuple, got {type(model_args).__name__}")
    _checks.positive_int("num_samples", num_samples)
    _checks.positive_int("batch_size", batch_size)
    chunks: dict[str, dict[str, list[np.ndarray]]] = {}
    forked = torch.random.fork_rng(range(torch.cuda.device_count()), enabled=seed is not None)
    with torch.no_grad(), evaluation_mode(model, guide), forked:
        if seed is not None:
            torch.manual_seed(seed)
        sampler = _Sampler(model, guide, model_args, dict(model_kwargs or {}))
        names = sampler.dims(dims or {})
        for start in range(0, num_samples, batch_size):
            size = min(batch_size, num_samples - start)
            for group, values in sampler.draw(size, prior, posterior_predictive, log_likelihood):
                for name, value in values.items():
                    chunks.setdefault(group, {}).setdefault(name, []).append(value)
    groups = {
        group: {name: _finite(np.concatenate(parts)[None], name, group) for name, parts in values.items()}
        for group, values in chunks.items()
    }
    if sampler.observed:
        groups["observed_data"] = sampler.observed
    return _to_arviz(groups, {**sampler.coords, **(coords or {})}, names)


def _to_arviz(groups: dict[str, Any], coords: dict[str, Any], dims: dict[str, list[str]]) -> Any:
    import arviz  # here, because it takes seconds and nothing else in the package needs it

    attrs = {
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "sample_note": "Independent draws from a variational approximation, stored as one chain: "
        "R-hat and effective sample size say nothing about the quality of the fit.",
    }
    from_dict: Any = arviz.from_dict
    if arviz.__version__.startswith("0."):
        group_attrs = {f"{group}_attrs": attrs for group in groups}
        return from_dict(**groups, coords=coords, dims=dims, attrs=attrs, **group_attrs)
    return from_dict(groups, coords=coords, dims=dims, attrs={"/": attrs, **dict.fromkeys(groups, attrs)})


class _HoldSubsamples(Messenger):
    """Holds each plate at the same indices, so that all draws are about the same data."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            # The first indices rather than random ones, because they are right both for a model that indexes
            # the full data with them and for one that is called with a minibatch and ignores them.
            fn = msg["fn"]
            size = fn.size if fn.subsample_size is None else fn.subsample_size
            msg["value"] = self.indices.get(msg["name"], torch.arange(size, device=fn.device))

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.indices.setdefault(msg["name"], msg["value"])


class _Release(Messenger):
    """Samples observed sites but, unlike ``poutine.uncondition``, not deterministic ones."""

    def _pyro_sample(self, msg: Any) -> None:
        if _is_data(msg):
            msg.update(is_observed=False, value=None, done=False)


class _Site(NamedTuple):
    """The dimensions of a site in one run of the model as it is written."""

    batch: tuple[int, ...]
    plates: tuple[str | None, ...]  # of each batch dimension; None outside plates
    event: tuple[int, ...]

    @property
    def kept(self) -> list[tuple[str | None, int]]:
        """Plate and size of the batch dimensions that are more than padding."""
        pairs = zip(self.plates, self.batch, strict=True)
        return [(plate, size) for plate, size in pairs if plate is not None or size > 1]


def _site(node: Any) -> _Site:
    shape = tuple(torch.as_tensor(node["value"]).shape)
    frames = {frame.dim: frame for frame in node["cond_indep_stack"] if frame.vectorized}
    depth = max((-dim for dim in frames), default=0)

    def batch_shape(event_dim: int) -> tuple[int, ...]:
        lead = shape[: len(shape) - event_dim]
        return (1,) * (depth - len(lead)) + lead

    event_dim = node["fn"].event_dim
    if node["infer"].get("_deterministic") and event_dim == len(shape):
        # By default pyro.deterministic takes every dimension for one of the event, also those of its plates.
        rest = max(0, len(shape) - depth)
        if all(batch_shape(rest)[dim] in (1, frame.size) for dim, frame in frames.items()):
            event_dim = rest
    lead = batch_shape(event_dim)
    dims = range(-len(lead), 0)
    batch = tuple(max(lead[dim], frames[dim].size) if dim in frames else lead[dim] for dim in dims)
    return _Site(
        batch,
        tuple(frames[dim].name if dim in frames else None for dim in dims),
        shape[len(shape) - event_dim :],
    )


class _Sampler:
    """Draws from a model and its guide, several at a time in an outermost plate."""

    def __init__(self, model: Function, guide: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.hold = _HoldSubsamples()
        self.nesting = 0
        # The model before the guide, whose plates have to take the indices that the model gives its own.
        self._trace(_Release()(model), 1)
        guide_trace, model_trace = self._posterior(1)
        # A factor statement is an observed site without a value.
        nodes = {
            name: node
            for name, node in model_trace.nodes.items()
            if node["type"] == "sample" and not (site_is_subsample(node) or isinstance(node["fn"], dist.Unit))
        }
        self.sites = {name: _site(node) for name, node in nodes.items()}
        self.data = [name for name, node in nodes.items() if _is_data(node)]
        self.variables = [name for name in nodes if name not in self.data]
        every_node: list[Any] = [*guide_trace.nodes.values(), *model_trace.nodes.values()]
        frames = [frame for node in every_node for frame in node.get("cond_indep_stack", ())]
        self.nesting = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        self.coords = {plate: _numpy(indices).copy() for plate, indices in self.hold.indices.items()}
        self.observed = {name: self._array(name, nodes[name]["value"], 1)[0].copy() for name in self.data}

    def dims(self, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The names of the dimensions of every site, after chain and draw."""
        if unknown := set(given) - set(self.sites):
            raise ValueError(f"Expected dims for sites among {list(self.sites)}, got {list(unknown)}")
        result = {}
        for name, site in self.sites.items():
            plates = [plate for plate, _ in site.kept] + [None] * len(site.event)
            own = given.get(name, ())
            if isinstance(own, str) or len(own) not in (0, len(site.event), len(plates)):
                raise ValueError(
                    f"Expected dims of site {name!r} to be {len(site.event)} names for its event or "
                    f"{len(plates)} for all its dimensions, got {own!r}"
                )
            unnamed = count()
            names = [plate or f"{name}_dim_{next(unnamed)}" for plate in plates]
            result[name] = names[: len(names) - len(own)] + list(own)
            if not {"chain", "draw"}.isdisjoint(result[name]):
                raise ValueError(f"Expected dims other than chain and draw, got {result[name]} for {name!r}")
        return result

    def draw(
        self, size: int, prior: bool, posterior_predictive: bool, log_likelihood: bool
    ) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Yield the groups, their arrays of shape (size, *plates, *event)."""
        for name, site in self.sites.items():
            if size > 1 and any(plate is None for plate, _ in site.kept):
                raise ValueError(
                    f"Expected every batch dimension of site {name!r} to be in a plate, or batch_size=1, "
                    f"got batch shape {site.batch} in plates {site.plates}"
                )
        guide_trace, model_trace = self._posterior(size)
        yield "posterior", self._values(self.variables, model_trace, size)
        if posterior_predictive:
            released = self._trace(_Release()(poutine.replay(self.model, trace=guide_trace)), size)
            yield "posterior_predictive", self._values(self.data, released, size)
        if log_likelihood:
            model_trace.compute_log_prob(lambda name, node: name in self.data)
            log_probs = {name: self._log_prob(name, model_trace.nodes[name], size) for name in self.data}
            yield "log_likelihood", log_probs
        if prior:
            released = self._trace(_Release()(self.model), size)
            yield "prior", self._values(self.variables, released, size)
            yield "prior_predictive", self._values(self.data, released, size)

    def _trace(self, fn: Function, size: int) -> poutine.Trace:
        with nullcontext() if size == 1 else pyro.plate("_draws", size, dim=-self.nesting - 1), self.hold:
            return poutine.trace(fn).get_trace(*self.args, **self.kwargs)

    def _posterior(self, size: int) -> tuple[poutine.Trace, poutine.Trace]:
        node: Any
        guide_trace = self._trace(self.guide, size)
        for name, node in guide_trace.iter_stochastic_nodes():
            # Before the model runs: it may stop at such a value with an error that does not name the site.
            if not node["infer"].get("is_auxiliary"):
                _finite(_numpy(node["value"]), name, "posterior")
        model_trace = self._trace(poutine.replay(self.model, trace=guide_trace), size)
        for name, node in model_trace.iter_stochastic_nodes():
            if name not in guide_trace and not site_is_subsample(node):
                raise ValueError(
                    f"Expected the guide to sample every latent site of the model, got none named {name!r} "
                    "(sites that inference enumerates are not supported)"
                )
        return guide_trace, model_trace

    def _values(self, names: list[str], trace: poutine.Trace, size: int) -> dict[str, np.ndarray]:
        return {name: self._array(name, trace.nodes[name]["value"], size) for name in names}

    def _log_prob(self, name: str, node: Any, size: int) -> np.ndarray:
        mask = True if node["mask"] is None else node["mask"]
        log_prob = node["unscaled_log_prob"]
        log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)
        return self._array(name, log_prob, size, self.sites[name]._replace(event=()))

    def _array(self, name: str, value: Any, size: int, site: _Site | None = None) -> np.ndarray:
        site = site or self.sites[name]
        value = torch.as_tensor(value)
        padding = (1,) * (self.nesting - len(site.batch))
        shape = (size, *padding, *site.batch, *site.event)
        try:
            value = value.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"Expected values of shape {shape} for {size} draws at once of site {name!r}, got "
                f"{tuple(value.shape)}; batch_size=1 runs the model as it is written"
            ) from None
        return _numpy(value.reshape(size, *(length for _, length in site.kept), *site.event))


def _model_and_guide(svi_or_pair: Any) -> tuple[Function, Function]:
    if isinstance(svi_or_pair, SVI):
        return svi_or_pair.model, svi_or_pair.guide
    if isinstance(svi_or_pair, tuple) and len(svi_or_pair) == 2 and all(map(callable, svi_or_pair)):
        return svi_or_pair
    raise TypeError(f"Expected an SVI object or a (model, guide) pair of callables, got {svi_or_pair!r}")


def _is_data(node: Any) -> bool:
    """Whether a site is observed, and not by a deterministic statement."""
    return bool(node["is_observed"] and not node["infer"].get("_deterministic"))


def _numpy(value: Any) -> np.ndarray:
    return torch.as_tensor(value).detach().cpu().numpy()


def _finite(value: np.ndarray, name: str, group: str) -> np.ndarray:
    # A log-likelihood may be -inf: the datum is impossible under that draw.
    if np.isnan(value).any() or (group != "log_likelihood" and np.isinf(value).any()):
        raise ValueError(f"Expected finite draws at site {name!r} of {group}, got NaN or infinity")
    return value
