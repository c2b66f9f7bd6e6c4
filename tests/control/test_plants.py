"""Controllers on simulated plants: a measure that follows the number that is moved, with a lag and noise."""

import math
import random
import warnings
from collections import deque

import pytest

from pyro_ilvae import GECO, BetaController, InverseLipschitzController, NatsController, PIController, measures
from pyro_ilvae.control import Measure

NUM_STEPS, TOTAL, SETTLED = 3200, 4000, 2400
CALM = math.log(1.2)


class Knob:
    """What a controller of a constant sets."""

    minimum_inverse_lipschitz = None

    def __init__(self, start, nats=None):
        self.inverse_lipschitz = start
        self.nats = nats


class Plant:
    """A measure whose logarithm goes to a function of the number, a part of the way in each step."""

    def __init__(self, goal, lag, noise=0.0, seed=0):
        self.goal = goal
        self.lag = lag
        self.noise = noise
        self.random = random.Random(seed)
        self.log = math.log(2.0)

    def step(self):
        self.log += (math.log(self.goal()) - self.log) / self.lag

    def measured(self):
        return math.exp(self.log) * (1 + self.noise * self.random.gauss(0, 1))


def run(controller, plant, num_steps=TOTAL):
    """The logarithm of the measure over its target, and the number, at each step."""
    errors, values = [], []
    for _ in range(num_steps):
        plant.step()
        controller.step()
        errors.append(plant.log - math.log(controller.target))
        values.append(controller.value)
        assert math.isfinite(controller.value)
        low, high = controller.bounds
        assert low <= controller.value <= high
    return errors, values


def information(constant, beta=1.0):
    """The total KL of 16 dimensions with a noise scale of 0.1, roughly; data alone fill 20 nats."""
    return (20.0 + 8.0 * math.log1p((constant / 0.1) ** 2)) * beta**-1.3


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("lag", [30, 100, 300])
@pytest.mark.parametrize("start", [0.0, 10.0])
@pytest.mark.parametrize("target", [4.0, 8.0, 16.0, 32.0, 64.0])
def test_an_amount_of_information_is_reached_and_kept(target, start, lag, noise):
    knob = Knob(start)
    plant = Plant(lambda: information(knob.inverse_lipschitz, controller.beta.value), lag, noise)
    controller = InverseLipschitzController(
        knob, Measure(plant.measured, name="KL"), target, num_steps=NUM_STEPS, largest_beta=100.0
    )
    errors, values = run(controller, plant)
    assert abs(errors[-1]) < math.log(1.1)
    assert max(map(abs, errors[SETTLED:])) < CALM
    assert controller.frozen
    assert controller.on_target
    assert len({*values[NUM_STEPS:]}) == 1
    # The weight of the KL rises only where the constant has nothing left to give.
    assert controller.beta.value == 1 or knob.inverse_lipschitz == 0
    assert (controller.beta.value > 1) == (target < 20)


@pytest.mark.parametrize("lag", [10, 100])
@pytest.mark.parametrize("elasticity", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("start", [0.01, 1.0, 30.0])
def test_a_power_of_nats_is_reached_and_kept(start, elasticity, lag):
    knob = Knob(0.0, nats=min(start, 10.0))
    plant = Plant(lambda: max(knob.nats, 1e-4) ** elasticity, lag, 0.05)
    controller = NatsController(knob, Measure(plant.measured, name="KL"), 0.5, num_steps=NUM_STEPS)
    errors, _ = run(controller, plant)
    assert abs(errors[-1]) < math.log(1.1)
    assert max(map(abs, errors[SETTLED:])) < CALM


@pytest.mark.parametrize("lag", [10, 100])
@pytest.mark.parametrize("target", [2.0, 20.0, 60.0])
@pytest.mark.parametrize("start", [0.1, 1.0, 8.0])
def test_beta_reaches_a_total(start, target, lag):
    plant = Plant(lambda: 20.0 / beta.value**1.2, lag, 0.05)
    beta = BetaController(Measure(plant.measured, name="KL"), target, num_steps=NUM_STEPS, start=start)
    errors, _ = run(beta, plant)
    assert abs(errors[-1]) < math.log(1.1)
    assert max(map(abs, errors[SETTLED:])) < CALM


@pytest.mark.parametrize("start", [0.05, 1.0, 5.0])
def test_geco_reaches_its_constraint(start):
    plant = Plant(lambda: 50.0 + 20.0 * beta.value, 30, 0.02)
    error = Measure(plant.measured, name="distortion", rises=False)
    beta = GECO(error, 60.0, start=start, num_steps=NUM_STEPS)
    errors, values = run(beta, plant)
    assert abs(errors[-1]) < 0.02
    assert values[-1] == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("target", [12.0, 20.0, 60.0])
def test_pi_control_reaches_its_total(target):
    plant = Plant(lambda: 10.0 / (0.1 + beta.value), 30, 0.02)
    beta = PIController(Measure(plant.measured, name="KL"), target, num_steps=6000)
    errors, _ = run(beta, plant, 8000)
    assert abs(errors[-1]) < math.log(1.1)


@pytest.mark.parametrize(("target", "end", "bound"), [(5.0, "lower", 0.0), (500.0, "upper", 2.0)])
def test_a_target_out_of_reach_ends_at_a_bound_and_says_so(target, end, bound):
    knob = Knob(1.0)
    plant = Plant(lambda: information(knob.inverse_lipschitz), 30)
    controller = InverseLipschitzController(
        knob, Measure(plant.measured, name="KL"), target, num_steps=NUM_STEPS, bounds=(0.0, 2.0)
    )
    with pytest.warns(UserWarning, match=f"froze off target: .* at its {end} bound"):
        run(controller, plant)
    assert knob.inverse_lipschitz == controller.value == pytest.approx(bound)
    assert not controller.on_target


def test_a_measure_above_its_target_is_as_good_with_at_least():
    knob = Knob(1.0)
    plant = Plant(lambda: information(knob.inverse_lipschitz), 30)
    controller = InverseLipschitzController(
        knob, Measure(plant.measured, name="KL"), 5.0, num_steps=NUM_STEPS, at_least=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(controller, plant)
    assert controller.on_target
    assert knob.inverse_lipschitz == 0


@pytest.mark.parametrize("rises", [True, False])
def test_at_least_rests_on_the_side_of_more_information(rises):
    knob = Knob(1.0)
    plant = Plant(lambda: information(knob.inverse_lipschitz) ** (1 if rises else -1), 30)
    target = 40.0 if rises else 1 / 40
    measure = Measure(plant.measured, name="m", rises=rises)
    controller = InverseLipschitzController(knob, measure, target, num_steps=NUM_STEPS, at_least=True)
    run(controller, plant)
    beyond = plant.measured() / target
    assert 1.0 <= (beyond if rises else 1 / beyond) <= 1.08


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_measure_of_nothing_is_far_too_small(value):
    knob = Knob(1.0)
    controller = InverseLipschitzController(knob, lambda _: value, 5.0, num_steps=400, every=1)
    with pytest.warns(UserWarning, match="upper bound"):
        deque(map(controller.step, [()] * 400))
    assert knob.inverse_lipschitz == pytest.approx(100.0)


def test_the_number_rests_within_its_tolerance_until_it_is_twice_as_far_off():
    knob = Knob(1.0)
    measured = [1.0]
    controller = InverseLipschitzController(
        knob, lambda: measured[0], 1.0, num_steps=1000, every=1, window=1, tolerance=0.1
    )

    def moves_at(value):
        measured[0] = value
        controller._law.error = math.log(1 / value)  # as if it had been there for long, without a trend
        controller._law.trend = 0.0
        before = knob.inverse_lipschitz
        controller.step()
        return knob.inverse_lipschitz != before

    assert not moves_at(1.0)
    assert not moves_at(1.15)
    assert moves_at(1.25)
    assert moves_at(1.15)
    assert not moves_at(1.05)
    assert not moves_at(1 / 1.15)
    assert not moves_at(1.0)
    controller.freeze()


def test_geco_by_hand():
    measured = iter([3.0, 7.0, 5.0])
    error = Measure(lambda: next(measured), name="distortion", rises=False)
    beta = GECO(error, 4.0, rate=0.1, every=2, window=1, start=2.0)
    log = math.log(2.0)
    for value in (3.0, 7.0, 5.0):
        beta.step()
        beta.step()
        log += 0.1 * 2 * (4.0 - value)
        assert beta.value == pytest.approx(math.exp(log))


def test_pi_control_by_hand_with_a_sum_that_waits_at_a_bound():
    beta = PIController(lambda: next(measured), 4.0, proportional=0.5, integral=0.1, every=1, bounds=(0.1, 1.0))
    measured = iter([6.0, 5.0, 100.0, 3.0])
    total = 0.0
    for value, grows in ((6.0, True), (5.0, True), (100.0, False), (3.0, True)):
        beta.step()
        error = 4.0 - value
        total -= 0.1 * error if grows else 0.0
        expected = 0.1 + 0.5 / (1 + math.exp(min(error, 50))) + total
        assert beta.value == pytest.approx(min(max(expected, 0.1), 1.0))


def test_the_running_mean_comes_before_its_summary():
    values = iter([[1.0, 3.0], [3.0, 1.0]])
    measure = Measure(lambda: next(values), name="smallest", summary=min)
    controller = InverseLipschitzController(Knob(1.0), measure, 2.0, num_steps=100, every=1, window=1000)
    controller.step()
    assert controller.estimate == 1.0
    controller.step()
    assert controller.estimate == pytest.approx(2.0, rel=1e-3)
    controller.freeze()


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, math.nan]])
def test_a_measure_that_is_not_finite_stops(value):
    controller = InverseLipschitzController(Knob(1.0), lambda: value, 2.0, num_steps=100, every=1)
    with pytest.raises(ValueError, match="the measure '<lambda>' to be finite, got"):
        controller.step()
    assert controller.value == 1.0
    with pytest.warns(UserWarning, match="off target"):
        controller.freeze()


def test_measures_of_several_numbers_need_a_summary():
    controller = InverseLipschitzController(Knob(1.0), lambda: [1.0, 2.0], 2.0, num_steps=100, every=1)
    with pytest.raises(ValueError, match="give it a summary"):
        controller.step()
    assert measures.Measure(lambda: 1.0, name="one").estimate(measures.Measure(lambda: 1.0, name="one")()) == 1.0
