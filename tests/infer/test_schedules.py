"""Schedules as pure functions of the step, their position, and the scheduler of the inverse Lipschitz constant."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae import (
    BrenierMap,
    InverseLipschitzDecoder,
    InverseLipschitzScheduler,
    MLPDecoder,
    Schedule,
    schedules,
)

TABLE = [
    (schedules.constant(0.3), [0.3, 0.3, 0.3]),
    (schedules.linear(0.0, 1.0, 4), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
    (schedules.linear(2.0, 0.5, 3), [2.0, 1.5, 1.0, 0.5, 0.5]),
    (schedules.cosine(0.0, 1.0, 4), [0.0, 0.1464466, 0.5, 0.8535534, 1.0, 1.0]),
    (schedules.exponential(0.01, 1.0, 4), [0.01, 0.0316228, 0.1, 0.3162278, 1.0, 1.0]),
    (schedules.cyclical(0.0, 1.0, 8, num_cycles=2), [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    (schedules.cyclical(0.0, 1.0, 4, num_cycles=1, ramp=1.0), [0.0, 0.25, 0.5, 0.75, 1.0]),
]
BUILDERS = [schedules.linear, schedules.cosine, schedules.exponential, schedules.cyclical]


@pytest.mark.parametrize(("schedule", "values"), TABLE)
def test_values(schedule, values):
    assert [schedule.at(step) for step in range(len(values))] == pytest.approx(values, abs=1e-6)
    walked = []
    for _ in values:
        walked.append(schedule.value)
        schedule.step()
    assert walked == pytest.approx(values, abs=1e-6)


@given(
    st.sampled_from(BUILDERS),
    st.floats(1e-3, 10),
    st.floats(1e-3, 10),
    st.integers(1, 1000),
    st.integers(0, 3000),
)
def test_stays_between_its_ends_and_ends_exactly(build, start, end, num_steps, step):
    schedule = build(start, end, num_steps)
    assert schedule.at(0) == pytest.approx(start)
    assert schedule.at(num_steps + step) == end
    low, high = min(start, end), max(start, end)
    assert low * (1 - 1e-9) <= schedule.at(step) <= high * (1 + 1e-9)


@pytest.mark.parametrize("build", BUILDERS)
def test_position_is_saved_and_restored(build):
    schedule = build(0.1, 1.0, 10)
    for _ in range(3):
        schedule.step()
    other = build(0.1, 1.0, 10)
    other.load_state_dict(schedule.state_dict())
    assert other.value == schedule.value == schedule.at(3)
    assert pickle.loads(pickle.dumps(schedule)).value == schedule.value


@pytest.mark.parametrize("build", BUILDERS)
def test_a_schedule_longer_than_the_training_warns(build):
    with pytest.warns(UserWarning, match="takes 100 steps and the training 50: it stops at"):
        build(0.1, 1.0, 100, planned_steps=50)
    build(0.1, 1.0, 50, planned_steps=50)


@pytest.mark.parametrize(
    "decoder", [BrenierMap(2), InverseLipschitzDecoder(latent_dim=2, event_shape=4, map_features=(4,))]
)
def test_scheduler_sets_the_constant(decoder):
    scheduler = InverseLipschitzScheduler(decoder, schedules.linear(4.0, 0.0, 4))
    seen = [decoder.inverse_lipschitz]
    for _ in range(5):
        scheduler.step()
        seen.append(decoder.inverse_lipschitz)
    assert seen == pytest.approx([4.0, 3.0, 2.0, 1.0, 0.0, 0.0])
    scheduler.load_state_dict({"num_steps_taken": 1})
    assert decoder.inverse_lipschitz == pytest.approx(3.0)
    assert scheduler.state_dict() == {"num_steps_taken": 1}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedules.linear(0.0, 1.0, 0), "num_steps to be an int >= 1"),
        (lambda: schedules.linear(float("nan"), 1.0, 3), "start to be a finite number, got nan"),
        (lambda: schedules.exponential(0.0, 1.0, 3), r"start to be a finite number > 0, got 0\.0"),
        (lambda: schedules.exponential(1.0, 0.0, 3), r"end to be a finite number > 0, got 0\.0"),
        (lambda: schedules.cyclical(0.0, 1.0, 3, num_cycles=0), "num_cycles"),
        (lambda: schedules.cyclical(0.0, 1.0, 3, ramp=1.5), "ramp .*1.5"),
        (lambda: schedules.cyclical(0.0, 1.0, 3, ramp=0.0), r"ramp to be a finite number > 0, got 0\.0"),
        (
            lambda: InverseLipschitzScheduler(MLPDecoder(latent_dim=2, event_shape=4), schedules.constant(1.0)),
            "inverse_lipschitz to set",
        ),
        (lambda: InverseLipschitzScheduler(BrenierMap(2), schedules.constant(-1.0)), "inverse_lipschitz"),
        (lambda: InverseLipschitzScheduler(BrenierMap(2), 0.5), "Expected schedule to be a Schedule, got 0.5"),
        (lambda: schedules.linear(0.0, 1.0, 3).at(-1), "step to be an int >= 0, got -1"),
        (lambda: schedules.linear(0.0, 1.0, -3), "num_steps to be an int >= 1, got -3"),
        (lambda: schedules.linear(0.0, 1.0, 3.0), "num_steps to be an int >= 1, got 3.0"),
        (lambda: schedules.cosine(0.0, 1.0, 3, planned_steps=0), "planned_steps to be an int >= 1"),
        (lambda: schedules.linear("0", 1.0, 3), "start to be a finite number, got '0'"),
        (lambda: schedules.linear(-1e308, 1e308, 3), "end - start to be a finite number, got inf"),
        (lambda: schedules.cyclical(0.0, 1.0, 3, ramp=float("nan")), "ramp .*nan"),
        (lambda: schedules.constant(float("nan")), "value to be a finite number, got nan"),
        (lambda: schedules.constant(float("inf")), "value to be a finite number, got inf"),
        (lambda: Schedule(lambda step: float("nan")), "the value of .* at step 0 to be a finite number, got nan"),
        (lambda: Schedule(lambda step: "a"), "the value of .* at step 0 to be a finite number, got 'a'"),
        (lambda: Schedule(lambda step: 1.0 / (1 - step) if step != 1 else 1e999).at(1), "at step 1 .*got inf"),
        (lambda: InverseLipschitzScheduler(BrenierMap(2), schedules.constant(1e308)), "from 0 to 1e.18, got 1e.308"),
        (lambda: InverseLipschitzScheduler(BrenierMap(2), schedules.linear(1.0, 1e308, 9)), "from 0 to 1e.18"),
        (lambda: InverseLipschitzScheduler(BrenierMap(2), schedules.linear(1.0, -1.0, 9)), "from 0 to 1e.18, got -1"),
        (lambda: InverseLipschitzScheduler(BrenierMap(2), Schedule(lambda step: -1.0)), "from 0 to 1e.18, got -1"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "state",
    [None, 3, "num_steps_taken", {}, {"num_steps_taken": -1}, {"num_steps_taken": 2.5}, {"num_steps_taken": "3"}],
)
def test_only_positions_are_loaded(state):
    for owner in (
        schedules.constant(1.0),
        InverseLipschitzScheduler(BrenierMap(2), schedules.linear(0.0, 1.0, 3)),
    ):
        with pytest.raises(ValueError, match="num_steps_taken"):
            owner.load_state_dict(state)


def test_only_functions_and_decoders_are_taken():
    with pytest.raises(TypeError, match="Expected function to be a function from a step to a number, got a float"):
        Schedule(0.5)
    with pytest.raises(TypeError, match="Expected function to be a function of a step, got one with missing"):
        Schedule(lambda step, end: 0.5)
    with pytest.raises(TypeError, match="Expected decoder to be a decoder, got the class BrenierMap"):
        InverseLipschitzScheduler(BrenierMap, schedules.constant(1.0))


def test_an_exponential_path_between_extreme_values_is_finite():
    assert schedules.exponential(1e-300, 1e300, 2).at(1) == pytest.approx(1.0)


def test_gradients_are_finite_at_the_largest_constant():
    brenier = BrenierMap(2)
    InverseLipschitzScheduler(brenier, schedules.constant(1e18))
    z = torch.ones(3, 2, requires_grad=True)
    (brenier(z) ** 2).sum().backward()
    assert z.grad.isfinite().all()
