"""A step of ``SVI`` on the VAE against the same mathematics in a loop written by hand."""

import itertools
import math
from collections.abc import Callable

import pyro
import torch
from decoders import BATCH, light
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from timing import Line, Step, at_most, compare
from torch import nn

from pyro_ilvae import VAE, AnnealedELBO, JointOptim, MLPEncoder, ProjectedDecoder, likelihoods, mlp

DATA_SIZE = 10_000

models = PyroModule("models")
count = itertools.count()


def build(latent_dim: int, features: int, kind: str) -> VAE:
    width = 512 if features > 100 else 32
    decoder: nn.Module
    if kind == "light composition":
        decoder = light(latent_dim, features, width)
    else:
        decoder = ProjectedDecoder(
            mlp(latent_dim, (width, width), features), latent_dim=latent_dim, event_shape=features
        )
    encoder = MLPEncoder(event_shape=features, latent_dim=latent_dim, hidden_features=(width, width))
    return under_a_name(VAE(decoder, encoder, likelihoods.Normal(0.3, estimate="learned"), data_size=DATA_SIZE))


def under_a_name(vae: VAE) -> VAE:
    """The model as a part of a whole, under a number of its own, so that the param store keeps models apart."""
    setattr(models, f"vae_{next(count)}", vae)
    return vae


def by_hand(vae: VAE, x: torch.Tensor, fused: bool | None = None) -> Step:
    """Encode, sample, decode, ELBO with analytic KL, backward, Adam; with the networks of the VAE."""
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


def by_svi(vae: VAE, x: torch.Tensor, optimizer: PyroOptim, annealed: bool = False) -> Step:
    elbo = AnnealedELBO(TraceMeanField_ELBO(), beta=0.5) if annealed else TraceMeanField_ELBO()
    svi = SVI(vae.model, vae.guide, optimizer, elbo)
    return lambda: svi.step(x)


def svi(row: str, latent_dim: int, features: int, kind: str, target: float | None) -> list[Line]:
    x = torch.randn(BATCH, features)
    adam = {"lr": 1e-4}
    fused = adam | {"fused": True}
    # Alike in everything but the way to take the step: one Adam for all parameters is what a loop by hand has too.
    steps = {
        "by hand": by_hand(build(latent_dim, features, kind), x),
        f"SVI, {kind}": by_svi(build(latent_dim, features, kind), x, pyro.optim.Adam(adam)),
        f"SVI annealed, {kind}": by_svi(build(latent_dim, features, kind), x, pyro.optim.Adam(adam), annealed=True),
        f"SVI, JointOptim, {kind}": by_svi(build(latent_dim, features, kind), x, JointOptim(torch.optim.Adam, adam)),
    }
    fused_steps = {
        "by hand, fused": by_hand(build(latent_dim, features, kind), x, fused=True),
        f"SVI, JointOptim fused, {kind}": by_svi(
            build(latent_dim, features, kind), x, JointOptim(torch.optim.Adam, fused)
        ),
    }
    timings, fused_timings = compare(steps, "by hand"), compare(fused_steps, "by hand, fused")
    return [at_most(row, name, "by hand", timings, target) for name in list(steps)[1:]] + [
        at_most(row, name, "by hand, fused", fused_timings, target) for name in list(fused_steps)[1:]
    ]


ROWS: dict[str, Callable[[str], list[Line]]] = {
    "svi-784": lambda row: svi(row, 32, 784, "light composition", 1.10),
    "svi-784-projected": lambda row: svi(row, 32, 784, "projected", 1.10),
    "svi-2": lambda row: svi(row, 2, 2, "light composition", None),
    "svi-2-projected": lambda row: svi(row, 2, 2, "projected", None),
}
