"""The remedies of collapse side by side: what information costs in likelihood, and how close controllers land.

Each remedy is fitted at several settings, and each setting has an amount of information between data and latent
variable and a held-out log likelihood. All decoders start from the data and have one budget, which ``_images.py`` says.
Remedies have the plain decoder with a linear path, which is a remedy itself and shares the start of the projected
decoder.

Three questions are answered, seed by seed:

1. At 5, 10 and 20 nats of information, which remedy has the highest held-out likelihood, between its settings? Is any
   more than 1 percent above the projected decoder?
2. How close do controllers land: is the total KL within 10 percent of its target, from L = 0 and from L = 10?
3. What becomes of each remedy when the noise scale is fixed far too large?

``PYRO_ILVAE_FULL=1 python experiments/remedies.py`` fits three seeds to digits, Fashion-MNIST and first names
(``PYRO_ILVAE_DATA`` names their folder). Without the variable one seed of some remedies is fitted to digits.
``PYRO_ILVAE_SMOKE=1`` takes seconds, for tests. Results are kept in experiments/output/remedies, and none is made
twice; ``PYRO_ILVAE_KEPT=1`` makes tables and pictures of the fits that are there.
"""

import itertools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _remedy_fits import ENDS, LANDING_EPOCHS, NAMES_EPOCHS, TOO_LARGE, fit, fit_to_target, fit_with_noise
from _sweep import FULL, OUTPUT, SMOKE, Run, Sweep, chosen, median_and_range, print_table

SEEDS = chosen(smoke=[0], short=[0], full=[0, 1, 2])
Panel = tuple[str, str]  # data and likelihood
PANELS: list[Panel] = [
    ("digits", "Normal"),
    ("digits", "Poisson"),
    ("Fashion-MNIST", "Normal"),
    ("Fashion-MNIST", "Bernoulli"),
    ("names", "Categorical"),
]
if not FULL:
    PANELS = PANELS[:1]

# The settings by remedy, for images of 16 latent dimensions.
IMAGES: dict[str, list[float]] = {
    "plain": [0],
    "linear path": [0],
    "projected": [0, 0.1, 0.25, 0.5, 1],  # kappa
    "beta": [0.25, 0.5, 2, 4, 8],  # the weight of the KL
    "free bits": [0.25, 0.5, 1, 2],  # nats of each dimension
    "PI control": [5, 10, 20],  # nats of all dimensions, by beta
    "controlled": [5, 10, 20],  # nats of all dimensions, by L and beta
    "delta-VAE": [4, 8, 16],  # delta, in nats of all dimensions
    "BN-VAE": [0.5, 1, 2],  # gamma
    "free bits of all": [10, 20],  # nats of all dimensions
    "latent reconstruction": [0.5, 5, 50],  # the weight, in nats per squared unit of z
    "aggressive inference": [10],  # the largest number of steps of the guide between two of the model
    "annealing": [1],
    "cyclical annealing": [1],
}
# The same for names of 8 latent dimensions; of the projected decoder, L.
NAMES: dict[str, list[float]] = {
    "plain": [0],
    "linear path": [0],
    "projected": [0, 0.65, 1.1, 1.8, 2.5, 3.5],
    "beta": [0.1, 0.25, 0.5],
    "free bits": [0.25, 0.5, 1],
    "PI control": [3, 5, 10],
    "controlled": [3, 5, 10],
    "delta-VAE": [2, 4, 8],
    "BN-VAE": [0.5, 1, 2],
    "free bits of all": [4, 8],
    "aggressive inference": [10],
    "annealing": [1],
    "cyclical annealing": [1],
}
if SMOKE:
    FEW = ("projected", "controlled", "delta-VAE", "aggressive inference", "annealing")
    IMAGES = {family: IMAGES[family][:1] for family in FEW}
elif not FULL:
    IMAGES = {family: IMAGES[family] for family in ("linear path", "beta", "free bits", "projected", "controlled")}


# How close controllers land. Targets are nats per dimension, of 16 dimensions together.
TARGETS = chosen(smoke=[1.0], short=[0.5, 1.0], full=[0.25, 0.5, 1.0, 2.0])
STARTS = chosen(smoke=[0.0], short=[0.0, 10.0], full=[0.0, 10.0])
LANDING: list[Panel] = [("digits", "Normal"), ("digits", "Poisson"), ("Fashion-MNIST", "Bernoulli")]
LANDING = [panel for panel in LANDING if panel in PANELS]


# The remedies with a noise scale of 1 in place of about 0.2, at a setting in the middle.
WITH_NOISE = {family: settings[len(settings) // 2] for family, settings in IMAGES.items()}
WITH_NOISE["projected"] = 0.5


# Digits come first, because they take a fraction of the time, and then one seed after the other.
FITS: dict[tuple[Any, ...], Run] = {}
ON_TARGET: dict[tuple[Any, ...], Run] = {}
NOISY: dict[tuple[Any, ...], Run] = {}


def sweep_of(panel: Panel) -> Sweep:
    epochs = NAMES_EPOCHS if panel[0] == "names" else ENDS[panel[0]][-1]
    return Sweep("remedies", f"epochs{epochs}")


for panel, seed in sorted(itertools.product(PANELS, SEEDS), key=lambda job: (job[0][0] != "digits", job[1])):
    settings = NAMES if panel[0] == "names" else IMAGES
    rows = [(*panel, family, setting, seed) for family, values in settings.items() for setting in values]
    FITS |= sweep_of(panel).run(fit, rows)
    if panel in LANDING:
        goals = itertools.product(TARGETS, STARTS)
        sweep = Sweep("remedies", f"epochs{LANDING_EPOCHS[panel[0]]}")
        ON_TARGET |= sweep.run(fit_to_target, [(*panel, target, start, seed) for target, start in goals])
    if panel == ("digits", "Normal"):
        NOISY |= sweep_of(panel).run(
            fit_with_noise, [(family, setting, seed) for family, setting in WITH_NOISE.items()]
        )

COLUMNS = {
    "IW log lik. (nats)": median_and_range("log_likelihood", 2),
    "information at most (nats)": median_and_range("information_at_most", 2),
    "KL": median_and_range("kl", 2),
    "smallest KL": median_and_range("smallest_kl", 3),
    "active": median_and_range("active", 0),
    "beta": median_and_range("beta", 2),
    "L": median_and_range("constant", 2),
    "seconds": median_and_range("seconds", 0),
}
LANDING_COLUMNS = {
    "KL, training data": median_and_range("train_kl", 2),
    "KL, held-out data": median_and_range("test_kl", 2),
    "off by": median_and_range("off", 3),
    "largest swing": median_and_range("swing", 3),
    "L": median_and_range("constant", 3),
    "beta": median_and_range("beta", 2),
}
# At these amounts of information remedies are compared.
AMOUNTS = [5.0, 10.0, 20.0]


def settings_of(panel: Panel) -> dict[str, list[float]]:
    return NAMES if panel[0] == "names" else IMAGES


def named(family: str, setting: float) -> str:
    return family if len(IMAGES[family]) == 1 else f"{family}, {setting:g}"


def runs(panel: Panel, family: str, setting: float) -> list[Run]:
    """The fits that are there, in the order of the seeds."""
    return [FITS[(*panel, family, setting, seed)] for seed in SEEDS if (*panel, family, setting, seed) in FITS]


def points(panel: Panel, family: str, seed: int) -> list[tuple[float, float]]:
    """Information and likelihood of the settings of a remedy, by information."""
    found = [FITS.get((*panel, family, setting, seed)) for setting in settings_of(panel)[family]]
    return sorted((run["information_at_most"], run["log_likelihood"]) for run in found if run is not None)


def at(panel: Panel, family: str, seed: int, amount: float) -> float | None:
    """The likelihood on the line between two settings that enclose an amount of information; None without them."""
    pairs = points(panel, family, seed)
    if not pairs or not pairs[0][0] <= amount <= pairs[-1][0]:
        return None
    return float(np.interp(amount, *zip(*pairs, strict=True)))


for panel in PANELS:
    every = [(family, setting) for family, values in settings_of(panel).items() for setting in values]
    print_table(", ".join(panel), {named(*row): runs(panel, *row) for row in every if runs(panel, *row)}, COLUMNS)

print("\nHeld-out log likelihood at the same information, in nats, between two settings of a remedy:")
for panel, amount in itertools.product(PANELS, AMOUNTS):
    found = {family: [at(panel, family, seed, amount) for seed in SEEDS] for family in settings_of(panel)}
    complete = {family: values for family, values in found.items() if None not in values}
    ranked = sorted(complete.items(), key=lambda item: -np.median(item[1]))
    words = [f"{family} {np.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" for family, values in ranked]
    print(f"{', '.join(panel)}, {amount:g} nats: {'; '.join(words) or 'no remedy with settings on both sides'}")

if ON_TARGET:
    off = [abs(run["off"]) for run in ON_TARGET.values()]
    close = sum(value <= 0.1 for value in off)
    print(
        f"\nControllers: {close} of {len(off)} within 10 percent of the target, the farthest {100 * max(off):.0f} off"
    )
    cases = dict.fromkeys(job[:4] for job in ON_TARGET)
    landed = {case: [run for job, run in ON_TARGET.items() if job[:4] == case] for case in cases}
    rows = {f"{', '.join(case[:2])}: {case[2]:g} from L = {case[3]:g}": found for case, found in landed.items()}
    print_table("target (nats per dimension) and L at the start", rows, LANDING_COLUMNS)
if NOISY:
    kept = {row: [NOISY[(*row, seed)] for seed in SEEDS if (*row, seed) in NOISY] for row in WITH_NOISE.items()}
    print_table(f"digits, noise scale {TOO_LARGE:g}", {named(*row): found for row, found in kept.items()}, COLUMNS)

# The picture: each fit is a point, to the right the information and upwards the likelihood. A line joins the medians of
# a remedy's settings; the projected decoder's line is bold. Settings far below the rest are cut off.
FAMILIES = list(IMAGES)
figure, axes = plt.subplots(1, len(PANELS), figsize=(4.2 * len(PANELS) + 2.5, 4.2), layout="constrained", squeeze=False)
for ax, panel in zip(axes[0], PANELS, strict=True):
    heights = []
    for family, values in settings_of(panel).items():
        i = FAMILIES.index(family)
        style = {"color": f"C{i % 10}", "marker": "osD^vPXd<>*h8p"[i]}
        middles = []
        for setting in values:
            pairs = np.array(
                [(run["information_at_most"], run["log_likelihood"]) for run in runs(panel, family, setting)]
            )
            if len(pairs):
                ax.scatter(*pairs.T, s=18, alpha=0.5, linewidth=0, **style)
                middles.append(np.median(pairs, axis=0))
        if middles:
            heights += [height for _, height in middles]
            bold = family in ("projected", "controlled")
            ax.plot(
                *np.array(sorted(map(tuple, middles))).T,
                markersize=4,
                linewidth=2.5 if bold else 1,
                label=family,
                **style,
            )
    low, high = np.quantile(heights, [0.1, 1.0])
    ax.set_ylim(low - 0.3 * (high - low), high + 0.1 * (high - low))
    ax.set(title=", ".join(panel), xlabel="information at most (nats)")
axes[0, 0].set_ylabel("held-out log likelihood (nats)")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
figure.savefig(OUTPUT / "remedies.png", dpi=120)
print(f"The picture is in {OUTPUT.resolve()}")
