"""A step as one graph, compiled and not, against a loop written by hand and against ``SVI``; and what L costs in it."""

from collections.abc import Callable

import torch
from decoders import BATCH
from pyro.infer import SVI, TraceMeanField_ELBO
from timing import Line, Step, at_most, compare, settings
from torch import nn
from training import DATA_SIZE, by_hand, under_a_name

from pyro_ilvae import (
    VAE,
    GraphSVI,
    InverseLipschitzDecoder,
    JointOptim,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    likelihoods,
    mlp,
)

ADAM = {"lr": 1e-4, "fused": True}


def build(latent_dim: int, features: int, kind: str) -> VAE:
    width = 512 if features > 100 else 32
    sizes = {"latent_dim": latent_dim, "event_shape": features}
    decoder: nn.Module
    if kind == "plain":
        decoder = MLPDecoder(**sizes, hidden_features=(width, width))
    elif kind == "projected":
        decoder = ProjectedDecoder(mlp(latent_dim, (width, width), features), **sizes)
    else:
        decoder = InverseLipschitzDecoder(**sizes, map_features=(width, width))
    encoder = MLPEncoder(**sizes, hidden_features=(width, width))
    return under_a_name(VAE(decoder, encoder, likelihoods.Normal(0.3, estimate="learned"), data_size=DATA_SIZE))


def by_svi(kind: Callable[..., SVI], vae: VAE, x: torch.Tensor) -> Step:
    svi = kind(vae.model, vae.guide, JointOptim(torch.optim.Adam, ADAM), TraceMeanField_ELBO())
    return lambda: svi.step(x)


def graph(vae: VAE, x: torch.Tensor) -> Step:
    return by_svi(lambda *args: GraphSVI(*args, compile=False), vae, x)


def compiled(vae: VAE, x: torch.Tensor) -> Step:
    return by_svi(lambda *args: GraphSVI(*args, compile=not settings["quick"]), vae, x)


def against_a_loop(row: str, latent_dim: int, features: int, kind: str, targets: tuple[float, float]) -> list[Line]:
    """``GraphSVI`` against the loop by hand and against ``SVI``, each with one fused Adam."""
    x = torch.randn(BATCH, features)
    name, svi, hand = f"compiled graph, {kind}", f"SVI, {kind}", "by hand"
    steps = {
        hand: by_hand(build(latent_dim, features, kind), x, fused=True),
        svi: by_svi(SVI, build(latent_dim, features, kind), x),
        f"graph, {kind}": graph(build(latent_dim, features, kind), x),
        name: compiled(build(latent_dim, features, kind), x),
    }
    timings = compare(steps, hand)
    lines = [at_most(row, f"graph, {kind}", hand, timings), at_most(row, name, hand, timings, targets[0])]
    return [*lines, at_most(row, name, svi, compare({svi: steps[svi], name: steps[name]}, svi), targets[1])]


def guarantee(row: str, latent_dim: int, features: int) -> list[Line]:
    """What a decoder with a constant costs within the compiled graph."""
    x = torch.randn(BATCH, features)
    kinds = {"plain": None, "projected": 1.1, "composition": 2.0}
    timings = compare({kind: compiled(build(latent_dim, features, kind), x) for kind in kinds}, "plain")
    return [at_most(row, kind, "plain", timings, target) for kind, target in kinds.items() if target is not None]


ROWS: dict[str, Callable[[str], list[Line]]] = {
    "graph-784-plain": lambda row: against_a_loop(row, 32, 784, "plain", (0.85, 0.8)),
    "graph-784-projected": lambda row: against_a_loop(row, 32, 784, "projected", (0.85, 0.8)),
    "graph-2-plain": lambda row: against_a_loop(row, 2, 2, "plain", (0.5, 0.8)),
    "graph-2-composition": lambda row: against_a_loop(row, 2, 2, "composition", (0.5, 0.8)),
    "graph-784-guarantee": lambda row: guarantee(row, 32, 784),
}
