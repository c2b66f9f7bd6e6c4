"""A device takes the same steps as SVI, and a step that fails loses none of the later ones.

On a CPU the operations of a step run one after the other, in the same memory, where a GPU runs one CUDA graph.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captures import replayed
from helpers.models import ONE_OF_EACH
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ilvae import AnnealedELBO, GraphSVI, JointOptim, NonFiniteLossError, schedules
from pyro_ilvae.infer import captured_step
from pyro_ilvae.infer.constant_folding import first_off_device, with_folded_constants
from pyro_ilvae.infer.recording import record

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
ADAM = (torch.optim.Adam, {"lr": 1e-2, "fused": True})
OPTIMIZERS = {
    "Adam": ADAM,
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "fused": True, "weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {"lr": 1e-4, "fused": True, "momentum": 0.9}),
    "clipped": (*ADAM, {"clip_norm": 1.0}),
}


CASES = [(name, "Adam") for name in ONE_OF_EACH] + [("vae", name) for name in OPTIMIZERS if name != "Adam"]


@pytest.fixture(autouse=True)
def _operations_of_a_cpu_run_one_by_one(monkeypatch):
    monkeypatch.setitem(captured_step.CAPTURES, "cpu", replayed)


def parameters():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def trained(kind, name, batches, optim, *, where="cpu", num_steps=25, **options):
    """The SVI, its losses and the parameters after steps with a schedule of beta and one of the learning rate."""
    model = ONE_OF_EACH[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    module = model.build(data_size=len(model.x)).to(where)
    pyro.set_rng_seed(1)
    beta = schedules.linear(0.0, 1.0, num_steps=20)
    svi = kind(module.model, module.guide, JointOptim(*optim), AnnealedELBO(model.objectives[0](), beta), **options)
    losses = []
    for step in range(num_steps):
        losses.append(svi.step(batches[step % len(batches)]))
        beta.step()
        for group in svi.optim.optimizer.param_groups:
            group["lr"] = optim[1]["lr"] * 0.95**step
    if kind is GraphSVI:
        svi.synchronize()
    return svi, [float(loss) for loss in losses], parameters()


def check_same(own, other):
    assert own[1] == pytest.approx(other[1], rel=1e-4)
    for name, value in other[2].items():
        torch.testing.assert_close(own[2][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "optim"), [*((name, "Adam") for name in ONE_OF_EACH), *(("vae", o) for o in OPTIMIZERS)]
)
def test_device_steps_are_those_of_svi(name, optim, device):
    x = ONE_OF_EACH[name].x
    half = len(x) // 2
    batches = [x[:half], x[half:], x[: half - 1]]
    # SVI takes the data from where the parameters are, and a GraphSVI takes them there.
    other = trained(SVI, name, [batch.to(device) for batch in batches], OPTIMIZERS[optim], where=device)
    settings = {"where": device, "device": device, "compile": False, "check_every": 4}
    own = trained(GraphSVI, name, batches, OPTIMIZERS[optim], **settings)
    assert own[0].runs == "CUDA graph", own[0]._reason
    assert [graph.captured is not None for graph in own[0]._cache.graphs.values()] == [True, True]
    check_same(own, other)


def with_a_bad_batch(kind, bad, **options):
    """Steps of which the twelfth has a batch that the graph does not take; the loss of each, or its error."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = torch.randn(20, 3)
    bad = x.clone().index_put((torch.tensor(4),), torch.tensor(bad))

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale).expand([3]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(pyro.param("loc_q", torch.tensor(0.0)), 1.0))

    pyro.enable_validation(False)
    beta = schedules.linear(0.0, 1.0, num_steps=30)
    svi = kind(model, guide, JointOptim(*ADAM), AnnealedELBO(Trace_ELBO(), beta), **options)
    losses, error = [], None
    try:
        for step in range(20):
            losses.append(svi.step(bad if step == 12 else x))
            beta.step()
        if kind is GraphSVI:
            svi.synchronize()
    except NonFiniteLossError as raised:
        error = raised
    finally:
        pyro.enable_validation(True)
    return svi, [float(loss) for loss in losses], parameters(), error


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("check_every", [1, 3, 100])
def test_a_step_that_is_not_finite_is_named_and_changes_nothing(check_every, value):
    other = with_a_bad_batch(SVI, value)
    own = with_a_bad_batch(GraphSVI, value, compile=False, check_every=check_every)
    assert own[3] is not None
    assert str(own[3]) == str(other[3])
    assert (own[3].step, own[3].site) == (12, "x") == (other[3].step, other[3].site)
    assert own[1][:12] == pytest.approx(other[1])
    for name, value in other[2].items():
        torch.testing.assert_close(own[2][name], value, msg=name)


class Averages(nn.Module):
    """A part that keeps a running average of what it sees."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 3))

    def forward(self, x):
        return self.network(x)


def with_averages(kind, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x, network = torch.randn(20, 3), Averages()

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(network(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))

    svi = kind(model, guide, JointOptim(*ADAM), Trace_ELBO(), **options)
    losses = [svi.step(x) for _ in range(20)]
    if kind is GraphSVI:
        svi.synchronize()
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    return svi, [float(loss) for loss in losses], parameters() | buffers


@pytest.fixture
def _does_not_hold_once(monkeypatch):
    """Graphs that say once, without cause, that something did not hold: the first at its seventh step."""
    calls = []

    def capture(function, device):
        replay, holds = replayed(function, device), captured_step.Outcome.holding

        def replay_once_not():
            calls.append(None)
            holds.fill_(len(calls) != 7)
            replay()

        return replay_once_not

    monkeypatch.setattr(captured_step.Outcome, "holding", torch.tensor(True), raising=False)
    monkeypatch.setitem(captured_step.CAPTURES, "cpu", capture)
    add = captured_step.Outcome.add
    monkeypatch.setattr(captured_step.Outcome, "add", lambda self, holds: add(self, holds & self.holding))
    yield
    assert len(calls) > 7


@pytest.mark.usefixtures("_does_not_hold_once")
def test_running_averages_see_each_batch_once():
    own = with_averages(GraphSVI, compile=False, check_every=4)
    assert own[0].runs == "CUDA graph", own[0]._reason
    check_same(own, with_averages(SVI))


@pytest.mark.usefixtures("_does_not_hold_once")
@pytest.mark.parametrize("check_every", [1, 4, 100])
def test_steps_after_one_that_did_not_hold_are_taken_again(check_every):
    x = ONE_OF_EACH["vae"].x
    own = trained(GraphSVI, "vae", [x], ADAM, compile=False, check_every=check_every)
    check_same(own, trained(SVI, "vae", [x], ADAM))


def test_what_is_not_captured_is_named():
    x = ONE_OF_EACH["vae"].x
    optim = (torch.optim.Adam, {"lr": 1e-2})
    with pytest.warns(UserWarning, match="operation by operation, because .* is not fused"):
        own = trained(GraphSVI, "vae", [x], optim, compile=False)
    assert own[0].runs == "graph"
    check_same(own, trained(SVI, "vae", [x], optim))


def test_options_and_states_of_the_optimizer_take_effect():
    """Weight decay and a loaded state are parts of a captured step, so that it is captured anew."""
    results = []
    x = ONE_OF_EACH["vae"].x
    for kind, options in ((SVI, {}), (GraphSVI, {"compile": False, "check_every": 3})):
        svi, *_ = trained(kind, "vae", [x], ADAM, num_steps=8, **options)
        (group,) = svi.optim.optimizer.param_groups
        for change in ("weight_decay", "state", "lr"):
            if kind is GraphSVI:
                svi.synchronize()
            if change == "weight_decay":
                group["weight_decay"] = 0.3
            elif change == "state":
                state = svi.optim.optimizer.state_dict()
                svi.optim.optimizer.load_state_dict(
                    {
                        **state,
                        "state": {
                            i: {name: 2 * value for name, value in own.items()} for i, own in state["state"].items()
                        },
                    }
                )
                (group,) = svi.optim.optimizer.param_groups
            else:
                group["lr"] = 0.1
            losses = [svi.step(x) for _ in range(5)]
        assert kind is SVI or svi.runs == "CUDA graph"
        results.append((svi, [float(loss) for loss in losses], parameters()))
    check_same(*results[::-1])


def test_evaluation_looks_at_all_steps_first():
    x = ONE_OF_EACH["vae"].x
    svi, *_ = trained(GraphSVI, "vae", [x], ADAM, compile=False, check_every=100)
    for _ in range(5):
        svi.step(x)
    assert len(svi._device_steps) == 5
    svi.evaluate_loss(x)
    assert len(svi._device_steps) == 0


def recorded(function, x):
    graph = record(lambda: function(x) * WEIGHT, [x], [WEIGHT])
    return graph.graph, graph.constants


WEIGHT = torch.tensor(2.0, requires_grad=True)
CONSTANT = torch.arange(3.0)


def draws(x):
    return (x + torch.randn(3) + torch.arange(3)).sum()


def in_place(x):
    total = torch.zeros(3)
    total += x
    total.mul_(CONSTANT)
    return (total + CONSTANT.exp()).sum()


def used_twice(x):
    scale = CONSTANT.exp().cumsum(0)
    return (scale * x).sum() + scale.sum()


@pytest.mark.parametrize("function", [draws, in_place, used_twice])
def test_folded_constants_change_no_result(function):
    x = torch.randn(3)
    graph, constants = recorded(function, x)
    folded, kept = with_folded_constants(graph, constants, torch.device("meta"))  # for which a CPU is another
    assert len(folded.graph.nodes) <= len(graph.graph.nodes) - 2 * (function is used_twice)
    for _ in range(3):
        x = torch.randn(3)
        state = torch.get_rng_state()
        expected = graph(x, WEIGHT, *constants)
        torch.set_rng_state(state)
        torch.testing.assert_close(folded(x, WEIGHT, *kept), expected)
    assert CONSTANT.tolist() == [0.0, 1.0, 2.0]


def test_operations_on_another_device_are_found():
    """With tensors that have a device and no values, since a GPU need not be there."""

    def on_the_way(x):
        return x + torch.randn(3).to(x.device)

    def stays(x):
        return x * 2.0 + 1.0

    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        for function, expected in ((stays, None), (on_the_way, "aten.randn")):
            graph = make_fx(function)(x)
            found = first_off_device(graph, [x], torch.device("cuda"))
            assert found is None if expected is None else found.startswith(expected)


def test_a_device_that_is_none_is_refused():
    for value, kind in (("no device", ValueError), (3.5, TypeError)):
        with pytest.raises(kind, match="Expected device to be a device"):
            GraphSVI(lambda: None, lambda: None, JointOptim(*ADAM), TraceMeanField_ELBO(), device=value)
