"""Which latent sites are local to the data: the parts of a model over which a log likelihood is integrated."""

from typing import Any, NamedTuple, TypeAlias

from pyro.poutine import Trace

from pyro_ilvae._programs import is_data, is_deterministic, is_variable, sample_sites

Plate: TypeAlias = tuple[str, int | None]  # its name, and the step of a sequential plate


class Unit(NamedTuple):
    """Sites with one value for each element of the same plates, and in further plates inside of these.

    Given the sites outside, its elements are independent: each is one datum.
    """

    name: str  #: of the variable that holds its log likelihood
    plates: frozenset[Plate]
    sizes: dict[str, int]  #: of its plates that are dimensions, by name, from left to right
    data: list[str]  #: the names of its observed sites
    latents: list[str]  #: the names of its latent sites

    def holds(self, site: Any) -> bool:
        """Whether the site is in all plates of the unit."""
        return plates_of(site) >= self.plates


def plates_of(site: Any) -> frozenset[Plate]:
    """Return the plates that a site is in."""
    return frozenset((frame.name, None if frame.vectorized else frame.counter) for frame in site["cond_indep_stack"])


def local_units(trace: Trace, plate: str | None) -> tuple[list[Unit], list[Unit]]:
    """Return the units of a model's trace that have latent sites, and units of which some share sites.

    The plates of a unit are those of an observed site that latent sites are in too; or the named ``plate`` and those
    around it, then also without latent sites.
    """
    sites = [site for site in sample_sites(trace) if not is_deterministic(site)]
    places = {site["name"]: plates_of(site) for site in sites}
    latents = [site["name"] for site in sites if not site["is_observed"]]
    data = [site["name"] for site in sites if is_variable(site) and is_data(site)]
    if plate is None:
        found = {places[x] for x in data if places[x] and any(places[z] >= places[x] for z in latents)}
        found = {place for place in found if not any(other < place for other in found)}
    else:
        names = sorted({name for place in places.values() for name, _ in place})
        if plate not in names:
            raise ValueError(f"Expected plate to be one of {names}, got {plate!r}")
        if not any((plate, step) in places[x] for x in data for _, step in places[x]):
            raise ValueError(f"Expected plate to hold observed sites, got {plate!r}")
        steps = {step for place in places.values() for step in place if step[0] == plate}
        found = {frozenset.intersection(*(place for place in places.values() if step in place)) for step in steps}
    units = [_unit(trace, place, places, data, latents) for place in sorted(found, key=sorted_names)]
    shared = [
        unit
        for unit in units
        for other in units
        if unit is not other and _members(unit, places) & _members(other, places)
    ]
    return [unit for unit in units if unit not in shared], shared


def sorted_names(place: frozenset[Plate]) -> list[tuple[str, int]]:
    """Return the plates in an order that does not depend on the run."""
    return sorted((name, -1 if step is None else step) for name, step in place)


def _members(unit: Unit, places: dict[str, frozenset[Plate]]) -> set[str]:
    return {name for name, place in places.items() if place >= unit.plates}


def _unit(
    trace: Trace, place: frozenset[Plate], places: dict[str, frozenset[Plate]], data: list[str], latents: list[str]
) -> Unit:
    frames: dict[str, Any] = {
        frame.name: frame
        for name, own in places.items()
        if own >= place
        for frame in trace.nodes[name]["cond_indep_stack"]
        if (frame.name, None) in place
    }
    sizes = {frame.name: frame.size for frame in sorted(frames.values(), key=lambda frame: frame.dim)}
    observed = [name for name in data if places[name] >= place]
    if len(observed) == 1 and places[observed[0]] == place:
        name = observed[0]
    else:
        steps = [str(step) for _, step in sorted_names(place) if step >= 0]
        name = "_".join(["joint", *(sizes or [plate for plate, _ in sorted_names(place)]), *steps])
    return Unit(name, place, sizes, observed, [name for name in latents if places[name] >= place])
