"""Row 6: ``pyro_ilvae.compiled`` (torch.compile) on decoders and encoder, against the same modules without it."""

import copy
import warnings
from collections.abc import Callable

import torch
from decoders import light, training_step
from timing import Line, at_most, compare, settings
from torch import nn

from pyro_ilvae import InverseLipschitzDecoder, MLPEncoder, ProjectedDecoder, compiled, mlp

MODULES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "composition": (lambda: InverseLipschitzDecoder(32, 784), 32, 784),
    "light composition": (lambda: light(32, 784), 32, 784),
    "projected": (lambda: ProjectedDecoder(mlp(32, (512, 512), 784), 32, 784), 32, 784),
    "encoder": (lambda: Sum(MLPEncoder(784, 32)), 784, 32),
}


class Sum(nn.Module):
    """The encoder's location plus its scale, which fits the training step of a decoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loc, scale = self.encoder(x)
        return loc + scale


def compile_rows(row: str) -> list[Line]:
    lines = []
    for name, (build, inputs, outputs) in MODULES.items():
        torch.compiler.reset()
        module = build()
        fast = copy.deepcopy(module)
        compiled(fast.encoder if isinstance(fast, Sum) else fast)
        x = torch.randn(16, inputs)
        with warnings.catch_warnings():
            # A compiler that fails would leave two equal things to compare.
            warnings.filterwarnings("error", message="torch.compile failed")
            torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-4)
        steps = {
            "without": training_step(module, inputs, outputs),
            f"compiled {name}": training_step(fast, inputs, outputs),
        }
        lines.append(at_most(row, list(steps)[1], "without", compare(steps, "without")))
        if settings["quick"]:
            break
    return lines


ROWS: dict[str, Callable[[str], list[Line]]] = {"compile": compile_rows}
