"""Aggressive inference: which parameters move when, the rule by hand, resumption, optimizers and graphs."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import X, vae_with
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormalMessenger

from pyro_ilvae import AnnealedELBO, GraphSVI, JointOptim
from pyro_ilvae.infer.remedies import AggressiveInference, FreeBitsELBO

OPTIMIZERS = {
    "pyro": lambda: pyro.optim.Adam({"lr": 0.02}),
    "joint": lambda: JointOptim(torch.optim.Adam, {"lr": 0.02}),
    "clipped": lambda: JointOptim(torch.optim.Adam, {"lr": 0.02}, {"clip_norm": 1.0}),
}


class Notes(pyro.optim.PyroOptim):
    """An optimizer that moves nothing and notes the parameters that it was given."""

    def __init__(self):
        super().__init__(torch.optim.SGD, {"lr": 0.0})
        self.moved = []

    def __call__(self, params, *args, **kwargs):
        self.moved.append(sorted(map(pyro.get_param_store().param_name, params)))


class Told(SVI):
    """SVI that returns losses as it is told, and notes what the optimizer was given."""

    def __init__(self, losses):
        self.told = iter(losses)
        super().__init__(self.model_of_a, self.guide_of_b, Notes(), Trace_ELBO())

    def model_of_a(self):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())), 1.0))

    def guide_of_b(self):
        pyro.sample("z", dist.Normal(pyro.param("b", torch.zeros(())), 1.0))

    def step(self):
        super().step()
        return next(self.told)

    def parts(self):
        return "".join("".join(names) for names in self.optim.moved)


@pytest.mark.parametrize(
    ("losses", "settings", "parts"),
    [
        # Windows of 2: means 9, 7, 8, so that the third is no better.
        ([9, 9, 7, 7, 8, 8, 0, 1, 1, 2, 2, 0], {"window": 2, "max_inner": 50}, "bbbbbbabbbba"),
        ([9, 8, 7, 6, 5, 4, 3, 2], {"window": 1, "max_inner": 3}, "bbbabbba"),
        ([5, 5, 5, 5, 5, 5], {"window": 1, "max_inner": 50}, "bbabba"),
        ([5, 5, 5, 5], {"window": 10, "max_inner": 1}, "baba"),
        ([3, 2, 1], {"max_inner": 0}, "ab" * 3),
    ],
)
def test_the_rule_by_hand(losses, settings, parts):
    svi = Told([float(loss) for loss in losses])
    inference = AggressiveInference(svi, **settings)
    found = [inference.step() for _ in losses]
    assert found == losses
    assert svi.parts() == parts


def test_information_that_stops_climbing_ends_it():
    def told(inference, information):
        """What ``update`` returns after a step of the model."""
        for _ in range(2):  # with max_inner=1, a step of the guide and one of the model
            inference.step()
        return inference.update(information)

    svi = Told([1.0] * 100)
    inference = AggressiveInference(svi, patience=2, max_inner=1)
    assert [told(inference, value) for value in (0.1, 0.3, 0.2, 0.4, 0.4, 0.1)] == [True] * 5 + [False]
    assert inference.num_model_steps == 6
    before = svi.parts()
    inference.step()
    assert svi.parts() == before + "ab"
    assert not inference.update(9.0)
    measured = iter([0.5, 0.4])
    inference = AggressiveInference(svi, information=lambda: next(measured), max_inner=1)
    assert [told(inference, None), told(inference, None)] == [True, False]
    for wrong in (math.nan, "a"):
        with pytest.raises(ValueError, match="information"):
            inference.update(wrong)
    with pytest.raises(ValueError, match="a function at the start"):
        AggressiveInference(svi).update()


def test_steps_of_the_guide_alone_end_nothing():
    inference = AggressiveInference(Told([1.0 / n for n in range(1, 100)]), max_inner=50)
    for _ in range(20):
        inference.step()
        assert inference.update(0.1)
    assert inference.num_model_steps == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_inner_steps_are_plain_svi(name):
    found = []
    for wrap in (lambda svi: svi, lambda svi: AggressiveInference(svi, max_inner=0)):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        vae = vae_with()
        steps = wrap(SVI(vae.model, vae.guide, OPTIMIZERS[name](), TraceMeanField_ELBO()))
        found.append([*(steps.step(X) for _ in range(4)), *(value.detach().clone() for value in vae.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [SVI, GraphSVI])
def test_a_step_moves_one_part_and_leaves_the_rest(name, kind):
    vae = vae_with()
    more = {} if kind is SVI else {"compile": False}
    svi = kind(vae.model, vae.guide, OPTIMIZERS[name](), AnnealedELBO(FreeBitsELBO(TraceMeanField_ELBO(), 0.1)), **more)
    inference = AggressiveInference(svi, max_inner=3, window=50)
    encoder = {id(value) for value in vae.encoder.parameters()}
    for i in range(8):
        before = [(value, value.detach().clone()) for value in vae.parameters()]
        state = {key: str(value) for key, value in svi.optim.get_state().items()}
        inference.step(X)
        of_guide = i % 4 < 3
        moved = {id(value) for value, old in before if not torch.equal(value.detach(), old)}
        assert moved
        assert (moved <= encoder) if of_guide else not (moved & encoder)
        assert all(value.grad is None or not value.grad.any() for value in vae.parameters())
        for key, value in svi.optim.get_state().items():
            if key.startswith("encoder") != of_guide:
                assert state.get(key) == str(value)
    assert kind is SVI or svi.runs == "graph"
    inference.is_aggressive = False
    before = [value.detach().clone() for value in vae.parameters()]
    inference.step(X)
    assert all(not torch.equal(value, old) for value, old in zip(vae.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", [SVI, GraphSVI])
def test_steps_are_those_of_two_optimizers_by_hand(kind):
    vae = vae_with().double()
    x = X.double()
    initial = {name: value.clone() for name, value in vae.state_dict().items()}
    more = {} if kind is SVI else {"compile": False}
    svi = kind(vae.model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 0.02}), TraceMeanField_ELBO(), **more)
    inference = AggressiveInference(svi, max_inner=2)
    pyro.set_rng_seed(7)
    for _ in range(9):
        inference.step(x)
    found = [value.detach().clone() for value in vae.parameters()]
    vae.load_state_dict(initial)
    of_guide = list(vae.encoder.parameters())
    of_model = [value for name, value in vae.named_parameters() if not name.startswith("encoder")]
    optimizers = [torch.optim.Adam(part, lr=0.02) for part in (of_guide, of_model)]
    elbo = TraceMeanField_ELBO()
    pyro.set_rng_seed(7)
    for i in range(9):
        vae.zero_grad()
        elbo.differentiable_loss(vae.model, vae.guide, x).backward()
        optimizers[i % 3 == 2].step()
    torch.testing.assert_close(found, [value.detach() for value in vae.parameters()], rtol=1e-7, atol=1e-9)


def test_shared_parameters_are_the_models():
    def model():
        shared, own = pyro.param("shared", torch.tensor(0.3)), pyro.param("of_model", torch.tensor(0.2))
        z = pyro.sample("z", dist.Normal(shared, 1.0))
        pyro.sample("x", dist.Normal(z * own, 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("of_guide", torch.tensor(0.1)), pyro.param("shared").exp()))

    svi = SVI(model, guide, Notes(), Trace_ELBO())
    pyro.param("shared", torch.tensor(0.3))
    inference = AggressiveInference(svi, max_inner=1)
    inference.step()
    inference.step()
    assert svi.optim.moved == [["of_guide"], ["of_model", "shared"]]


def test_a_guide_that_runs_the_model():
    def model(x):
        loc = pyro.param("of_model", torch.tensor(0.2))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = SVI(model, AutoNormalMessenger(model), Notes(), Trace_ELBO())
    inference = AggressiveInference(svi, max_inner=1)
    for _ in range(2):
        inference.step(torch.ones(5))
    of_guide, of_model = svi.optim.moved
    assert of_model == ["of_model"]
    assert len(of_guide) == 2
    assert "of_model" not in of_guide


def test_the_run_of_the_model_draws_nothing_and_moves_no_average():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.normalization = torch.nn.BatchNorm1d(2)
            self.dropout = torch.nn.Dropout(0.5)

        def model(self, x):
            pyro.module("own", self)
            with pyro.plate("data", 5):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.dropout(self.normalization(z)), 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", 5):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    found = []
    for wrap in (lambda svi: svi, lambda svi: AggressiveInference(svi, max_inner=9)):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        own = Model()
        svi = SVI(own.model, own.guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
        wrap(svi).step(torch.ones(5, 2))
        found.append((own.normalization.running_mean.clone(), torch.rand(3)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumption_is_exact(name):
    def start():
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        vae = vae_with()
        svi = SVI(vae.model, vae.guide, OPTIMIZERS[name](), TraceMeanField_ELBO())
        return vae, svi, AggressiveInference(svi, max_inner=7, window=3)

    vae, svi, inference = start()
    for _ in range(11):
        inference.step(X)
    assert inference.num_model_steps > 0
    inference.update(0.4)
    saved = vae.state_dict(), svi.optim.get_state(), inference.state_dict(), torch.get_rng_state()
    saved = torch.load(_saved(saved), weights_only=True)
    losses = [inference.step(X) for _ in range(9)]
    expected = [value.detach().clone() for value in vae.parameters()]
    vae, svi, inference = start()
    vae.load_state_dict(saved[0])
    svi.optim.set_state(saved[1])
    inference.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    assert [inference.step(X) for _ in range(9)] == losses
    assert all(torch.equal(one, other) for one, other in zip(vae.parameters(), expected, strict=True))
    assert not inference.update(0.4)


def _saved(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_states_and_words():
    svi = Told([1.0] * 20)
    inference = AggressiveInference(svi, max_inner=5)
    text = "AggressiveInference(Told, max_inner=5, window=10, patience=1) whose next step updates the guide"
    assert repr(inference) == text
    with pytest.raises(ValueError, match="state_dict"):
        inference.load_state_dict({"typo": 1})
    with pytest.raises(TypeError, match="state_dict"):
        inference.load_state_dict(3)
    with pytest.raises(TypeError, match="svi"):
        AggressiveInference(Trace_ELBO())
    before = inference.state_dict()
    wrong = {"is_aggressive": "no", "updates_guide": 3, "num_inner": -1, "loss_sum": None, "best": "a"}
    for name, value in (wrong | {"last_mean": True, "num_without_gain": 0.5}).items():
        with pytest.raises((ValueError, TypeError), match=rf"state_dict\['{name}'\]"):
            inference.load_state_dict({**before, "num_inner": 2, name: value})
        assert inference.state_dict() == before


def test_an_error_leaves_the_optimizer_in_place():
    vae = vae_with()
    optimizer = JointOptim(torch.optim.Adam, {"lr": 0.02})
    svi = SVI(vae.model, vae.guide, optimizer, AnnealedELBO(TraceMeanField_ELBO()))
    inference = AggressiveInference(svi, max_inner=3)
    before = inference.state_dict()
    with pytest.raises(ValueError, match="NaN"):
        inference.step(torch.full_like(X, torch.nan))
    assert svi.optim is optimizer
    assert inference.state_dict() == before
