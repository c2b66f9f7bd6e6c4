"""Conversions measure modules in evaluation mode, however the model and the guide that use them are written."""

from functools import partial

import numpy as np
import pyro
import pytest
import torch
from helpers.arviz_groups import values
from pyro import distributions as dist
from pyro.infer import HMC, MCMC
from torch import nn

from pyro_ilvae.io_pyro import from_pyro_mcmc, from_pyro_svi

X = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)
WAYS = {
    "function": lambda f, net: lambda x: f(net, x),
    "partial": lambda f, net: partial(f, net),
    "parameters": lambda f, net: lambda x: f(pyro.module("net", net), x),
}


def decoded(net, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        shape = z.shape
        mean = net(z.reshape(-1, 2)).reshape(shape)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def standard_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def network():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("samples_per_pass", [1, None])
def test_a_fit_of_a_model_without_a_module_of_its_own(way, samples_per_pass):
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    arguments = {"num_samples": 5, "samples_per_pass": samples_per_pass, "log_likelihood": "conditional"}
    fit = from_pyro_svi((WAYS[way](decoded, net), standard_guide), X, **arguments)
    assert all(part.training for part in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    z = torch.tensor(values(fit, "posterior")["z"])
    with torch.no_grad():
        mean = net.eval()(z.reshape(-1, 2)).reshape(z.shape)
    expected = dist.Normal(mean, 1.0).log_prob(X).sum(-1)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_chains_of_a_model_without_a_module_of_its_own(way):
    net = network()
    kernel = HMC(WAYS[way](decoded, net), step_size=0.1, num_steps=1, adapt_step_size=False)
    mcmc = MCMC(kernel, 4, 1, disable_progbar=True)
    mcmc.run(X)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit = from_pyro_mcmc(mcmc, log_likelihood="conditional")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    z = torch.tensor(values(fit, "posterior")["z"])
    with torch.no_grad():
        mean = net.eval()(z.reshape(-1, 2)).reshape(z.shape)
    expected = dist.Normal(mean, 1.0).log_prob(X).sum(-1)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)
