"""Verdicts on latent units and on a model, in words, from nats."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

#: the mean KL of one unit, in nats, from which on numbers are out of all scale: single precision tells fewer than
#: exp(100) values apart
OFF_SCALE = 1000.0

_ALL_COLLAPSED = 1.0  # the nats of all units together from which on no model is collapsed


def of_units(kl: npt.ArrayLike, limits: Mapping[str, float]) -> Any:
    """The verdict on each unit from its mean KL in nats, as an array of words."""
    values = np.asarray(kl, dtype=float)
    # NaN falls through to the default.
    conditions = [
        values < limits["collapsed_below"],
        values < limits["active_from"],
        values < OFF_SCALE,
        values >= OFF_SCALE,
    ]
    return np.select(conditions, ["collapsed", "weak", "active", "off scale"], "unknown")


def near_a_limit(kl: npt.ArrayLike, kl_se: npt.ArrayLike, limits: Mapping[str, float]) -> npt.NDArray[np.bool_]:
    """Which units have a mean KL within two standard errors of a limit, so that another sample may change the word."""
    distance = np.min([np.abs(np.asarray(kl) - limits[name]) for name in ("collapsed_below", "active_from")], 0)
    near: npt.NDArray[np.bool_] = distance < 2 * np.asarray(kl_se)
    return near


def of_model(words: Sequence[str], total: float, limits: Mapping[str, float]) -> str:
    """The verdict on a model in a sentence, from the words for its units and their nats together."""
    size = len(words)
    count = {word: list(words).count(word) for word in ("collapsed", "weak", "active", "off scale", "unknown")}
    below, above = f"{limits['collapsed_below']:g}", f"{limits['active_from']:g}"
    if count["off scale"]:
        head = "off scale"
    elif count["unknown"] == size:
        return f"unknown: none of {size} units has a KL of its own"
    elif count["active"]:
        head = "partly collapsed" if count["collapsed"] else "active"
    else:
        # Many units that are collapsed one by one can hold information together.
        mean = total / (size - count["unknown"])
        head = "collapsed" if mean < limits["collapsed_below"] and total < _ALL_COLLAPSED else "weak"
    rest = [
        f"{count['weak']} weak ({below} to {above})",
        f"{count['active']} active",
        f"{count['off scale']} off scale",
    ]
    rest += [f"{count['unknown']} unknown"]
    told = [part for part in rest if not part.startswith("0 ")]
    units = f"{count['collapsed']} of {size} units hold less than {below} nats"
    sums = f"; {total:.3g} nats in all" if np.isfinite(total) else ""
    return f"{head}: {', '.join([units, *told])}{sums}"
