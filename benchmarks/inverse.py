"""The inverse of a Brenier map and its change of variables, 10,000 points at once."""

from collections.abc import Callable
from typing import Any

import torch
from timing import Line, compare, faster, milliseconds, peak_bytes, settings
from torch import Tensor
from torch.func import jacfwd, vmap

from pyro_ilvae import BrenierMap, BrenierTransform

FEATURES = 32


class CountingMap(BrenierMap):
    """Counts its Jacobians: each Newton step forms one."""

    count = 0

    def jacobian(self, z: Tensor) -> Tensor:
        self.count += 1
        return super().jacobian(z)


def build(inverse_lipschitz: float) -> CountingMap:
    brenier = CountingMap(FEATURES, inverse_lipschitz)
    with torch.no_grad():
        for parameter in brenier.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return brenier


def points() -> Tensor:
    return torch.randn(500 if settings["quick"] else 10_000, FEATURES)


@torch.no_grad()
def inverse(row: str) -> list[Line]:
    lines = []
    for constant in (1.0, 0.1):
        brenier = build(constant)
        z = points()
        y = brenier(z)
        error = (brenier.inverse(y) - z).norm(dim=-1).max().item()
        iterations = brenier.count
        memory = peak_bytes(lambda brenier=brenier, y=y: brenier.inverse(y))
        steps: dict[str, Any] = {
            "inverse": lambda brenier=brenier, y=y: brenier.inverse(y),
            "map": lambda brenier=brenier, z=z: brenier(z),
        }
        timings = compare(steps, "map")
        lines.append(
            Line(
                row,
                f"inverse of {len(y):,} points, L = {constant:g}: {milliseconds(timings['inverse'])}, "
                f"{iterations} Newton steps, {memory / 2**20:.0f} MiB, error {error:.0e}",
                f"map {milliseconds(timings['map'])}",
                f"{timings['inverse'].ratio:.0f} [{timings['inverse'].low:.0f}, {timings['inverse'].high:.0f}]",
            )
        )
    return lines


@torch.no_grad()
def log_determinant(row: str) -> list[Line]:
    brenier = build(1.0)
    transform = BrenierTransform(brenier)
    z = points()
    y = brenier(z)
    jacobian = vmap(jacfwd(brenier))

    def automatic() -> Tensor:
        return torch.linalg.slogdet(jacobian(z)).logabsdet

    def ours() -> Tensor:
        return transform.log_abs_det_jacobian(z, y)

    torch.testing.assert_close(ours(), automatic(), rtol=1e-3, atol=1e-3)
    lines = [
        faster(
            row,
            "log det",
            "forward-mode autograd",
            compare({"log det": ours, "forward-mode autograd": automatic}, "log det"),
        )
    ]
    ours_memory, automatic_memory = peak_bytes(ours), peak_bytes(automatic)
    lines.append(
        Line(
            row,
            f"log det {ours_memory / 2**20:.0f} MiB",
            f"forward-mode autograd {automatic_memory / 2**20:.0f} MiB",
            f"{automatic_memory / ours_memory:.1f} less",
        )
    )
    return lines


ROWS: dict[str, Callable[[str], list[Line]]] = {"inverse": inverse, "log-det": log_determinant}
