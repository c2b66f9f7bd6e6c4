"""Models and guides that disagree on a site, which SVI refuses as well."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.measures import MEASURES, exported
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_ilvae.diagnostics import (
    collapse_summary,
    evidence,
    kl_divergence,
)

X = torch.randn(5, generator=torch.Generator().manual_seed(0))


def scalar(x):
    with pyro.plate("data", len(x)):
        return pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def as_event(x):
    return pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))


def vector(size, event=True, dim=-1):
    def program(x):
        with pyro.plate("data", len(x), dim=dim):
            fn = dist.Normal(torch.zeros(len(x), *(1,) * (-1 - dim), size), 1.0)
            return pyro.sample("z", fn.to_event(1) if event else fn)

    return program


def matrix(x):
    with pyro.plate("data", len(x)):
        return pyro.sample("z", dist.Normal(torch.zeros(len(x), 2, 2), 1.0).to_event(2))


def column(x):
    with pyro.plate("other", 1), pyro.plate("data", len(x), dim=-2):
        return pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))


def other_size(x):
    with pyro.plate("others", len(x) - 1):
        return pyro.sample("z", dist.Normal(torch.zeros(len(x) - 1), 1.0))


def one_row(x):
    with pyro.plate("data", len(x)):
        return pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))


PAIRS = {
    "scalars and an event": (scalar, as_event),
    "sizes of an event": (vector(2), vector(3)),
    "an event of one and of several": (vector(3), one_row),
    "events of two dimensions": (vector(2), matrix),
    "a column": (scalar, column),
    "another number of values": (scalar, other_size),
    "an event of all data and a vector of one": (as_event, one_row),
}


def observing(prior):
    def model(x):
        z = prior(x)
        with pyro.plate("observed", len(x)) if prior is as_event else poutine.mask(mask=True):
            pyro.factor("rest", 0.0 * z.sum())

    return model


@pytest.mark.parametrize("measure", [*MEASURES, exported], ids=lambda measure: measure.__name__)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_sites_of_other_shapes_are_refused(pair, swapped, measure):
    prior, guide = reversed(pair) if swapped else pair
    with pytest.raises(ValueError, match=r"site '?z'?"):
        measure(observing(prior), guide, X)
    with pytest.raises((ValueError, RuntimeError)):
        Trace_ELBO().loss(observing(prior), guide, X)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
@pytest.mark.parametrize("name", [None, "data"])
def test_sites_in_other_plates_are_refused(measure, name):
    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="plate"):
        measure(model, guide, X, plate=name)


@pytest.mark.parametrize("measure", [evidence, collapse_summary, exported])
@pytest.mark.parametrize("shape", [(5, 1), (5, 2), (5, 4)])
def test_data_of_another_shape_are_refused(measure, shape):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + torch.zeros(3), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"site '?x'?"):
        measure(model, guide, torch.zeros(shape))


def test_a_delta_and_a_transformed_draw_of_the_right_shape_are_accepted():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u.sum(-1), event_dim=1))

    torch.testing.assert_close(kl_divergence(model, guide, X, num_samples=5).values, torch.zeros(5), atol=1e-5, rtol=0)
