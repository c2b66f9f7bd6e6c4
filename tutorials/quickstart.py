# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Posterior collapse as a dial
#
# A variational autoencoder may ignore part of its latent variable: the posterior of these dimensions is the prior, and
# they carry no information. This tutorial fits one model to one data set with one budget and changes only the decoder:
# plain networks, LIDVAE (constant L = 0), and decoders that guarantee a number of nats to each dimension.
#
# The data are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which need no download.

# %%
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from joblib import Parallel, delayed
from pyro.infer import SVI, TraceMeanField_ELBO
from tqdm import tqdm

import pyro_ilvae as ilvae

SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))  # runs every line in seconds, for tests: its numbers mean nothing
SEEDS, EPOCHS, NUM_SAMPLES = ([0], 2, 5) if SMOKE else ([0, 1, 2], 80, 200)
OUTPUT = Path("tutorials/output/smoke" if SMOKE else "tutorials/output")
OUTPUT.mkdir(parents=True, exist_ok=True)

digits = ilvae.datasets.digits()
train, test = digits.train, digits.test

# %% [markdown]
# ## The decoders
#
# `InverseLipschitzDecoder` is the decoder of Kinoshita et al. (2023). `ProjectedDecoder` gives its guarantee to any
# network, here to the plain decoder's own. With Normal noise of scale sigma, L = sigma sqrt(exp(2 k) - 1) guarantees k
# nats to each dimension: `Nats(k, likelihood)` keeps L there while sigma is learned. `vae.initialize(train)` starts a
# decoder where the data are. The plain decoder with a linear path shares the projected decoder's start and not its
# guarantee, so it is the baseline that shows what the guarantee costs.

# %%
SIZES = {"latent_dim": 16, "event_shape": (8, 8)}


def plain(linear_path):
    return ilvae.MLPDecoder(**SIZES, hidden_features=(128, 128), linear_path=linear_path)


def composition(constant):
    return ilvae.InverseLipschitzDecoder(**SIZES, inverse_lipschitz=constant, map_features=(128, 128))


def projected(constant):
    return ilvae.ProjectedDecoder(ilvae.mlp(16, (128, 128), 64), **SIZES, inverse_lipschitz=constant)


DECODERS = {
    "VAE (plain)": lambda noise: plain(linear_path=False),
    "VAE, linear path": lambda noise: plain(linear_path=True),
    "LIDVAE (L = 0)": lambda noise: composition(0.0),
    "IL-LIDVAE, 0.25 nats": lambda noise: composition(ilvae.Nats(0.25, noise)),
    "projected, 0.25 nats": lambda noise: projected(ilvae.Nats(0.25, noise)),
    "projected, 0.5 nats": lambda noise: projected(ilvae.Nats(0.5, noise)),
    "projected, 1 nat": lambda noise: projected(ilvae.Nats(1.0, noise)),
}

# %% [markdown]
# ## The fit
#
# This is ordinary Pyro: `SVI`, an optimizer, and an ELBO, in which the weight of the KL rises from 0 to 1 during the
# first quarter of the training. The last lines measure the fit on held-out images.


# %%
def fit(name, seed):
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    likelihood = ilvae.likelihoods.Normal(0.3, estimate="learned")
    decoder, encoder = DECODERS[name](likelihood), ilvae.MLPEncoder(**SIZES, hidden_features=(128, 128))
    vae = ilvae.VAE(decoder, encoder, likelihood, data_size=len(train))
    vae.initialize(train)
    num_steps = EPOCHS * -(-len(train) // 128)
    beta = ilvae.schedules.linear(0.0, 1.0, num_steps=num_steps // 4, planned_steps=num_steps)
    optimizer = pyro.optim.ClippedAdam({"lr": 2e-3, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(vae.model, vae.guide, optimizer, ilvae.AnnealedELBO(TraceMeanField_ELBO(), beta=beta))
    began = time.perf_counter()
    for _ in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(128):
            svi.step(batch)
            beta.step()
    seconds = time.perf_counter() - began
    measures = ("kl", "active_units", "evidence", "guaranteed_information")
    return seconds, ilvae.diagnostics.collapse_summary(
        vae.model, vae.guide, test, measures=measures, num_samples=NUM_SAMPLES, batch_size=100
    )


jobs = [(name, seed) for name in DECODERS for seed in SEEDS]
runs = Parallel(n_jobs=1 if SMOKE else -1, return_as="generator")(delayed(fit)(*job) for job in jobs)
fits = dict(zip(jobs, tqdm(runs, total=len(jobs), desc="fits", mininterval=1.0), strict=True))

# %% [markdown]
# ## The table
#
# In nats: ELBO and importance-weighted log likelihood of held-out images (higher is better), the smallest KL of a
# dimension and the KL of all 16. The last columns say how many nats about z an image of the model's own holds at least,
# by L and the noise alone and by the Jacobian of the fitted decoder. The fits run on all cores at once.

# %%
print(f"{'model':<22}seed    ELBO  IW log-lik.  KL min  KL sum  KL < 0.1  seconds  guaranteed  by Jacobian")
for (name, seed), (seconds, s) in fits.items():
    line = (
        f"{name:<22}{seed:>4}{float(s.elbo):>8.1f}{float(s.log_likelihood):>13.1f}{float(s.kl.min()):>8.3f}"
        f"{float(s.kl.sum()):>8.1f}{int((s.kl < 0.1).sum()):>10}{seconds:>9.1f}"
    )
    if not name.startswith("VAE"):
        line += f"{s.guaranteed_floor.item():>12.1f}{s.guaranteed_nats.item():>13.1f}"
    print(line)

# %% [markdown]
# ## The dial
#
# Left: the KL of every dimension, sorted, on average over the seeds. The plain decoders let the last dimensions fall to
# the prior. With nats the curve has a floor, which rises with them. Right: each point is one fit.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4), layout="constrained")
kl = {name: [np.sort(fits[name, seed][1].kl) for seed in SEEDS] for name in DECODERS}
ilvae.plots.plot_kl_per_dimension(kl, ax=left)
left.set(yscale="log", title="What the guarantee does")
for line in left.lines:
    summaries = [fits[line.get_label(), seed][1] for seed in SEEDS]
    floors, likelihood = zip(*((float(s.kl.min()), float(s.log_likelihood)) for s in summaries), strict=True)
    right.plot(floors, likelihood, line.get_marker(), color=line.get_color())
right.set(xlabel="smallest KL of a dimension (nats)", xscale="log", title="What it gains and costs")
right.set_ylabel("held-out log likelihood (nats per image)")
figure.savefig(OUTPUT / "dial.png", dpi=150)
print(f"The picture is {OUTPUT.resolve() / 'dial.png'}")
