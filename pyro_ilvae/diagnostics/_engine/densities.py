"""Log densities of the sites of a trace, for each datum, or for all data together where they share a site."""

from typing import Any

from torch import Tensor

from pyro_ilvae._programs import site_log_prob
from pyro_ilvae.diagnostics._engine.batch import Batch


def marginal(log_joint: Tensor) -> Tensor:
    """Return a log density of shape (draws, N), with enumerated dimensions to the left of that shape summed out."""
    lead = log_joint.dim() - 2
    return log_joint.flatten(0, lead - 1).logsumexp(0) if lead > 0 else log_joint


def whole_data(batch: Batch, sites: list[Any], num_draws: int) -> Tensor:
    """Return the log density of all data together, of shape (draws, 1), to which shared sites add once."""
    local = [site for site in sites if batch.is_local(site)]
    total = batch.log_density([site for site in sites if not batch.is_local(site)], num_draws)
    if local:
        log_density = batch.log_density(local, num_draws)
        for site in local:
            # Plates have become two dimensions, for draws and data. Local sites are summed out before data are added.
            dim = site["infer"].get("_enumerate_dim", 0) + batch.nesting - 1
            if "_enumerate_dim" in site["infer"] and -dim <= log_density.dim():
                log_density = log_density.logsumexp(dim, keepdim=True)
        total = total + log_density.sum(-1, keepdim=True)
    return marginal(total) if total.dim() else total.expand(num_draws, 1)


def check_numbers(log_densities: Tensor, sites: list[Any]) -> None:
    """Raise if log densities of sites hold a NaN, and name the sites that it comes from."""
    if log_densities.isnan().any():
        bad = sorted({site["name"] for site in sites if site_log_prob(site).isnan().any()})
        raise ValueError(f"Expected log densities of model and guide that are numbers, got NaN at sites {bad}")


def shared_sites(batch: Batch, nodes: list[Any], batch_size: int | None) -> list[str]:
    """Return the names of the sites that all data share; then the data have to be in one batch."""
    shared = list(dict.fromkeys(node["name"] for node in nodes if not batch.is_local(node)))
    if shared and batch.from_loader:
        raise ValueError(
            f"Expected all data in one call where data share sites, here {shared}, got model_args in batches: pass "
            "tensors of all data"
        )
    if shared and batch_size is not None:
        raise ValueError(f"Expected batch_size=None where data share sites, here {shared}, got {batch_size}")
    return shared


def log_density(batch: Batch, nodes: list[Any], count: int, together: bool) -> Tensor:
    """Return the log density of sites, of shape (count, N), or of all data together, of shape (count, 1)."""
    return whole_data(batch, nodes, count) if together else marginal(batch.log_density(nodes, count))
