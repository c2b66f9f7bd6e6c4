"""What changes between steps that a device takes, also while the host has not looked at their outcome yet."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captures import replayed
from helpers.models import ONE_OF_EACH
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.modules.transformer import _detect_is_causal_mask

from pyro_ilvae import AnnealedELBO, GraphSVI, JointOptim, NonFiniteLossError
from pyro_ilvae.infer import captured_step
from pyro_ilvae.infer.device_steps import DeviceSteps

X = torch.randn(20, generator=torch.Generator().manual_seed(0))
NO_MASK, CAUSAL = torch.zeros(2, 2), torch.full((2, 2), -torch.inf).triu(1)
ADAM = (torch.optim.Adam, {"lr": 0.05, "fused": True})


@pytest.fixture(autouse=True)
def _operations_of_a_cpu_run_one_by_one(monkeypatch):
    monkeypatch.setitem(captured_step.CAPTURES, "cpu", replayed)


class Program(nn.Module):
    """A model with a part that is what PyTorch finds in a mask, which a graph takes for granted."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("shift", torch.zeros(2))
        self.first = self.count[:1]
        self.prior = dist.Normal(torch.zeros(()), torch.ones(())).expand([2]).to_event(1)
        self.of_buffer = dist.Normal(torch.zeros(2), self.scale).to_event(1)

    def model(self, x, mask=NO_MASK):
        factor = 1.1 if _detect_is_causal_mask(mask, None, 2) else 1.0
        a = pyro.param("a", torch.tensor(0.5))
        z = pyro.sample("z", self.prior)
        pyro.sample("w", self.of_buffer, obs=torch.ones(2))
        self.count.add_(0.1)
        with pyro.plate("data", len(x)):
            center = factor * a * self.dropout(z).sum() + self.first + self.shift.sum()
            pyro.sample("x", dist.Normal(center, 1.0), obs=x)

    def guide(self, x, mask=NO_MASK):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.full((2,), 0.1)), 1.0).to_event(1))


class Run:
    """Steps of one kind of SVI, of which the tenth does not hold if ``flips``."""

    def __init__(self, kind, *, flips=False, optim=ADAM, beta=1.0, check_every=5):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.program, self.beta, self.flips = Program(), beta, flips
        options = {} if kind is SVI else {"compile": False, "check_every": check_every}
        objective = AnnealedELBO(Trace_ELBO(), beta)
        self.svi = kind(self.program.model, self.program.guide, JointOptim(*optim), objective, **options)
        self.losses, self.errors = [], []

    def take(self, change=None, at=(), num_steps=20):
        for i in range(num_steps):
            if change is not None and i in at:
                change(self)
            self.step(X, CAUSAL if self.flips and i == 9 else NO_MASK)
        if isinstance(self.svi, GraphSVI):
            self.svi.synchronize()
        return self

    def step(self, *args):
        self.losses.append(self.svi.step(*args))

    @property
    def optimizer(self):
        return self.svi.optim.optimizer

    @property
    def result(self):
        values = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        values |= {name: value.clone() for name, value in self.program.named_buffers()}
        return [float(loss) for loss in self.losses], values, torch.rand(())


def check_same(own, other):
    assert own[0] == pytest.approx(other[0], rel=1e-4)
    for name, value in other[1].items():
        torch.testing.assert_close(own[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert own[2] == other[2]  # the next draw


def swap_groups(run):
    groups = run.optimizer.param_groups
    run.optimizer.add_param_group({"params": [groups[0]["params"].pop()], "lr": 0.5})


def double_state(run):
    for state in run.optimizer.state.values():
        for name in state:
            state[name] = 2 * state[name]


def set_data(run):
    parameter = pyro.param("a")
    parameter.data = parameter.data + 1.0


def leave_gradient(run):
    pyro.param("m").unconstrained().grad = torch.ones(2)


def evaluate(run):
    with torch.no_grad():
        run.svi.evaluate_loss(X)


def evaluate_without_dropout(run):
    run.program.eval()
    run.svi.evaluate_loss(X)
    run.program.train()


def step_under_a_handler(run):
    with poutine.scale(scale=0.5):
        run.step(X)


def draw(run):
    run.step(X + 0.1 * torch.randn(20))


CHANGES = {
    "nothing": lambda run: None,
    "learning rate": lambda run: run.optimizer.param_groups[0].update(lr=0.2),
    "weight decay": lambda run: run.optimizer.param_groups[0].update(weight_decay=0.3),
    "betas": lambda run: run.optimizer.param_groups[0].update(betas=(0.5, 0.9)),
    "optimizer": lambda run: setattr(run.svi, "optim", JointOptim(torch.optim.Adam, {"lr": 0.5, "fused": True})),
    "hook": lambda run: run.optimizer.register_step_post_hook(lambda *_: pyro.param("a").data.mul_(0.9)),
    "groups": swap_groups,
    "state": double_state,
    "data of a parameter": set_data,
    "gradient": leave_gradient,
    "buffer in place": lambda run: run.program.shift.fill_(0.3),
    "buffer": lambda run: setattr(run.program, "shift", torch.full((2,), 0.3)),
    "written buffer": lambda run: run.program.count.fill_(0.5),
    "scale of a prior in place": lambda run: run.program.of_buffer.base_dist.scale.fill_(3.0),
    "scale of a prior": lambda run: (
        setattr(run.program.prior.base_dist.base_dist, "scale", torch.tensor(3.0))
        if hasattr(run.program.prior.base_dist, "base_dist")
        else setattr(run.program.prior.base_dist, "scale", torch.full((2,), 3.0))
    ),
    "training": lambda run: run.program.eval(),
    "evaluation": evaluate,
    "evaluation without dropout": evaluate_without_dropout,
    "handler": step_under_a_handler,
    "draws": draw,
}
# A step that does not hold is taken again with the data, draws, beta, options and settings of its own; a tensor that
# the model reads, or a parameter, has the value that it has by then.
OF_THE_TIME = {"buffer in place", "buffer", "written buffer", "scale of a prior in place", "scale of a prior"}
OF_THE_TIME |= {"data of a parameter", "state", "hook"}


AGAIN_AND_AGAIN = {"draws", "evaluation", "evaluation without dropout", "handler"}


@pytest.mark.filterwarnings("ignore:GraphSVI runs a graph operation by operation, because the optimizer has a hook")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect_as_with_svi(change):
    at = range(8, 20) if change in AGAIN_AND_AGAIN else [12]
    results = []
    for kind in (GraphSVI, SVI):
        run = Run(kind).take(CHANGES[change], at)
        results.append(run.result)
        assert kind is SVI or run.svi.runs == ("graph" if change == "hook" else "CUDA graph"), run.svi._reason
    check_same(*results)


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in OF_THE_TIME])
@pytest.mark.parametrize("check_every", [1, 5])
def test_a_step_that_does_not_hold_is_taken_as_it_was(change, check_every, monkeypatch):
    at = range(8, 20) if change in AGAIN_AND_AGAIN else [11]
    results = []
    taken_again = []
    as_at = DeviceSteps.as_at
    monkeypatch.setattr(DeviceSteps, "as_at", lambda *args: taken_again.append(args) or as_at(*args))
    for kind in (GraphSVI, SVI):
        results.append(Run(kind, flips=True, check_every=check_every).take(CHANGES[change], at).result)
    assert taken_again
    check_same(*results)


def test_a_beta_that_is_a_tensor_has_the_value_of_its_step():
    results = []
    for kind in (GraphSVI, SVI):
        beta = torch.tensor(1.0)
        results.append(Run(kind, flips=True, beta=beta).take(lambda run: run.beta.mul_(0.7), range(8, 20)).result)
    check_same(*results)


def test_steps_after_an_error_that_is_caught_are_taken():
    results, bad = [], X.clone().fill_(torch.nan)
    for kind in (GraphSVI, SVI):
        run = Run(kind)
        for i in range(20):
            try:
                run.step(bad if i == 9 else X)
            except (NonFiniteLossError, ValueError) as error:
                run.errors.append(error)
        while isinstance(run.svi, GraphSVI) and len(run.svi._device_steps):
            run.svi.synchronize()
        losses, values, _ = run.result
        results.append((losses[-6:], values))  # after the error
        assert len(run.errors) == 1
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, value in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("change", [{"momentum": 0.9}, "cleared"])
def test_state_that_the_optimizer_makes_in_a_step(change):
    def apply(run):
        if change == "cleared":
            run.optimizer.state.clear()
        else:
            run.optimizer.param_groups[0].update(change)

    optim = (torch.optim.SGD, {"lr": 1e-3, "fused": True, "momentum": 0.9 if change == "cleared" else 0.0})
    check_same(*(Run(kind, optim=optim).take(apply, [12]).result for kind in (GraphSVI, SVI)))


def test_a_new_svi_can_be_pickled():
    model = ONE_OF_EACH["vae"].build(data_size=20)
    svi = GraphSVI(model.model, model.guide, JointOptim(*ADAM), Trace_ELBO(), compile=False)
    again = pickle.loads(pickle.dumps(svi))
    again.step(ONE_OF_EACH["vae"].x)


def results_of(runs, **options):
    """What is left by a run of each kind; the steps of GraphSVI have to run as ``runs`` says."""
    results = []
    for kind in (GraphSVI, SVI):
        run = Run(kind, **options).take()
        assert kind is SVI or run.svi.runs == runs, run.svi._reason
        results.append(run.result)
    return results


def failing(function, device):
    """A trial whose optimizer raises an error, as where a GPU has not enough memory."""

    def raises(*args, **kwargs):
        raise RuntimeError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_fused_adam_", raises)
        patch.setattr(torch, "_fused_sgd_", raises)
        function()


@pytest.mark.filterwarnings("ignore:GraphSVI runs a graph operation by operation, because no memory")
@pytest.mark.parametrize("optim", [ADAM, (torch.optim.SGD, {"lr": 1e-3, "fused": True, "momentum": 0.9})])
def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch, optim):
    monkeypatch.setitem(captured_step.CAPTURES, "cpu", failing)
    check_same(*results_of("graph", optim=optim))


def test_a_default_dtype_of_double_precision():
    torch.set_default_dtype(torch.float64)
    try:
        check_same(*results_of("CUDA graph"))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_that_is_a_tensor_changes_in_place(dtype):
    results = []
    for kind in (GraphSVI, SVI):
        rate = torch.tensor(0.05, dtype=dtype)
        run = Run(kind, optim=(torch.optim.Adam, {"lr": rate, "fused": True}))
        results.append(run.take(lambda run, rate=rate: rate.mul_(0.8), range(8, 20)).result)
    check_same(*results)


def test_a_scheduler_that_is_built_late_has_nothing_to_warn_of():
    results = []
    for kind in (GraphSVI, SVI):
        run = Run(kind).take(num_steps=10)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
        for _ in range(10):
            run.step(X)
            scheduler.step()
        results.append(run.take(num_steps=1).result)
    check_same(*results)
