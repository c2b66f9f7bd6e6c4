"""JointOptim moves parameters as PyroOptim does, with one norm for all of them."""

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


@pytest.mark.parametrize("clip_args", [lambda module, name: {"clip_norm": 1.0}, {"norm": 1.0}])
def test_rejects_clipping_of_single_parameters(clip_args):
    with pytest.raises(ValueError, match="Expected clip_args"):
        JointOptim(torch.optim.Adam, {"lr": 0.1}, clip_args)
