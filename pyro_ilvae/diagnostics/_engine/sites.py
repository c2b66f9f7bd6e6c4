"""Which latent site a diagnostic is about, and what the diagnostics ask of sites."""

from collections.abc import Iterable
from typing import Any

from torch.distributions import constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError


def only_site(batch: Batch, name: str | None, *, continuous: bool = False) -> str:
    """The latent site called ``name``; if None, the only (continuous) latent site that the guide samples."""
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"Expected site to be the name of a site or None, got {name!r}")
        return name
    check_samples(batch)
    nodes: dict[str, Any] = batch.model_trace.nodes
    names = [site for site in batch.latent_sites if not (continuous and nodes[site]["fn"].support.is_discrete)]
    if len(names) == 1:
        return names[0]
    kind = "continuous latent" if continuous else "latent"
    if not names:
        raise UnavailableError(f"Expected a {kind} site that the guide samples, got {batch.latent_sites}")
    raise ValueError(f"Expected the argument site to name one of several {kind} sites, {names}, got None")


def site_names(sites: Any) -> list[str]:
    """Return the argument ``sites`` as a list of names, each once."""
    if isinstance(sites, str):
        raise ValueError(f"Expected sites to be a sequence of names, got the string {sites!r}")
    if not isinstance(sites, Iterable):
        raise TypeError(f"Expected sites to be a sequence of names, got {sites!r}")
    names = list(sites)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"Expected sites to be names, each once, got {names!r}")
    return names


def check_samples(batch: Batch) -> None:
    """Raise if the guide samples none of the model's latent sites."""
    if not batch.latent_sites:
        raise UnavailableError("Expected a guide that samples a latent site of the model, got none")


def check_no_points(batch: Batch, consequence: str) -> None:
    """Raise if the guide puts a continuous latent site at one value, as ``AutoDelta`` does."""
    if points := batch.points():
        raise UnavailableError(
            "Expected a guide that draws its sites from distributions, got a Delta at a point for each of "
            f"{points}: {consequence}"
        )


def check_not_flat(batch: Batch, names: Iterable[str]) -> None:
    """Raise if the model masks a site where other sites depend on it, which leaves it a flat prior there."""
    if flat := [name for name in names if name in batch.runs.flat_sites]:
        raise UnavailableError(
            f"Expected a prior of site '{flat[0]}' wherever other sites depend on it, got a mask: a divergence from a "
            "flat prior means nothing"
        )


def dims_of_unit(site: Any) -> int:
    """The number of event dimensions, from the right, whose entries are one variable together.

    It is 1 for one-hot, simplex and ordered vectors, 2 for covariances and their factors, and 0 where each entry can
    take its values whatever the others are.
    """
    try:
        support = site["fn"].support
        while isinstance(support, constraints.independent | MixtureSameFamilyConstraint):
            support = support.base_constraint
        return int(support.event_dim)
    except NotImplementedError:  # of a distribution that does not say what its support is
        return 0


def local_dim(batch: Batch, site: Any) -> int:
    """The dimension of the data, from the right, in the batch shape of a site that has a value for each datum."""
    dim = batch.data_dim(site)
    if dim is None:
        plates = [(frame.name, frame.size) for frame in site["cond_indep_stack"]]
        raise ValueError(
            f"Expected site '{site['name']}' in a plate over the {batch.num_data} data, got plates {plates}"
        )
    return dim
