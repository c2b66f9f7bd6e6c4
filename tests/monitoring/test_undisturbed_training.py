"""A training goes the same way with a monitor and without one, to the last bit."""

import random
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import EVERY_KIND, ONE_OF_EACH, X, vae_with
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_ilvae import AnnealedELBO, CollapseMonitor, GraphSVI, JointOptim, likelihoods, schedules
from pyro_ilvae.infer.graph_cache import GraphCache

FLAT = X.flatten(1)


def every(models, slow=()):
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in models}
    return pytest.mark.parametrize("model", [pytest.param(models[name], id=name, marks=marks[name]) for name in models])


def adam():
    return JointOptim(torch.optim.Adam, {"lr": 1e-2})


def states():
    return torch.rand(3).tolist(), random.random(), np.random.rand()


def same(value, other):
    return torch.equal(value.isnan(), other.isnan()) and torch.equal(value.nan_to_num(), other.nan_to_num())


def left(holder):
    """All tensors and modes of a module, and what Pyro's store and the random states hold."""
    tensors = {name: value.clone() for name, value in holder.state_dict().items()} if holder is not None else {}
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    modes = [module.training for module in holder.modules()] if holder is not None else []
    return tensors, store, modes, states()


def check_same(build, data, *, make=SVI, objective=Trace_ELBO, steps=5, **options):
    """Raise unless two runs that differ by a monitor alone leave the same, bit by bit."""
    results, monitors = [], []
    for monitored in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model, guide, holder = build()
        beta = schedules.linear(0.1, 1.0, num_steps=5)
        svi = make(model, guide, adam(), AnnealedELBO(objective(), beta=beta))
        if monitored:
            monitors.append(CollapseMonitor(model, guide, data, every=2, beta=beta, num_samples=3, **options))
        losses = []
        for _ in range(steps):
            loss = svi.step(data)
            beta.step()
            losses.append(float(loss))
            if monitored:
                monitors[0].step(loss)
        results.append((losses, *left(holder), getattr(svi, "runs", None)))
    (losses, tensors, store, *rest), (own_losses, own_tensors, own_store, *own_rest) = results
    assert own_losses == losses
    assert list(own_store) == list(store)
    assert own_tensors.keys() == tensors.keys()
    for own, other in ((own_tensors, tensors), (own_store, store)):
        assert not [name for name in other if not same(own[name], other[name])]
    assert own_rest == rest
    assert monitors[0].history[-1]["step"] == 4
    assert monitors[0].history[-1]["loss"] == (losses[2] + losses[3]) / 2
    return monitors[0], svi


def of(model):
    def build():
        vae = model.build(data_size=40)
        vae.train()
        return vae.model, vae.guide, vae

    return build


@every(EVERY_KIND)
def test_svi_goes_the_same_way(model):
    check_same(of(model), model.x, objective=model.objectives[0])


@every(ONE_OF_EACH, slow=set(ONE_OF_EACH) - {"vae"})
def test_one_graph_steps_go_the_same_way_and_nothing_is_recorded_anew(model, monkeypatch):
    recorded, record = [], GraphCache._recorded
    monkeypatch.setattr(GraphCache, "_recorded", lambda *args: recorded.append(args) or record(*args))
    make = partial(GraphSVI, compile=False)
    _, svi = check_same(of(model), model.x, make=make, objective=model.objectives[0])
    assert svi.runs == "graph"
    assert len(recorded) == 2  # once in each of the two runs


@pytest.mark.parametrize("estimate", ["learned", "optimal"])
def test_scales_that_follow_the_data_stay(estimate):
    def build():
        vae = vae_with(likelihood=likelihoods.Normal(0.5, estimate))
        return vae.model, vae.guide, vae

    check_same(build, X, objective=TraceMeanField_ELBO)


class Own(PyroModule):
    """Layers that have a training mode, and one that counts its calls in any mode."""

    def __init__(self):
        super().__init__()
        self.encoder = PyroModule[nn.Sequential](nn.Linear(FLAT.shape[1], 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.decoder = PyroModule[nn.Linear](2, FLAT.shape[1])
        self.decoder.register_buffer("num_calls", torch.zeros(()))
        self.encoder[1].eval()

    def model(self, x):
        self.decoder.num_calls += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def test_modes_statistics_and_counters_are_left():
    def build():
        own = Own()
        own.encoder[1].train()
        own.encoder[2].eval()
        return own.model, own.guide, own

    monitor, _ = check_same(build, FLAT)
    assert len(monitor.history) == 3
    assert not monitor.reasons.keys() & {"elbo", "kl", "active_units"}


def test_a_buffer_that_is_replaced_is_put_back():
    own = Own()

    def model(x):
        own.decoder.num_calls = own.decoder.num_calls + 1
        own.model(x)

    before = own.decoder.num_calls
    CollapseMonitor(model, own.guide, FLAT)
    assert own.decoder.num_calls is before
    assert float(before) == 0


def test_parameters_start_as_they_would():
    def model(x):
        scale = pyro.param("scale", lambda: torch.rand(()) + 0.5, constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn(()) + random.random() + np.random.rand())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * loc, 0.5))

    check_same(lambda: (model, guide, None), FLAT[:, 0])
    pyro.clear_param_store()
    CollapseMonitor(model, guide, FLAT[:, 0])
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("kind", [AutoNormal, AutoLowRankMultivariateNormal])
def test_the_start_of_an_autoguide_belongs_to_the_first_step(kind):
    def build():
        own = Own()
        guide = kind(own.model)
        return own.model, guide, guide

    monitor, _ = check_same(build, FLAT)
    assert [record["step"] for record in monitor.history] == [1, 2, 4]
    assert monitor.history[0]["elbo"] is not None


def test_the_start_of_lazy_layers_belongs_to_the_first_step():
    def build():
        layer, own = nn.LazyLinear(2), Own()

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(layer(x), 1.0).to_event(1))

        return own.model, guide, own

    monitor, _ = check_same(build, FLAT)
    assert [record["step"] for record in monitor.history] == [1, 2, 4]


def test_programs_that_draw_from_numpy_and_python_leave_their_states():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(random.random(), 1.0 + np.random.rand()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    pyro.set_rng_seed(0)
    expected = states()
    pyro.set_rng_seed(0)
    monitor = CollapseMonitor(model, guide, FLAT[:, 0], every=1, batch_size=5)
    assert states() == expected
    first = monitor.step()
    states()
    assert monitor.step() == first | {"step": 2}


def test_a_warning_that_comes_again_is_shown_once_and_warnings_of_the_training_are_left():
    numbers = iter(range(1000))

    def model(x):
        warnings.warn(f"an odd model, run {next(numbers)}", stacklevel=1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        before = warnings.showwarning
        monitor = CollapseMonitor(model, guide, FLAT[:, 0], every=1)
        monitor.step()
        monitor.step()
        assert warnings.showwarning is before
        assert len([warning for warning in shown if "an odd model" in str(warning.message)]) == 1
        warnings.warn("an odd training", stacklevel=1)
        warnings.warn("an odd training", stacklevel=1)
    assert len([warning for warning in shown if "an odd training" in str(warning.message)]) == 2


def test_filters_of_warnings_are_not_touched():
    """A change of the filters would show again what Python has shown once, such as the warnings of each step."""
    vae = vae_with()
    filters = list(warnings.filters)
    monitor = CollapseMonitor(vae.model, vae.guide, X, every=1)
    version = getattr(warnings, "_filters_version", None)
    monitor.step()
    assert warnings.filters == filters
    assert getattr(warnings, "_filters_version", None) == version


def test_what_was_undisturbed_is_so_after_an_error_too():
    own = Own()

    def guide(x):
        own.guide(x)
        raise RuntimeError("a guide that fails")

    expected = left(own)
    pyro.set_rng_seed(0)
    random_states = states()
    pyro.set_rng_seed(0)
    with pytest.raises(ValueError, match="a guide that fails"):
        CollapseMonitor(own.model, guide, FLAT)
    assert states() == random_states
    tensors, store, modes, _ = left(own)
    assert (store.keys(), modes) == (expected[1].keys(), expected[2])
    assert all(same(tensors[name], value) for name, value in expected[0].items())


@every(ONE_OF_EACH)
def test_an_optimizer_of_pytorch_and_local_parameters_go_the_same_way(model):
    results = []
    with pyro.settings.context(module_local_params=True):
        for monitored in (False, True):
            pyro.set_rng_seed(3)
            vae = model.build(data_size=40)
            loss = model.objectives[0]()(vae.model, vae.guide)
            monitor = CollapseMonitor(vae.model, vae.guide, model.x, every=1, num_samples=2) if monitored else None
            optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
            for _ in range(3):
                optimizer.zero_grad()
                value = loss(model.x)
                value.backward()
                optimizer.step()
                if monitor is not None:
                    assert monitor.step(value)["loss"] == value.item()
            results.append(left(vae))
    (tensors, *rest), (own_tensors, *own_rest) = results
    assert not [name for name in tensors if not same(own_tensors[name], tensors[name])]
    assert own_rest == rest
    assert not list(pyro.get_param_store())
