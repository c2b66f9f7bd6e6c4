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
# # Two layers of latent variables
#
# In a hierarchy z2 -> z1 -> x the upper layer collapses first: z1 alone can explain the images, and nothing asks it to
# be explained by z2 in turn. This tutorial fits two such models to scikit-learn's digits. They differ in the step from
# z2 to z1: a plain decoder, and a decoder that guarantees half a nat for each dimension of z2.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import Trace_ELBO
from tqdm import trange

import pyro_ilvae as ilvae

SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))  # runs every line in seconds, for tests: its numbers mean nothing
EPOCHS = 2 if SMOKE else 100
OUTPUT = Path("tutorials/output/smoke" if SMOKE else "tutorials/output")
OUTPUT.mkdir(parents=True, exist_ok=True)
K1, K2 = 16, 8
data = ilvae.datasets.digits()
train, test = data.train, data.test
SHAPE = tuple(train.shape[1:])

# %% [markdown]
# ## The model
#
# The parts between x and z1 are those of a `VAE`. Above it stands a `Layer`: a decoder from z2 to z1, Normal noise
# around its value, and an encoder from z1 to z2. A step with Normal noise is a channel like the one from z1 to an
# image, so `Nats(kappa, noise)` is a guarantee for it too. With kappa nats, noise of scale exp(-kappa) starts z1 near
# the unit scale that the decoder of images expects.
#
# `inference="bottom_up"` draws z1 given the image, and z2 given z1. Its objective is `Trace_ELBO`: divergences in
# closed form would be wrong for a guide that draws z1 before z2. The other guide, "top_down", is the ladder VAE.


# %%
def layer(kappa):
    noise = ilvae.likelihoods.Normal(0.6, estimate="learned")
    if kappa is None:
        decoder = ilvae.MLPDecoder(latent_dim=K2, event_shape=K1, hidden_features=(64,))
    else:
        decoder = ilvae.ProjectedDecoder(
            ilvae.mlp(K2, (64,), K1), latent_dim=K2, event_shape=K1, inverse_lipschitz=ilvae.Nats(kappa, noise)
        )
    return ilvae.Layer(decoder, ilvae.MLPEncoder(event_shape=K1, latent_dim=K2, hidden_features=(64,)), noise)


def model(kappa):
    pyro.set_rng_seed(0)
    pyro.clear_param_store()  # it holds the parameters of the other model under the same names
    likelihood = ilvae.likelihoods.Normal(0.3, estimate="learned")
    sizes = {"latent_dim": K1, "event_shape": SHAPE}
    images = ilvae.ProjectedDecoder(
        ilvae.mlp(K1, (128,), train[0].numel()), **sizes, inverse_lipschitz=ilvae.Nats(0.25, likelihood)
    )
    encoder = ilvae.MLPEncoder(**sizes, hidden_features=(128,))
    vae = ilvae.HierarchicalVAE(
        images, encoder, likelihood, [layer(kappa)], inference="bottom_up", data_size=len(train)
    )
    vae.initialize(train)
    return vae


# %% [markdown]
# ## Two fits
#
# Nothing is annealed here. Each site may have a weight of its own,
# `ilvae.AnnealedELBO(Trace_ELBO(), beta={"z1": 1.0, "z2": schedule})`.


# %%
def fit(vae, name):
    optimizer = ilvae.JointOptim(torch.optim.Adam, {"lr": 3e-3})
    svi = ilvae.GraphSVI(vae.model, vae.guide, optimizer, Trace_ELBO(), compile=False)
    for _ in trange(EPOCHS, desc=name, mininterval=1.0):
        for batch in train[torch.randperm(len(train))].split(128):
            svi.step(batch)
    return vae


fits = {name: fit(model(kappa), name) for name, kappa in (("plain", None), ("half a nat", 0.5))}

# %% [markdown]
# ## What is left of the upper layer
#
# The table has held-out nats: the KL of each site, what its dimensions are guaranteed, and the log likelihood. The
# guarantee of z2 is a floor under its information about z1 in the model. The KL of z2 is about that information on
# real images, where the guide draws z1. It is a part of the joint divergence, for which `collapse_summary` has no
# verdict. With `inference="top_down"` each site has a divergence and a verdict of its own.

# %%
for name, vae in fits.items():
    measures = ["kl", "active_units", "guaranteed_information", "evidence"]
    summary = ilvae.diagnostics.collapse_summary(
        vae.model, vae.guide, test, batch_size=100, num_samples=50, measures=measures, seed=0
    )
    kl = summary.kl.groupby("unit_site").sum().rename(unit_site="site")
    table = summary[["active_units", "guaranteed_floor"]].assign(kl=kl).to_dataframe().round(2)
    print(f"{name}: {summary.log_likelihood.item():.1f} nats per image\n{table}\n")

# %% [markdown]
# ## What each layer knows
#
# Reconstructions from z1 use all that the posterior says. Those from z2 go down through the means of the model, so that
# they show what z2 knows by itself. A collapsed upper layer draws one image for all.

# %%
figure, axes = plt.subplots(5, 10, figsize=(10, 5.4), layout="constrained")
rows = {"data": test[:10]}
for name, vae in fits.items():
    rows |= {f"{name}, {site}": vae.reconstruct(test[:10], site=site) for site in vae.latent_sites}
for own, (name, images) in zip(axes, rows.items(), strict=True):
    own[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax, image in zip(own, images, strict=True):
        ax.imshow(image.clamp(0, 1).numpy(force=True), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
figure.savefig(OUTPUT / "layers.png", dpi=120)
