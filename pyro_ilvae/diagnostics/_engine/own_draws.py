"""Draws of a latent site from the prior of the model itself."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae._programs import Release, sample_sites
from pyro_ilvae.diagnostics._engine.batch import Batch
from pyro_ilvae.diagnostics._engine.batches import batches
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics._engine.summaries import Call


def draws_of_prior(call: Call, name: str) -> Tensor:
    """Draws of a site of shape (S, K), spread evenly over the data, whose priors may differ; S >= ``num_samples``.

    The model runs with its data released, so that nothing but the model decides on the draws.
    """
    size, num_samples = call.arguments.num_data, call.options["num_samples"]
    rounds = math.ceil(num_samples / size)
    chosen = torch.arange(size) if rounds > 1 else torch.randperm(size)[:num_samples].sort().values
    parts, start = [], 0
    for batch in batches(call.model, call.guide, call.arguments, call.options["batch_size"], call.options["plate"]):
        index = chosen[(chosen >= start) & (chosen < start + batch.num_data)] - start
        start += batch.num_data
        if len(index):
            parts.append(_draws(batch, name, index.repeat(rounds)))
    return torch.cat(parts)


def _draws(batch: Batch, name: str, index: Tensor) -> Tensor:
    """One draw for each entry of ``index``, of the datum with this number in the batch."""
    latent = [node for node in sample_sites(batch.model_trace) if not node["is_observed"]]
    alone = all(batch.is_local(node) for node in latent)
    # Data that share a site have dependent draws in one run, so that each draw is from a run of its own.
    turns = torch.bincount(index).max() if alone else len(index)
    which = torch.arange(len(index)) // (index.unique().numel() if alone else 1)
    rows: list[Any] = []
    position = 0
    for count in batch.passes(int(turns)):
        node = _released(batch, count).nodes[name]
        value = batch.data_first(node["value"], node, node["fn"].event_dim)
        if value.dim() != 3:
            raise UnavailableError(
                f"Expected site '{name}' to be one vector for each datum, got shape {tuple(value.shape[2:])}"
            )
        value = value.expand(count, batch.num_data, value.shape[-1])
        mine = (which >= position) & (which < position + count)
        rows.append(value[(which[mine] - position).to(value.device), index[mine].to(value.device)])
        position += count
    return torch.cat(rows)


def _released(batch: Batch, count: int) -> Any:
    try:
        with torch.no_grad():
            return batch.runs.trace(Release()(batch.model), count)
    except Exception as error:
        raise UnavailableError(
            f"Expected a model that draws its own data, got {type(error).__name__}: {error}"
        ) from error
