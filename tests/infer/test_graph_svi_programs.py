"""What ordinary programs do between and inside steps: a graph takes the steps of SVI, or leaves them to SVI."""

import random
from types import ModuleType, SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.graph_programs import STEPS, X, built, check, guide_of_nothing, loc, model_with, pyro_adam, sgd
from pyro.distributions.transforms import affine_coupling
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ilvae import JointOptim

NUMBER = 1.0


class Config:
    scale = 1.0


class Slots:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


class Owner:
    @property
    def scale(self):
        return NUMBER


def nested(depth):
    return SimpleNamespace(scale=1.0) if depth == 0 else SimpleNamespace(inner=nested(depth - 1))


def innermost(config):
    return innermost(config.inner) if hasattr(config, "inner") else config


def helper():
    return NUMBER


def through(function, depth):
    return function if depth == 0 else through(lambda: function(), depth - 1)


def set_number(*_):
    globals()["NUMBER"] = 3.0


# What holds a number, how it is read, and how it changes.
class Settings(dict):
    """A dictionary whose items are attributes too."""

    def __init__(self, **items):
        super().__init__(items)
        self.scale = items["scale"]


class Pair(tuple):
    pass


def with_scale(config):
    config.scale = 1.0
    return config


CHANGES = {
    "a class": (lambda: Config, lambda config: config.scale, lambda config, _: setattr(Config, "scale", 3.0)),
    "a class of an object": (Config, lambda config: config.scale, lambda config, _: setattr(Config, "scale", 3.0)),
    "slots": (Slots, lambda config: config.scale, lambda config, _: setattr(config, "scale", 3.0)),
    "a property": (Owner, lambda config: config.scale, set_number),
    "deep": (
        lambda: nested(5),
        lambda config: innermost(config).scale,
        lambda config, _: setattr(innermost(config), "scale", 3.0),
    ),
    "functions": (lambda: through(helper, 5), lambda config: config(), set_number),
    "an attribute that comes": (
        SimpleNamespace,
        lambda config: getattr(config, "scale", 1.0),
        lambda config, _: setattr(config, "scale", 3.0),
    ),
    "an attribute that goes": (
        lambda: SimpleNamespace(scale=1.0),
        lambda config: getattr(config, "scale", 3.0),
        lambda config, _: delattr(config, "scale"),
    ),
    "a tensor that goes": (
        lambda: SimpleNamespace(scale=torch.tensor(1.0)),
        lambda config: getattr(config, "scale", 3.0),
        lambda config, _: delattr(config, "scale"),
    ),
    "a longer list": (lambda: [1.0], sum, lambda config, _: config.append(2.0)),
    "a shorter list": (lambda: [1.0, 2.0], sum, lambda config, _: config.pop()),
    "many numbers": (lambda: [0.01] * 300, sum, lambda config, _: config.__setitem__(200, 3.0)),
    "a dictionary": (lambda: {"a": 1.0}, lambda config: sum(config.values()), lambda config, _: config.update(b=2.0)),
    "a dictionary's attribute": (
        lambda: Settings(scale=1.0),
        lambda config: config.scale,
        lambda config, _: setattr(config, "scale", 3.0),
    ),
    "a tuple's attribute": (
        lambda: with_scale(Pair((1, 2))),
        lambda config: config.scale,
        lambda config, _: setattr(config, "scale", 3.0),
    ),
    "a distribution's scale": (
        lambda: dist.Normal(0.0, torch.tensor(1.0)),
        lambda config: config.scale,
        lambda config, _: setattr(config, "scale", torch.tensor(3.0)),
    ),
    "a distribution's scale inside": (
        lambda: dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1),
        lambda config: config.base_dist.scale[0],
        lambda config, _: config.base_dist.scale.fill_(3.0),
    ),
    "an array": (lambda: np.ones(2), lambda config: float(config[0]), lambda config, _: config.__setitem__(0, 3.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_number_that_changes_somewhere_takes_effect(name, monkeypatch):
    build, read, change = CHANGES[name]

    def build_afresh():
        monkeypatch.setattr(Config, "scale", 1.0)
        monkeypatch.setitem(globals(), "NUMBER", 1.0)
        config = build()
        return model_with(lambda x: (loc(), read(config))), guide_of_nothing, config

    check(build_afresh, [*STEPS, change, *STEPS])


settings = ModuleType("settings")


def test_a_variable_of_another_module_takes_effect():
    def build():
        settings.scale = 1.0
        return model_with(lambda x: (loc(), settings.scale)), guide_of_nothing, None

    check(build, [*STEPS, lambda *_: setattr(settings, "scale", 3.0), *STEPS])


class Networks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 1))

    def forward(self, x, both=True):
        return self.first(x)[:, 0] + (self.second(x)[:, 0] if both else 0.0)


def with_networks():
    networks = Networks()

    def likelihood(x, both=True):
        pyro.module("networks", networks)
        return networks(x.to(networks.first.weight.dtype), both), 1.0

    return model_with(likelihood), guide_of_nothing, networks


CHANGES_OF_NETWORKS = {
    "a layer": lambda networks, _: networks.second.append(nn.Tanh()),
    "a layer with parameters": lambda networks, _: networks.second.append(nn.Linear(1, 1)),
    "a hook": lambda networks, _: networks.second.register_forward_hook(lambda module, x, y: 5 * y),
    "a frozen part": lambda networks, _: networks.second.requires_grad_(False),
    "the dtype": lambda networks, _: networks.double(),
    "gradients of another loss": lambda networks, svi: svi.loss_and_grads(svi.model, svi.guide, X),
    "another model": lambda networks, svi: setattr(svi, "model", pyro.poutine.scale(svi.model, 0.1)),
    "a state": lambda networks, _: networks.load_state_dict({k: v + 1 for k, v in networks.state_dict().items()}),
    "the store": lambda networks, _: pyro.clear_param_store(),
}


@pytest.mark.parametrize("optim", [sgd, pyro_adam])
@pytest.mark.parametrize("name", CHANGES_OF_NETWORKS)
def test_a_change_of_a_network_takes_effect(name, optim):
    check(with_networks, [*STEPS, CHANGES_OF_NETWORKS[name], *STEPS], optim=optim)


@pytest.mark.parametrize("optim", [sgd, pyro_adam])
def test_parameters_that_a_step_does_not_use_move_as_in_svi(optim):
    check(with_networks, [(X, True)] * 3 + [(X, False)] * 3, optim=optim)


def test_hooks_of_parameters_run_in_each_step():
    def build():
        model, guide, networks = with_networks()
        calls = []
        networks.first.weight.register_hook(calls.append)
        networks.left = lambda: [len(calls)]
        return model, guide, networks

    check(build, STEPS, runs="SVI")


def test_gradients_that_are_equal_are_clipped_once():
    def build():
        return model_with(lambda x: (loc() + pyro.param("b", torch.tensor(0.2)), 1.0)), guide_of_nothing, None

    check(build, STEPS, optim=lambda: JointOptim(torch.optim.SGD, {"lr": 0.1}, {"clip_norm": 0.1}))


def test_layouts_and_kinds_of_arguments_are_told_apart():
    def likelihood(x, flag):
        return loc() + x.reshape(-1)[:4].mean(), 1.0 if flag is True else 2.0

    check(built(likelihood), [(X, True)] * 3 + [(torch.randn(3, 12).t(), True)] * 2 + [(X, 1)] * 2)


def test_an_error_of_an_operation_is_the_error_of_svi():
    def model(y):
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    y = torch.tensor([0, 1, 2, 1])
    check(lambda: (model, guide_of_nothing, None), [(y,)] * 3 + [(y + 1,), (y,)])


def test_parameters_that_appear_later_have_the_draws_of_svi():
    def likelihood(x, number):
        new = sum(pyro.param(f"w{i}", lambda: torch.randn(())) for i in range(number))
        return loc() + new + torch.randn(()), 1.0

    check(built(likelihood), [(X, number) for number in (0, 1, 2) for _ in range(3)])


def running(update):
    """A model with a running mean in an attribute."""

    def build():
        holder = SimpleNamespace(mean=torch.zeros(2))
        holder.left = lambda: holder.mean.tolist()

        def likelihood(x):
            update(holder, x.mean())
            return loc() + holder.mean.sum(), 1.0

        return model_with(likelihood), guide_of_nothing, holder

    return build


def replaces(holder, mean):
    holder.mean = 0.5 * holder.mean + mean


@pytest.mark.parametrize(
    ("update", "runs"),
    [
        (lambda holder, mean: holder.mean.mul_(0.5).add_(mean), "graph"),
        (lambda holder, mean: holder.mean.unbind(0)[0].add_(mean), "graph"),
        (lambda holder, mean: torch.add(holder.mean, mean, out=holder.mean), "graph"),
        (replaces, "SVI"),
    ],
)
def test_running_means_are_those_of_svi(update, runs):
    check(running(update), [(X + i,) for i in range(5)], runs=runs)


def draws_of(holder):
    return 1.0 if holder.random() < 0.9 else 2.0


@pytest.mark.parametrize(
    "build", [lambda: random, lambda: np.random, lambda: np.random.default_rng(0), lambda: random.Random(0)]
)
def test_rare_draws_from_other_generators_are_found(build):
    def build_afresh():
        generator = build()
        return model_with(lambda x: (loc(), draws_of(generator))), guide_of_nothing, None

    check(build_afresh, STEPS * 2, runs="SVI")


def test_draws_from_a_generator_of_pytorch_are_those_of_svi():
    def build():
        generator = torch.Generator().manual_seed(0)
        return model_with(lambda x: (loc() + torch.randn((), generator=generator), 1.0)), guide_of_nothing, None

    check(build, STEPS, runs="SVI")


def test_parameters_that_are_changed_in_place_stay_right():
    def likelihood(x):
        value = loc()
        value.data.mul_(0.9)
        return value, 1.0

    check(built(likelihood), STEPS, runs="SVI")


def test_gradients_outside_of_pyro_are_added_to():
    def build():
        network = nn.Linear(3, 1)
        network.left = lambda: network.weight.grad.flatten().tolist()
        return model_with(lambda x: (loc() + network(x)[:, 0], 1.0)), guide_of_nothing, network

    check(build, STEPS, runs="SVI")
    data = X.clone().requires_grad_()
    check(built(lambda x: (loc(), 1.0)), [(data,)] * 3, runs="SVI")


def test_flows_of_the_same_data_in_each_step_are_recorded():
    def build():
        transform = affine_coupling(3, hidden_dims=[4])
        flow = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [transform])

        def model(x):
            pyro.module("transform", transform)
            with pyro.plate("data", len(x)):
                pyro.sample("x", flow, obs=x)

        return model, guide_of_nothing, flow

    check(build, [(X,), lambda flow, _: flow.clear_cache()] * 4, optim=pyro_adam)


def test_data_of_a_condition_may_be_replaced():
    def build():
        data = {"x": X[:, 0]}

        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc(), 1.0))

        return pyro.poutine.condition(model, data=data), guide_of_nothing, data

    check(build, [*STEPS, lambda data, _: data.update(x=X[:, 0] + 5), *STEPS])


def test_masks_that_no_data_decide_about_are_recorded():
    def model(x):
        factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=x)

    check(lambda: (model, AutoNormal(model), None), STEPS)

    def written(x):
        mask = torch.zeros(len(x), dtype=torch.bool)
        mask[:6] = x[:6, 0] > 0
        return loc() + x[mask].sum(), 1.0

    check(built(written), [(X.roll(i, 0),) for i in range(3)], runs="SVI")


def test_values_that_differ_in_each_step_are_given_up():
    def build():
        network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=None), nn.Linear(2, 1))

        def likelihood(x):
            pyro.module("network", network)
            return network(x)[:, 0], 1.0

        return model_with(likelihood), guide_of_nothing, None

    check(build, STEPS * 10, runs="SVI")
