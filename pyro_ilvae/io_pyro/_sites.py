"""Sites of a Pyro model: the handlers that draws run under, and which dimensions a site has."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample


class HoldSubsamples(Messenger):
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
            self.indices[msg["name"]] = msg["value"]


class Release(Messenger):
    """Samples observed sites but, unlike ``poutine.uncondition``, not deterministic ones."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_data(msg):
            msg.update(is_observed=False, value=None, done=False)


class Replay(Messenger):
    """Gives latent sites the values of a draw, as ``poutine.replay`` does with those of a trace."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg.update(value=self.values[msg["name"]], done=True)


class Site(NamedTuple):
    """The dimensions of a site in one run of the model as it is written."""

    batch: tuple[int, ...]
    plates: tuple[str | None, ...]  # of each batch dimension; None outside plates
    event: tuple[int, ...]

    @property
    def kept(self) -> list[tuple[str | None, int]]:
        """Plate and size of the batch dimensions that are more than padding."""
        pairs = zip(self.plates, self.batch, strict=True)
        return [(plate, size) for plate, size in pairs if plate is not None or size > 1]


def dimensions(node: Any) -> Site:
    """The dimensions of the site of a trace's node."""
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
    return Site(
        batch,
        tuple(frames[dim].name if dim in frames else None for dim in dims),
        shape[len(shape) - event_dim :],
    )


def is_data(node: Any) -> bool:
    """Whether a site is observed, and not by a deterministic statement or a reparametrization."""
    # poutine.reparam observes a site at what it computes for it, under a Delta distribution, as a deterministic
    # statement does, but does not say so.
    fn = node["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return bool(node["is_observed"]) and not isinstance(fn, dist.Delta)


def is_variable(node: Any) -> bool:
    """Whether a node of a trace is a site that has a value: no parameter, no plate and no factor statement."""
    # A factor statement is an observed site without a value.
    return node["type"] == "sample" and not (site_is_subsample(node) or isinstance(node["fn"], dist.Unit))


def nesting(nodes: Any) -> int:
    """The number of dimensions that the plates of nodes take."""
    frames = [frame for node in nodes for frame in node.get("cond_indep_stack", ())]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def as_numpy(value: Any) -> np.ndarray:
    """A tensor, or what becomes one, as an array."""
    return torch.as_tensor(value).detach().cpu().numpy()


def finite(value: np.ndarray, name: str, group: str) -> np.ndarray:
    """Return ``value`` if it is finite, or -inf in ``log_likelihood``."""
    # A log-likelihood may be -inf: the datum is impossible under that draw.
    if np.isnan(value).any() or (group != "log_likelihood" and np.isinf(value).any()):
        raise ValueError(f"Expected finite draws at site {name!r} of {group}, got NaN or infinity")
    return value
