"""A loss as a module: what it holds, what it computes in each mode, and where PyTorch's traversals end."""

import copy
import functools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_ilvae import VAE, AnnealedELBO, MLPDecoder, MLPEncoder, anneal, likelihoods

X = torch.linspace(-1, 1, 5 * 6).reshape(5, 6)


def build():
    torch.manual_seed(0)
    decoder = MLPDecoder(latent_dim=2, event_shape=6, hidden_features=(4,))
    encoder = MLPEncoder(event_shape=6, latent_dim=2, hidden_features=(4,))
    return VAE(decoder, encoder, likelihoods.Normal(0.5))


def annealed(beta=0.1):
    return AnnealedELBO(TraceMeanField_ELBO(), beta=beta)


def value(loss):
    pyro.set_rng_seed(1)
    return float(loss(X).detach())


WRAPPERS = {
    "methods": lambda fn: fn,
    "partial": lambda fn: functools.partial(functools.partial(fn)),
    "scale": lambda fn: poutine.scale(fn, 1.0),
    "reparam": lambda fn: poutine.reparam(fn, config={}),
    "trace": lambda fn: poutine.trace(fn),
    "enumerate": lambda fn: config_enumerate(fn),
    "anneal": lambda fn: anneal(functools.partial(fn), 1.0),
    "wraps": lambda fn: functools.wraps(fn)(lambda *args: fn(*args)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_owners_of_methods_are_held_once(wrapper):
    vae = build()
    wrap = WRAPPERS[wrapper]
    loss = annealed()(wrap(vae.model), wrap(vae.guide))
    assert set(map(id, loss.parameters())) == set(map(id, vae.parameters()))
    assert set(loss.state_dict()) == {f"model_module.{name}" for name in vae.state_dict()}
    loss.eval()
    assert not any(module.training for module in vae.modules())
    loss.train()
    assert all(module.training for module in vae.modules())
    loss.double()
    assert all(parameter.dtype == torch.float64 for parameter in vae.parameters())


def test_modules_keep_the_names_that_pyro_gives():
    vae = build()
    guide = AutoNormal(vae.model)
    guide(X)
    assert [name for name, _ in annealed()(vae.model, guide).named_children()] == ["guide", "model_module"]
    theirs = Trace_ELBO()(guide, guide).state_dict()
    assert annealed()(guide, guide).state_dict().keys() == theirs.keys()
    # The decoder is inside the model's module, and is not held a second time.
    assert [name for name, _ in annealed()(vae.model, vae.decoder.forward).named_children()] == ["model_module"]
    assert [name for name, _ in annealed()(vae.decoder.forward, vae.guide).named_children()] == ["guide_module"]


def test_modules_among_the_arguments_of_a_partial_function():
    def model(decoder, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    vae = build()
    loss = annealed()(functools.partial(model, vae.decoder), vae.guide)
    assert [name for name, _ in loss.named_children()] == ["guide_module"]
    decoder = build().decoder
    loss = annealed()(functools.partial(model, decoder), functools.partial(vae.guide))
    assert [name for name, _ in loss.named_children()] == ["model_module", "guide_module"]


@pytest.mark.parametrize("beta", [0.0, 0.3, {"z": 0.3}])
def test_training_mode_is_annealed_and_evaluation_mode_is_not(beta):
    vae = build()
    loss = annealed(beta)(vae.model, vae.guide)
    pyro.set_rng_seed(1)
    trained = float(annealed(beta).differentiable_loss(vae.model, vae.guide, X).detach())
    pyro.set_rng_seed(1)
    evaluated = TraceMeanField_ELBO().loss(vae.model, vae.guide, X)
    assert trained < evaluated
    assert value(loss) == pytest.approx(trained)
    assert value(loss.eval()) == pytest.approx(evaluated)
    assert value(loss.train()) == pytest.approx(trained)
    with torch.no_grad():
        assert value(loss.eval()) == pytest.approx(evaluated)


@pytest.mark.parametrize("local", [True, False])
def test_an_optimizer_of_its_parameters_trains_the_model(local):
    with pyro.settings.context(module_local_params=local):
        vae = build()
        loss = annealed(0.5)(vae.model, vae.guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
        before = value(loss)
        for _ in range(100):
            optimizer.zero_grad()
            loss(X).backward()
            optimizer.step()
        assert value(loss) < 0.6 * before
        assert loss.model.__self__ is vae


def test_state_goes_into_another_loss():
    loss = annealed()(*(lambda vae: (vae.model, vae.guide))(build()))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn_like(parameter))
    state, expected = copy.deepcopy(loss.state_dict()), value(loss)
    pyro.clear_param_store()
    vae = build()
    other = annealed()(vae.model, vae.guide)
    other.load_state_dict(state)
    assert value(other) == pytest.approx(expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_holds_what_its_methods_use(copied):
    with pyro.settings.context(module_local_params=True):
        vae = build()
        loss = annealed()(vae.model, vae.guide)
        other = copied(loss)
        assert other.model.__self__ is other.guide.__self__ is other.model_module
        assert other.model_module is not vae
        assert value(other) == value(loss)


class Trainer(nn.Module):
    """A module that keeps the loss of its own methods, as Lightning users write it."""

    def __init__(self):
        super().__init__()
        self.vae = build()
        self.loss = annealed()(self.model, self.guide)

    def model(self, x):
        return self.vae.model(x)

    def guide(self, x):
        return self.vae.guide(x)


@pytest.mark.parametrize(
    "traverse",
    [
        lambda trainer: trainer.eval().train(),
        lambda trainer: trainer.loss.eval().train(),
        lambda trainer: trainer.double(),
        lambda trainer: trainer.load_state_dict({f"vae.{k}": v for k, v in build().state_dict().items()}),
        lambda trainer: trainer.loss.state_dict(),
        lambda trainer: trainer.apply(lambda module: None),
        lambda trainer: repr(trainer),
        lambda trainer: list(trainer.loss.parameters()),
        lambda trainer: copy.deepcopy(trainer).eval(),
    ],
)
def test_a_module_may_hold_its_own_loss(traverse):
    trainer = Trainer()
    traverse(trainer)
    assert len(list(trainer.parameters())) == len(list(trainer.vae.parameters()))
    assert set(trainer.state_dict()) == {f"vae.{name}" for name in trainer.vae.state_dict()}
    trainer.eval()
    assert not trainer.loss.training
    trainer.train()
    assert trainer.loss.training


def test_parameters_that_an_optimizer_would_leave_alone_are_announced_once():
    vae = build()
    encoder = MLPEncoder(event_shape=6, latent_dim=2, hidden_features=(4,))

    def guide(x):
        pyro.module("other", encoder)
        loc, scale = encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    loss = AnnealedELBO(Trace_ELBO())(vae.model, guide)
    with pytest.warns(UserWarning, match=r"depends on \['other\$\$\$.*not among its parameters\(\)"):
        loss(X)
    loss(X)
    # All of them are functions: there is nothing that an optimizer could be built from.
    pure = AnnealedELBO(Trace_ELBO())(lambda x: vae.model(x), guide)
    assert not list(pure.parameters())
    pure(X)


def test_refuses_what_is_no_model_guide_or_differentiable_loss():
    vae = build()
    with pytest.raises(TypeError, match="Expected model to be a function, got the class VAE"):
        annealed()(VAE, vae.guide)
    with pytest.raises(TypeError, match="Expected guide to be a function, got None"):
        annealed()(vae.model, None)
    with pytest.raises(ValueError, match="differentiable loss, got RenyiELBO"):
        AnnealedELBO(RenyiELBO())(vae.model, vae.guide)


def test_a_module_as_model_is_not_held_again_for_its_method():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.vae = build()

        def forward(self, x):
            return self.vae.model(x)

        def guide(self, x):
            return self.vae.guide(x)

    model = Model()
    loss = annealed()(model, model.guide)
    assert [name for name, _ in loss.named_children()] == ["model"]
    assert torch.isfinite(loss(X))
