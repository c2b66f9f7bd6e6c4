"""Two latent layers: does the upper one collapse, and what does a guarantee in nats change?

A ``HierarchicalVAE`` with 16 and 8 latent dimensions and Normal noise is fitted to images. All fits have the same
projected decoder of images (kappa = 0.25) and differ in the step between the two layers: a plain decoder, a plain
decoder with a linear path, which has the start of a projected decoder and none of its guarantees, and projected
decoders at several kappa, the nats per dimension of z2 that are guaranteed. The noise of the step is learned, and for
one more fit at kappa = 1 fixed. A ``VAE`` with the same decoder of images is the model without an upper layer. Recipe
and early stopping are those of ``nats.py``, see ``_images.py``.

What is guaranteed is I(z2; z1) in the model. The bottom-up guide's mean KL of z2, E KL(q(z2 | z1) || p(z2)), is about
this information; the KL of the top-down guide, E KL(q(z2 | x) || p(z2)), is about I(z2; x), which is smaller. Three
questions are answered, for each guide:

1. Does the upper layer collapse with plain steps, with a KL below 0.1 nats on held-out images?
2. Does it keep at least the nats that are guaranteed?
3. What does that cost in held-out likelihood, against the best of all fits with this guide?

``PYRO_ILVAE_FULL=1 python experiments/layers.py`` fits three seeds to digits and, fewer steps, to Fashion-MNIST
(``PYRO_ILVAE_DATA`` names its folder, see ``fashion_mnist.py``); without it, one seed to digits.
``PYRO_ILVAE_SMOKE=1`` takes seconds, for tests. Results are kept in experiments/output/layers, and none is made twice;
``PYRO_ILVAE_KEPT=1`` makes the table and the picture of the fits that are there.
"""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pyro
from _images import LATENT_DIM, NUM_JACOBIANS, NUM_SAMPLES, Images, images_of, plain, projected, train
from _sweep import FULL, OUTPUT, SMOKE, Column, Run, Sweep, chosen, median_and_range, print_table
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_ilvae import VAE, HierarchicalVAE, Layer, MLPEncoder, diagnostics, likelihoods

UPPER_DIM = 8
BOTTOM_KAPPA = 0.25
SEEDS = chosen(smoke=[0], short=[0], full=[0, 1, 2])
LEARNING_RATE = 3e-3
ENDS = {"digits": (600, 600, 600), "Fashion-MNIST": (80, 105, 120)}
HIDDEN = {"digits": (32, 32) if SMOKE else (128, 128), "Fashion-MNIST": (256, 256)}
WIDTHS = (16,) if SMOKE else (64, 64)  # of the step between the layers and of its encoder
GUIDES = {"bottom_up": Trace_ELBO, "top_down": TraceMeanField_ELBO}
FIXED = "kappa = 1, fixed noise"
KAPPAS = {f"kappa = {kappa:g}": kappa for kappa in (0.1, 0.25, 0.5, 1.0)} | {FIXED: 1.0}
STEPS = {
    "plain": plain(linear_path=False),
    "plain, linear path": plain(linear_path=True),
    **{name: projected(kappa) for name, kappa in KAPPAS.items()},
}
ONE_LAYER = "no upper layer"
# Fits to Fashion-MNIST take ten times as long.
ROWS = {"digits": [*STEPS], "Fashion-MNIST": ["plain", "kappa = 0.25", "plain, linear path"]}
DATA = ["digits", "Fashion-MNIST"] if FULL else ["digits"]
if SMOKE:
    ENDS = {"digits": (1, 2)}
    STEPS = {name: STEPS[name] for name in ("plain", "plain, linear path", "kappa = 0.25")}
    KAPPAS = {"kappa = 0.25": 0.25}
    ROWS = {"digits": [*STEPS]}
COLLAPSED = 0.1


def build(row: str, guide: str, data: str, part: Images) -> VAE | HierarchicalVAE:
    pyro.clear_param_store()  # it holds the parameters of an earlier model under the same names
    likelihood = likelihoods.Normal(0.3, estimate="learned")
    parts = {
        "decoder": projected(BOTTOM_KAPPA)(LATENT_DIM, part.shape, HIDDEN[data], likelihood),
        "encoder": MLPEncoder(event_shape=part.shape, latent_dim=LATENT_DIM, hidden_features=HIDDEN[data]),
        "likelihood": likelihood,
        "data_size": len(part.train),
    }
    if row == ONE_LAYER:
        return VAE(**parts)
    # z1 starts near unit scale: with kappa nats L^2 + sigma^2 = 1, and the linear path of a plain step has slope sigma.
    scale = math.exp(-KAPPAS[row]) if row in KAPPAS else math.sqrt(0.5)
    noise = likelihoods.Normal(scale, estimate="fixed" if row == FIXED else "learned")
    step = STEPS[row](UPPER_DIM, (LATENT_DIM,), WIDTHS, noise)
    encoder = MLPEncoder(event_shape=LATENT_DIM, latent_dim=UPPER_DIM, hidden_features=WIDTHS)
    return HierarchicalVAE(**parts, layers=[Layer(step, encoder, noise)], inference=guide)


def fit(data: str, guide: str, row: str, seed: int) -> Run:
    pyro.enable_validation(False)
    pyro.set_rng_seed(seed)
    part = images_of(data, "Normal")
    vae = build(row, guide, data, part)
    vae.initialize(part.train, seed=seed)
    objective = TraceMeanField_ELBO if row == ONE_LAYER else GUIDES[guide]
    run = train(vae, part, ENDS[data], LEARNING_RATE, objective)
    pair = (vae.model, vae.guide, part.test)
    bounds = diagnostics.evidence(*pair, num_samples=NUM_SAMPLES, batch_size=100, seed=0)
    run |= {
        "log_likelihood": float(bounds.log_likelihood.mean()),
        "elbo": float(bounds.elbo.mean()),
        "sigma": float(vae.likelihood.noise_scale.detach()),
    }
    for site in getattr(vae, "latent_sites", ("z",)):
        options = {"site": site, "batch_size": 200, "seed": 0}
        kl = diagnostics.kl_per_dimension(*pair, **options, num_samples=20).values.mean(0)
        units = diagnostics.active_units(*pair, **options, num_samples=20)
        floor = diagnostics.guaranteed_information(
            vae, site=None if site == "z" else site, num_samples=NUM_JACOBIANS, seed=0
        )
        own = {"kl": float(kl.sum()), "smallest_kl": float(kl.min()), "active": units.num_active}
        if floor.reason is None:
            own |= {"floor": floor.floor, "by_jacobian": floor.by_jacobian}
        run |= {f"{name}_{'z1' if site == 'z' else site}": value for name, value in own.items()}
    if row != ONE_LAYER:
        run["sigma_z1"] = float(vae.layers[0].noise.noise_scale.detach())
    return run


# Digits come first, because they take a fraction of the time, and then one seed after the other.
FITS: dict[tuple[str, str, str, int], Run] = {}
for data, seed in itertools.product(DATA, SEEDS):
    sweep = Sweep("layers", f"epochs{ENDS[data][-1]}")
    jobs = [(data, guide, row, seed) for guide in reversed(GUIDES) for row in ROWS[data]]
    FITS |= sweep.run(fit, [*jobs, (data, "top_down", ONE_LAYER, seed)])
DATA = [data for data in DATA if any(job[0] == data for job in FITS)]


def runs(data: str, guide: str, row: str) -> list[Run]:
    """The fits that are there, in the order of the seeds."""
    guide = "top_down" if row == ONE_LAYER else guide
    return [FITS[data, guide, row, seed] for seed in SEEDS if (data, guide, row, seed) in FITS]


COLUMNS: dict[str, Column] = {
    "IW log lik. (nats)": median_and_range("log_likelihood", 1),
    "ELBO": median_and_range("elbo", 1),
    "KL of z1": median_and_range("kl_z1", 1),
    "KL of z2": median_and_range("kl_z2", 2),
    "smallest KL in z2": median_and_range("smallest_kl_z2", 3),
    "guaranteed I(z2; z1)": median_and_range("floor_z2", 1),
    "by the Jacobian": median_and_range("by_jacobian_z2", 1),
    "guaranteed I(z1; x)": median_and_range("floor_z1", 1),
    "active in z1": median_and_range("active_z1", 0),
    "active in z2": median_and_range("active_z2", 0),
    "sigma of z1": median_and_range("sigma_z1", 3),
    "seconds": median_and_range("seconds", 0),
}
for data, guide in itertools.product(DATA, GUIDES):
    rows = {row: runs(data, guide, row) for row in [ONE_LAYER, *STEPS] if runs(data, guide, row)}
    print_table(f"{data}, {guide}", rows, COLUMNS)

print()
for data, guide in itertools.product(DATA, GUIDES):
    found = {row: runs(data, guide, row) for row in STEPS if runs(data, guide, row)}
    for row, of_row in found.items():
        kl = [run["kl_z2"] for run in of_row]
        if row in KAPPAS:
            kept = sum(run["kl_z2"] >= run["floor_z2"] for run in of_row)
            verdict = f"z2 keeps what is guaranteed in {kept} of {len(kl)} fits"
        else:
            verdict = f"z2 is collapsed in {sum(value < COLLAPSED for value in kl)} of {len(kl)} fits"
        best = max(np.median([run["log_likelihood"] for run in others]) for others in found.values())
        cost = best - np.median([run["log_likelihood"] for run in of_row])
        print(f"{data}, {guide}, {row}: {verdict}; {cost:.1f} nats below the best median of this guide")

# Held-out KL of z2 against what is guaranteed, for the layers in nats, and the plain steps at the left.
figure, axes = plt.subplots(1, len(DATA), figsize=(5.5 * len(DATA), 4), squeeze=False, layout="constrained")
for ax, data in zip(axes[0], DATA, strict=True):
    for guide, color in zip(GUIDES, ("tab:blue", "tab:orange"), strict=True):
        shown = [row for row in STEPS if runs(data, guide, row)]
        for i, row in enumerate(shown):
            values = [run["kl_z2"] for run in runs(data, guide, row)]
            ax.plot([i] * len(values), values, "o", color=color, label=guide if i == 0 else None)
        ax.set_xticks(range(len(shown)), [row.replace("kappa", "κ").replace(", ", ",\n") for row in shown])
    floors = [(i, UPPER_DIM * KAPPAS[row]) for i, row in enumerate(shown) if row in KAPPAS]
    ax.plot(*zip(*floors, strict=True), "_", color="black", markersize=18, label="guaranteed I(z2; z1)")
    ax.set(title=data, ylabel="KL of z2 on held-out images (nats)", yscale="symlog")
    ax.legend()
figure.savefig(OUTPUT / "layers.png", dpi=120)
print(f"Pictures are in {OUTPUT.resolve()}")
