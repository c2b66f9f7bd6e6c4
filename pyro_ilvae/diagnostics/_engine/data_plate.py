"""Which plate of a model is over the data."""

from collections.abc import Sequence

from pyro.poutine import Trace

from pyro_ilvae._programs import Arguments, is_data, sample_sites


def plate_over_data(
    guide_trace: Trace, model_trace: Trace, arguments: Arguments, plate: str | None
) -> tuple[str, int] | None:
    """Return the name of the plate over the data and its size, which is the number of data; None without such a plate.

    It is the one that is named, or else the only one that the tensors fit. If they fit none, it is the only plate that
    holds everything that is observed.
    """
    observed = [site for site in sample_sites(model_trace) if is_data(site)]
    frames = {
        frame
        for site in [*sample_sites(guide_trace), *sample_sites(model_trace)]
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    }
    plates = {frame.name: frame.size for frame in frames}
    sizes = [arguments.size] if arguments.size is not None else arguments.sizes
    fit = sorted(name for name, size in plates.items() if size in sizes)
    partial = [frame for frame in frames if frame.size not in sizes and frame.full_size in sizes]
    if plate is not None:
        if plate not in plates:
            raise ValueError(f"Expected plate to be one of {sorted(plates)}, got {plate!r}")
        if plate not in fit and len(sizes) == 1 and (fit or partial):
            raise ValueError(
                f"Expected plate '{plate}' to hold the data, got size {plates[plate]} for {_either(sizes)} data"
            )
        return plate, plates[plate]
    if not fit and partial:
        raise ValueError(
            f"Expected all data of the batch in the plate '{partial[0].name}', got {partial[0].size} of the "
            f"{partial[0].full_size} data: the argument batch_size makes batches, rather than the model"
        )
    if not fit and observed:
        held = [{frame.name for frame in site["cond_indep_stack"] if frame.vectorized} for site in observed]
        fit = sorted(set.intersection(*held))
    if len(fit) > 1:
        raise ValueError(
            f"Expected one plate over the {_either(sizes)} data, got {fit}; name the plate over the data with plate=..."
        )
    return (fit[0], plates[fit[0]]) if fit else None


def _either(sizes: Sequence[int]) -> str:
    return " or ".join(map(str, sizes)) or "observed"
