"""A step of ``SVI`` on the sequential VAE, inverse Lipschitz decoders against the plain one."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule
from timing import Line, Step, at_most, compare, peak_bytes
from torch import nn

from pyro_ilvae import (
    InverseLipschitzDecoder,
    JointOptim,
    MLPDecoder,
    ProjectedDecoder,
    SequenceDecoder,
    SequenceEncoder,
    SequentialVAE,
)

LATENT_DIM, LENGTH, WIDTH = 16, 12, 256

models = PyroModule("sequences")
count = itertools.count()


def build(name: str, vocab_size: int) -> nn.Module:
    sizes: dict[str, Any] = {"latent_dim": LATENT_DIM, "event_shape": vocab_size, "context_dim": WIDTH}
    if name == "composition":
        return InverseLipschitzDecoder(**sizes, map_features=(256, 256), frame="centered")
    plain = MLPDecoder(**sizes, hidden_features=(WIDTH,))
    return plain if name == "plain" else ProjectedDecoder(plain, **sizes, frame="centered")


def step_of(name: str, x: torch.Tensor, vocab_size: int) -> Step:
    vae = SequentialVAE(
        SequenceDecoder("gru", build(name, vocab_size)),
        SequenceEncoder(vocab_size=vocab_size, latent_dim=LATENT_DIM),
        data_size=10_000,
    )
    # As a part of a whole, under a number of its own, so that the param store keeps the models apart.
    setattr(models, f"vae_{next(count)}", vae)
    svi = SVI(vae.model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 1e-4, "fused": True}), TraceMeanField_ELBO())
    return lambda: svi.step(x)


def sequential(row: str, vocab_size: int, batch_size: int, names: tuple[str, ...]) -> list[Line]:
    x = torch.randint(0, vocab_size, (batch_size, LENGTH))
    steps = {name: step_of(name, x, vocab_size) for name in names}
    timings = compare(steps, "plain")
    lines = [at_most(row, name, "plain", timings, 1.2 if name == "projected" else None) for name in names[1:]]
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    logits = 4 * batch_size * LENGTH * vocab_size
    ratio = peaks["projected"] / peaks["plain"]
    memory = [f"{name} {peaks[name] / 2**20:.0f} MiB, {peaks[name] / logits:.1f} x logits" for name in names[:2]]
    return [*lines, Line(row, memory[1], memory[0], f"{ratio:.2f}", "<= 1.2", ratio <= 1.2)]


ROWS: dict[str, Callable[[str], list[Line]]] = {
    "sequential-30": lambda row: sequential(row, 30, 128, ("plain", "projected", "composition")),
    "sequential-5000": lambda row: sequential(row, 5000, 64, ("plain", "projected", "composition")),
    "sequential-50000": lambda row: sequential(row, 50_000, 16, ("plain", "projected")),
}
