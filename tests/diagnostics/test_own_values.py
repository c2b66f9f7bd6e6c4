"""Guides that hold a value for each datum: right for the data they were learned on, and refused for others."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.measures import MEASURES, exported
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import (
    collapse_summary,
    evidence,
    kl_divergence,
)
from pyro_ilvae.io_pyro import from_pyro_svi

N = 10
X = torch.randn(N, generator=torch.Generator().manual_seed(0))
LOCS = torch.linspace(-2.0, 2.0, N)


def whole(x, index=None):
    """The batch is the data set."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def part(x, index=None):
    """The batch is a part of N data; its indices are those of the first data unless they are given."""
    index = torch.arange(len(x)) if index is None else index
    with pyro.plate("data", N, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def drawn(x, index=None):
    """As Pyro's own examples have it: the plate draws indices, and the batch ignores them."""
    with pyro.plate("data", N, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


AUTOGUIDES = (
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoNormalMessenger,
    AutoDelta,
)


def learned(build, model, **options):
    guide = build(model, **options)
    guide(X)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if name in ("locs.z_unconstrained", "loc", "z_unconstrained"):
                parameter.copy_(LOCS)
    return guide


def by_parameter(x, index=None):
    loc = pyro.param("loc", LOCS.clone())
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


def by_sum(x, index=None):
    loc = pyro.param("loc", LOCS.clone())
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + 0 * x, 1.0))


@pytest.mark.parametrize("measure", [kl_divergence, exported])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("model", [whole, part, drawn])
@pytest.mark.parametrize("build", [*AUTOGUIDES, lambda _: by_parameter, lambda _: by_sum])
def test_held_out_data_are_refused(build, model, size, measure):
    guide = build(model) if build not in AUTOGUIDES else learned(build, model)
    with pytest.raises(ValueError, match=r"batch_size|site '?z'?|locs\.z"):
        measure(model, guide, X[:size])


@pytest.mark.parametrize("measure", [kl_divergence, collapse_summary])
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("model", [whole, part, drawn])
@pytest.mark.parametrize("build", [*AUTOGUIDES, lambda _: by_parameter, lambda _: by_sum])
def test_batches_are_refused(build, model, batch_size, measure):
    guide = build(model) if build not in AUTOGUIDES else learned(build, model)
    with pytest.raises(ValueError, match=r"batch_size|site '?z'?|locs\.z"):
        measure(model, guide, X, batch_size=batch_size)


@pytest.mark.parametrize("measure", [*MEASURES, exported])
@pytest.mark.parametrize("model", [whole, part, drawn])
def test_every_measure_refuses_held_out_data(model, measure):
    guide = learned(AutoNormal, model)
    with pytest.raises(ValueError, match="batch_size=None"):
        measure(model, guide, X[:4])
    if measure is not exported:
        with pytest.raises(ValueError, match="batch_size=None"):
            measure(model, guide, X, batch_size=5)


def by_plate(x, index=None):
    loc = pyro.param("loc", LOCS.clone())
    with pyro.plate("data", N, subsample_size=len(x)) as own:
        pyro.sample("z", dist.Normal(loc[own], 0.5))


def by_table(x, index=None):
    with pyro.plate("data", N, subsample_size=len(x)) as own:
        pyro.sample("z", dist.Normal(LOCS[own], 0.5))


def by_module(x, index=None):
    table = pyro.module("table", torch.nn.Embedding.from_pretrained(LOCS[:, None], freeze=False))
    with pyro.plate("data", N, subsample_size=len(x)) as own:
        pyro.sample("z", dist.Normal(table(own)[..., 0], 0.5))


def small_batches(model):
    guide = AutoNormal(model, init_scale=0.5)
    guide(X[:4])
    with torch.no_grad():
        guide.locs.z.copy_(LOCS)
    return guide


INDEXED = {
    "param": lambda _: by_plate,
    "table": lambda _: by_table,
    "module": lambda _: by_module,
    "AutoNormal": small_batches,
    "lambda": lambda model: (lambda guide: lambda x, index=None: guide(x, index))(small_batches(model)),
}


@pytest.mark.parametrize("measure", [evidence, collapse_summary, exported])
@pytest.mark.parametrize("model", [part, drawn])
@pytest.mark.parametrize("build", INDEXED.values(), ids=INDEXED)
def test_values_by_the_indices_of_a_plate_need_the_indices(build, model, measure):
    guide = build(model)
    with pytest.raises(ValueError, match=r"indices of the data in model_args.* site 'z' for each of its 10 members"):
        measure(model, guide, X[4:8])
    if measure is not exported:
        with pytest.raises(ValueError, match="indices of the data in model_args"):
            measure(model, guide, X[:8], batch_size=4)


@pytest.mark.parametrize("build", INDEXED.values(), ids=INDEXED)
def test_values_by_the_indices_in_the_arguments_are_right(build):
    guide = build(part)
    index = torch.tensor([7, 2, 0, 1])
    for args, options in (((X[index], index), {}), (X[index], {"model_kwargs": {"index": index}})):
        kl = kl_divergence(part, guide, args, **options)
        torch.testing.assert_close(kl.values, exact_kl(Normal(LOCS[index], 0.5), Normal(0.0, 1.0)))
    index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 9])
    kl = kl_divergence(part, guide, (X[index], index), batch_size=4)
    torch.testing.assert_close(kl.values, exact_kl(Normal(LOCS[index], 0.5), Normal(0.0, 1.0)))
    draws = from_pyro_svi((part, guide), (X[:4], torch.arange(4)), num_samples=2000, seed=0)
    means = torch.tensor(draws["posterior"]["z"].values.mean((0, 1)))
    torch.testing.assert_close(means, LOCS[:4], atol=0.1, rtol=0)


def test_indices_that_the_model_chooses_on_its_own_are_right():
    index = torch.tensor([7, 2, 0, 1])
    kl = kl_divergence(lambda x: part(x, index), by_plate, X[index])
    torch.testing.assert_close(kl.values, exact_kl(Normal(LOCS[index], 0.5), Normal(0.0, 1.0)))


def test_a_model_that_takes_its_data_by_the_indices_of_the_plate():
    def model():
        with pyro.plate("data", N, subsample_size=4) as own:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[own])

    def guide():
        with pyro.plate("data", N, subsample_size=4) as own:
            pyro.sample("z", dist.Normal(LOCS[own], 0.5))

    kl = kl_divergence(model, guide)
    torch.testing.assert_close(kl.values, exact_kl(Normal(LOCS[:4], 0.5), Normal(0.0, 1.0)))


@pytest.mark.parametrize("measure", [*MEASURES, exported])
@pytest.mark.parametrize("model", [part, drawn])
def test_functions_of_the_data_need_no_indices(model, measure):
    def guide(x, index=None):
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    measure(model, guide, X[4:8])
    if measure is not exported:
        measure(model, guide, X, batch_size=4)


@pytest.mark.parametrize("build", [AutoNormal, AutoDiagonalNormal, AutoNormalMessenger])
@pytest.mark.parametrize("model", [whole, part, drawn])
def test_all_data_at_once_are_right(build, model):
    kl = kl_divergence(model, learned(build, model, init_scale=0.5), X, site="z")
    torch.testing.assert_close(kl.values, exact_kl(Normal(LOCS, 0.5), Normal(0.0, 1.0)), rtol=1e-4, atol=1e-5)
