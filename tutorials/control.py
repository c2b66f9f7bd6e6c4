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
# # Nats on target
#
# For Normal noise the dial is in nats: `Nats(0.5, likelihood)` guarantees half a nat to each dimension. For other
# likelihoods no such bound is known, and some users want an amount rather than a floor. A *controller* measures the
# training batches and moves L until the measure is on target; then it freezes L, so that the final model has one
# constant, which holds. This tutorial fits binary digits five times: without a remedy, with free bits, and under three
# controllers.

# %%
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_ilvae as ilvae
from pyro_ilvae import measures, remedies

SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))  # runs every line in seconds, for tests: its numbers mean nothing
EPOCHS = 2 if SMOKE else 200
OUTPUT = Path("tutorials/output/smoke" if SMOKE else "tutorials/output")
OUTPUT.mkdir(parents=True, exist_ok=True)
K, WIDTHS = 10, (128, 128)
data = ilvae.datasets.digits()
train, test = (ilvae.datasets.binarize(x, threshold=0.5) for x in (data.train, data.test))
SHAPE = tuple(train.shape[1:])
NUM_STEPS = EPOCHS * -(-len(train) // 128)
if SMOKE:  # two epochs are not enough to come to a target
    warnings.filterwarnings("ignore", ".*froze off target")


# %% [markdown]
# ## One loop for all of them
#
# `settings` says for a new VAE what is different: an objective, and something that is stepped with each batch. A
# `CollapseMonitor` measures held-out digits a few times and changes nothing.


# %%
def fit(name, decoder, settings):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    encoder = ilvae.MLPEncoder(event_shape=SHAPE, latent_dim=K, hidden_features=WIDTHS)
    vae = ilvae.VAE(decoder, encoder, ilvae.likelihoods.Bernoulli(), data_size=len(train))
    vae.initialize(train)
    elbo, controller, beta = settings(vae)
    optimizer = ilvae.JointOptim(torch.optim.Adam, {"lr": 2e-3, "fused": True})
    svi = ilvae.GraphSVI(vae.model, vae.guide, optimizer, elbo, compile=False)
    monitor = ilvae.CollapseMonitor(vae.model, vae.guide, test, every=max(1, NUM_STEPS // 20), beta=beta)
    print(name)
    for _ in monitor.track(range(EPOCHS)):
        for batch in train[torch.randperm(len(train))].split(128):
            monitor.step(svi.step(batch))
            if controller is not None:
                controller.step(batch)
    return vae, monitor, controller


def plain():
    return ilvae.MLPDecoder(latent_dim=K, event_shape=SHAPE, hidden_features=WIDTHS, linear_path=True)


def projected():
    backbone = ilvae.mlp(K, WIDTHS, 64)
    return ilvae.ProjectedDecoder(backbone, latent_dim=K, event_shape=SHAPE, inverse_lipschitz=0.0, map_features=WIDTHS)


# %% [markdown]
# ## No remedy, and free bits
#
# Free bits are one of the remedies in `pyro_ilvae.remedies`; others are used in the same way. They leave the KL below
# half a nat out of the objective of each dimension.

# %%
fits = {}
name = "plain"
fits[name] = fit(name, plain(), lambda vae: (TraceMeanField_ELBO(), None, None))
name = "plain, free bits"
fits[name] = fit(name, plain(), lambda vae: (remedies.FreeBitsELBO(TraceMeanField_ELBO(), 0.5), None, None))

# %% [markdown]
# ## At least half a nat in each dimension
#
# The controller follows the smallest KL of all dimensions in training batches, and raises L from 0 until that is half
# a nat. This is an estimate: nats are guaranteed under Normal noise only. After 80
# percent of the steps it freezes L. `measures` has other things to follow, and any function of a batch will do.

# %%
OPTIONS = {"num_steps": max(10, int(0.8 * NUM_STEPS)), "planned_steps": max(10, NUM_STEPS)}


def at_least(nats):
    def settings(vae):
        smallest = measures.smallest_kl(vae.model, vae.guide)
        controller = ilvae.InverseLipschitzController(vae.decoder, smallest, nats, at_least=True, **OPTIONS)
        return TraceMeanField_ELBO(), controller, None

    return settings


name = "at least 0.5 nats each"
fits[name] = fit(name, projected(), at_least(0.5))

# %% [markdown]
# ## An amount
#
# `total_kl` is the KL of all dimensions together. Where L = 0 leaves more than is wanted, a weight of the KL above 1
# lowers it: with `largest_beta` the controller has a `beta` too, which the objective reads. Binary digits fill about 8
# nats by themselves. Fewer or a few more cost little, and 12 nats cost about 2 nats of likelihood: see the table.


# %%
def amount(nats):
    def settings(vae):
        total = measures.total_kl(vae.model, vae.guide)
        controller = ilvae.InverseLipschitzController(vae.decoder, total, nats, largest_beta=20.0, **OPTIONS)
        return ilvae.AnnealedELBO(TraceMeanField_ELBO(), beta=controller.beta), controller, controller.beta

    return settings


for nats in (6.0, 12.0):
    name = f"{nats:g} nats together"
    fits[name] = fit(name, projected(), amount(nats))

# %%
print(f"\n{'':24} {'log lik.':>9} {'KL':>6} {'smallest':>9} {'L':>6} {'beta':>6}   (nats per held-out image)")
for name, (vae, monitor, _) in fits.items():
    evidence = ilvae.diagnostics.evidence(vae.model, vae.guide, test, num_samples=5 if SMOKE else 100, seed=0)
    last = monitor.history[-1]
    constant, beta = (f"{last.get(key) or default:.2f}" for key, default in (("inverse_lipschitz", 0), ("beta", 1)))
    kl = last["kl_per_dimension"]
    print(f"{name:24} {evidence.log_likelihood.mean():9.2f} {sum(kl):6.2f} {min(kl):9.3f} {constant:>6} {beta:>6}")
axes = ilvae.plots.plot_training({name: monitor for name, (_, monitor, _) in fits.items()})
axes[0, 0].figure.savefig(OUTPUT / "control.png", dpi=120)
plt.close("all")
