"""Training loops that would go wrong without a word: schedules that nobody steps or that two step, and threads."""

import threading
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ilvae import AnnealedELBO, BrenierMap, InverseLipschitzScheduler, anneal, schedules
from pyro_ilvae.infer import AnnealMessenger, step_watch

X = torch.tensor([0.5, -1.0])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=torch.as_tensor(x))


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


@pytest.fixture
def few(monkeypatch):
    """Few losses are many."""
    monkeypatch.setattr(step_watch, "_MANY_EPOCHS", 10)
    monkeypatch.setattr(step_watch, "_MANY_LOSSES", 30)


def losses(beta, num_losses, after=lambda step: None, data=lambda: X):
    """The texts of the warnings of some training losses."""
    elbo = AnnealedELBO(Trace_ELBO(), beta)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for step in range(num_losses):
            elbo.differentiable_loss(model, guide, data())
            after(step)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("data", "when"), [(lambda: X, 10), (lambda: X.clone(), 30), (lambda: [0.5, -1.0], 30)])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("start", [0, 3])
def test_a_schedule_that_nobody_steps_is_announced_once(few, start, named, data, when):
    beta = schedules.linear(0.0, 1.0, 10)
    beta.load_state_dict({"num_steps_taken": start})
    weight = {"z": beta} if named else beta
    assert losses(weight, when - 1, data=data) == []
    (text,) = losses(weight, 40, data=data)
    assert text.startswith(f"After {when} losses beta is still {0.1 * start:g}, at step {start} of linear(0.0, 1.0")


def test_a_schedule_that_moves_or_has_nowhere_to_go_is_not_announced(few):
    beta = schedules.linear(0.0, 1.0, 10)
    # Once an epoch, with minibatches.
    assert losses(beta, 40, lambda step: beta.step() if step == 25 else None, data=lambda: X.clone()) == []
    done = schedules.linear(0.0, 1.0, 10)
    done.load_state_dict({"num_steps_taken": 10})
    assert losses(done, 40) == losses(schedules.constant(0.5), 40) == losses(0.5, 40) == []


def test_evaluation_is_not_counted(few):
    elbo = AnnealedELBO(Trace_ELBO(), schedules.linear(0.0, 1.0, 10))
    for _ in range(30):
        elbo.loss(model, guide, X)
    elbo.differentiable_loss(model, guide, X)


def test_a_schedule_of_beta_and_the_constant_is_stepped_by_one_of_them():
    shared = schedules.linear(0.0, 1.0, 10)
    decoder = BrenierMap(2)
    scheduler = InverseLipschitzScheduler(decoder, shared)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), AnnealedELBO(Trace_ELBO(), shared))
    for step in range(5):
        assert shared.value == decoder.inverse_lipschitz == pytest.approx(step / 10)
        svi.step(X)
        scheduler.step()
    shared.step()
    with pytest.raises(ValueError, match=r"Expected only this scheduler to step linear\(0.0, 1.0, num_steps=10\)"):
        scheduler.step()


def test_two_decoders_need_two_schedules():
    shared = schedules.linear(0.0, 1.0, 10)
    schedulers = [InverseLipschitzScheduler(BrenierMap(2), shared) for _ in range(2)]
    schedulers[0].step()
    with pytest.raises(ValueError, match="Give each its own schedule"):
        schedulers[1].step()


def test_a_checkpoint_of_the_schedule_itself_is_no_step():
    schedule = schedules.linear(0.0, 1.0, 10)
    scheduler = InverseLipschitzScheduler(BrenierMap(2), schedule)
    schedule.load_state_dict({"num_steps_taken": 4})
    scheduler.step()
    assert scheduler.decoder.inverse_lipschitz == pytest.approx(0.5)


def in_a_thread(function):
    """The error of a function that runs in a thread of its own, or None."""
    errors = []

    def target():
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return errors[0] if errors else None


@pytest.mark.parametrize("beta", [0.5, {"z": 0.5}])
def test_a_model_in_another_thread_is_refused_while_one_anneals(beta):
    def loss():
        Trace_ELBO().loss(model, guide, X)

    with anneal(beta=beta):
        model(X)
        error = in_a_thread(loss)
        assert isinstance(error, RuntimeError)
        assert "one thread at a time to run models, got site 'data'" in str(error)
        model(X)
    assert in_a_thread(loss) is None
    # The thread that enters is the one that may run: no thread is special.
    assert in_a_thread(lambda: AnnealedELBO(Trace_ELBO(), beta).loss_and_grads(model, guide, X)) is None


def test_a_handler_is_entered_once():
    with AnnealMessenger({"z": 0.5}) as messenger:
        model(X)
        with pytest.raises(ValueError, match="cannot install a Messenger instance twice"), messenger:
            pass
        model(X)


@pytest.mark.parametrize("beta", [schedules.Schedule, schedules.linear, lambda step: 0.5])
def test_a_way_to_make_a_schedule_is_no_schedule(beta):
    with pytest.raises(ValueError, match=r"finite number >= 0 or a Schedule, got .*schedules.linear\(...\) makes"):
        AnnealedELBO(Trace_ELBO(), beta)


def test_a_class_is_no_objective():
    with pytest.raises(ValueError, match=r"the class Trace_ELBO: pass an object of it, such as Trace_ELBO\(\)"):
        AnnealedELBO(Trace_ELBO)


@pytest.mark.parametrize("fn", [0.5, "model", torch.distributions.Normal])
def test_only_functions_can_be_annealed(fn):
    with pytest.raises(TypeError, match="Expected fn to be a model or guide"):
        anneal(fn)
