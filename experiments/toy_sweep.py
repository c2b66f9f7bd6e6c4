"""Two clusters that overlap: Figures 1, 2 and 4 of Kinoshita et al. (2023), and the README's table of collapse.

The data are an equal mixture of two Gaussians around (0, 0) and (10, 10). As their spread sigma grows the clusters
overlap, and an autoencoder does better to call the spread noise: the posterior falls onto the prior, and the clusters
are lost. The inverse Lipschitz constant forbids that. The models are the paper's: VAE, LIDVAE and IL-LIDVAE, and
the same three with a mixture of two Gaussians as prior (GMVAE, LIDMVAE, IL-LIDMVAE), which is `MixtureVAE` with another
decoder.

One recipe serves all of them, and nothing is tuned to any: networks of two hidden layers of 32, Adam at a learning
rate that decays from 0.01 to 0.001, a Normal likelihood whose noise is learned and starts at the standard deviation of
the data, and the start from data, ``initialize(x)``. Each L is given as the constant L1 = L2 of the paper's maps, or in
nats per dimension relative to the learned noise.

The fits of all seeds are trained side by side by ``torch.func.vmap``: a step of ten fits takes 4 to 16 ms of one core,
where ten steps of ``SVI`` take 25 to 130 and ten compiled steps of ``GraphSVI`` 8 to 15. Pyro's handlers cannot run
under it, so the two losses are written out here: ``TraceMeanField_ELBO`` for the VAE and ``TraceEnum_ELBO`` for the
mixture. The library makes all measures.

``PYRO_ILVAE_FULL=1 python experiments/toy_sweep.py`` makes all 1,320 fits (6 spreads, 22 models, 10 seeds) in a few
hours. Without the variable 132 fits (3 spreads, 2 seeds) take some minutes. ``PYRO_ILVAE_SMOKE=1`` takes seconds, for
tests. Results are kept in experiments/output/toy_sweep, and none is made twice.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from _sweep import OUTPUT, Column, Run, Sweep, chosen, median_and_range, print_table
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ilvae import (
    VAE,
    InverseLipschitzDecoder,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    Nats,
    datasets,
    diagnostics,
    likelihoods,
    plots,
)

SEEDS = list(range(chosen(smoke=1, short=2, full=10)))
SIGMAS = chosen(smoke=[7.5], short=[1.0, 5.0, 7.5], full=[0.5, 1.0, 2.5, 5.0, 7.5, 10.0])
STEPS = chosen(smoke=20, short=2000, full=2000)
NUM_SAMPLES = chosen(smoke=10, short=200, full=200)
HIDDEN, BATCH_SIZE, LEARNING_RATE = (32, 32), 200, 1e-2
# The decoders by name: whether a plain one has a linear path; L1 = L2, as the paper names the constant, where the
# decoder's own is the square; nats per dimension.
PLAIN = {"plain": False, "plain, linear path": True}
CONSTANTS = {f"L1 = L2 = {value:g}": value for value in (0.0, 0.5, 1.0, 2.0, 5.0)}
NATS = {f"{value:g} nats": value for value in (0.25, 0.5, 1.0, 2.0)}
FAMILIES = {"VAE": "one prior N(0, I)", "MVAE": "mixture prior"}
MODELS = [(family, name) for family in FAMILIES for name in (*PLAIN, *CONSTANTS, *NATS)]
SWEEP = Sweep("toy_sweep", f"steps{STEPS}_seeds{len(SEEDS)}")


def build_decoder(name: str, likelihood: likelihoods.Normal) -> nn.Module:
    if name in PLAIN:
        return MLPDecoder(latent_dim=2, event_shape=2, hidden_features=HIDDEN, linear_path=PLAIN[name])
    constant = (CONSTANTS[name], CONSTANTS[name]) if name in CONSTANTS else Nats(NATS[name], likelihood)
    return InverseLipschitzDecoder(latent_dim=2, event_shape=2, inverse_lipschitz=constant, map_features=HIDDEN)


def build(family: str, name: str, x: Tensor) -> VAE | MixtureVAE:
    likelihood = likelihoods.Normal(float(x.std()), estimate="learned")
    decoder = build_decoder(name, likelihood)
    encoder = MLPEncoder(event_shape=2, latent_dim=2, hidden_features=HIDDEN)
    if family == "MVAE":
        return MixtureVAE(decoder, encoder, likelihood, num_components=2, data_size=len(x))
    return VAE(decoder, encoder, likelihood, data_size=len(x))


class Loss(nn.Module):
    """The negative ELBO per datum of a model, without Pyro's handlers: one draw of z for each component.

    The guide of the mixture is its factor form, see ``MixtureVAE``.
    """

    def __init__(self, model: VAE | MixtureVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        model, x = self.model, x[:, None]
        a, b = model.encoder(x)
        if isinstance(model, MixtureVAE):
            m, s = model.component_loc, model.component_log_scale.exp()
            log_q = Normal(m, s.hypot(b)).log_prob(a).sum(-1).log_softmax(-1)
            share = (s / s.hypot(b)) ** 2
            q, p = Normal(m + share * (a - m), share.sqrt() * b), Normal(m, s)
            log_prior = -math.log(model.num_components)
        else:
            q, p = Normal(a, b), Normal(torch.zeros_like(a), 1.0)
            log_q, log_prior = torch.zeros_like(a[..., 0]), 0.0
        z = q.loc + q.scale * noise
        drawn = isinstance(model, MixtureVAE)  # as the two losses of Pyro have it
        kl = (q.log_prob(z) - p.log_prob(z) if drawn else kl_divergence(q, p)).sum(-1)
        log_likelihood = model.likelihood(model.decoder(z)).log_prob(x).sum(-1)
        return -(log_q.exp() * (log_likelihood - kl + log_prior - log_q)).sum(-1).mean()


def train(family: str, name: str, sigma: float) -> list[tuple[VAE | MixtureVAE, Tensor, Tensor]]:
    """For each seed the fitted model, its data and their clusters."""
    data = [datasets.gaussian_mixture(1000, sigma, seed=seed) for seed in SEEDS]
    models = []
    for seed, (x, _) in zip(SEEDS, data, strict=True):
        pyro.set_rng_seed(seed)
        models.append(build(family, name, x))
        models[-1].initialize(x)
    losses = [Loss(model) for model in models]
    parameters, buffers = stack_module_state(losses)

    def loss_of_one(parameters: Any, buffers: Any, x: Tensor, noise: Tensor) -> Tensor:
        return functional_call(losses[0], (parameters, buffers), (x, noise))

    optimizer = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE, fused=True)
    rows, all_x = torch.arange(len(SEEDS))[:, None], torch.stack([x for x, _ in data])
    draws = getattr(models[0], "num_components", 1)
    gradient: Callable[..., dict[str, Tensor]] | None = None
    with pyro.validation_enabled(False):
        for step in range(STEPS):
            x = all_x[rows, torch.randint(all_x.shape[1], (len(SEEDS), BATCH_SIZE))]
            noise = torch.randn(len(SEEDS), BATCH_SIZE, draws, 2)
            now = {key: value.detach() for key, value in parameters.items()}
            if gradient is None:  # recorded once, which halves the time of a step
                gradient = make_fx(vmap(grad(loss_of_one)))(now, buffers, x, noise)
            for key, value in gradient(now, buffers, x, noise).items():
                parameters[key].grad = value
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.1 ** (step / STEPS)
            optimizer.step()
    with torch.no_grad():
        for number, loss in enumerate(losses):
            for key, value in loss.named_parameters():
                value.copy_(parameters[key][number])
    return [(model, *pair) for model, pair in zip(models, data, strict=True)]


def measured(model: VAE | MixtureVAE, x: Tensor, labels: Tensor) -> Run:
    """Accuracy, divergences of the posterior from the prior, evidence.

    The accuracy takes the most probable component of each datum, matched to the clusters. A VAE has no components:
    k-means finds two among its posterior means. The relative Fisher divergence is estimated for the *exact* posterior,
    by importance sampling from the guide; ``trusted`` is the fraction of data whose Pareto k allows that.
    """
    pyro.clear_param_store()
    pair = (model.model, model.guide)
    evidence = diagnostics.evidence(*pair, x, num_samples=NUM_SAMPLES, seed=0)
    fisher = diagnostics.posterior_fisher_divergence(*pair, x[:200], sites=["z"], num_samples=NUM_SAMPLES, seed=0)
    kl = {"z": diagnostics.kl_divergence(*pair, x, site="z", num_samples=NUM_SAMPLES, seed=0).values}
    if isinstance(model, MixtureVAE):
        found = model.predict_component(x)
        kl["y"] = diagnostics.kl_divergence(*pair, x, site="y").values
    else:
        found = torch.as_tensor(KMeans(2, n_init=10, random_state=0).fit_predict(model.encode(x)[0].numpy(force=True)))
    return {
        "accuracy": diagnostics.cluster_agreement(labels, found).accuracy,
        "best": float(((x.sum(1) > 10).long() == labels).float().mean()),
        "kl_y": float(kl["y"].mean()) if "y" in kl else None,
        "kl_z": float(kl["z"].mean()),
        "fisher": float(fisher.values.mean()),
        "trusted": float((fisher.pareto_k < 0.7).float().mean()),
        "elbo": float(evidence.elbo.mean()),
        "log_likelihood": float(evidence.log_likelihood.mean()),
        "noise": model.likelihood.noise_scale.item(),  # type: ignore[attr-defined]
        "constant": getattr(model.decoder, "inverse_lipschitz", None),
    }


def fit(family: str, name: str, sigma: float) -> Run:
    """The measures of the fits of all seeds."""
    return {"runs": [measured(*fitted) for fitted in train(family, name, sigma)]}


JOBS = [(*model, sigma) for model in MODELS for sigma in SIGMAS]
RESULTS: dict[tuple[Any, ...], list[Run]] = {job: result["runs"] for job, result in SWEEP.run(fit, JOBS).items()}

# The tables: KL, ELBO and log likelihood in nats per datum.
COLUMNS: dict[str, Column] = {
    "accuracy": median_and_range("accuracy", 3),
    "KL of y": median_and_range("kl_y", 2),
    "KL of z": median_and_range("kl_z", 2),
    "Fisher": median_and_range("fisher", 2),
    "trusted": median_and_range("trusted", 2),
    "collapsed (Fisher < 0.01)": lambda runs: f"{sum(run['fisher'] < 0.01 for run in runs)} of {len(runs)}",
    "ELBO": median_and_range("elbo", 3),
    "IW log lik.": median_and_range("log_likelihood", 3),
}
for sigma in SIGMAS:
    best = datasets.gaussian_mixture_accuracy(sigma)
    rows = {f"{family}, {name}": RESULTS[family, name, sigma] for family, name in MODELS}
    print_table(f"sigma = {sigma:g}, best accuracy {best:.3f}", rows, COLUMNS)


# The claims, counted over all spreads and seeds: in how many sweeps over L the divergence rises with each step of L,
# how many fits collapse at each L, and how many come within 0.03 of the best classifier's accuracy on the same data.
# That classifier knows both clusters.
def values(family: str, name: str, measure: str) -> NDArray[np.float64]:
    """A row for each seed and a column for each sigma."""
    return np.array([[run[measure] for run in RESULTS[family, name, sigma]] for sigma in SIGMAS]).T


for family in FAMILIES:
    print()
    for unit, names in {"L1 = L2": CONSTANTS, "nats": NATS}.items():
        rising = (np.diff([values(family, name, "fisher") for name in names], axis=0) > 0).all(0)
        print(f"{family}: the divergence rises with each step of {unit} in {rising.sum()} of {rising.size} sweeps")
    for name in (*PLAIN, *CONSTANTS, *NATS):
        collapsed = values(family, name, "fisher") < 0.01
        near = values(family, name, "accuracy") > values(family, name, "best") - 0.03
        print(
            f"  {name:>18}: {collapsed.sum()} of {collapsed.size} collapsed; near the best accuracy, by sigma: "
            f"{near.sum(0).tolist()}"
        )


# Figure 1: a point for each fit and a line through the medians. The dashed line is the expected accuracy of the best
# classifier; on 1,000 data it varies by a few hundredths.
def draw(names: Sequence[str], file: str) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for row, (family, title) in zip(axes, FAMILIES.items(), strict=True):
        panels = {
            f"{label}, {title}": {name: values(family, name, measure) for name in names}
            for measure, label in (("accuracy", "accuracy"), ("fisher", "relative Fisher divergence"))
        }
        plots.plot_sweep(
            SIGMAS,
            panels,
            xlabel="standard deviation sigma of each cluster",
            ylabels=["clustering accuracy", "posterior || prior (1 / unit of z squared)"],
            axes=row,
        )
        grid = np.linspace(min(SIGMAS), max(SIGMAS), 100)
        row[0].plot(grid, [datasets.gaussian_mixture_accuracy(sigma) for sigma in grid], color="gray", linestyle="--")
        place = 3.5, datasets.gaussian_mixture_accuracy(3.5)
        row[0].annotate("best classifier", place, xytext=(4, 4), textcoords="offset points", color="gray")
        row[1].set_yscale("log")
    figure.savefig(OUTPUT / file, dpi=120)


draw([*PLAIN, *CONSTANTS], "toy_sweep.png")
draw([*PLAIN, *NATS], "toy_sweep_nats.png")

# Figures 2 and 4: posterior means and 2-sigma ellipses of 200 data at sigma = 7.5, colored by cluster, for the first
# seed; dashed, the 2-sigma contours of the prior. A collapsed posterior is the prior, whatever the datum.
SHOWN = ["plain", "L1 = L2 = 0", "L1 = L2 = 1", "L1 = L2 = 5"]
torch.set_num_threads(1)  # as in the sweep, so that the fits are the same
figure, axes = plt.subplots(2, len(SHOWN), figsize=(4 * len(SHOWN), 8), layout="constrained")
for row, (family, title) in zip(axes, FAMILIES.items(), strict=True):
    for ax, name in zip(row, SHOWN, strict=True):
        model, x, labels = train(family, name, 7.5)[0]
        prior: bool | tuple[Tensor, Tensor] = True
        if isinstance(model, MixtureVAE):
            prior = (model.component_loc, model.component_log_scale.exp())
        plots.plot_posteriors(*model.encode(x[:200]), labels=labels[:200], prior=prior, ax=ax)
        ax.set_title(f"{title}, {name}")
figure.savefig(OUTPUT / "toy_posteriors.png", dpi=120)
print(f"\nPictures are in {OUTPUT.resolve()}")
