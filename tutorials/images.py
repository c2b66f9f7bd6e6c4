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
# # The guarantee for a network of your own
#
# `ProjectedDecoder` makes any PyTorch network inverse Lipschitz. Here it is a small stack of transposed convolutions.
# The tutorial fits a VAE with it, shows reconstructions and what each latent dimension does to an image, and hands the
# fit to ArviZ. The images are scikit-learn's digits, which need no download; `datasets.fashion_mnist()` in their place
# works without another change.

# %%
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn

import pyro_ilvae as ilvae

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
import arviz as az  # noqa: E402 - after the filter, because ArviZ announces its successor on import

SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))  # runs every line in seconds, for tests: its numbers mean nothing
EPOCHS, NUM_SAMPLES = (2, 10) if SMOKE else (80, 1000)
OUTPUT = Path("tutorials/output/smoke" if SMOKE else "tutorials/output")
OUTPUT.mkdir(parents=True, exist_ok=True)
LATENT_DIM = 8
data = ilvae.datasets.digits()
train, test = data.train, data.test
HEIGHT, WIDTH = train.shape[1:]

# %% [markdown]
# ## The network
#
# A backbone is any module from latent points of shape (N, K) to images. It may be of plain PyTorch layers. The
# projected decoder replaces what the backbone says along K directions of pixel space, the frame, by an inverse
# Lipschitz map, and leaves everything orthogonal to them to the backbone.
#
# `Nats(0.5, likelihood)` sets its constant L: the images of the model then say at least half a nat about each latent
# dimension, whatever the noise becomes. `initialize` starts at the mean image and at the leading principal directions.


# %%
class Backbone(nn.Module):
    """Two transposed convolutions, each of which doubles height and width."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENT_DIM, 32 * (HEIGHT // 4) * (WIDTH // 4)),
            nn.Softplus(),
            nn.Unflatten(-1, (32, HEIGHT // 4, WIDTH // 4)),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.Softplus(),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        )

    def forward(self, z):
        return self.layers(z).squeeze(-3)


pyro.set_rng_seed(0)
SIZES = {"latent_dim": LATENT_DIM, "event_shape": (HEIGHT, WIDTH)}
likelihood = ilvae.likelihoods.Normal(0.3, estimate="learned")
decoder = ilvae.ProjectedDecoder(Backbone(), **SIZES, inverse_lipschitz=ilvae.Nats(0.5, likelihood))
encoder = ilvae.ConvEncoder(**SIZES)
vae = ilvae.VAE(decoder, encoder, likelihood, data_size=len(train))
vae.initialize(train)

# %% [markdown]
# ## The fit
#
# The weight of the KL rises from 0 to 1 during the first quarter of the training. A `CollapseMonitor` stands beside the
# training loop, whatever that looks like, and changes nothing in it: twenty times it measures ELBO, KL, active units
# and mutual information on held-out images, and what the decoder guarantees. The last record stands beside the progress
# bar. In the picture, the KL of each dimension stays above 0.1 nats after the first steps.

# %%
num_steps = EPOCHS * -(-len(train) // 128)
beta = ilvae.schedules.linear(0.0, 1.0, num_steps=num_steps // 4, planned_steps=num_steps)
optimizer = ilvae.JointOptim(torch.optim.Adam, {"lr": 2e-3})
svi = SVI(vae.model, vae.guide, optimizer, ilvae.AnnealedELBO(TraceMeanField_ELBO(), beta=beta))
monitor = ilvae.CollapseMonitor(vae.model, vae.guide, test, every=max(8, num_steps // 20), beta=beta)
for _ in monitor.track(range(EPOCHS)):
    for batch in train[torch.randperm(len(train))].split(128):
        monitor.step(svi.step(batch))
        beta.step()
axes = ilvae.plots.plot_training(monitor)
axes[0, 0].figure.savefig(OUTPUT / "training.png", dpi=120)

# %% [markdown]
# ## What the fit is worth
#
# `guaranteed_information` has two floors under what the model's own images say about z. One follows from L and the
# noise alone, and no training can take it away. The other one is from the Jacobian of the fitted decoder, and higher.
# On held-out images the KL of each dimension should be of this order or larger.

# %%
guaranteed = ilvae.diagnostics.guaranteed_information(vae, seed=0)
summary = ilvae.diagnostics.collapse_summary(vae.model, vae.guide, test, batch_size=100, seed=0)
print(f"guaranteed by L: {guaranteed.floor:.1f} nats, by the Jacobian: {guaranteed.by_jacobian:.1f} nats")
print(f"held-out log likelihood: {summary.log_likelihood.item():.1f} nats per image")
print(summary[["kl", "mean_variance", "verdict"]].to_dataframe().round(2))

# %% [markdown]
# ## Reconstructions and traversals
#
# The first picture has held-out images above their reconstructions. In the second one each row starts from the same
# image and moves one latent dimension by up to 3 either way. A row in which nothing moves would be a collapsed
# dimension.

# %%
ax = ilvae.plots.plot_reconstructions(test[:10], vae.reconstruct(test[:10]).clamp(0, 1))
ax.figure.savefig(OUTPUT / "reconstructions.png", dpi=120)
center = vae.encode(test[:1])[0][0]
ax = ilvae.plots.plot_traversals(lambda z: vae.decoder(z).clamp(0, 1), LATENT_DIM, center=center)
ax.figure.savefig(OUTPUT / "traversals.png", dpi=120, bbox_inches="tight")

# %% [markdown]
# ## The posterior in ArviZ
#
# `from_pyro_svi` converts the fit of any Pyro model and guide: posterior, prior, predictive draws and log likelihoods.
# The draws are independent draws from the guide, stored as one chain, so R-hat and effective sample sizes look perfect
# whatever the fit is worth. Means and intervals are what to read.

# %%
dims = {"z": ["latent"], "x": ["row", "column"]}
fit = ilvae.from_pyro_svi(svi, model_args=(test[:5],), num_samples=NUM_SAMPLES, dims=dims, seed=0)
print(az.summary(fit, var_names=["z"], coords={"data": [0]}, kind="stats"))

# %% [markdown]
# The latent variable of two images. The prior's interval is -1.9 to 1.9, and a collapsed dimension would have it for
# every image.

# %%
interval = {"hdi_prob": 0.94} if az.__version__.startswith("0.") else {"ci_probs": (0.5, 0.94)}
az.plot_forest(fit, var_names=["z"], coords={"data": [0, 1]}, combined=True, **interval)
plt.gcf().savefig(OUTPUT / "forest.png", dpi=100, bbox_inches="tight")
