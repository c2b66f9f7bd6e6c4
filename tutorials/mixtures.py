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
# # Clusters without labels
#
# `MixtureVAE` has a component y for each datum and, given y, a Gaussian z. This tutorial fits ten components to
# handwritten digits, looks at what they have become, and compares them with the labels, which the fit never sees.
#
# Two things can go wrong with such a model. All data may gather in a few components; a good start prevents that. Or the
# posterior of z collapses onto its prior, so that no component says anything about the data; an inverse Lipschitz
# decoder prevents that.

# %%
import os
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO, TraceMeanField_ELBO
from tqdm import trange

import pyro_ilvae as ilvae

SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))  # runs every line in seconds, for tests: its numbers mean nothing
EPOCHS = 2 if SMOKE else 60
OUTPUT = Path("tutorials/output/smoke" if SMOKE else "tutorials/output")
OUTPUT.mkdir(parents=True, exist_ok=True)
NUM_COMPONENTS = 10

digits = ilvae.datasets.digits()
train, test = digits.train, digits.test

# %% [markdown]
# ## The model
#
# The decoder is a plain network made inverse Lipschitz, with half a nat for each latent dimension of a Gaussian. The
# component y is summed out of the model (`enumerate_in="model"`), so each image passes the decoder once, whatever the
# number of components.

# %%
pyro.set_rng_seed(0)
SIZES = {"latent_dim": 8, "event_shape": (8, 8)}
likelihood = ilvae.likelihoods.Normal(0.3, estimate="learned")
decoder = ilvae.ProjectedDecoder(ilvae.mlp(8, (128, 128), 64), **SIZES, inverse_lipschitz=ilvae.Nats(0.5, likelihood))
encoder = ilvae.MLPEncoder(**SIZES, hidden_features=(128, 128))
mixture = ilvae.MixtureVAE(decoder, encoder, likelihood, NUM_COMPONENTS, data_size=len(train), enumerate_in="model")

# %% [markdown]
# ## The fit
#
# Components that start at random die: the data go to the few components that are useful first. So decoder and encoder
# are trained with the one prior N(0, I) first, as a `VAE`. Then `initialize_components` puts the components where
# k-means finds clusters among the posterior means, and everything is trained together. `TraceEnum_ELBO` sums over y.


# %%
def train_epochs(model, elbo, name):
    optimizer = ilvae.JointOptim(torch.optim.Adam, {"lr": 2e-3})
    svi = SVI(model.model, model.guide, optimizer, elbo)
    for _ in trange(EPOCHS, desc=name, mininterval=1.0):
        for batch in train[torch.randperm(len(train))].split(128):
            svi.step(batch)


vae = ilvae.VAE(decoder, encoder, likelihood, data_size=len(train))
vae.initialize(train)  # start where the data are
train_epochs(vae, TraceMeanField_ELBO(), "VAE")
pyro.clear_param_store()  # the networks keep their weights; the store would keep their names for the VAE
mixture.initialize_components(train, seed=0)
train_epochs(mixture, TraceEnum_ELBO(max_plate_nesting=1), "mixture")

# %% [markdown]
# ## Are all components in use?
#
# The effective number of components is the exponential of the entropy of their shares of the data. The mean KL of
# q(y | x) from the uniform prior splits into the information that x gives about y and the unevenness of the shares.

# %%
probs = mixture.predict_component(test)
usage = ilvae.diagnostics.component_usage(probs)
print(f"shares: {[round(share, 2) for share in usage.usage.tolist()]}")
print(f"effective number of components: {usage.effective_number:.1f} of {NUM_COMPONENTS}")
print(f"information of x about y: {usage.mutual_information:.2f} nats, unevenness: {usage.kl:.2f} nats")

# %% [markdown]
# ## Do the components match the digits?
#
# Components have no names, so `cluster_agreement` matches them with the digits one to one, as well as possible. The
# accuracy takes the most probable component of each image. The other numbers need no matching: the purity is the share
# of the images whose digit is the most frequent one of their component.

# %%
agreement = ilvae.diagnostics.cluster_agreement(digits.test_labels, probs)
print(
    f"accuracy {agreement.accuracy:.2f}, purity {agreement.purity:.2f}, adjusted Rand index "
    f"{agreement.adjusted_rand:.2f}, normalized mutual information {agreement.normalized_mutual_information:.2f}"
)

# %% [markdown]
# The picture has images drawn from each component, a row for each. Several components are one digit, others mix two.

# %%
samples = torch.stack([mixture.sample_component(y, 12, mean=True, seed=y) for y in range(NUM_COMPONENTS)])
ax = ilvae.plots.plot_class_samples(samples.clamp(0, 1))
ax.set_ylabel("component")
ax.figure.savefig(OUTPUT / "mixture.png", dpi=120)

# %% [markdown]
# ## Has z collapsed?
#
# A collapsed posterior of z is the prior, here the whole mixture, whatever the image. The KL of q(z | x) from the
# mixture has no formula and is estimated from draws. It should be far above 0 for every image.

# %%
kl = ilvae.diagnostics.kl_divergence(mixture.model, mixture.guide, test, site="z", num_samples=100, seed=0)
print(f"KL of z from the mixture: {kl.values.mean():.1f} nats on average, {kl.values.min():.1f} for the least image")
