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
# # Is my posterior collapsed? Diagnostics for any Pyro model
#
# Nothing here needs an inverse Lipschitz decoder. First Pyro's ordinary VAE, with plain PyTorch networks: which latent
# dimensions are at the prior, how much the latent variable says about the data, and how far the guide is from the exact
# posterior, which NUTS draws for a few images. Then a hierarchical model that is no VAE, in which the measures mean
# something else, and a look at what ArviZ's diagnostics cannot see in a variational fit.

# %%
import os
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from tqdm import trange

from pyro_ilvae import datasets, diagnostics, from_pyro_mcmc, from_pyro_svi, plots

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
import arviz as az  # noqa: E402 - after the filter, because it announces its successor on import

# Smoke mode runs every line in seconds, for tests: its numbers mean nothing.
SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))
EPOCHS = 2 if SMOKE else 100
NUM_SAMPLES = 10 if SMOKE else 200
DRAWS = 20 if SMOKE else 500
STEPS = 20 if SMOKE else 3000
OUTPUT = Path(tempfile.mkdtemp() if SMOKE else "tutorials/output")
OUTPUT.mkdir(parents=True, exist_ok=True)
LATENT_DIM, HIDDEN = 16, 128

digits = datasets.digits()
train, test = (datasets.binarize(split, threshold=0.5).flatten(1) for split in (digits.train, digits.test))

# %% [markdown]
# ## Pyro's ordinary VAE
#
# As in Pyro's own tutorial: `nn.Module` networks, registered by `pyro.module`, on binarized digits. Before any training
# a linear reference says what to expect: which principal directions of the data carry more variance than the noise, and
# so would survive in a linear VAE. For binary pixels the noise is that of a coin, at most 0.5.

# %%
reference = diagnostics.linear_reference(train, noise_scale=0.4, latent_dim=LATENT_DIM)
print("collapsed in a linear VAE:", reference.collapsed.tolist())
print("nats per dimension there: ", [round(float(value), 2) for value in reference.kl])


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
for _ in trange(EPOCHS, desc="VAE", mininterval=1.0):
    for batch in train[torch.randperm(len(train))].split(128):
        svi.step(batch)

# %% [markdown]
# One call for everything that can be said of this pair of model and guide, with a verdict for each dimension. All of it
# is an `xarray.Dataset`, so it can be saved, sliced and put beside the draws in ArviZ.

# %%
summary = diagnostics.collapse_summary(vae.model, vae.guide, test, num_samples=NUM_SAMPLES, batch_size=100, seed=0)
print(summary[["kl", "mean_variance", "collapsed_fraction", "verdict"]].to_dataframe().round(3))
print(summary[["kl_total", "mutual_information", "aggregate_kl", "mutual_information_limit"]].to_dataframe().round(2))

# %% [markdown]
# Half of the dimensions are next to the prior, where the linear reference expected two: it is a reference, no bound.
# Read the KL beside the verdict. The customary threshold on the variance of posterior means, 0.01, calls a dimension
# active that carries a hundredth of a nat; `threshold=` and `epsilon=` set where to draw the lines. The mutual
# information is that with the index of an image among these 297, and cannot exceed the logarithm of their number.
#
# The left picture is the first thing to look at: a dimension at the prior is a flat bar. The right one is the paper's
# epsilon-collapse: the fraction of images whose whole posterior is within epsilon of the prior.

# %%
kl = diagnostics.kl_per_dimension(vae.model, vae.guide, test)
units = diagnostics.active_units(vae.model, vae.guide, test)
total = diagnostics.kl_divergence(vae.model, vae.guide, test)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
plots.plot_kl_per_dimension(kl, units, epsilon=0.1, ax=left)
plots.plot_epsilon_curve(total.values, ax=right)
figure.savefig(OUTPUT / "collapse.png", dpi=120)

# %% [markdown]
# ## The decoder's side
#
# `lipschitz_audit` looks for the pair of latent points that the decoder pulls together most. What it finds is an upper
# bound on the decoder's inverse Lipschitz constant; a plain network certifies nothing.

# %%
audit = diagnostics.lipschitz_audit(vae.decoder, latent_dim=LATENT_DIM, num_samples=50 if SMOKE else 500, seed=0)
print(f"certified: {audit.certified}, smallest ratio found: {audit.smallest:.3f} logits per unit of z")

# %% [markdown]
# ## The guide against the exact posterior
#
# For three images NUTS draws from the exact posterior of their latent variables, with the decoder fixed. The relative
# Fisher divergence of the exact posterior from the prior is estimated from these draws, and by importance sampling from
# the guide: Pareto k above 0.7 says that the guide is too far off for its weights to be trusted.

# %%
few = test[:3]
vae.eval().requires_grad_(False)  # fixed, so that they are no parameters to NUTS
pyro.clear_param_store()
mcmc = MCMC(NUTS(vae.model), num_samples=DRAWS, warmup_steps=DRAWS // 2, disable_progbar=True)
mcmc.run(few)
exact = from_pyro_mcmc(mcmc, model_args=(few,), dims={"z": ["latent"], "x": ["pixel"]}, seed=0)
approximate = from_pyro_svi(
    (vae.model, vae.guide),
    model_args=(few,),
    num_samples=DRAWS,
    batch_size=DRAWS,
    dims={"z": ["latent"], "x": ["pixel"]},
    seed=0,
)

by_guide = diagnostics.posterior_fisher_divergence(vae.model, vae.guide, few, num_samples=10 * NUM_SAMPLES, seed=0)
by_draws = diagnostics.posterior_fisher_divergence_of_draws(vae.model, {"z": mcmc.get_samples()["z"]}, few)
print("image   by NUTS         by the guide's draws   Pareto k")
for i in range(len(few)):
    print(
        f"{i:<8}{by_draws.values[i]:5.2f} +- {by_draws.standard_errors[i]:<7.2f}"
        f"{by_guide.values[i]:5.2f} +- {by_guide.standard_errors[i]:<12.2f}{by_guide.pareto_k[i]:.2f}"
    )

# %% [markdown]
# Both posteriors of the first image in one picture. NUTS is the reference: where the intervals differ it is the guide
# that is off. A dimension with the interval of the prior, -1.9 to 1.9, under NUTS too has collapsed in the *model*: the
# decoder ignores it, and no better guide would bring it back.

# %%
OPTIONS = {"var_names": ["z"], "coords": {"data": [0]}, "combined": True}
if az.__version__.startswith("0."):
    names = ["NUTS", "guide"]
    [axes] = az.plot_forest([exact, approximate], model_names=names, figsize=(7, 7), hdi_prob=0.94, **OPTIONS)
    axes.get_legend().set_loc("upper left")
else:
    az.plot_forest({"NUTS": exact, "guide": approximate}, ci_probs=(0.5, 0.94), **OPTIONS).add_legend("model")
plt.gcf().savefig(OUTPUT / "nuts_forest.png", dpi=120, bbox_inches="tight")

# %% [markdown]
# ## Where the diagnostics of a variational fit mislead
#
# The eight schools of Rubin (1981): effects of coaching, each with its own standard error, around a common mean. The
# effective sample sizes of the *guides'* draws are about their number, because these draws are independent; that says
# nothing of whether they come from the right distribution. Of NUTS's draws, the reference here, it does say something.

# %%
effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(effects, errors):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * offset)
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


mcmc = MCMC(NUTS(schools), num_samples=DRAWS, warmup_steps=DRAWS, disable_progbar=True)
mcmc.run(effects, errors)
fits = {"NUTS": from_pyro_mcmc(mcmc, model_args=(effects, errors), seed=0)}
guides = {}
for name, build in {"mean field": AutoNormal, "joint Normal": AutoMultivariateNormal}.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = guides[name] = build(schools)
    svi = SVI(schools, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.1 ** (1 / STEPS)}), Trace_ELBO())
    for _ in range(STEPS):
        svi.step(effects, errors)
    fits[name] = from_pyro_svi((schools, guide), model_args=(effects, errors), num_samples=DRAWS, seed=0)
for name, fit in fits.items():
    sizes = az.ess(fit, var_names=["mu", "tau"])
    print(
        f"\n{name}: effective sample sizes of {DRAWS} draws: mu {float(sizes['mu']):.0f}, tau {float(sizes['tau']):.0f}"
    )
    print(az.summary(fit, var_names=["mu", "tau"], kind="stats"))

# %% [markdown]
# Pictures of the draws show what the numbers did not: the funnel between the spread of the schools and each school's
# offset, and a guide that has no room for it.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharex=True, sharey=True, layout="constrained")
for ax, (name, fit) in zip(axes, fits.items(), strict=True):
    tau = np.asarray(fit["posterior"]["tau"]).reshape(-1)
    theta = np.asarray(fit["posterior"]["theta"]).reshape(len(tau), -1)[:, 0]
    ax.scatter(tau, theta, s=4, alpha=0.5, color="#0072B2")
    ax.set(title=name, xlabel="tau", xscale="log")
axes[0].set_ylabel("effect of the first school")
figure.savefig(OUTPUT / "schools.png", dpi=120)

# %% [markdown]
# ## Collapse that is not a failure
#
# The measures apply to this model too, site by site. The offsets of the schools stay close to their prior: their
# divergences are a few hundredths of a nat, and in a VAE one would worry. Here it is what eight noisy
# numbers say, and the exact posterior agrees. A verdict about a model whose *exact* posterior is near the prior is a
# verdict about the model; only where guide and exact posterior differ is it one about the guide.

# %%
summary = diagnostics.collapse_summary(schools, guides["mean field"], (effects, errors), epsilon=0.05, seed=0)
print(summary[["kl", "kl_se", "verdict"]].to_dataframe().round(3))
kl = diagnostics.kl_per_dimension(schools, guides["mean field"], (effects, errors), site="offset", seed=0)
print("KL of each school's offset (nats):", [round(float(value), 3) for value in kl.values])
for site, note in zip(summary.site.values, summary.note.values, strict=True):
    print(f"{site}: {note or 'nothing left out'}")
offsets = np.asarray(fits["NUTS"]["posterior"]["offset"]).reshape(-1, len(effects))
print("NUTS, standard deviations of the offsets (prior: 1):", [round(float(value), 2) for value in offsets.std(0)])
print(f"Pictures are in {OUTPUT.resolve()}")
