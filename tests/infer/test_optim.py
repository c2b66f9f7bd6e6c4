"""JointOptim moves parameters as PyroOptim does, with one norm for all of them."""

import functools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import EVENT, LATENT
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim

from pyro_ilvae import VAE, JointOptim, MLPEncoder, ProjectedDecoder, likelihoods, mlp

CONSTRUCTORS = {
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam, fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "adam, foreach": (torch.optim.Adam, {"lr": 0.01, "foreach": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.001, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}


def per_name(name):
    return {"lr": 0.1 if "encoder" in name else 0.01}


def build():
    torch.manual_seed(0)
    decoder = ProjectedDecoder(mlp(LATENT, (8,), 8), latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=0.5)
    return VAE(
        decoder,
        MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(8,)),
        likelihoods.Normal(0.3, estimate="learned"),
    ).double()


def fit(optimizer, steps, vae=None):
    """The parameters after some steps, in a fresh store unless a model is given."""
    if vae is None:
        pyro.clear_param_store()
        vae = build()
    svi = SVI(vae.model, vae.guide, optimizer, Trace_ELBO())
    x = torch.linspace(-1, 1, 5 * 8, dtype=torch.float64).reshape(5, *EVENT)
    for step in steps:
        pyro.set_rng_seed(step)
        svi.step(x)
    return {name: value.detach().clone() for name, value in vae.named_parameters()}, vae


def assert_equal(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], **({"rtol": 1e-9, "atol": 1e-12} | tolerance), msg=name
        )


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_moves_parameters_as_pyro_does(name):
    constructor, arguments = CONSTRUCTORS[name]
    expected, _ = fit(PyroOptim(constructor, arguments), range(5))
    actual, _ = fit(JointOptim(constructor, arguments), range(5))
    assert_equal(actual, expected)


def test_gradients_are_dropped_after_the_step():
    _, vae = fit(JointOptim(torch.optim.Adam, {"lr": 0.01}), range(1))
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_arguments_may_depend_on_the_name():
    expected, _ = fit(PyroOptim(torch.optim.Adam, per_name), range(5))
    optimizer = JointOptim(torch.optim.Adam, per_name)
    actual, _ = fit(optimizer, range(5))
    assert_equal(actual, expected)
    assert sorted(group["lr"] for group in optimizer.optimizer.param_groups) == [0.01, 0.1]


@pytest.mark.parametrize("before", [PyroOptim, JointOptim])
@pytest.mark.parametrize("after", [PyroOptim, JointOptim])
def test_state_goes_on_where_it_stopped(before, after, tmp_path):
    arguments = (torch.optim.Adam, {"lr": 0.01})
    expected, _ = fit(JointOptim(*arguments), range(6))
    optimizer = before(*arguments)
    _, vae = fit(optimizer, range(3))
    optimizer.save(tmp_path / "optimizer.pt")
    resumed = after(*arguments)
    resumed.load(tmp_path / "optimizer.pt")
    actual, _ = fit(resumed, range(3, 6), vae)
    assert_equal(actual, expected)


def test_saved_options_are_restored():
    optimizer = JointOptim(torch.optim.Adam, {"lr": 0.01})
    _, vae = fit(optimizer, range(2))
    for group in optimizer.optimizer.param_groups:
        group["lr"] = 0.5
    resumed = JointOptim(torch.optim.Adam, {"lr": 0.01})
    resumed.set_state(optimizer.get_state())
    assert resumed.get_state().keys() == optimizer.get_state().keys()
    fit(resumed, [2], vae)
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [0.5]


def gradients_at(scales):
    """Parameters whose loss has the gradients ``scales``."""

    def model():
        for name, scale in scales.items():
            pyro.factor(f"factor_{name}", -scale * pyro.param(name, torch.tensor(0.0, dtype=torch.float64)))

    return model


@given(
    st.lists(st.floats(-100, 100).filter(lambda g: abs(g) > 1e-3), min_size=1, max_size=4),
    st.floats(0.1, 50),
)
def test_clips_the_norm_of_the_whole_gradient(gradients, limit):
    pyro.clear_param_store()
    scales = {f"p{i}": gradient for i, gradient in enumerate(gradients)}
    svi = SVI(
        gradients_at(scales), lambda: None, JointOptim(torch.optim.SGD, {"lr": 1.0}, {"clip_norm": limit}), Trace_ELBO()
    )
    svi.step()
    norm = sum(gradient**2 for gradient in gradients) ** 0.5
    for name, gradient in scales.items():
        expected = -gradient * min(1.0, limit / norm)
        assert float(pyro.param(name).detach()) == pytest.approx(expected, rel=1e-5)


def test_clips_each_entry():
    optimizer = JointOptim(torch.optim.SGD, {"lr": 1.0}, {"clip_value": 2.0})
    SVI(gradients_at({"a": 5.0, "b": -1.0}), lambda: None, optimizer, Trace_ELBO()).step()
    assert (float(pyro.param("a").detach()), float(pyro.param("b").detach())) == (-2.0, 1.0)


def test_parameters_may_come_later_and_rest():
    optimizer = JointOptim(torch.optim.Adam, {"lr": 0.1})
    both, first = gradients_at({"a": 1.0, "b": 1.0}), gradients_at({"a": 1.0})
    SVI(first, lambda: None, optimizer, Trace_ELBO()).step()
    SVI(both, lambda: None, optimizer, Trace_ELBO()).step()
    b = pyro.get_param_store()["b"].unconstrained()
    resting = float(b.detach())
    # A gradient that someone else left on a parameter that the step does not use is neither used nor lost.
    b.grad = torch.tensor(7.0, dtype=torch.float64)
    SVI(first, lambda: None, optimizer, Trace_ELBO()).step()
    assert float(b.detach()) == resting
    assert float(b.grad) == 7.0
    assert float(pyro.param("a").detach()) == pytest.approx(-0.3, rel=1e-6)


def test_schedulers_of_pytorch_go_with_it():
    optimizer = JointOptim(torch.optim.SGD, {"lr": 1.0})
    svi = SVI(gradients_at({"a": 1.0}), lambda: None, optimizer, Trace_ELBO())
    svi.step()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer, gamma=0.5)
    for _ in range(2):
        svi.step()
        scheduler.step()
    assert float(pyro.param("a").detach()) == pytest.approx(-1 - 1 - 0.5)


def test_a_model_without_parameters_takes_a_step():
    optimizer = JointOptim(torch.optim.Adam, {"lr": 0.1}, {"clip_norm": 1.0})
    SVI(
        lambda: pyro.sample("z", dist.Normal(0.0, 1.0)),
        lambda: pyro.sample("z", dist.Normal(0.0, 1.0)),
        optimizer,
        Trace_ELBO(),
    ).step()
    assert optimizer.get_state() == {}
    assert isinstance(pickle.loads(pickle.dumps(optimizer)), JointOptim)


def late(scheduler, optim_args=None, steps=3):
    """The optimizer after steps for a, and later for a and b, under a scheduler."""
    optimizer = JointOptim(torch.optim.SGD, {"lr": 1.0} if optim_args is None else optim_args)
    SVI(gradients_at({"a": 1.0}), lambda: None, optimizer, Trace_ELBO()).step()
    schedule = scheduler(optimizer.optimizer)
    for _ in range(2):
        schedule.step()
    both = SVI(gradients_at({"a": 1.0, "b": 1.0}), lambda: None, optimizer, Trace_ELBO())
    for _ in range(steps):
        both.step()
        schedule.step()
    return optimizer


SCHEDULERS = {
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_late_parameter_has_the_learning_rate_of_the_scheduler(scheduler):
    optimizer = late(SCHEDULERS[scheduler])
    (group,) = optimizer.optimizer.param_groups
    assert len(group["params"]) == 2
    # The scheduler has halved the rate twice when b appears.
    expected = -(0.25 + 0.125 + 0.0625)
    assert float(pyro.param("b").detach()) == pytest.approx(expected)
    assert float(pyro.param("a").detach()) == pytest.approx(-1.0 + expected)


def test_a_late_parameter_shares_a_rate_that_is_set_by_hand():
    def halved(optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100)

    class Steps:
        def __init__(self, optimizer):
            self.plateau = halved(optimizer)

        def step(self):
            self.plateau.step(1.0)

    late(Steps)
    assert float(pyro.param("b").detach()) == pytest.approx(-1.5)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_late_parameter_with_arguments_of_its_own_is_refused_under_a_scheduler():
    def of_name(name):
        return {"lr": 1.0 if name == "a" else 0.1}

    with pytest.raises(ValueError, match=r"earlier ones, got 'b' with \{'lr': 0.1\}, of which the scheduler"):
        late(SCHEDULERS["lambda"], of_name)


@pytest.mark.parametrize("name", ["clip_norm", "clip_value"])
@pytest.mark.parametrize("limit", [-1.0, 0.0, float("nan"), "1", True, torch.tensor([1.0, 2.0])])
def test_limits_are_positive(name, limit):
    with pytest.raises(ValueError, match=f"Expected {name} in clip_args to be a finite number > 0"):
        JointOptim(torch.optim.Adam, {"lr": 0.1}, {name: limit})


def test_an_infinite_limit_is_none():
    optimizer = JointOptim(torch.optim.SGD, {"lr": 1.0}, {"clip_norm": float("inf")})
    SVI(gradients_at({"a": 5.0}), lambda: None, optimizer, Trace_ELBO()).step()
    assert float(pyro.param("a").detach()) == -5.0


@pytest.mark.parametrize(
    "constructor",
    [
        pyro.optim.Adam,
        pyro.optim.ClippedAdam,
        pyro.optim.Adam({"lr": 0.1}),
        torch.optim.Adam([torch.zeros(1, requires_grad=True)]),
        torch.optim.lr_scheduler.ExponentialLR,
        torch.nn.Linear,
        "Adam",
        None,
    ],
)
def test_only_classes_of_optimizers_are_constructors(constructor):
    with pytest.raises(TypeError, match=r"Expected optim_constructor to be a class of torch.optim"):
        JointOptim(constructor, {"lr": 0.1})


def test_what_a_constructor_builds_is_checked_too():
    with pytest.raises(TypeError, match="Expected optim_constructor to build an optimizer of PyTorch, got a dict"):
        JointOptim(lambda params, lr: {}, {"lr": 0.1})
    with pytest.raises(TypeError, match="Expected optim_constructor to treat each parameter on its own, got LBFGS"):
        JointOptim(torch.optim.LBFGS, {"lr": 0.1})
    assert JointOptim(functools.partial(torch.optim.SGD, momentum=0.5), {"lr": 0.1}).optimizer is None


@pytest.mark.parametrize("arguments", [None, 0.1, [("lr", 0.1)], "lr", dict, lambda: {}, lambda a, b, c: {}])
def test_arguments_are_a_dictionary_or_a_function(arguments):
    with pytest.raises(TypeError, match="Expected optim_args to be a"):
        JointOptim(torch.optim.Adam, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": 0.1},
        {"lr": "a"},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": 0.1, "betas": 0.9},
        {"lr": 0.1, "betas": (2.0, 0.9)},
        {"lr": 0.1, "weight_decay": -1.0},
    ],
)
def test_the_class_refuses_arguments_at_once(arguments):
    with pytest.raises((ValueError, TypeError), match=r"Expected optim_args to be arguments of Adam, got \{"):
        JointOptim(torch.optim.Adam, arguments)
    optimizer = JointOptim(torch.optim.Adam, lambda name: arguments)
    with pytest.raises((ValueError, TypeError), match=r"Expected optim_args to be arguments of Adam, got \{"):
        SVI(gradients_at({"a": 1.0}), lambda: None, optimizer, Trace_ELBO()).step()


def test_arguments_of_a_function_are_a_dictionary():
    optimizer = JointOptim(torch.optim.Adam, lambda name: 0.1)
    with pytest.raises(TypeError, match=r"Expected optim_args to return a dictionary of arguments for 'a', got 0\.1"):
        SVI(gradients_at({"a": 1.0}), lambda: None, optimizer, Trace_ELBO()).step()


def test_arguments_may_depend_on_two_names():
    optimizer = JointOptim(torch.optim.SGD, lambda module, name: {"lr": 0.5 if name == "a" else 1.0})
    SVI(gradients_at({"a": 1.0}), lambda: None, optimizer, Trace_ELBO()).step()
    assert float(pyro.param("a").detach()) == -0.5


@pytest.mark.parametrize("state", [None, "state", [1], {"a": 3}, {"a": {"scheduler": {}, "optimizer": {}}}])
def test_only_states_of_optimizers_are_taken(state):
    with pytest.raises((ValueError, TypeError), match="Expected state_dict"):
        JointOptim(torch.optim.Adam, {"lr": 0.1}).set_state(state)


@pytest.mark.parametrize("clip_args", [lambda module, name: {"clip_norm": 1.0}, {"norm": 1.0}, [1.0], 5.0, "clip_norm"])
def test_rejects_clipping_of_single_parameters(clip_args):
    with pytest.raises(ValueError, match="Expected clip_args"):
        JointOptim(torch.optim.Adam, {"lr": 0.1}, clip_args)
