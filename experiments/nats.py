"""Information in nats: what a decoder guarantees, what it has, and what that costs in likelihood.

Decoders start from the data (``vae.initialize``) and have one budget, which ``_images.py`` says: the plain decoder, the
plain decoder with a linear path, which has the start of a projected decoder and none of its guarantees, LIDVAE, the
paper's composition, and the projected decoder at several kappa, the nats per dimension that are guaranteed for Normal
noise. For the other likelihoods kappa refers to a noise unit and guarantees nothing.

Three questions are answered, seed by seed:

1. Does the projected decoder at its best kappa fit held-out images at least as well as every other decoder, with at
   least 0.3 nats in each dimension? For counts: within 1 percent of the best?
2. Does some kappa up to 0.5 cost more than 1 percent of the best held-out likelihood?
3. Is the information in the model's own data at least what is guaranteed, and how much of it is guaranteed by the
   Jacobian?

``PYRO_ILVAE_FULL=1 python experiments/nats.py`` fits three seeds to digits with three likelihoods and to Fashion-MNIST
(``PYRO_ILVAE_DATA`` names its folder, see ``fashion_mnist.py``) with two. Without the variable one seed is fitted to
digits with Normal noise. ``PYRO_ILVAE_SMOKE=1`` takes seconds, for tests. Results are kept in experiments/output/nats,
and none is made twice; ``PYRO_ILVAE_KEPT=1`` makes tables and pictures of the fits that are there, and no other fit.
"""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pyro
from _images import (
    DECODERS,
    KAPPAS,
    build,
    guaranteed,
    images_of,
    kl_of_dimensions,
    measure,
    own_information,
    train,
)
from _sweep import FULL, OUTPUT, SMOKE, Column, Run, Sweep, chosen, median_and_range, print_table
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pyro_ilvae import plots

SEEDS = chosen(smoke=[0], short=[0], full=[0, 1, 2])
LEARNING_RATE = 3e-3
Panel = tuple[str, str]  # data and likelihood
# The epochs at which each of three learning rates ends at the latest. Fits to digits end earlier by themselves.
ENDS: dict[Panel, tuple[int, ...]] = {
    ("digits", "Normal"): (600, 600, 600),
    ("digits", "Bernoulli"): (600, 600, 600),
    ("digits", "Poisson"): (600, 600, 600),
    ("Fashion-MNIST", "Normal"): (80, 105, 120),
    ("Fashion-MNIST", "Bernoulli"): (80, 105, 120),
}
PANELS = [panel for panel in ENDS if FULL or (panel[0] == "digits" and (SMOKE or panel[1] == "Normal"))]
HIDDEN = {"digits": (32, 32) if SMOKE else (128, 128), "Fashion-MNIST": (256, 256)}
# The compositions cost most: where L1 = L2 says nothing about nats, they are fitted at one constant and at 0.
IN_NATS = [row for row in DECODERS if "L1" not in row]
ROWS = {panel: list(DECODERS) if panel == ("digits", "Normal") else IN_NATS for panel in PANELS}
if SMOKE:
    ENDS = dict.fromkeys(ENDS, (1, 2))
    few = ("plain", "plain, linear path", "projected, kappa = 0", "projected, kappa = 0.25")
    ROWS = {panel: [*few, "composition, L1 = L2 = 0.5"] for panel in PANELS}
MARGIN, ACTIVE = 0.01, 0.3  # a percent of the best likelihood; nats below which a dimension counts as collapsed


def fit(data: str, likelihood: str, decoder: str, seed: int) -> Run:
    pyro.enable_validation(False)
    pyro.set_rng_seed(seed)
    part = images_of(data, likelihood)
    vae = build(decoder, likelihood, part.shape, HIDDEN[data], len(part.train))
    vae.initialize(part.train, seed=seed)
    run = train(vae, part, ENDS[data, likelihood], LEARNING_RATE)
    return {**run, **measure(vae, part), **kl_of_dimensions(vae, part), **guaranteed(vae), **own_information(vae)}


# Digits come first, because they take a fraction of the time, and then one seed after the other.
FITS: dict[tuple[str, str, str, int], Run] = {}
for panel, seed in sorted(itertools.product(PANELS, SEEDS), key=lambda job: (job[0][0] != "digits", job[1])):
    sweep = Sweep("nats", f"epochs{ENDS[panel][-1]}")
    FITS |= sweep.run(fit, [(*panel, row, seed) for row in ROWS[panel]])
PANELS = [panel for panel in PANELS if any(job[:2] == panel for job in FITS)]


def runs(panel: Panel, row: str) -> list[Run]:
    """The fits that are there, in the order of the seeds."""
    return [FITS[(*panel, row, seed)] for seed in SEEDS if (*panel, row, seed) in FITS]


COLUMNS: dict[str, Column] = {
    "IW log lik. (nats)": median_and_range("log_likelihood", 1),
    "ELBO": median_and_range("elbo", 1),
    "KL": median_and_range("kl", 1),
    "smallest KL": median_and_range("smallest_kl", 2),
    "active": median_and_range("active", 0),
    "guaranteed": median_and_range("floor", 1),
    "by the Jacobian": median_and_range("floor_by_jacobian", 1),
    "own data, at least": median_and_range("own_information_low", 1),
    "at most": median_and_range("own_information_high", 1),
    "sigma": median_and_range("noise_scale", 3),
    "L": median_and_range("constant", 3),
    "k-NN": median_and_range("knn", 3),
    "best epoch": median_and_range("best_epoch", 0),
    "epochs": median_and_range("epochs", 0),
    "seconds": median_and_range("seconds", 0),
}
for panel in PANELS:
    print_table(", ".join(panel), {row: runs(panel, row) for row in ROWS[panel] if runs(panel, row)}, COLUMNS)


def label(row: str) -> str:
    """The row without its decoder."""
    return row.removeprefix("projected, ").removeprefix("composition, ").replace("kappa", "κ")


# The three questions. A seed counts where the fits of both plain decoders and of some kappa are there. The best kappa
# is chosen by validation images.
print()
for panel, seed in itertools.product(PANELS, SEEDS):
    of_seed = {row: FITS[(*panel, row, seed)] for row in ROWS[panel] if (*panel, row, seed) in FITS}
    if not {"plain", "plain, linear path"} <= set(of_seed) or not set(KAPPAS) & set(of_seed):
        continue
    missing = [row for row in ROWS[panel] if row not in of_seed]
    value = {row: run["log_likelihood"] for row, run in of_seed.items()}
    top = max(value.values())
    other = max((row for row in value if not row.startswith("projected")), key=lambda row: value[row])
    slack = MARGIN * abs(top) if panel[1] == "Poisson" else 0.0
    tried = [row for row in value if row.startswith("projected")]
    best = max(tried, key=lambda row: of_seed[row]["validation"])
    first = [row for row in tried if value[row] >= value[other] - slack and of_seed[row]["smallest_kl"] >= ACTIVE]
    costs = {KAPPAS[row]: (top - value[row]) / abs(top) for row in tried if KAPPAS.get(row, 1) <= 0.5}
    print(
        f"{', '.join(panel)}, seed {seed}: {other} has {value[other]:.2f} nats, {best}, the best by validation, "
        f"{value[best]:.2f} with a smallest KL of {of_seed[best]['smallest_kl']:.2f}. Goal 1 is met at the best kappa: "
        f"{best in first}; it is met at: {', '.join(map(label, first)) or 'none'}. Cost by kappa: "
        f"{', '.join(f'{kappa:g}: {100 * cost:.1f} %' for kappa, cost in costs.items())}; goal 2 is met: "
        f"{max(costs.values()) <= MARGIN}{'; without ' if missing else ''}{', '.join(missing)}"
    )
certain = {job: run for job, run in FITS.items() if run.get("floor") is not None}
kept = [job for job, run in certain.items() if run["floor_by_jacobian"] <= run["own_information_low"]]
shares = {job: run["floor_by_jacobian"] / run["own_information_high"] for job, run in certain.items()}
print(f"goal 3: the floor by the Jacobian is met by the model's own data in {len(kept)} of {len(certain)} fits")
for panel in PANELS:
    for row in ROWS[panel]:
        found = [share for job, share in shares.items() if job[:3] == (*panel, row)]
        if found:
            print(f"  {', '.join(panel)}, {row}: {', '.join(f'{share:.2f}' for share in found)} of it by the Jacobian")

# The first picture: held-out likelihood, the plain decoders as bands from the lowest to the highest seed. Points are
# hollow for a fit with a collapsed dimension.
COLORS = {"plain": "tab:gray", "plain, linear path": "tab:orange", "projected": "tab:blue", "composition": "tab:green"}
FRAMED = [row for row in ROWS[PANELS[0]] if not row.startswith("plain")]
GROUPS = {row: "projected" if row.startswith("projected") else "composition" for row in FRAMED}


def draw_likelihoods(ax: Axes, panel: Panel) -> None:
    for row in ("plain", "plain, linear path"):
        values = [run["log_likelihood"] for run in runs(panel, row)]
        if values:
            ax.axhspan(min(values), max(values), color=COLORS[row], alpha=0.25, linewidth=0)
            ax.axhline(np.median(values), color=COLORS[row], linewidth=1)
    shown = [row for row in FRAMED if row in ROWS[panel]]
    for i, row in enumerate(shown):
        color = COLORS[GROUPS[row]]
        for run in runs(panel, row):
            face = color if run["smallest_kl"] >= ACTIVE else "white"
            ax.plot(i, run["log_likelihood"], "o", markeredgecolor=color, markerfacecolor=face)
    names = [label(row).replace(" frame", "") for row in shown]
    ax.set_xticks(range(len(shown)), names, rotation=60, ha="right", rotation_mode="anchor")
    ax.axvline(sum(GROUPS[row] == "projected" for row in shown) - 0.5, color="black", linewidth=0.5)
    ax.set(title=", ".join(panel), xlim=(-0.5, len(shown) - 0.5))


width = 1 + 3.2 * len(PANELS)
figure, axes = plt.subplots(1, len(PANELS), figsize=(width, 4.6), layout="constrained", squeeze=False)
for ax, panel in zip(axes[0], PANELS, strict=True):
    draw_likelihoods(ax, panel)
axes[0, 0].set_ylabel("held-out log likelihood (nats per image)")
handles = [Line2D([], [], color=color) for color in list(COLORS.values())[:2]]
handles += [Line2D([], [], color=color, marker="o", linestyle="") for color in list(COLORS.values())[2:]]
handles.append(Line2D([], [], color="black", marker="o", linestyle="", markerfacecolor="white"))
names = [*COLORS, f"hollow: a dimension below {ACTIVE} nats"]
figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
figure.savefig(OUTPUT / "nats_likelihood.png", dpi=120)

# The second picture: what is guaranteed and what there is, for digits with Normal noise.
shown = {row: runs(PANELS[0], row) for row in KAPPAS if len(runs(PANELS[0], row)) == len(SEEDS)}


def by_seed(name: str) -> list[list[float]]:
    """The measure in an array of shape (seeds, kappas)."""
    return [[fits[i][name] for fits in shown.values()] for i in range(len(SEEDS))]


ax = plots.plot_guaranteed_information(
    [KAPPAS[row] for row in shown],
    {"floor": by_seed("floor"), "by_jacobian": by_seed("floor_by_jacobian")},
    information=by_seed("own_information_low"),
    kl=by_seed("kl"),
)
ax.set_title("digits, Normal noise\ninformation in the model's own data, KL of held-out images", fontsize="medium")
ax.figure.savefig(OUTPUT / "nats_guaranteed.png", dpi=120, bbox_inches="tight")
print(f"Pictures are in {OUTPUT.resolve()}")
