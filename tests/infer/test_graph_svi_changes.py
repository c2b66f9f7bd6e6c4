"""What changes between the steps of a graph, and what a graph cannot repeat."""

import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import ONE_OF_EACH, X, vae_with
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ilvae import AnnealedELBO, InverseLipschitzScheduler, JointOptim, NonFiniteLossError, likelihoods, schedules
from pyro_ilvae.infer.graph_svi import GraphSVI

DATA = torch.randn(20, generator=torch.Generator().manual_seed(0))
TENSOR = torch.tensor(1.0)
NUMBER = 1.0


def graph_svi(model, guide, objective=None, optim=None, **options):
    optim = optim or JointOptim(torch.optim.SGD, {"lr": 1e-3})
    return GraphSVI(model, guide, optim, objective or Trace_ELBO(), **{"compile": False} | options)


def model_with(scale):
    """A model whose scale is what a function returns."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale(x)), obs=x)

    return model


def check_next_step(svi, *args):
    """Raise unless the next step is a graph and has the loss of now."""
    state = torch.get_rng_state()
    loss = svi.step(*args)
    assert svi.runs == "graph"
    torch.set_rng_state(state)
    # The parameters have moved a little.
    assert float(loss) == pytest.approx(svi.evaluate_loss(*args), rel=0.02)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.number = 1.0
        self.register_buffer("tensor", torch.tensor(1.0))
        self.plain = torch.tensor(1.0)
        self.options = {"factor": 1.0}

    def forward(self, x):
        scale = self.number * self.tensor * self.plain * NUMBER * TENSOR
        return scale * self.options["factor"] * (1.0 if self.training else 2.0)


def set_global(name, value):
    globals()[name] = value


CHANGES = {
    "a number": lambda scale: setattr(scale, "number", 3.0),
    "a buffer in place": lambda scale: scale.tensor.fill_(3.0),
    "a buffer": lambda scale: setattr(scale, "tensor", torch.tensor(3.0)),
    "a tensor": lambda scale: setattr(scale, "plain", torch.tensor(3.0)),
    "an entry of a dictionary": lambda scale: scale.options.update(factor=3.0),
    "a dictionary": lambda scale: setattr(scale, "options", {"factor": 3.0}),
    "the mode": lambda scale: scale.eval(),
    "a global number": lambda scale: set_global("NUMBER", 3.0),
    "a global tensor": lambda scale: set_global("TENSOR", torch.tensor(3.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect_at_the_next_step(change, monkeypatch):
    monkeypatch.setitem(globals(), "NUMBER", 1.0)
    monkeypatch.setitem(globals(), "TENSOR", torch.tensor(1.0))
    scale = Scale()
    model = model_with(scale)
    svi = graph_svi(model, AutoNormal(model))
    for _ in range(4):
        svi.step(DATA)
    assert svi.runs == "graph"
    CHANGES[change](scale)
    check_next_step(svi, DATA)


def test_tensors_change_without_a_new_graph():
    likelihood = likelihoods.Normal(0.5, "learned")
    vae = vae_with("projected-mlp", likelihood=likelihood, data_size=len(X))
    scheduler = InverseLipschitzScheduler(vae.decoder, schedules.linear(0.5, 3.0, num_steps=8))
    beta = schedules.linear(0.0, 1.0, num_steps=8)
    svi = graph_svi(vae.model, vae.guide, AnnealedELBO(TraceMeanField_ELBO(), beta))
    for _ in range(10):
        state = torch.get_rng_state()
        plain = AnnealedELBO(TraceMeanField_ELBO(), beta.value)
        expected = plain.differentiable_loss(vae.model, vae.guide, X).item()
        torch.set_rng_state(state)
        assert float(svi.step(X)) == pytest.approx(expected, rel=1e-4)
        scheduler.step()
        beta.step()
    assert len(svi._cache.graphs) == 1


def test_a_new_model_under_the_same_names_is_recorded_anew():
    svi = None
    for _ in range(2):
        pyro.clear_param_store()
        vae = vae_with(data_size=len(X))
        if svi is None:
            svi = graph_svi(vae.model, vae.guide)
        svi.model, svi.guide = vae.model, vae.guide
        before = [parameter.detach().clone() for parameter in vae.parameters()]
        for _ in range(4):
            svi.step(X)
        moved = [not torch.equal(old, new) for old, new in zip(before, vae.parameters(), strict=True)]
        assert all(moved)


def by_value(x):
    return 1.0 if x.mean() > 0 else 2.0


def by_number(x):
    return float(x.std())


def by_array(x):
    return float(np.std(x.numpy()))


def by_numpy(x):
    return 1.0 + np.random.rand()


def by_mask(x):
    return x[x > 0].std()


COUNTER = {"calls": 0}


def by_counter(x):
    COUNTER["calls"] += 1
    return 1.0 + 1.0 / COUNTER["calls"]


@pytest.mark.parametrize("scale", [by_value, by_number, by_array, by_numpy, by_mask, by_counter])
def test_what_a_graph_cannot_repeat_is_a_step_of_svi(scale):
    losses = []
    for kind in (SVI, GraphSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        COUNTER["calls"] = 0
        model = model_with(scale)
        options = {"compile": False} if kind is GraphSVI else {}
        svi = kind(model, AutoNormal(model), JointOptim(torch.optim.SGD, {"lr": 1e-3}), Trace_ELBO(), **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses.append([float(svi.step(DATA)) for _ in range(5)])
    assert svi.runs == "SVI"
    (message,) = [str(warning.message) for warning in caught if "GraphSVI" in str(warning.message)]
    if scale is not by_counter:  # which recording counts on
        assert losses[1] == pytest.approx(losses[0])
    if scale in (by_value, by_number, by_array):
        assert re.search(rf"in {scale.__name__}, test_graph_svi_changes.py, line \d+", message), message


@pytest.mark.parametrize("objective", [TraceGraph_ELBO(), RenyiELBO(num_particles=2)])
def test_objectives_without_a_graph_are_named(objective):
    model = model_with(lambda x: 1.0)
    with pytest.warns(UserWarning, match=type(objective).__name__):
        svi = graph_svi(model, AutoNormal(model), objective)
    assert float(svi.step(DATA)) > 0
    assert svi.runs == "SVI"


def test_a_loss_that_is_not_finite_stops_with_step_and_site():
    beta = schedules.linear(0.1, 1.0, num_steps=8)
    vae = vae_with(data_size=len(X))
    svi = graph_svi(vae.model, vae.guide, AnnealedELBO(TraceMeanField_ELBO(), beta))
    for _ in range(4):
        svi.step(X)
        beta.step()
    assert svi.runs == "graph"
    with torch.no_grad():
        vae.likelihood.log_scale.fill_(torch.nan)
    before = [parameter.detach().clone() for parameter in vae.parameters()]
    with pytest.raises(NonFiniteLossError, match="at step 4, at site 'x'") as caught:
        svi.step(X)
    assert (caught.value.step, caught.value.site) == (4, "x")
    for old, new in zip(before, vae.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


@pytest.mark.parametrize("likelihood", [likelihoods.Bernoulli(), likelihoods.Poisson()])
def test_the_checks_of_data_hold_in_a_graph(likelihood):
    vae = vae_with(likelihood=likelihood, data_size=len(X))
    svi = graph_svi(vae.model, vae.guide, TraceMeanField_ELBO())
    binary = (X > 0).float()
    for _ in range(4):
        svi.step(binary)
    assert svi.runs == "graph"
    with pytest.raises(ValueError, match="x"):
        svi.step(binary + 0.5)
    svi.step(binary)
    assert svi.runs == "graph"


def test_a_part_that_is_replaced_is_watched_like_the_first():
    scale = Scale()
    owner = nn.Module()
    owner.scale = scale
    model = model_with(lambda x: owner.scale(x))
    svi = graph_svi(model, AutoNormal(model))
    for _ in range(3):
        svi.step(DATA)
    owner.scale = Scale()
    svi.step(DATA)
    owner.scale.number = 3.0
    check_next_step(svi, DATA)


def test_one_tensor_in_two_places_is_not_mixed_up_with_two():
    def model(x, y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            pyro.sample("y", dist.Normal(loc, 2.0), obs=y)

    svi = graph_svi(model, AutoNormal(model))
    other = DATA + 10
    for _ in range(4):
        svi.step(DATA, DATA)
    check_next_step(svi, DATA, other)


def test_handlers_around_a_step_have_their_effect():
    model = model_with(lambda x: 1.0)
    svi = graph_svi(model, AutoNormal(model))
    for _ in range(4):
        state = torch.get_rng_state()
        loss = svi.step(DATA)
    torch.set_rng_state(state)
    with pyro.poutine.scale(scale=0.1):
        assert float(svi.step(DATA)) == pytest.approx(0.1 * float(loss), rel=0.1)


class Batch:
    def __init__(self, x):
        self.x = x


def test_arguments_that_hide_tensors_are_refused():
    def model(batch):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch.x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=batch.x)

    svi = graph_svi(model, AutoNormal(model))
    svi.step(Batch(DATA))
    with pytest.warns(UserWarning, match="argument of type Batch"):
        svi.step(Batch(DATA))
    assert svi.runs == "SVI"


def test_many_shapes_are_told_of():
    model = model_with(lambda x: 1.0)
    svi = graph_svi(model, AutoNormal(model), num_graphs=1)
    batches = [DATA[: 2 + step % 5] for step in range(20)]
    with pytest.warns(UserWarning, match="shapes"):
        list(map(svi.step, batches))
    assert svi.runs == "SVI"


@pytest.mark.parametrize("name", ["vae", "mixture-factor"])
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    """Optimizer, schedule, random state and parameters are saved as with SVI, and the graph is recorded anew."""
    of_kind = ONE_OF_EACH[name]

    def start(seed):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        model = of_kind.build(data_size=len(of_kind.x))
        beta = schedules.linear(0.0, 1.0, num_steps=30)
        optim = JointOptim(torch.optim.Adam, {"lr": 1e-2, "fused": True}, {"clip_norm": 100.0})
        # Pyro draws to find out the number of plates, where it is not told.
        objective = AnnealedELBO(of_kind.objectives[0](max_plate_nesting=1), beta)
        return model, beta, graph_svi(model.model, model.guide, objective, optim)

    def steps(beta, svi, number):
        losses = []
        for _ in range(number):
            losses.append(float(svi.step(of_kind.x)))
            beta.step()
        return losses

    model, beta, svi = start(0)
    steps(beta, svi, 12)
    saved = {
        "model": model.state_dict(),
        "optim": svi.optim.get_state(),
        "beta": beta.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(saved, tmp_path / "run.pt")
    expected = steps(beta, svi, 12), {key: value.clone() for key, value in model.state_dict().items()}

    model, beta, svi = start(1)
    saved = torch.load(tmp_path / "run.pt")
    model.load_state_dict(saved["model"])
    svi.optim.set_state(saved["optim"])
    beta.load_state_dict(saved["beta"])
    torch.set_rng_state(saved["random"])
    assert steps(beta, svi, 12) == pytest.approx(expected[0], rel=1e-5)
    assert svi.runs == "graph"
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[1][key], rtol=1e-4, atol=1e-5, msg=key)
