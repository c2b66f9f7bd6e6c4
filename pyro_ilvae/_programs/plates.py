"""The sizes of plates that are written without one, as ``pyro.plate("data")``, from the sites in them."""

from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.messenger import Messenger

from pyro_ilvae._programs.sites import drawn, is_data, is_deterministic, sample_sites, site_shape

_WITHOUT_SIZE = -1


class SizePlates(Messenger):
    """Gives plates without a size the size of their sites, so that a run is as with the size written out.

    A site that is in such a plate and has one value for all of it is taken out of the plate: as written, all draws of
    the plate share the value. A latent site that the guide does not draw has a value for each member of the plate, as
    it has under Pyro's enumeration.

    Attributes:
        sizes: the sizes of the plates by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}
        self._outside: set[tuple[str, str]] = set()  # a site, and a plate without a size that it is taken out of

    def learn(self, guide_trace: Trace, model_trace: Trace, given: set[str]) -> bool:
        """Find the sizes in traces of one draw, and return whether there are plates without a size.

        ``given`` names the latent sites whose values are known otherwise.
        """
        own = [(site, frame, _size(site, frame)) for site, frame in _without_size(guide_trace)]
        model = [(site, frame, _size(site, frame)) for site, frame in _without_size(model_trace)]
        first: dict[str, str] = {}
        for site, frame, size in own + model:
            before = self.sizes.setdefault(frame.name, size)
            if size > 1 and before > 1 and size != before:
                raise ValueError(
                    f"Expected the sites in plate '{frame.name}' to agree on its size, got {before} at site "
                    f"'{first[frame.name]}' and {size} at site '{site['name']}'"
                )
            if size > 1 or before == 1:
                self.sizes[frame.name] = size
                first[frame.name] = site["name"]
        summed_out = drawn(model_trace).keys() - drawn(guide_trace).keys() - given
        for parts in (own, model):
            for site, frame, size in parts:
                if size == 1 < self.sizes[frame.name] and site["name"] not in summed_out:
                    self._outside.add((site["name"], frame.name))
        for site, frame, size in model:
            if size > 1 and ((site["name"], frame.name) in self._outside or _is_one_datum(site, frame)):
                raise ValueError(
                    f"Expected {size} values of site '{site['name']}' in plate '{frame.name}', as other sites there "
                    "have, got one (a guide that holds values for each datum takes the data that it was learned on, "
                    "all together: batch_size=None)"
                )
        return bool(own or model)

    def _pyro_sample(self, msg: Any) -> None:
        frames = msg["cond_indep_stack"]
        if not self.sizes or all(frame.size != _WITHOUT_SIZE for frame in frames):
            return
        msg["cond_indep_stack"] = tuple(
            self._sized(frame) for frame in frames if (msg["name"], frame.name) not in self._outside
        )
        # Pyro expands only what is still to be drawn. Densities of given values have to be expanded as well.
        done, msg["done"] = msg["done"], False
        BroadcastMessenger._pyro_sample(msg)
        msg["done"] = done

    def _sized(self, frame: Any) -> Any:
        if frame.size != _WITHOUT_SIZE or frame.name not in self.sizes:
            return frame
        size = self.sizes[frame.name]
        return frame._replace(size=size, full_size=size)


def _without_size(trace: Trace) -> list[tuple[Any, Any]]:
    """The sites in plates without a size, each with the frame of such a plate."""
    return [
        (site, frame)
        for site in sample_sites(trace)
        if not is_deterministic(site)  # which has a batch dimension for each of its plates
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.size == _WITHOUT_SIZE
    ]


def _size(site: Any, frame: Any) -> int:
    batch = site_shape(site).batch
    return batch[frame.dim] if len(batch) >= -frame.dim else 1


def _is_one_datum(site: Any, frame: Any) -> bool:
    """Whether a single datum is observed, which would be compared with the distributions of several."""
    value = torch.as_tensor(site["value"])
    batch = value.shape[: value.dim() - site["fn"].event_dim]
    return is_data(site) and len(batch) >= -frame.dim and batch[frame.dim] == 1
