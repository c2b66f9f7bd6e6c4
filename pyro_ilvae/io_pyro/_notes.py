"""What is said beside the log likelihoods and log densities of a conversion: in attributes and in warnings."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pyro.poutine import Trace

from pyro_ilvae._programs import drawn
from pyro_ilvae.io_pyro._integrated import IntegratedLikelihood
from pyro_ilvae.io_pyro._log_densities import LogDensities
from pyro_ilvae.io_pyro._units import plates_of


class Notes(NamedTuple):
    """Attributes of a group, and warnings for the user."""

    attrs: dict[str, str]
    warnings: list[str]


def drawn_for_several(trace: Trace, integrated: IntegratedLikelihood, name: str) -> tuple[list[str], list[str]]:
    """Return latent sites that are not integrated and that elements of an observed site share, and their plates."""
    nodes: Any = trace.nodes
    own, places = plates_of(nodes[name]), {latent: plates_of(nodes[latent]) for latent in drawn(trace)}
    beside = [latent for latent, place in places.items() if place & own and not integrated.local(nodes[latent])]
    return beside, sorted({plate for latent in beside for plate, _ in places[latent] & own})


def of_log_likelihood(
    trace: Trace, data: Sequence[str], integrated: IntegratedLikelihood, conditional: Sequence[str], *, by_guide: bool
) -> Notes:
    """Say what each variable of the group ``log_likelihood`` is a density of, given what."""
    nodes: Any = trace.nodes
    parts, warnings = [], []
    of_data = {unit.name: unit for unit in integrated.units}
    for unit in of_data.values():
        means = "by importance sampling from the guide" if unit in integrated.sampled else "exactly"
        over = f", integrated over {unit.latents} {means}" if unit.latents else ""
        parts.append(f"{unit.name}: log p of {unit.data}{over}")
    places = {name: plates_of(nodes[name]) for name in drawn(trace)}
    for name in conditional:
        beside, plates = drawn_for_several(trace, integrated, name)
        parts.append(f"{name}: log p of {[name]}, conditional on the draws of {beside or 'the latent sites'}")
        if beside and by_guide:
            warnings.append(
                f"The log likelihood of {name!r} is conditional on the draws of {beside}, which several of its "
                f"elements share: leave-one-out estimates leave out single elements. Name the plate of what is to be "
                f"left out, one of {plates}, with plate=... to integrate over them"
            )
    left_out = [name for name in data if name in integrated.of_left_out]
    for variable, reason in integrated.left_out.items():
        if by_guide:
            warnings.append(
                f"The log likelihood of {variable!r} is left out: it cannot be integrated over the latent sites of "
                f"each datum, because {reason}. With log_likelihood='conditional' it is given the draws of these sites"
            )
    if left_out and not by_guide:
        beside = [name for name, place in places.items() if any(place >= plates_of(nodes[x]) for x in left_out)]
        warnings.append(
            f"The log likelihood of {left_out} is conditional on the draws of {beside}, of which each datum has its "
            "own: leave-one-out estimates need the integral over them, and are unreliable. "
            "Pass log_likelihood='conditional' if that is what you want"
        )
    return Notes({"log_likelihood_note": "; ".join(parts)}, warnings)


def of_conditional(trace: Trace, data: Sequence[str]) -> Notes:
    """Say that all variables of the group ``log_likelihood`` are given the draws of the latent sites."""
    text = f"log p of each of {[*data]}, conditional on the draws of {[*drawn(trace)]}"
    return Notes({"log_likelihood_note": text}, [])


def of_log_densities(densities: LogDensities) -> dict[str, str]:
    """Say which densities are in ``sample_stats``."""
    text = (
        "lp is log p(x, z) of a draw z with enumerated sites summed out, and lp_approx its log density log q(z) under "
        "the guide. lp_global and lp_approx_global are of the sites that data share, with the others integrated out."
    )
    left_out = [f" Without {name}: {reason}." for name, reason in densities.without.items()]
    return {"log_density_note": text + "".join(left_out)}
