"""Row 5: a step of ``SVI`` on the VAE against the same mathematics in a loop written by hand."""

import math
from collections.abc import Callable

import pyro
import torch
from decoders import BATCH, light
from pyro.infer import SVI, TraceMeanField_ELBO
from timing import Line, Step, at_most, compare
from torch import nn

from pyro_ilvae import VAE, AnnealedELBO, MLPEncoder, ProjectedDecoder, likelihoods, mlp

DATA_SIZE = 10_000


def build(latent_dim: int, features: int, kind: str) -> VAE:
    width = 512 if features > 100 else 32
    decoder: nn.Module
    if kind == "light composition":
        decoder = light(latent_dim, features, width)
    else:
        decoder = ProjectedDecoder(mlp(latent_dim, (width, width), features), latent_dim, features)
    encoder = MLPEncoder(features, latent_dim, (width, width))
    return VAE(decoder, encoder, likelihoods.Normal(0.3, estimate="learned"), data_size=DATA_SIZE)


def by_hand(vae: VAE, x: torch.Tensor, fused: bool | None = None) -> Step:
    """Encode, sample, decode, ELBO with analytic KL, backward, Adam; the networks are those of the VAE."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-4, fused=fused)
    scale_up = DATA_SIZE / len(x)

    def step() -> float:
        loc, scale = vae.encoder(x)
        eta = vae.decoder(loc + scale * torch.randn_like(loc))
        log_noise = vae.likelihood.log_scale
        error = 0.5 * ((x - eta) / log_noise.exp()).square() + log_noise + 0.5 * math.log(2 * math.pi)
        kl = 0.5 * (loc.square() + scale.square() - 1) - scale.log()
        loss = scale_up * (error.sum() + kl.sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_svi(vae: VAE, x: torch.Tensor, annealed: bool, fused: bool | None = None) -> Step:
    elbo = AnnealedELBO(TraceMeanField_ELBO(), beta=0.5) if annealed else TraceMeanField_ELBO()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-4, "fused": fused}), elbo)
    return in_own_store(lambda: svi.step(x))


def in_own_store(step: Step) -> Step:
    """The step with a parameter store of its own, so that two models do not share their names."""
    store = pyro.get_param_store()
    with store.scope() as state:
        step()

    def scoped() -> None:
        with store.scope(state):
            step()

    return scoped


def svi(row: str, latent_dim: int, features: int, kind: str, target: float | None) -> list[Line]:
    x = torch.randn(BATCH, features)
    steps = {
        "by hand": by_hand(build(latent_dim, features, kind), x),
        f"SVI, {kind}": by_svi(build(latent_dim, features, kind), x, annealed=False),
        f"SVI annealed, {kind}": by_svi(build(latent_dim, features, kind), x, annealed=True),
        f"SVI with fused Adam, {kind}": by_svi(build(latent_dim, features, kind), x, annealed=False, fused=True),
    }
    timings = compare(steps, "by hand")
    return [at_most(row, name, "by hand", timings, target) for name in list(steps)[1:]]


ROWS: dict[str, Callable[[str], list[Line]]] = {
    "svi-784": lambda row: svi(row, 32, 784, "light composition", 1.10),
    "svi-784-projected": lambda row: svi(row, 32, 784, "projected", 1.10),
    "svi-2": lambda row: svi(row, 2, 2, "light composition", None),
    "svi-2-projected": lambda row: svi(row, 2, 2, "projected", None),
}
