"""Diagnostics of variational fits against draws of NUTS: a VAE of digits, and the eight schools.

1. Pyro's ordinary VAE, as in ``tutorials/diagnostics.py``. For three images NUTS draws from the exact posterior of the
   latent variables, with the decoder fixed. The relative Fisher divergence of the exact posterior from the prior is
   estimated from these draws and by importance sampling from the guide, whose Pareto k says whether to trust it.
2. The eight schools of Rubin (1981), a hierarchical model that is no VAE. The effective sample sizes of the *guides'*
   draws look perfect, because these draws are independent, and say nothing of whether the draws come from the right
   distribution. The offsets of the schools stay close to their prior, and the exact posterior agrees: a verdict about
   a model whose exact posterior is near the prior is a verdict about the model. It is one about the guide only where
   guide and exact posterior differ.

One fit of each, about two minutes, with or without ``PYRO_ILVAE_FULL=1``; ``PYRO_ILVAE_SMOKE=1`` takes seconds, for
tests.
"""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _sweep import OUTPUT, chosen
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from tqdm import trange

from pyro_ilvae import datasets, diagnostics, from_pyro_mcmc, from_pyro_svi

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
import arviz as az  # noqa: E402 - after the filter, because ArviZ announces its successor on import

EPOCHS = chosen(smoke=2, short=100, full=100)
NUM_SAMPLES = chosen(smoke=10, short=200, full=200)
DRAWS = chosen(smoke=20, short=500, full=500)
STEPS = chosen(smoke=20, short=3000, full=3000)
LATENT_DIM, HIDDEN = 16, 128
OUTPUT.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(1)

# 1. A VAE of digits
digits = datasets.digits()
train, test = (datasets.binarize(split, threshold=0.5).flatten(1) for split in (digits.train, digits.test))


class OrdinaryVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(LATENT_DIM, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 64))
        self.encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 2 * LATENT_DIM))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
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

few = test[:3]
vae.eval().requires_grad_(False)  # fixed, so that NUTS does not take the weights for parameters
pyro.clear_param_store()
mcmc = MCMC(NUTS(vae.model), num_samples=DRAWS, warmup_steps=DRAWS // 2, disable_progbar=True)
mcmc.run(few)
by_guide = diagnostics.posterior_fisher_divergence(vae.model, vae.guide, few, num_samples=10 * NUM_SAMPLES, seed=0)
by_draws = diagnostics.posterior_fisher_divergence_of_draws(vae.model, {"z": mcmc.get_samples()["z"]}, few)
print("relative Fisher divergence of the exact posterior from the prior")
print("image   by NUTS         by the guide   Pareto k")
for i in range(len(few)):
    print(
        f"{i:<8}{by_draws.values[i]:5.2f} +- {by_draws.standard_errors[i]:<7.2f}"
        f"{by_guide.values[i]:5.2f} +- {by_guide.standard_errors[i]:<6.2f}{by_guide.pareto_k[i]:.2f}"
    )

# Both posteriors of the first image in one picture. NUTS is the reference: where the intervals differ the guide is off.
# A dimension with the interval of the prior, -1.9 to 1.9, under NUTS too has collapsed in the *model*: the decoder
# ignores it, and no better guide would bring it back.
dims = {"z": ["latent"], "x": ["pixel"]}
pair = (vae.model, vae.guide)
fits = {
    "NUTS": from_pyro_mcmc(mcmc, model_args=(few,), dims=dims, log_likelihood=False, seed=0),
    "guide": from_pyro_svi(pair, few, num_samples=DRAWS, dims=dims, log_likelihood=False, seed=0),
}
options = {"var_names": ["z"], "coords": {"data": [0]}, "combined": True}
if az.__version__.startswith("0."):
    [axes] = az.plot_forest(list(fits.values()), model_names=list(fits), figsize=(7, 7), hdi_prob=0.94, **options)
    axes.get_legend().set_loc("upper left")
else:
    az.plot_forest(fits, ci_probs=(0.5, 0.94), **options).add_legend("model")
plt.gcf().savefig(OUTPUT / "nuts_forest.png", dpi=120, bbox_inches="tight")

# 2. The eight schools: effects of coaching, each with its own standard error, around a common mean
effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(effects: Tensor, errors: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * offset)
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


mcmc = MCMC(NUTS(schools), num_samples=DRAWS, warmup_steps=DRAWS, disable_progbar=True)
mcmc.run(effects, errors)
fits = {"NUTS": from_pyro_mcmc(mcmc, model_args=(effects, errors), log_likelihood=False, seed=0)}
guides = {}
for name, build in {"mean field": AutoNormal, "joint Normal": AutoMultivariateNormal}.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = guides[name] = build(schools)
    svi = SVI(schools, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.1 ** (1 / STEPS)}), Trace_ELBO())
    for _ in range(STEPS):
        svi.step(effects, errors)
    fits[name] = from_pyro_svi(svi, (effects, errors), num_samples=DRAWS, log_likelihood=False, seed=0)
for name, fit in fits.items():
    sizes = az.ess(fit, var_names=["mu", "tau"])
    print(f"\n{name}: effective sample sizes of {DRAWS} draws", end=": ")
    print(f"mu {float(sizes['mu']):.0f}, tau {float(sizes['tau']):.0f}")
    print(az.summary(fit, var_names=["mu", "tau"], kind="stats"))

# The draws show what the sizes do not: the funnel between the spread of the schools and the effect of a school, and a
# guide that has no room for it.
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharex=True, sharey=True, layout="constrained")
for ax, (name, fit) in zip(axes, fits.items(), strict=True):
    tau = np.asarray(fit["posterior"]["tau"]).reshape(-1)
    theta = np.asarray(fit["posterior"]["theta"]).reshape(len(tau), -1)[:, 0]
    ax.scatter(tau, theta, s=4, alpha=0.5, color="#0072B2")
    ax.set(title=name, xlabel="tau", xscale="log")
axes[0].set_ylabel("effect of the first school")
figure.savefig(OUTPUT / "schools.png", dpi=120)

# Site by site: the divergences of the offsets are a few hundredths of a nat. In a VAE one would worry; here it is what
# eight noisy numbers say, and NUTS gives the offsets nearly the prior's standard deviation.
arguments = (effects, errors)
summary = diagnostics.collapse_summary(schools, guides["mean field"], arguments, collapsed_below=0.05, seed=0)
print(summary[["kl", "kl_se", "verdict"]].to_dataframe().round(3))
kl = diagnostics.kl_per_dimension(schools, guides["mean field"], arguments, site="offset", seed=0)
print("KL of each school's offset (nats):", [round(float(value), 3) for value in kl.values])
for site, note in zip(summary.site.values, summary.note.values, strict=True):
    print(f"{site}: {note or 'nothing left out'}")
offsets = np.asarray(fits["NUTS"]["posterior"]["offset"]).reshape(-1, len(effects))
print("NUTS, standard deviations of the offsets (prior: 1):", [round(float(value), 2) for value in offsets.std(0)])
print(f"Pictures are in {OUTPUT.resolve()}")
