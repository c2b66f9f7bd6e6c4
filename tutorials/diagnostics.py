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
# The diagnostics work for any Pyro model and guide; here, Pyro's ordinary VAE with plain PyTorch networks, on binarized
# digits of 8 x 8 pixels.

# %%
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from tqdm import trange

from pyro_ilvae import datasets, diagnostics, from_pyro_svi, plots

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
import arviz as az  # noqa: E402 - after the filter, because ArviZ announces its successor on import

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
# A linear VAE collapses the principal directions of the data with less variance than the noise: a reference, no bound.

# %%
reference = diagnostics.linear_reference(train, noise_scale=0.4, latent_dim=LATENT_DIM)
print(f"a linear VAE would collapse {int(reference.collapsed.sum())} of {LATENT_DIM} dimensions")


# %%
class OrdinaryVAE(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
        self.decoder = nn.Sequential(nn.Linear(size, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 64))
        self.encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 2 * size))

    def model(self, x):
        pyro.module(f"decoder_{self.size}", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.size), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module(f"encoder_{self.size}", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def fitted(size):
    pyro.set_rng_seed(0)
    vae = OrdinaryVAE(size)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), TraceMeanField_ELBO())
    for _ in trange(EPOCHS, desc="epochs", mininterval=1.0):
        for batch in train[torch.randperm(len(train))].split(128):
            svi.step(batch)
    return vae


vae = fitted(LATENT_DIM)

# %% [markdown]
# ## Which dimensions are at the prior?
#
# One call computes all that can be said of this model and guide, as an `xarray.Dataset`.

# %%
summary = diagnostics.collapse_summary(vae.model, vae.guide, test, num_samples=NUM_SAMPLES, batch_size=100, seed=0)
print(summary[["kl", "mean_variance", "collapsed_fraction", "verdict"]].to_dataframe().round(3))
print(summary.attrs["verdict"])

# %% [markdown]
# Half of the dimensions are next to the prior. The verdicts go by the mean KL: a dimension is collapsed below 0.01
# nats, weak below 0.1 nats and active from there; `collapsed_below=` and `active_from=` draw other lines. The customary
# threshold of 0.01 on the variance of the posterior means calls dimensions with a hundredth of a nat active. Left:
# collapsed and weak dimensions are hollow. Right: the fraction of images within epsilon nats of the prior.

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
# The mean KL is the mutual information of x and z, at most log 297 nats on these images, plus KL(q(z) || p(z)).

# %%
print(summary[["kl_total", "mutual_information", "aggregate_kl", "mutual_information_limit"]].to_dataframe().round(2))

# %% [markdown]
# ## Does the decoder ignore a direction?
#
# The two latent points that the decoder pulls together most bound its inverse Lipschitz constant, from above.

# %%
audit = diagnostics.lipschitz_audit(vae.decoder, latent_dim=LATENT_DIM, num_samples=50 if SMOKE else 500, seed=0)
print(f"certified: {audit.certified}; smallest ratio found: {audit.smallest:.3f} logits per unit of z")

# %% [markdown]
# ## Can the guide be trusted?
#
# The *exact* posterior has a relative Fisher divergence from the prior too, estimated by importance sampling from the
# guide unless a Pareto k is above 0.7. If only the guide is at the prior, a better guide helps; if both, no guide does.

# %%
exact = diagnostics.posterior_fisher_divergence(vae.model, vae.guide, test[:20], num_samples=10 * NUM_SAMPLES, seed=0)
own = diagnostics.guide_fisher_divergence(vae.model, vae.guide, test[:20], seed=0)
print(f"relative Fisher divergence from the prior: exact {exact.values.mean():.1f}, guide {own.values.mean():.1f}")
print(f"Pareto k below 0.7 for {int((exact.pareto_k < 0.7).sum())} of {len(exact.pareto_k)} images")

# %% [markdown]
# ## Which fit is better?
#
# `from_pyro_svi` integrates the log likelihood of an image over its z, so that ArviZ ranks by the evidence. Given each
# image's own z, more dimensions would win, whatever they are worth. ArviZ warns where Pareto k is large.

# %%
both = {f"K = {fit.size}": (fit.model, fit.guide) for fit in (vae, fitted(2))}
fits = {name: from_pyro_svi(pair, test, num_samples=NUM_SAMPLES, prior=False, seed=0) for name, pair in both.items()}
with warnings.catch_warnings(action="ignore" if SMOKE else "default"):
    print(az.compare(fits).iloc[:, :4])
