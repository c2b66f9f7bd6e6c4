"""Inverse Lipschitz constants that are trained above a floor."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import EVENT, LATENT
from helpers.models import vae_with
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroParam, PyroSample
from torch.nn import functional as F

from pyro_ilvae import (
    BrenierMap,
    GraphSVI,
    InverseLipschitzController,
    InverseLipschitzDecoder,
    InverseLipschitzScheduler,
    JointOptim,
    LearnedConstant,
    Nats,
    NatsScheduler,
    ProjectedDecoder,
    diagnostics,
    likelihoods,
    mlp,
    schedules,
)

FLOORS = [0.0, 0.7]


def projected(constant):
    return ProjectedDecoder(mlp(LATENT, (16,), 8), latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=constant)


def composition(constant):
    return InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=constant, map_features=(16, 12)
    )


BUILD = {"projected": projected, "composition": composition, "map": lambda constant: BrenierMap(LATENT, constant, (8,))}


def perturbed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return module


def smallest_ratio(decoder, dtype):
    near, far = torch.randn(2, 200, LATENT, dtype=dtype)
    difference = (decoder(near) - decoder(far)).reshape(200, -1).norm(dim=-1)
    return float((difference / (near - far).norm(dim=-1)).detach().min())


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_present_constant_holds_and_is_above_its_floor(build, floor, dtype):
    for _ in range(5):
        decoder = perturbed(build(LearnedConstant(floor, excess=0.5))).to(dtype)
        constant = decoder.inverse_lipschitz
        assert smallest_ratio(decoder, dtype) >= constant * (1 - 1e-4)
        assert constant > decoder.minimum_inverse_lipschitz == pytest.approx(floor)


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
@pytest.mark.parametrize("floor", FLOORS)
def test_the_start_is_the_floor_and_the_excess(build, floor):
    decoder = build(LearnedConstant(floor, excess=0.5))
    assert decoder.inverse_lipschitz == pytest.approx(floor + 0.5)
    assert build(1.0).minimum_inverse_lipschitz is None


@pytest.mark.parametrize("build", [projected, composition])
def test_nats_are_the_floor_and_the_noise_scale_the_unit(build):
    noise = likelihoods.Normal(0.2, "learned")
    decoder = build(LearnedConstant(Nats(0.5, noise), excess=0.3))
    with torch.no_grad():
        noise.log_scale += 0.7
    sigma = float(noise.noise_scale.detach())
    ratio = Nats(0.5, noise).ratio
    assert decoder.nats == 0.5
    assert decoder.minimum_inverse_lipschitz == pytest.approx(sigma * ratio, rel=1e-5)
    expected = sigma * (ratio + 0.3)
    if build is composition:  # the inner constant does not follow
        expected = decoder.minimum_inverse_lipschitz + 0.3 * sigma
    assert decoder.inverse_lipschitz == pytest.approx(expected, rel=1e-5)
    decoder.nats = 0.25
    assert decoder.minimum_inverse_lipschitz == pytest.approx(sigma * Nats(0.25, noise).ratio, rel=1e-5)
    assert decoder.inverse_lipschitz == pytest.approx(decoder.minimum_inverse_lipschitz + 0.3 * sigma, rel=1e-5)


def test_the_gradient_of_the_parameter():
    brenier = BrenierMap(2, LearnedConstant(0.5, excess=0.3)).double()
    z = torch.randn(5, 2, dtype=torch.double)
    brenier(z).sum().backward()
    # d/dtheta sum_ij softplus(theta) z_ij
    expected = torch.sigmoid(brenier.excess_raw) * z.sum()
    torch.testing.assert_close(brenier.excess_raw.grad, expected)


def test_the_inverse_knows_of_the_parameter():
    brenier = BrenierMap(2, LearnedConstant(0.5, excess=0.3)).double()
    z = torch.randn(5, 2, dtype=torch.double)
    y = brenier(z).detach()
    torch.testing.assert_close(brenier.inverse(y), z, rtol=0, atol=1e-6)
    found = torch.autograd.grad(brenier.inverse(y).sum(), brenier.excess_raw)[0]
    step = 1e-5
    with torch.no_grad():
        brenier.excess_raw += step
        above = brenier.inverse(y, tolerance=1e-13).sum()
        brenier.excess_raw -= 2 * step
        below = brenier.inverse(y, tolerance=1e-13).sum()
    assert float(found) == pytest.approx(float((above - below) / (2 * step)), rel=1e-3)


@pytest.mark.parametrize("build", [projected, composition])
def test_training_moves_it_as_in_one_graph(build):
    runs = []
    for svi_of in (SVI, lambda *args: GraphSVI(*args, compile=False)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        decoder = build(LearnedConstant(0.5))
        vae = vae_with(decoder=decoder)
        start = decoder.inverse_lipschitz
        svi = svi_of(vae.model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 0.05}), Trace_ELBO())
        x = 5 * torch.randn(12, *EVENT)
        for _ in range(20):
            svi.step(x)
        assert decoder.inverse_lipschitz > 0.5
        assert decoder.inverse_lipschitz != pytest.approx(start, rel=0.005)
        runs.append(decoder.inverse_lipschitz)
    assert svi.runs == "graph"
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state_dict"])
def test_copies_have_the_constant(build, copied):
    decoder = perturbed(build(LearnedConstant(0.5, excess=0.3)))
    if copied == "state_dict":
        other = build(LearnedConstant(0.1))
        other.load_state_dict(decoder.state_dict())
    else:
        other = copy.deepcopy(decoder) if copied == "deepcopy" else pickle.loads(pickle.dumps(decoder))
    assert other.inverse_lipschitz == decoder.inverse_lipschitz
    assert other.minimum_inverse_lipschitz == decoder.minimum_inverse_lipschitz == pytest.approx(0.5)
    with pytest.raises(RuntimeError, match="excess_raw"):
        build(0.5).load_state_dict(decoder.state_dict())


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_a_number_ends_the_learning(build):
    decoder = perturbed(build(LearnedConstant(0.5, excess=0.3)))
    constant = decoder.inverse_lipschitz
    decoder.inverse_lipschitz = constant
    assert decoder.minimum_inverse_lipschitz is None
    assert decoder.inverse_lipschitz == pytest.approx(constant)
    assert not [name for name, _ in decoder.named_parameters() if "excess" in name]


def test_the_start_from_data_keeps_the_parameter_that_an_optimizer_has():
    likelihood = likelihoods.Bernoulli()
    decoder = projected(LearnedConstant(Nats(0.5, likelihood), excess=0.3))
    parameter = decoder.map.excess_raw
    decoder.initialize((torch.randn(50, *EVENT) > 0).float(), likelihood)
    assert decoder.map.excess_raw is parameter
    assert float(F.softplus(parameter.detach())) == pytest.approx(0.3, rel=1e-5)


def test_the_floor_in_nats_is_guaranteed_and_more_than_it():
    noise = likelihoods.Normal(0.5)
    decoder = projected(LearnedConstant(Nats(0.5, noise), excess=0.3))
    vae = vae_with(decoder=decoder, likelihood=noise)
    assert diagnostics.guaranteed_information(vae).floor > LATENT * 0.5


def test_no_schedule_and_no_controller_moves_what_is_learned():
    decoder = projected(LearnedConstant(0.5))
    in_nats = projected(LearnedConstant(Nats(0.5, likelihoods.Normal(0.5))))
    for make in (
        lambda: InverseLipschitzScheduler(decoder, schedules.constant(1.0)),
        lambda: NatsScheduler(in_nats, schedules.constant(1.0)),
        lambda: InverseLipschitzController(decoder, lambda: 1.0, 1.0, num_steps=10),
    ):
        with pytest.raises(ValueError, match="is not learned"):
            make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [0.1, 0.7, 1e5])
def test_rounding_puts_no_constant_below_its_floor(floor, dtype):
    for build in (projected, lambda constant: BrenierMap(LATENT, constant, (8,))):
        decoder = build(LearnedConstant(floor, excess=1e-12)).to(dtype)
        assert decoder.inverse_lipschitz >= decoder.minimum_inverse_lipschitz == floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_changes_a_learned_map_no_more_than_another_one(dtype):
    learned, fixed = (BrenierMap(2, value, (8,)).to(dtype) for value in (LearnedConstant(1e5, excess=1e-12), 1e5))
    fixed.icnn.load_state_dict(learned.icnn.state_dict())
    z = 0.1 * torch.randn(20, 2, dtype=dtype)
    torch.testing.assert_close(learned(z), fixed(z), rtol=0, atol=0)


def test_a_prior_on_the_excess_is_drawn_and_the_constant_is_the_floor_of_all_draws():
    brenier = BrenierMap(2, LearnedConstant(0.5, excess=0.1), (8,)).double()
    brenier.excess_raw = PyroSample(dist.Normal(torch.tensor(2.0).double(), 1.0))
    z = torch.randn(4, 2, dtype=torch.double)

    def model():
        with pyro.plate("particles", 3, dim=-2):
            return brenier(z)

    trace = pyro.poutine.trace(model).get_trace()
    draws = trace.nodes["excess_raw"]["value"]
    assert draws.shape == (3, 1)
    expected = brenier.icnn.gradient(z) + (0.5 + F.softplus(draws)).unsqueeze(-1) * z
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected)
    assert brenier.inverse_lipschitz == brenier.minimum_inverse_lipschitz == 0.5
    brenier.inverse_lipschitz = LearnedConstant(0.5, excess=1.0)
    assert brenier.inverse_lipschitz == pytest.approx(1.5)


def test_a_constraint_on_the_excess_is_kept_and_ends_with_a_number():
    brenier = BrenierMap(2, LearnedConstant(0.5, excess=0.1))
    brenier.excess_raw = PyroParam(torch.tensor(1.0), constraint=dist.constraints.interval(0.0, 2.0))
    assert brenier.inverse_lipschitz == pytest.approx(0.5 + float(F.softplus(torch.tensor(1.0))))
    brenier.inverse_lipschitz = brenier.inverse_lipschitz
    assert brenier.minimum_inverse_lipschitz is None
    assert not [name for name, _ in brenier.named_parameters() if "excess" in name]


@pytest.mark.parametrize("logit", [-1000.0, -200.0])
def test_nats_can_be_set_where_training_left_no_excess(logit):
    decoder = composition(LearnedConstant(Nats(0.5, likelihoods.Normal(0.3)), excess=0.1))
    with torch.no_grad():
        decoder.outer.excess_raw.fill_(logit)
    decoder.nats = 0.8
    assert decoder.inverse_lipschitz == pytest.approx(Nats(0.8, likelihoods.Normal(0.3)).constant())
    assert decoder.minimum_inverse_lipschitz is not None


@pytest.mark.parametrize("floor", [0.0, 1e-300, 1e-40, 1e-20, 1e-9, 1e17])
def test_floors_of_any_size_start_at_their_sum_with_the_excess(floor):
    for build in BUILD.values():
        decoder = build(LearnedConstant(floor, excess=0.5))
        assert decoder.inverse_lipschitz == pytest.approx(floor + 0.5)
        assert decoder.minimum_inverse_lipschitz == pytest.approx(floor, rel=1e-6, abs=0)
        assert decoder(torch.randn(3, LATENT)).isfinite().all()


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_an_excess_beyond_the_largest_constant_is_refused(build):
    with pytest.raises(ValueError, match="excess <= 1e\\+18"):
        build(LearnedConstant(0.5, excess=1e30))
