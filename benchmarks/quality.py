"""Held-out log likelihood of cheaper decoders against the composition with all input skips.

    PYRO_ILVAE_DATA=DIR python benchmarks/quality.py [DECODER ...] [--seeds 3] [--epochs 30]

DIR holds images in the IDX format and file names of Fashion-MNIST, all of them or a subset. One line for each run, so
that a run that is cut short is not lost; a 16-dimensional latent variable, Normal noise with a learned scale.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_ilvae import (
    VAE,
    InverseLipschitzDecoder,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    datasets,
    diagnostics,
    likelihoods,
    mlp,
    principal_frame,
)

LATENT = 16
BATCH = 128


def composition(frame: Tensor, **arguments: Any) -> nn.Module:
    return InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=len(frame), inverse_lipschitz=(0.5, 0.5), frame=frame, **arguments
    )


SMALL: dict[str, Any] = {"inner_map_features": (64, 64)}

# The first decoder is the reference for the others.
DECODERS: dict[str, Callable[[Tensor], nn.Module]] = {
    "composition": composition,
    "small-inner": lambda q: composition(q, **SMALL),
    "no-skips": lambda q: composition(q, **SMALL, input_skips=False),
    "one-layer-1024": lambda q: composition(q, **SMALL, map_features=(1024,), input_skips=False),
    "light": lambda q: composition(q, **SMALL, map_features=(512, 256), input_skips=False),
    "skips-512-128": lambda q: composition(q, **SMALL, map_features=(512, 128)),
    "skips-384-128": lambda q: composition(q, **SMALL, map_features=(384, 128)),
    "skips-256-256": lambda q: composition(q, **SMALL, map_features=(256, 256)),
    "skips-448-64": lambda q: composition(q, **SMALL, map_features=(448, 64)),
    "projected": lambda q: ProjectedDecoder(
        mlp(LATENT, (512, 512), len(q)), latent_dim=LATENT, event_shape=len(q), inverse_lipschitz=1.0, frame=q
    ),
    "plain": lambda q: MLPDecoder(latent_dim=LATENT, event_shape=len(q)),
}


def run(name: str, seed: int, epochs: int, train: Tensor, test: Tensor) -> str:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = VAE(
        decoder=DECODERS[name](principal_frame(train, LATENT)),
        encoder=MLPEncoder(event_shape=train.shape[1], latent_dim=LATENT),
        likelihood=likelihoods.Normal(0.3, estimate="learned"),
        data_size=len(train),
    )
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    start = time.process_time()
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            svi.step(batch)
    seconds = time.process_time() - start
    with torch.no_grad():
        evidence = diagnostics.evidence(vae.model, vae.guide, test, batch_size=250)
        divergences = diagnostics.kl_per_dimension(vae.model, vae.guide, test).values.mean(0)
    bounds = f"log likelihood {evidence.log_likelihood.mean():7.2f}  ELBO {evidence.elbo.mean():7.2f}"
    return (
        f"{name:22s} seed {seed}  {bounds}"
        f"  smallest KL {divergences.min():5.2f}  noise {vae.likelihood.scale.item():.4f}  {seconds:5.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoders", nargs="*", metavar="DECODER", help=f"of {', '.join(DECODERS)}; all if none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    unknown = set(arguments.decoders) - set(DECODERS)
    if unknown or "PYRO_ILVAE_DATA" not in os.environ:
        parser.error(f"Expected decoders of {list(DECODERS)} and PYRO_ILVAE_DATA to be set, got {sorted(unknown)}")
    data = datasets.fashion_mnist()
    train, test = data.train.flatten(1), data.test.flatten(1)
    print(f"{len(train)} training and {len(test)} test images, {arguments.epochs} epochs", flush=True)
    for seed in range(arguments.seeds):
        for name in arguments.decoders or DECODERS:
            print(run(name, seed, arguments.epochs, train, test), flush=True)


if __name__ == "__main__":
    main()
