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
# # Counts with batches and sizes
#
# A table of counts, like a small single-cell study: 3,000 cells, 500 genes, three batches, a library size for each
# cell. It is simulated from a z of five numbers. What does a VAE find of them, how much of the batch does it leave in
# z, and which of 20 latent dimensions collapse?

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch import nn
from tqdm import trange

import pyro_ilvae as ilvae

SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))  # runs every line in seconds, for tests: its numbers mean nothing
NUM_CELLS, NUM_TRAIN, NUM_GENES, EPOCHS, DRAWS = (200, 160, 30, 1, 2) if SMOKE else (3000, 2500, 500, 50, 50)
NUM_BATCHES, TRUE_DIM, LATENT_DIM, WIDTH = 3, 5, 20, 128
OUTPUT = Path("tutorials/output/smoke" if SMOKE else "tutorials/output")
OUTPUT.mkdir(parents=True, exist_ok=True)

pyro.set_rng_seed(0)
z = torch.randn(NUM_CELLS, TRUE_DIM)
batch = torch.randint(NUM_BATCHES, (NUM_CELLS,))
programs = 0.35 * torch.randn(TRUE_DIM, NUM_GENES) * (torch.rand(TRUE_DIM, NUM_GENES) < 0.3)
effects = 0.4 * torch.randn(NUM_BATCHES, NUM_GENES)
shares = (torch.randn(NUM_GENES) + z @ programs + effects[batch]).softmax(-1)
dispersion = torch.exp(0.5 + 0.5 * torch.randn(NUM_GENES))
rate = 2000 * torch.exp(0.5 * torch.randn(NUM_CELLS, 1)) * shares
counts = dist.GammaPoisson(dispersion, dispersion / rate).sample()
context, log_size = nn.functional.one_hot(batch).float(), counts.sum(1).log()
train, test = slice(0, NUM_TRAIN), slice(NUM_TRAIN, NUM_CELLS)

# %% [markdown]
# ## By hand
#
# A conditional VAE in plain Pyro. The batch enters encoder and decoder, the log of the size is added to the logits of a
# negative binomial, and each gene has a dispersion.


# %%
class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = ilvae.mlp(NUM_GENES + NUM_BATCHES, (WIDTH,), 2 * LATENT_DIM)
        self.decoder = ilvae.mlp(LATENT_DIM + NUM_BATCHES, (WIDTH,), NUM_GENES)
        self.decoder[-1].bias.data = ((counts[train].sum(0) + 0.5) / counts[train].sum()).log()
        self.log_total_count = nn.Parameter(torch.zeros(NUM_GENES))

    def model(self, x, context, offset):
        pyro.module("by_hand", self)
        with pyro.plate("data", NUM_TRAIN, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            logits = self.decoder(torch.cat([z, context.expand(*z.shape[:-1], -1)], -1)) + offset[:, None]
            pyro.sample("x", dist.NegativeBinomial(self.log_total_count.exp(), logits=logits).to_event(1), obs=x)

    def guide(self, x, context, offset):
        pyro.module("by_hand", self)
        loc, raw = self.encoder(torch.cat([x.log1p(), context], -1)).chunk(2, -1)
        with pyro.plate("data", NUM_TRAIN, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-6).to_event(1))


# %% [markdown]
# ## With the package
#
# The same model, and the same without the batch. `Nats(0.1, likelihood)` asks for a tenth of a nat of each latent
# dimension in noise units, for counts a reference. `initialize` seeks directions beyond batches and sizes.


# %%
def vae_with(*, conditional=True, kappa=None):
    sizes = {"latent_dim": LATENT_DIM, "event_shape": NUM_GENES, "context_dim": NUM_BATCHES if conditional else None}
    likelihood = ilvae.likelihoods.NegativeBinomial(torch.ones(NUM_GENES))
    decoder = ilvae.MLPDecoder(**sizes, hidden_features=(WIDTH,))
    if kappa is not None:
        nats = ilvae.Nats(kappa, likelihood)
        decoder = ilvae.ProjectedDecoder(decoder, **sizes, inverse_lipschitz=nats, map_features=(WIDTH,))
    encoder = ilvae.MLPEncoder(**sizes, hidden_features=(WIDTH,), input_transform=torch.log1p)
    vae = ilvae.VAE(decoder, encoder, likelihood, data_size=NUM_TRAIN)
    vae.initialize(counts[train], context[train] if conditional else None, offset=log_size[train])
    return vae


FITS = {"by hand": ByHand, "plain": vae_with, "plain, no context": lambda: vae_with(conditional=False)}
FITS["projected, 0.1 nats"] = lambda: vae_with(kappa=0.1)


def fit(name):
    pyro.clear_param_store()
    pyro.set_rng_seed(int(os.environ.get("PYRO_ILVAE_SEED", "0")))
    model = FITS[name]()
    data = [counts] if "no context" in name else [counts, context]
    optimizer = ilvae.JointOptim(torch.optim.Adam, {"lr": 2e-3})
    svi = ilvae.GraphSVI(model.model, model.guide, optimizer, TraceMeanField_ELBO(), compile=False)
    for _ in trange(EPOCHS, desc=name, mininterval=1.0):
        for rows in torch.randperm(NUM_TRAIN).chunk(20):
            svi.step(*(part[rows] for part in data), offset=log_size[rows])
    held_out = {"model_args": tuple(part[test] for part in data), "model_kwargs": {"offset": log_size[test]}}
    held = ilvae.diagnostics.evidence(model.model, model.guide, **held_out, num_samples=DRAWS, seed=0)
    kl = ilvae.diagnostics.kl_per_dimension(model.model, model.guide, **held_out).values.mean(0)
    guide = pyro.poutine.trace(model.guide).get_trace(*(part[train] for part in data), offset=log_size[train])
    codes = guide.nodes["z"]["fn"].mean.detach()
    canonical = CCA(TRUE_DIM, max_iter=2000).fit(codes, z[train]).transform(codes, z[train])
    found = np.mean([np.corrcoef(*(part[:, i] for part in canonical))[0, 1] for i in range(TRUE_DIM)])
    seen = cross_val_score(LogisticRegression(max_iter=1000), codes, batch[train]).mean()
    print(f"{name:19} {held.log_likelihood.mean():14.1f} {found:9.2f} {seen:5.2f} {sum(kl > 0.1):6d} {min(kl):8.3f}")
    return kl, codes


# %% [markdown]
# Columns: held-out log likelihood (nats per cell), mean canonical correlation of codes and true z, accuracy of a
# classifier of the batch (a third is chance), dimensions above 0.1 nats, smallest KL of a dimension (nats). Plain
# decoders use as many dimensions as the true z has, and two more for batches that they are not told. With nats all 20
# stay in use, for 0.5 nats of 999, and a linear classifier reads no batch from the codes.

# %%
print(f"{'':19} log likelihood canonical batch active   min KL")
results = {name: fit(name) for name in FITS}

fig, (left, *right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for name, (kl, _) in results.items():
    left.plot(range(1, LATENT_DIM + 1), kl.sort(descending=True).values, ".-", label=name)
left.set(xlabel="latent dimension, sorted", ylabel="KL on held-out cells (nats)", xticks=(1, 5, 10, 15, 20))
left.legend()
for ax, name in zip(right, ("plain, no context", "plain"), strict=True):
    ax.scatter(*PCA(2).fit_transform(results[name][1]).T, c=batch[train], s=4, cmap="viridis")
    ax.set(title=f"codes, {name}; color: batch", xlabel="first component", ylabel="second component")
fig.savefig(OUTPUT / "counts.png", dpi=120)
