"""Which plate of a model is over the data."""

from collections.abc import Sequence

from pyro.poutine import Trace

from pyro_ilvae._programs import Arguments, is_data, sample_sites


def plate_over_data(
    guide_trace: Trace, model_trace: Trace, arguments: Arguments, plate: str | None, *, whole: bool = True
) -> tuple[str, int] | None:
    """Return the name of the plate over the data and its size, which is the number of data; None without such a plate.

    It is the one that is named, or else the only one that the tensors fit; of several that fit the same tensor, it is
    the one that holds everything that is observed. If the tensors fit no plate that does, it is the only plate that
    does. A name decides where the data go in as a ``whole``, unless the plate is inside another that the tensors fit.
    """
    sites = [*sample_sites(guide_trace), *sample_sites(model_trace)]
    frames = {frame for site in sites for frame in site["cond_indep_stack"] if frame.vectorized}
    plates = {frame.name: frame.size for frame in frames}
    inside = {
        name: {site["name"] for site in sites if any(frame.name == name for frame in site["cond_indep_stack"])}
        for name in plates
    }
    observed = {site["name"] for site in sample_sites(model_trace) if is_data(site)}
    holding = {name for name in plates if observed and observed <= inside[name]}
    sizes = [arguments.size] if arguments.size is not None else arguments.sizes
    fit = {name for name, size in plates.items() if size in sizes}
    partial = [frame for frame in frames if frame.size not in sizes and frame.full_size in sizes]
    if plate is not None:
        if plate not in plates:
            raise ValueError(f"Expected plate to be one of {sorted(plates)}, got {plate!r}")
        others = {name for name in fit if not whole or inside[plate] < inside[name]}
        if plate not in fit and len(sizes) == 1 and (others or any(frame.name == plate for frame in partial)):
            raise ValueError(
                f"Expected plate '{plate}' to hold the data, got size {plates[plate]} for {_either(sizes)} data"
            )
        return plate, plates[plate]
    partial = [frame for frame in partial if not fit or frame.name in holding]
    if not fit & holding and partial:
        raise ValueError(
            f"Expected all data of the batch in the plate '{partial[0].name}', got {partial[0].size} of the "
            f"{partial[0].full_size} data: the argument batch_size makes batches, rather than the model"
        )
    several = len({plates[name] for name in fit}) > 1  # tensors, of which only a name can tell which holds the data
    found = sorted(fit if several else fit & holding or holding or fit)
    if len(found) == 1 and not inside[found[0]] - observed:
        # The latent sites may be along another dimension of the data, as in (words, documents).
        found += sorted(name for name in holding if inside[found[0]] < inside[name])
    if len(found) > 1:
        raise ValueError(
            f"Expected one plate over the {_either(sizes)} data, got {found}; name the plate over the data with "
            "plate=..."
        )
    return (found[0], plates[found[0]]) if found else None


def _either(sizes: Sequence[int]) -> str:
    return " or ".join(map(str, sizes)) or "observed"
