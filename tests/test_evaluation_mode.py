"""Evaluation mode of the modules that a function runs, however it is written."""

from functools import partial, wraps
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.func import functional_call

from pyro_ilvae._contexts import evaluation_mode
from pyro_ilvae.diagnostics import (
    collapse_summary,
    evidence,
    guaranteed_information,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    lipschitz_audit,
    mean_fisher_divergence,
    separation,
)
from pyro_ilvae.io_pyro import from_pyro_svi
from pyro_ilvae.likelihoods import Normal
from pyro_ilvae.plots import plot_traversals

net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
REGISTRY = {"net": net}
Z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def trained():
    """The network with statistics of its own, in training mode but for one layer."""
    torch.manual_seed(0)
    net.train()
    for _ in range(5):
        net(torch.randn(20, 2) + 1)
    net[3].eval()


def look_up(name):
    return REGISTRY[name]


def global_function(z):
    return net(z)


class Holder:
    def __init__(self):
        self.parts = {"net": [net]}

    def method(self, z):
        return self.parts["net"][0](z)

    __call__ = method

    def model(self, x):
        model(x)

    def guide(self, x):
        guide(x)


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = [net]

    def forward(self, z):
        return self.parts[0](z)


def decorated(function):
    @wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


def asks_first(z):
    return net(z) if not net.training else torch.full((len(z), 3), torch.nan)


def without_hooks(z):
    return nn.functional.dropout(net.forward(z), 0.5, net.training)


HOLDERS = [SimpleNamespace(own=Holder())]
STYLES = {
    "module": net,
    "function": global_function,
    "lambda": lambda z: net(z),
    "default": lambda z, module=net: module(z),
    "bound": net.forward,
    "partial": partial(lambda scale, z: net(scale * z), 1.0),
    "partial of a method": partial(Holder().method),
    "method of an object": Holder().method,
    "callable object": Holder(),
    "handler": poutine.scale(poutine.block(global_function), scale=2.0),
    "handler of a method": poutine.scale(partial(Holder().method), scale=2.0),
    "decorated": decorated(decorated(global_function)),
    "in a list": lambda z, holders=HOLDERS: holders[0].own(z),
    "by name": lambda z: look_up("net")(z),
    "unregistered": Unregistered(),
    "functional": lambda z: functional_call(net, dict(net.named_parameters()), (z,)),
    "asks first": asks_first,
    "without hooks": without_hooks,
}


@pytest.mark.parametrize("function", STYLES.values(), ids=STYLES)
def test_no_dropout_and_no_statistics_and_all_modes_back(function):
    modes = [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with evaluation_mode(function):
        value = function(Z)
        with evaluation_mode(function):
            assert torch.equal(function(Z), value)
        assert torch.equal(function(Z), value)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), evaluation_mode(function):
        function(torch.zeros(6, 5))
    assert [module.training for module in net.modules()] == modes == [True] * 4 + [False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.eval()
    assert torch.equal(function(Z), value)
    net.train()
    assert not torch.equal(function(Z), function(Z))  # so that the test can fail


@pytest.mark.parametrize("compiled", ["module", "in place", "function"])
def test_compiled_functions_are_not_compiled_again(compiled):
    own = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    if compiled == "in place":
        function = own
        own.compile(backend=backend)
    else:
        function = torch.compile(own if compiled == "module" else lambda z: own(z), backend=backend)
    function(Z)
    expected_compilations = len(compilations)
    statistics = own[1].running_mean.clone()
    for _ in range(10):
        with evaluation_mode(function):
            value = function(Z)
    function(Z)
    assert len(compilations) == expected_compilations
    assert own.training
    own[1].running_mean.copy_(statistics)
    own[1].running_var.copy_(torch.ones(8))
    with evaluation_mode(function):
        value = function(Z)
    own.eval()
    own._compiled_call_impl = None
    torch.testing.assert_close(own(Z), value)


def test_modules_that_are_made_on_the_way():
    with evaluation_mode(made_inside := lambda z: nn.Dropout(0.5)(z)):
        assert torch.equal(made_inside(Z), Z)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_scripted_modules():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)))
    with evaluation_mode(lambda z: scripted(z)):
        assert torch.equal(scripted(Z), scripted(Z))
    assert all(module.training for module in scripted.modules())


# The same in whatever runs functions of a user


def model(x):
    pyro.module("net", net)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        loc = nn.functional.dropout(x[:, :2], 0.5, net.training)
        pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


class Module(PyroModule):
    forward = staticmethod(model)


def auto():
    posterior = AutoNormal(model, init_scale=0.5)
    with evaluation_mode(posterior):
        posterior(X)
    return posterior


PROGRAMS = {
    "functions": lambda: (model, guide),
    "lambdas": lambda: (lambda x: model(x), lambda x: guide(x)),
    "partials": lambda: (partial(model), partial(guide)),
    "handlers": lambda: (poutine.scale(model, scale=1.0), poutine.block(guide, hide=["nothing"])),
    "methods": lambda: (Holder().model, Holder().guide),
    "modules": lambda: (Module(), guide),
    "AutoGuide": lambda: (model, auto()),
}
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


def summary(*programs):
    return collapse_summary(*programs, X, seed=0, num_samples=5)["elbo"].item()


def exported(*programs):
    draws = from_pyro_svi(programs, X, num_samples=3, seed=0)
    return float(draws["posterior_predictive"]["x"].sum() + draws["log_likelihood"]["x"].sum())


@pytest.mark.parametrize("measure", [summary, exported])
@pytest.mark.parametrize("programs", PROGRAMS.values(), ids=PROGRAMS)
def test_measures_of_any_program_are_those_of_evaluation_mode(measure, programs):
    modes = [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pair = programs()
    value = measure(*pair)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.eval()
    assert measure(*pair) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("measure", [evidence, kl_divergence, kl_per_dimension, guide_fisher_divergence])
def test_densities_of_a_flow_are_those_of_evaluation_mode(measure):
    """The densities are computed after the guide has run."""
    flow = dist.transforms.batchnorm(2)
    flow(torch.randn(20, 2))
    x = torch.randn(6, 2)

    def normal(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def flow_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x, 0.5).to_event(1), [flow]))

    def measured():
        try:
            return repr(measure(normal, flow_guide, x, seed=0))
        except ValueError as error:
            return str(error)

    before = {name: value.clone() for name, value in flow.state_dict().items()}
    value = measured()
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert flow.training
    flow.eval()
    assert measured() == value


def with_coordinates(decoder):
    def own(z):
        return decoder(z)

    own.latent_dim, own.inverse_lipschitz, own.coordinates = 2, 0.0, lambda y: y[..., :2]
    return own


DECODERS = {
    "guaranteed_information": lambda decoder: (
        guaranteed_information(with_coordinates(decoder), Normal(0.5), num_samples=20, seed=0).by_jacobian
    ),
    "lipschitz_audit": lambda decoder: lipschitz_audit(decoder, latent_dim=2, num_samples=20, steps=3, seed=0),
    "separation": lambda decoder: separation(decoder, Normal(0.5), latent_dim=2, num_samples=20, seed=0),
    "mean_fisher_divergence": lambda decoder: mean_fisher_divergence(
        decoder, Normal(0.5), latent_dim=2, num_samples=20, seed=0
    ),
    "plot_traversals": lambda decoder: (
        plot_traversals(lambda z: decoder(z)[:, None, :], latent_dim=2).images[0].get_array().sum()
    ),
}


@pytest.mark.parametrize("measure", DECODERS.values(), ids=DECODERS)
def test_measures_of_decoders_are_those_of_evaluation_mode(measure):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    value = measure(lambda z: look_up("net")(z))
    assert [module.training for module in net.modules()] == [True] * 4 + [False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.eval()
    assert repr(measure(net)) == repr(value)
