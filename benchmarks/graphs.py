"""A step as one graph, compiled and not, against a loop written by hand and against ``SVI``; and what L costs in it."""

from collections.abc import Callable

import torch
from decoders import BATCH
from pyro.infer import SVI, TraceMeanField_ELBO
from timing import Line, Step, at_most, compare, on_gpu, settings
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
WIDTHS = {2: 32, 784: 512, 12_288: 2048}


def build(latent_dim: int, features: int, kind: str) -> VAE:
    width = WIDTHS[features]
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
    for _ in range(5):  # SVI, recorded and compared steps, and a capture
        svi.step(x)
    if on_gpu() and kind is not SVI and svi.runs != "CUDA graph":
        raise RuntimeError(f"Expected a CUDA graph, got {svi!r}")
    return lambda: svi.step(x)


def graph(vae: VAE, x: torch.Tensor) -> Step:
    return by_svi(lambda *args: GraphSVI(*args, compile=False), vae, x)


def compiled(vae: VAE, x: torch.Tensor) -> Step:
    return by_svi(lambda *args: GraphSVI(*args, compile=not settings["quick"]), vae, x)


def against_a_loop(
    row: str, latent_dim: int, features: int, kind: str, targets: tuple[float, float], batch: int = BATCH
) -> list[Line]:
    """``GraphSVI`` against the loop by hand and against ``SVI``, each with one fused Adam."""
    x = torch.randn(batch, features)
    name = f"CUDA graph, {kind}" if on_gpu() else f"compiled graph, {kind}"
    hand, svi = "by hand", f"SVI, {kind}"
    steps = {
        hand: by_hand(build(latent_dim, features, kind), x, fused=True),
        svi: by_svi(SVI, build(latent_dim, features, kind), x),
        name: compiled(build(latent_dim, features, kind), x),
    }
    if not on_gpu():
        steps[f"graph, {kind}"] = graph(build(latent_dim, features, kind), x)
    timings = compare(steps, hand)
    lines = [at_most(row, other, hand, timings) for other in steps if other.startswith("graph")]
    lines.append(at_most(row, name, hand, timings, targets[0]))
    return [*lines, at_most(row, name, svi, compare({svi: steps[svi], name: steps[name]}, svi), targets[1])]


def guarantee(row: str, latent_dim: int, features: int) -> list[Line]:
    """What a decoder with a constant costs within the compiled graph, or the CUDA graph."""
    x = torch.randn(BATCH, features)
    kinds = {"plain": None, "projected": 1.25 if on_gpu() else 1.1, "composition": 1.5 if on_gpu() else 2.0}
    timings = compare({kind: compiled(build(latent_dim, features, kind), x) for kind in kinds}, "plain")
    return [at_most(row, kind, "plain", timings, target) for kind, target in kinds.items() if target is not None]


def small(row: str, kind: str) -> list[Line]:
    return against_a_loop(row, 2, 2, kind, (0.15, 0.15) if on_gpu() else (0.5, 0.8))


def images(row: str, kind: str) -> list[Line]:
    return against_a_loop(row, 32, 784, kind, (0.15, 0.15) if on_gpu() else (0.85, 0.8))


def large(row: str) -> list[Line]:
    """Where the arithmetic takes the time: on a GPU only, since a step on a CPU takes seconds."""
    return against_a_loop(row, 128, 12_288, "plain", (0.95, 0.95), batch=1024) if on_gpu() else []


ROWS: dict[str, Callable[[str], list[Line]]] = {
    "graph-784-plain": lambda row: images(row, "plain"),
    "graph-784-projected": lambda row: images(row, "projected"),
    "graph-2-plain": lambda row: small(row, "plain"),
    "graph-2-composition": lambda row: small(row, "composition"),
    "graph-12288-plain": large,
    "graph-784-guarantee": lambda row: guarantee(row, 32, 784),
}
