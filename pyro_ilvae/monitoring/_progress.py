"""A progress bar with the numbers that matter, and the same numbers in a line."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")


class Progress:
    """The bar that stands on the screen, if there is one."""

    def __init__(self) -> None:
        self._bar: Any = None

    def over(self, iterable: Iterable[_T], description: str, words: str) -> Iterator[_T]:
        """Go through an iterable, with a bar."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        with tqdm(iterable, desc=description) as bar:
            outer, self._bar = self._bar, bar
            self.show(words)
            try:
                yield from bar
            finally:
                self._bar = outer

    def show(self, words: str) -> None:
        """Put these words beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(words)


def in_words(record: Mapping[str, Any], sites: tuple[str, ...]) -> str:
    """The numbers of a record that matter, in one line."""
    prefixes = [f"{site}/" for site in sites] if len(sites) > 1 else [""]

    def of_sites(key: str) -> list[Any]:
        return [record[prefix + key] for prefix in prefixes if record.get(prefix + key) is not None]

    loss = record["loss_per_datum"] if record["loss_per_datum"] is not None else record["loss"]
    parts = [f"loss {loss:.4g}"] if loss is not None else []
    if record["non_finite_losses"]:
        parts.append(f"{record['non_finite_losses']} losses not finite")
    if record["elbo"] is not None and loss is None:
        parts.append(f"ELBO {record['elbo']:.4g}")
    if record["kl"] is not None:
        parts.append(f"KL {record['kl']:.3g}")
    counted = [prefix for prefix in prefixes if record[f"{prefix}active_units"] is not None]
    if counted:
        active = sum(record[f"{prefix}active_units"] for prefix in counted)
        parts.append(f"active units {active}/{sum(record[f'{prefix}num_units'] for prefix in counted)}")
    if constants := of_sites("inverse_lipschitz"):
        parts.append(f"L {', '.join(f'{constant:.3g}' for constant in constants)}")
    if floors := of_sites("guaranteed_floor"):
        parts.append(f"≥ {', '.join(f'{floor:.3g}' for floor in floors)} nats")
    betas = [record["beta"]] if record.get("beta") is not None else of_sites("beta")
    if betas:
        parts.append(f"β {', '.join(f'{beta:.3g}' for beta in betas)}")
    return " · ".join(parts)
