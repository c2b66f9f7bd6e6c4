"""Controllers in training: the models of the package, one-graph steps, checkpoints, warnings and errors."""

import copy
import gc
import json
import math
import pickle
import warnings
from collections import deque
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import EVERY_KIND, vae_with
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyro_ilvae import (
    GECO,
    AnnealedELBO,
    BetaController,
    BiLipschitzMap,
    BrenierMap,
    CollapseMonitor,
    GraphSVI,
    InverseLipschitzController,
    InverseLipschitzDecoder,
    InverseLipschitzScheduler,
    JointOptim,
    MLPDecoder,
    Nats,
    NatsController,
    PIController,
    ProjectedDecoder,
    control,
    diagnostics,
    likelihoods,
    measures,
    mlp,
    schedules,
)

X = torch.randn(24, 4, 2, generator=torch.Generator().manual_seed(0))
SIZES = {"latent_dim": 2, "event_shape": 6, "map_features": (8,), "context_dim": 2}
KINDS = ["L", "L-and-beta", "nats", "beta", "GECO", "PI"]


def data():
    return X.to(torch.get_default_device())


def fitted(kind, num_steps=40, every=5, **options):
    """A VAE with a controller of some kind, and the beta for its objective."""
    noise = likelihoods.Normal(0.5, "learned")
    constant = Nats(0.5, noise) if kind == "nats" else 0.7
    decoder = ProjectedDecoder(mlp(3, (8,), 8), latent_dim=3, event_shape=(4, 2), inverse_lipschitz=constant)
    vae = vae_with(decoder=decoder, likelihood=noise)
    total, smallest = measures.total_kl(vae.model, vae.guide), measures.smallest_kl(vae.model, vae.guide)
    options = {"num_steps": num_steps, "every": every} | options
    if kind == "L":
        controller = InverseLipschitzController(decoder, smallest, 0.4, **options)
    elif kind == "L-and-beta":
        controller = InverseLipschitzController(decoder, total, 0.1, largest_beta=10.0, **options)
        return vae, controller, controller.beta
    elif kind == "nats":
        controller = NatsController(decoder, measures.fisher_divergence(vae.model, vae.guide), 5.0, **options)
    elif kind == "beta":
        controller = BetaController(total, 3.0, **options)
    elif kind == "GECO":
        controller = GECO(measures.distortion(vae.model, vae.guide), 8.0, **options)
    else:
        controller = PIController(total, 3.0, **options)
    return vae, controller, controller if kind in ("beta", "GECO", "PI") else 1.0


def optimizer():
    return JointOptim(torch.optim.Adam, {"lr": 0.01})


def release(*controllers):
    """End the controllers, so that they do not warn of training that ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for controller in controllers:
            controller.freeze()


def train(svi, controller, num_steps):
    """The values of the controller and the losses."""
    values, losses = [], []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*froze off target")
        for _ in range(num_steps):
            losses.append(float(svi.step(data())))
            controller.step(data())
            values.append(controller.value)
    return values, losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_step_sees_each_move_without_recording_anew(kind):
    runs = {}
    for svi_of in (SVI, lambda *args: GraphSVI(*args, compile=False)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae, controller, beta = fitted(kind)
        svi = svi_of(vae.model, vae.guide, optimizer(), AnnealedELBO(TraceMeanField_ELBO(), beta=beta))
        runs[type(svi)] = train(svi, controller, 50)
        assert len({*runs[type(svi)][0]}) > 2, "the controller did not move"
    assert svi.runs == "graph"
    assert len(svi._cache.graphs) == 1
    for mine, other in zip(runs[GraphSVI], runs[SVI], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [3, 20, 45])
def test_resumed_in_the_middle_equals_uninterrupted(kind, stop):
    def start():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae, controller, beta = fitted(kind)
        optim = optimizer()
        return vae, controller, optim, SVI(vae.model, vae.guide, optim, AnnealedELBO(Trace_ELBO(), beta=beta))

    _, controller, _, svi = start()
    whole = train(svi, controller, 60)
    vae, controller, optim, svi = start()
    interrupted = controller
    first = train(svi, controller, stop)
    saved = copy.deepcopy((vae.state_dict(), optim.get_state()))
    state = json.loads(json.dumps(controller.state_dict()))
    random = torch.get_rng_state()

    vae, controller, optim, svi = start()
    vae.load_state_dict(saved[0])
    optim.set_state(saved[1])
    controller.load_state_dict(state)
    torch.set_rng_state(random)
    second = train(svi, controller, 60 - stop)
    assert first[0] + second[0] == whole[0]
    assert first[1] + second[1] == whole[1]
    if kind == "L-and-beta":
        assert controller.beta.num_steps_taken == controller.num_steps_taken == 60
    release(interrupted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_controller_moves_no_more_and_measures_no_more(kind):
    vae, controller, beta = fitted(kind, num_steps=20)
    svi = SVI(vae.model, vae.guide, optimizer(), AnnealedELBO(Trace_ELBO(), beta=beta))
    train(svi, controller, 20)
    assert controller.frozen
    value, estimate = controller.value, controller.estimate
    controller.measure.function = None  # a call would raise
    train(svi, controller, 10)
    assert controller.value == value == controller.freeze()
    assert controller.estimate == estimate
    assert "frozen" in repr(controller)
    if kind.startswith("L"):
        assert vae.decoder.inverse_lipschitz == value
        assert diagnostics.guaranteed_information(vae).floor >= 0
    if kind == "nats":
        assert vae.decoder.nats == value


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("measure", [measures.smallest_kl, measures.total_kl, measures.fisher_divergence])
def test_measures_of_every_model(name, measure):
    case = EVERY_KIND[name]
    model = case.build()
    site = None if measure is measures.total_kl else next(site for site in case.sites if site.startswith("z"))
    found = measure(model.model, model.guide, num_samples=3, site=site)
    if name.startswith("hierarchical-bottom") and measure is measures.fisher_divergence:
        with pytest.raises(ValueError, match=r"before site|in another order"):
            found(case.x)
        return
    assert math.isfinite(found.estimate(found(case.x)))


def test_measures_are_the_means_of_diagnostics():
    vae = vae_with()
    pair, x = (vae.model, vae.guide), data()
    kl = diagnostics.kl_per_dimension(*pair, x).values.mean(0)
    smallest = measures.smallest_kl(*pair)
    torch.testing.assert_close(smallest(x), kl.double().cpu())
    assert smallest.estimate(smallest(x)) == pytest.approx(float(kl.min()))
    total = measures.total_kl(*pair)(x)
    assert float(total) == pytest.approx(float(kl.sum()), rel=1e-5)
    fisher = diagnostics.guide_fisher_divergence(*pair, x).values.mean()
    assert float(measures.fisher_divergence(*pair)(x)) == pytest.approx(float(fisher))


def test_distortion_against_many_draws():
    vae = vae_with()
    x = data()
    found = float(measures.distortion(vae.model, vae.guide, num_samples=2000)(x))
    with torch.no_grad():
        loc, scale = vae.encoder(x)
        z = dist.Normal(loc, scale).sample((2000,))
        log_density = vae.likelihood(vae.decoder(z)).log_prob(x)
    assert found == pytest.approx(-float(log_density.flatten(2).sum(-1).mean()), rel=0.01)


def test_a_model_of_ones_own_with_subsampling_and_keywords():
    x = torch.randn(40, 3)

    def model(x, *, scale=1.0):
        with pyro.plate("data", 40, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x, *, scale=1.0):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(loc * x, 0.5).to_event(1))

    beta = BetaController(measures.total_kl(model, guide), 2.0, num_steps=40, every=2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), AnnealedELBO(Trace_ELBO(), beta=beta))
    for batch in list(x.split(10)) * 5:
        svi.step(batch, scale=0.5)
        beta.step(batch, scale=0.5)
    expected = diagnostics.kl_divergence(model, guide, x, model_kwargs={"scale": 0.5}).values.mean()
    assert beta.estimate == pytest.approx(float(expected), rel=0.2)
    with pytest.warns(UserWarning, match="off target"):
        beta.freeze()


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_leaves_no_trace(kind):
    vae, controller, _ = fitted(kind, every=1)
    vae.model(data())
    vae.guide(data())
    before = copy.deepcopy(vae.state_dict())
    state, names = torch.get_rng_state(), set(pyro.get_param_store())
    controller.step(data())
    assert controller.estimate is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert set(pyro.get_param_store()) == names
    for name, value in vae.state_dict().items():
        if "extra_state" not in name:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    release(controller)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_on_by_themselves(kind, copied):
    _, controller, _ = fitted(kind, every=1)
    for _ in range(5):
        controller.step(data())
    other = copied(controller)
    assert other.state_dict() == controller.state_dict()
    assert repr(other) == repr(controller)
    value = controller.value
    other.step(data())
    assert controller.value == value
    release(controller, other)


def test_a_warning_where_training_ends_before_the_freeze():
    controllers = [BetaController(lambda: 1.0, 2.0, num_steps=100, every=1)]
    controllers[0].step()
    with pytest.warns(UserWarning, match="Training ended before BetaController froze, at step 1 of 100: beta = "):
        controllers.clear()
    gc.collect()
    with pytest.warns(UserWarning, match="freezes after 100 steps and the training has 50"):
        BetaController(lambda: 1.0, 1.0, num_steps=100, planned_steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BetaController(lambda: 1.0, 1.0, num_steps=100, planned_steps=100)  # no step was taken: no training ended
        endless = GECO(control.Measure(lambda: 1.0, name="error", rises=False), 1.0)
        endless.step()
        endless.load_state_dict(endless.state_dict())
        frozen = BetaController(lambda: 1.0, 1.0, num_steps=10, every=1)
        for _ in range(10):
            frozen.step()
        del endless, frozen
        gc.collect()


@pytest.mark.parametrize("kind", KINDS)
def test_warnings_name_the_line_of_the_caller(kind):
    with pytest.warns(UserWarning, match="will still be moving") as caught:
        _, controller, _ = fitted(kind, planned_steps=10)
    assert caught[0].filename == __file__
    if kind != "GECO":  # whose constraint is met
        with pytest.warns(UserWarning, match="froze off target") as caught:
            controller.freeze()
        assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", ["L", "L-and-beta", "nats"])
def test_something_else_that_sets_the_constant_is_an_error(kind):
    vae, controller, _ = fitted(kind, every=1)
    controller.step(data())
    value, attribute = controller.value, controller._attribute
    setattr(vae.decoder, attribute, 0.123)
    with pytest.raises(ValueError, match=rf"Expected only this \w+ to set {attribute} .* got 0\.123"):
        controller.step(data())
    setattr(vae.decoder, attribute, value)
    release(controller)
    setattr(vae.decoder, attribute, 0.123)  # after the freeze it is the user's
    controller.step(data())


def test_a_state_of_another_controller_is_refused():
    states = {kind: fitted(kind)[1] for kind in ("L", "nats", "beta", "GECO", "PI")}
    for kind, controller in states.items():
        for other, of_other in states.items():
            if kind != other:
                with pytest.raises(ValueError, match="Expected state of a"):
                    controller.load_state_dict(of_other.state_dict())


def test_a_constraint_with_slack_is_on_target():
    beta = GECO(control.Measure(lambda: 1.0, name="error", rises=False), 4.0, num_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            beta.step()
    assert beta.on_target
    assert "for at most 4" in repr(beta)


def test_a_beta_that_no_objective_reads_is_an_error():
    _, controller, _ = fitted("L-and-beta", every=1, num_steps=400)
    with pytest.raises(ValueError, match=r"pass beta=controller\.beta to AnnealedELBO"):
        deque(map(controller.step, [data()] * 400))
    release(controller)


def test_a_monitor_that_shows_beta_is_no_objective():
    vae, controller, beta = fitted("L-and-beta", every=1, num_steps=400)
    monitor = CollapseMonitor(vae.model, vae.guide, data(), every=1, beta=beta, num_samples=1)

    def step(_):
        controller.step(data())
        return monitor.step()

    with pytest.raises(ValueError, match=r"pass beta=controller\.beta to AnnealedELBO"):
        deque(map(step, range(400)))
    assert monitor.history[-1]["beta"] > 1
    release(controller)


def test_an_objective_warns_of_a_controller_that_nobody_steps():
    vae, _, beta = fitted("beta")
    elbo = AnnealedELBO(Trace_ELBO(), beta=beta)
    with pytest.warns(UserWarning, match="After 100 losses beta is still 1"):
        deque(map(partial(elbo.differentiable_loss, vae.model, vae.guide), [data()] * 100))


def test_beta_of_one_site():
    vae, controller, beta = fitted("beta", every=1)
    elbo = AnnealedELBO(Trace_ELBO(), beta={"z": beta})
    controller._set(2.0)
    torch.manual_seed(0)
    found = elbo.differentiable_loss(vae.model, vae.guide, data())
    torch.manual_seed(0)
    expected = AnnealedELBO(Trace_ELBO(), beta={"z": 2.0}).differentiable_loss(vae.model, vae.guide, data())
    assert torch.equal(found, expected)
    release(controller)


class Fixed:
    """A decoder whose constant cannot be set."""

    @property
    def inverse_lipschitz(self):
        return 1.0


def in_nats():
    return BrenierMap(2, Nats(0.5, likelihoods.Normal(0.5)))


def plain():
    return MLPDecoder(latent_dim=3, event_shape=(4, 2), hidden_features=(8,))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: InverseLipschitzController(plain(), max, 1.0, num_steps=10), "attribute inverse_lipschitz"),
        (lambda: NatsController(BrenierMap(2), max, 1.0, num_steps=10), "use an InverseLipschitzController"),
        (
            lambda: InverseLipschitzController(BrenierMap(2, Nats(1.0, likelihoods.Normal())), max, 1.0, num_steps=10),
            "use a NatsController",
        ),
        (lambda: InverseLipschitzController(vae_with(), max, 1.0, num_steps=10), "whose decoder may have one"),
        (lambda: InverseLipschitzController(BrenierMap(2, 5.0), max, 1.0, num_steps=10, bounds=(0, 1)), "bounds"),
        (lambda: InverseLipschitzController(BiLipschitzMap(2), max, 1.0, num_steps=10), "bounds up to 10, the largest"),
        (lambda: InverseLipschitzController(BrenierMap(2), max, 1.0, num_steps=10, bounds=(0, 1e30)), r"up to 1e\+18"),
        (lambda: NatsController(in_nats(), max, 1.0, num_steps=10, bounds=(0, 100)), "bounds up to 40"),
        (lambda: InverseLipschitzController(Fixed(), max, 1.0, num_steps=10), "cannot be set"),
        (lambda: BetaController(max, 1.0, num_steps=50, start=0.0, bounds=(0.0, 1e-320)), r"bounds\[1\] >= 1e-300"),
        (lambda: InverseLipschitzScheduler(BiLipschitzMap(2), schedules.constant(11.0)), "schedule to give .* to 10"),
        (
            lambda: InverseLipschitzController(
                InverseLipschitzDecoder(**SIZES).given(torch.ones(2)), max, 1.0, num_steps=10
            ),
            "inverse_lipschitz cannot be set",
        ),
        (lambda: BetaController(max, 1.0, num_steps=5), "num_steps >= every"),
        (lambda: BetaController(max, 1.0, num_steps=50, bounds=(2.0, 1.0)), "bounds"),
        (lambda: BetaController(max, 1.0, num_steps=50, bounds=3.0), "bounds"),
        (lambda: GECO(control.Measure(max, name="KL"), 1.0), "measure to fall"),
        (lambda: GECO(max, 1.0, bounds=(0.0, 1.0)), r"bounds\[0\] > 0"),
        (lambda: PIController(control.Measure(max, name="e", rises=False), 1.0), "measure to rise"),
    ],
)
def test_what_cannot_be_controlled(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [{"value": float("nan")}, {"value": 1e9}, {"num_steps_taken": -1}, {"law": {}}, {"frozen": 3}, {"weight": "a"}],
    ids=str,
)
def test_states_that_are_none(kind, change):
    _, controller, _ = fitted(kind)
    with pytest.raises((ValueError, TypeError), match="state"):
        controller.load_state_dict({**controller.state_dict(), **change})
    with pytest.raises(ValueError, match="state"):
        controller.load_state_dict({})


@pytest.mark.parametrize(
    ("kind", "entry", "value"),
    [
        *((kind, "mean", value) for kind in ("L", "PI") for value in ("a", [math.nan])),
        *((kind, "shape", value) for kind in ("L", "PI") for value in (None, [7], [1.0])),
        ("PI", "law", {"sum_of_errors": math.nan}),
        ("L", "law", {"position": math.inf}),
        *(("L", "law", {"sign": value}) for value in ("a", 2)),
        *(("L", "law", {"recent": value}) for value in (3, ["a"])),
        *(("L", "law", {name: "a"}) for name in ("num_same", "inside", "error", "trend")),
    ],
)
def test_a_state_that_is_none_names_the_entry_and_changes_nothing(kind, entry, value):
    _, controller, _ = fitted(kind, every=1)
    deque(map(controller.step, [data()] * 3))
    before = controller.state_dict()
    value = before["law"] | value if entry == "law" else value
    with pytest.raises((ValueError, TypeError), match=rf"Expected state\['{entry}'\]"):
        controller.load_state_dict({**before, "value": 0.9, "num_steps_taken": 9, entry: value})
    assert controller.state_dict() == before
    release(controller)


@pytest.mark.parametrize("value", ["a", None, {}, [1.0, "b"], [[1.0], [2.0, 3.0]], 1j, torch.tensor(1j)], ids=str)
def test_a_measure_that_is_no_number_is_named(value):
    with pytest.raises(TypeError, match="Expected the measure 'mine' to be real numbers"):
        control.Measure(lambda: value, name="mine")()
    with pytest.raises(TypeError, match="Expected the summary of the measure 'mine' to be real numbers"):
        control.Measure(lambda: 1.0, name="mine", summary=lambda mean: value).estimate(torch.tensor(1.0))


@pytest.mark.parametrize("value", [0.1, 1e300, 3])
def test_a_measure_keeps_pythons_numbers(value):
    measure = control.Measure(lambda: value, name="mine", summary=lambda mean: float(mean))
    assert float(measure()) == measure.estimate(measure()) == value


@pytest.mark.parametrize("target", [1e-300, 1e300])
@pytest.mark.parametrize("measured", [1e-300, 1.0, 1e300, 0.0, -1.0])
def test_numbers_of_any_size_move_a_controller_within_its_bounds(target, measured):
    controller = BetaController(lambda: measured, target, num_steps=10, every=1)
    controller.step()
    assert 0.01 <= controller.value <= 10
    assert (controller.value > 1) == (measured > target)
    release(controller)


def test_the_composition_keeps_its_split():
    decoder = InverseLipschitzDecoder(latent_dim=2, event_shape=6, inverse_lipschitz=(2.0, 0.5), map_features=(8,))
    controller = InverseLipschitzController(decoder, lambda: 1.0, 2.0, num_steps=20, every=1)
    controller.step()
    ratio = decoder.inner.inverse_lipschitz / decoder.outer.inverse_lipschitz
    assert ratio == pytest.approx(4.0)
    assert decoder.inverse_lipschitz == pytest.approx(controller.value)
    release(controller)
