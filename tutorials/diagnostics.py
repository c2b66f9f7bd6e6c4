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
# # Is my Pyro VAE collapsed?
#
# The diagnostics work for any Pyro model and guide, and nothing here uses an inverse Lipschitz decoder. The model is
# Pyro's ordinary VAE with plain PyTorch networks. Four questions: which latent dimensions are at the prior, how much
# the latent variable says about an image, whether the decoder ignores a direction, and whether the guide can be
# trusted.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from tqdm import trange

from pyro_ilvae import datasets, diagnostics, plots

SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))  # runs every line in seconds, for tests: its numbers mean nothing
EPOCHS, NUM_SAMPLES = (2, 10) if SMOKE else (100, 200)
OUTPUT = Path("tutorials/output/smoke" if SMOKE else "tutorials/output")
OUTPUT.mkdir(parents=True, exist_ok=True)
LATENT_DIM, HIDDEN = 16, 128

digits = datasets.digits()
train, test = (datasets.binarize(split, threshold=0.5).flatten(1) for split in (digits.train, digits.test))

# %% [markdown]
# ## What to expect
#
# A linear VAE collapses every principal direction of the data whose variance is below the noise variance. That can be
# computed before any training, and is a reference for other VAEs, not a bound. A binary pixel has the noise of a coin,
# whose standard deviation is at most 0.5.

# %%
reference = diagnostics.linear_reference(train, noise_scale=0.4, latent_dim=LATENT_DIM)
print(f"a linear VAE would collapse {int(reference.collapsed.sum())} of {LATENT_DIM} dimensions")

# %% [markdown]
# ## Pyro's ordinary VAE
#
# The model comes from Pyro's own tutorial and is fitted to binarized digits of 8 x 8 pixels.


# %%
class OrdinaryVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(LATENT_DIM, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 64))
        self.encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 2 * LATENT_DIM))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


pyro.set_rng_seed(0)
vae = OrdinaryVAE()
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), TraceMeanField_ELBO())
for _ in trange(EPOCHS, desc="epochs", mininterval=1.0):
    for batch in train[torch.randperm(len(train))].split(128):
        svi.step(batch)

# %% [markdown]
# ## Which dimensions are at the prior?
#
# One call computes all that can be said of this model and guide, with a verdict for each dimension. The result is an
# `xarray.Dataset`, which can be saved, sliced, and kept beside the draws in ArviZ.

# %%
summary = diagnostics.collapse_summary(vae.model, vae.guide, test, num_samples=NUM_SAMPLES, batch_size=100, seed=0)
print(summary[["kl", "mean_variance", "collapsed_fraction", "verdict"]].to_dataframe().round(3))
print(summary.attrs["verdict"])

# %% [markdown]
# Half of the dimensions are next to the prior. The verdicts go by the mean KL: a dimension is collapsed below 0.01
# nats, weak below 0.1 nats and active from there, and the arguments `collapsed_below=` and `active_from=` draw the
# lines elsewhere. The customary count of active units, by a threshold of 0.01 on the variance of the posterior means,
# counts dimensions that carry a hundredth of a nat.
#
# Left: a collapsed dimension is a flat bar. Right: the fraction of images whose whole posterior is within epsilon nats
# of the prior, for every epsilon (the paper's epsilon-collapse).

# %%
kl = diagnostics.kl_per_dimension(vae.model, vae.guide, test)
total = diagnostics.kl_divergence(vae.model, vae.guide, test)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plots.plot_kl_per_dimension(kl, summary.verdict.values == "active", epsilon=0.1, ax=left)
plots.plot_epsilon_curve(total.values, ax=right)
figure.savefig(OUTPUT / "collapse.png", dpi=120)

# %% [markdown]
# ## How much does z say about x?
#
# The mean KL splits into the mutual information of x and z under the guide and KL(q(z) || p(z)), the divergence of the
# aggregate posterior from the prior. Measured on these 297 images, the information cannot exceed log 297 nats.

# %%
print(summary[["kl_total", "mutual_information", "aggregate_kl", "mutual_information_limit"]].to_dataframe().round(2))

# %% [markdown]
# ## Does the decoder ignore a direction?
#
# `lipschitz_audit` looks for the two latent points that the decoder pulls together most. What it finds is an upper
# bound on the decoder's inverse Lipschitz constant. A plain network certifies no lower bound.

# %%
audit = diagnostics.lipschitz_audit(vae.decoder, latent_dim=LATENT_DIM, num_samples=50 if SMOKE else 500, seed=0)
print(f"certified: {audit.certified}; smallest ratio found: {audit.smallest:.3f} logits per unit of z")

# %% [markdown]
# ## Can the guide be trusted?
#
# All of the above is about the guide. The *exact* posterior has a divergence from the prior too, the relative Fisher
# divergence, which can be estimated by importance sampling from the guide. A Pareto k above 0.7 says that the guide is
# too far from the exact posterior for that. If the exact posterior is away from the prior while the guide is at it, a
# better guide helps; if both are at the prior, only another decoder does.
# `experiments/diagnostics_against_nuts.py` compares these numbers with draws of NUTS.

# %%
exact = diagnostics.posterior_fisher_divergence(vae.model, vae.guide, test[:20], num_samples=10 * NUM_SAMPLES, seed=0)
own = diagnostics.guide_fisher_divergence(vae.model, vae.guide, test[:20], seed=0)
print(f"relative Fisher divergence from the prior: exact {exact.values.mean():.1f}, guide {own.values.mean():.1f}")
print(f"Pareto k below 0.7 for {int((exact.pareto_k < 0.7).sum())} of {len(exact.pareto_k)} images")
