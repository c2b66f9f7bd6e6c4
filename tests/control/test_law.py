"""The law by which controllers of a constant and of beta move."""

import math

import pytest

from pyro_ilvae.control._law import LogLaw


def test_the_rate_falls_where_the_sign_changes_and_grows_otherwise():
    law = LogLaw(400, 0.02)
    law.change(1.0)
    before = law.rate
    law.change(1.0)
    assert law.rate == pytest.approx(1.03 * before)
    before = law.rate
    law.change(-1.0)
    assert law.rate == pytest.approx(0.7 * before)
    for _ in range(200):
        law.change(1.0)
        law.change(-1.0)
    assert law.rate == pytest.approx(law.largest_rate / 32)


def test_moves_grow_up_to_threefold_where_the_sign_stays():
    law = LogLaw(100, 0.02)
    moves = [law.change(1.0) / law.rate for _ in range(60)]
    assert moves[:8] == pytest.approx([1.0] * 8)
    assert moves[-1] == pytest.approx(3.0)
    assert moves == sorted(moves)


@pytest.mark.parametrize("num_moves", [1, 5, 100, 10_000])
def test_no_move_is_larger_than_the_limit(num_moves):
    law = LogLaw(num_moves, 0.02)
    moves = [abs(law.change(error)) for error in [50.0, -50.0, 50.0] * 20 + [50.0] * 200]
    assert max(moves) <= 0.3 + 1e-9


def test_positions_far_from_the_target_do_not_count_for_the_freeze():
    law = LogLaw(80, 0.02)
    for error, position in ((0.0, 1.0), (1.0, 5.0), (0.1, 2.0), (-0.1, 3.0)):
        law.change(error)
        law.remember(position)
    assert law.recent == [2.0, 3.0]
    for position in range(20):
        law.remember(float(position))
    assert law.recent == [float(position) for position in range(10, 20)]  # an eighth of all moves


def test_a_trend_is_followed_ahead():
    rising, resting = LogLaw(100, 0.02), LogLaw(100, 0.02)
    for error in (0.5, 0.4, 0.3):
        falling = rising.change(error)
        still = resting.change(0.3)
    assert 0 < falling < still
    assert math.isclose(resting.trend, 0.0)
