"""Runs the same program with SVI and with GraphSVI, and compares what is left."""

import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ilvae import JointOptim
from pyro_ilvae.infer.graph_svi import GraphSVI

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
STEPS = [(X,)] * 3


def sgd():
    return JointOptim(torch.optim.SGD, {"lr": 1e-3})


def pyro_adam():
    return pyro.optim.Adam({"lr": 1e-2})


def after(kind, build, steps, optim):
    """The SVI, and what is left after steps, which are arguments of a step or functions of the holder and the SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, holder = build()
    svi = kind(model, guide, optim(), Trace_ELBO(), **({"compile": False} if kind is GraphSVI else {}))
    losses = []
    for step in steps:
        if callable(step):
            step(holder, svi)
            continue
        with warnings.catch_warnings():
            # Pyro tells of frozen parameters, GraphSVI of what it does not record.
            warnings.simplefilter("ignore", UserWarning)
            try:
                losses.append(float(svi.step(*step)))
            except (ValueError, RuntimeError) as error:
                losses.append(str(error)[:40])
    parameters = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    states = (torch.rand(3).tolist(), random.random(), np.random.rand())
    return svi, losses, parameters, states, getattr(holder, "left", list)()


def check(build, steps, *, optim=sgd, runs="graph"):
    """Raise unless a graph and SVI leave the same."""
    _, losses, parameters, states, left = after(SVI, build, steps, optim)
    svi, own_losses, own_parameters, own_states, own_left = after(GraphSVI, build, steps, optim)
    assert svi.runs == runs, svi._reason
    for own, other in zip(own_losses, losses, strict=True):
        assert own == (other if isinstance(other, str) else pytest.approx(other, rel=1e-4))
    assert own_parameters.keys() == parameters.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(own_parameters[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert own_states == states
    assert own_left == pytest.approx(left)
    return svi


def guide_of_nothing(*_):
    pass


def model_with(likelihood):
    """A model whose mean and scale are what a function returns."""

    def model(x, *args):
        mean, scale = likelihood(x, *args)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, scale).expand([len(x)]), obs=x[:, 0])

    return model


def built(likelihood, holder=None):
    return lambda: (model_with(likelihood), guide_of_nothing, holder)


def loc():
    return pyro.param("loc", torch.tensor(0.1))
