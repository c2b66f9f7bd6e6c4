"""Ten clusters of Fashion-MNIST without labels: the README's table of mixtures and its picture.

Mixtures of ten components, with several decoders, Normal noise or binary pixels, and two starts of the components. What
the decoders cost and bring with one prior is in ``nats.py``.

``PYRO_ILVAE_DATA`` names a folder with the files of Fashion-MNIST, or with a part of it, as used for the README.
Without it they are downloaded once, and without a network scikit-learn's digits take their place.

``PYRO_ILVAE_FULL=1 python experiments/fashion_mnist.py`` fits three seeds to all images for 30 epochs. Without the
variable one seed is fitted to at most 5,000 images for 15 epochs. ``PYRO_ILVAE_SMOKE=1`` takes seconds, for tests.
Results are kept in experiments/output/fashion_mnist, and none is made twice.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from _images import DECODERS, LIKELIHOODS, images, measure
from _sweep import FULL, OUTPUT, SMOKE, Column, Run, Sweep, chosen, median_and_range, print_table
from pyro.infer import ELBO, SVI, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_ilvae import VAE, JointOptim, MixtureVAE, MLPEncoder, datasets, diagnostics, plots

DATA = datasets.digits() if SMOKE else datasets.fashion_mnist()
if not FULL:
    DATA = datasets.ImageData(DATA.name, *(part[:5000] for part in DATA[1:3]), *(part[:1000] for part in DATA[3:]))
SEEDS = chosen(smoke=[0], short=[0], full=[0, 1, 2])
EPOCHS = chosen(smoke=1, short=10, full=20)
HIDDEN = (32, 32) if SMOKE else (512, 512)
LATENT_DIM, NUM_COMPONENTS, BATCH_SIZE, LEARNING_RATE = 16, 10, 128, 1e-3
NUM_TRAIN = len(images(DATA, "Normal").train)
SWEEP = Sweep("fashion_mnist", f"{DATA.name}_{len(DATA.train)}_{len(DATA.test)}_epochs{EPOCHS}")
print(f"{DATA.name}: {len(DATA.train)} training and {len(DATA.test)} test images of {DATA.train.shape[1:]}")


def train(model: VAE | MixtureVAE, x: Tensor, epochs: int, elbo: ELBO) -> None:
    optimizer = JointOptim(torch.optim.Adam, {"lr": LEARNING_RATE, "fused": True})
    svi = SVI(model.model, model.guide, optimizer, elbo)
    for epoch in range(epochs):
        for batch in x[torch.randperm(len(x))].split(BATCH_SIZE):
            svi.step(batch)
        # Half of the epochs at the full rate, then down to a tenth of it.
        for group in optimizer.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.1 ** max(0.0, 2 * (epoch + 1) / epochs - 1)


# The mixture of ten components. Components that start at random die: all images go to the few that are useful first.
# What helps costs little: train decoder and encoder with the one prior N(0, I), put the components where k-means finds
# clusters of the codes, then train everything together. The component y is summed out of the model, so that an image
# passes the decoder once and not ten times. Nothing here sees a label: the configurations are compared by evidence, and
# labels are used at the end, to measure.
Mixture = tuple[str, str, int, str]  # decoder, likelihood, latent dimension, start of the components


def build_mixture(decoder: str, likelihood: str, latent_dim: int) -> MixtureVAE:
    pyro.clear_param_store()  # it holds the parameters of an earlier model under the same names
    shape, noise = tuple(DATA.train.shape[1:]), LIKELIHOODS[likelihood]()
    return MixtureVAE(
        DECODERS[decoder](latent_dim, shape, HIDDEN, noise),
        MLPEncoder(event_shape=shape, latent_dim=latent_dim, hidden_features=HIDDEN),
        noise,
        NUM_COMPONENTS,
        data_size=NUM_TRAIN,
        enumerate_in="model",
    )


def fit_mixture(decoder: str, likelihood: str, latent_dim: int, start: str, seed: int) -> Run:
    """Measures of held-out images, and the state of the model in a file beside them.

    Accuracy, purity, adjusted Rand index and normalized mutual information compare the most probable component with
    the label; for the accuracy, components and labels are matched one to one. The effective number of components is the
    exponential of the entropy of the aggregate q(y). The mean of KL(q(y | x) || pi) splits into KL(q(y) || pi),
    ``usage_kl``, and the mutual information of x and y. The measure ``kl`` is the KL of z from the whole mixture.
    """
    pyro.set_rng_seed(seed)
    part = images(DATA, likelihood)
    began = time.perf_counter()
    mixture = build_mixture(decoder, likelihood, latent_dim)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    if start == "k-means":
        vae = VAE(mixture.decoder, mixture.encoder, mixture.likelihood, data_size=NUM_TRAIN)
        vae.initialize(part.train, seed=seed)
        train(vae, part.train, EPOCHS // 2, TraceMeanField_ELBO())
        pyro.clear_param_store()
        mixture.initialize_components(part.train, seed=seed)
        train(mixture, part.train, EPOCHS, elbo)
    else:
        mixture.initialize(part.train, seed=seed)
        train(mixture, part.train, EPOCHS + EPOCHS // 2, elbo)
    seconds = time.perf_counter() - began
    torch.save(mixture.state_dict(), SWEEP.file(decoder, likelihood, latent_dim, start, seed, suffix=".pt"))
    probs = mixture.predict_component(part.test, batch_size=500)
    usage = diagnostics.component_usage(probs)
    agreement = diagnostics.cluster_agreement(DATA.test_labels, probs)
    return {
        "seconds": seconds,
        **measure(mixture, part),
        "accuracy": agreement.accuracy,
        "purity": agreement.purity,
        "adjusted_rand": agreement.adjusted_rand,
        "nmi": agreement.normalized_mutual_information,
        "usage": usage.usage.tolist(),
        "effective_number": usage.effective_number,
        "kl_y": usage.kl + usage.mutual_information,
        "usage_kl": usage.kl,
    }


def restored(row: Mixture, seed: int) -> MixtureVAE:
    mixture = build_mixture(*row[:3])
    mixture.load_state_dict(torch.load(SWEEP.file(*row, seed, suffix=".pt")))
    return mixture


MIXTURES: list[Mixture] = [
    ("projected, kappa = 0.25", "Normal", LATENT_DIM, "random"),
    ("plain, linear path", "Normal", LATENT_DIM, "k-means"),
    ("LIDVAE", "Normal", LATENT_DIM, "k-means"),
    ("composition, kappa = 0.25", "Normal", LATENT_DIM, "k-means"),
    ("projected, kappa = 0.25", "Normal", LATENT_DIM, "k-means"),
    ("projected, kappa = 0.25", "Normal", 2 * LATENT_DIM, "k-means"),
    ("projected, kappa = 0.25", "Bernoulli", LATENT_DIM, "k-means"),
]
MIXTURE_FITS = SWEEP.run(fit_mixture, [(*row, seed) for seed in SEEDS for row in MIXTURES])
MIXTURE_COLUMNS: dict[str, Column] = {
    "accuracy": median_and_range("accuracy", 3),
    "purity": median_and_range("purity", 3),
    "ARI": median_and_range("adjusted_rand", 3),
    "NMI": median_and_range("nmi", 3),
    "components": median_and_range("effective_number", 1),
    "smallest share": median_and_range(lambda run: min(run["usage"]), 3),
    "KL of y": median_and_range("kl_y", 2),
    "usage KL": median_and_range("usage_kl", 2),
    "IW log lik. (nats)": median_and_range("log_likelihood", 1),
    "ELBO": median_and_range("elbo", 1),
    "KL": median_and_range("kl", 1),
    "active": median_and_range("active", 0),
    "information (nats)": median_and_range("information", 2),
    "k-NN": median_and_range("knn", 3),
    "seconds": median_and_range("seconds", 0),
}
mixture_rows = {", ".join(map(str, row)): [MIXTURE_FITS[(*row, seed)] for seed in SEEDS] for row in MIXTURES}
print_table("mixture", mixture_rows, MIXTURE_COLUMNS)

# The picture is of the mixture with Normal noise that is best by evidence, whatever its accuracy. It is chosen by the
# likelihood of the held-out images themselves, but without their labels.
NORMAL = [row for row in MIXTURES if row[1] == "Normal"]
best = max(NORMAL, key=lambda row: np.median([MIXTURE_FITS[(*row, seed)]["log_likelihood"] for seed in SEEDS]))
print(f"\nbest by evidence: {', '.join(map(str, best))}")
mixture = restored(best, SEEDS[0])
pyro.set_rng_seed(0)
samples = torch.stack([mixture.sample_component(y, 10, mean=True) for y in range(NUM_COMPONENTS)])
shown = DATA.test[:10]
figure, axes = plt.subplots(2, 1, figsize=(6, 7.6), layout="constrained", height_ratios=[10, 2.2])
plots.plot_class_samples(samples.clamp(0, 1), ax=axes[0])
axes[0].set(title="samples, a row for each component", ylabel="component")
plots.plot_reconstructions(shown, mixture.reconstruct(shown).clamp(0, 1), ax=axes[1])
axes[1].set_title("held-out images")
figure.savefig(OUTPUT / "fashion_mixture.png", dpi=110, bbox_inches="tight")

# Component numbers mean nothing across seeds: the same cluster has another number in another fit. How well two fits
# agree after the best permutation says how reproducible the clusters are.
probs = [restored(best, seed).predict_component(DATA.test, batch_size=500) for seed in SEEDS]
for seed, other in zip(SEEDS[1:], probs[1:], strict=True):
    match = diagnostics.match_components(probs[0], other)
    print(f"seeds {SEEDS[0]} and {seed}: agreement {match.agreement:.2f}")
print(f"Pictures are in {OUTPUT.resolve()}")
