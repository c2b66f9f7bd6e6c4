"""What the constant costs and brings on Fashion-MNIST: the README's two tables of images and its picture of a mixture.

First variational autoencoders with one prior, N(0, I): a plain decoder, LIDVAE, the paper's composition and the
projected decoder at several L, with Normal noise and with binary pixels. Then mixtures of ten components, without
labels.

``PYRO_ILVAE_DATA`` names a folder with the files of Fashion-MNIST, or with a part of it, as used for the README.
Without it they are downloaded once, and without a network scikit-learn's digits take their place.

``PYRO_ILVAE_FULL=1 python experiments/fashion_mnist.py`` fits three seeds to all images for 20 epochs, in about 40
minutes on two cores for 5,200 images. Without the variable one seed is fitted to at most 5,000 images for 10 epochs.
``PYRO_ILVAE_SMOKE=1`` takes seconds, for tests. Results are kept in experiments/output/fashion_mnist, and none is made
twice.
"""

import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from _sweep import FULL, OUTPUT, SMOKE, Column, Run, Sweep, chosen, median_and_range, print_table
from pyro.infer import ELBO, SVI, TraceEnum_ELBO, TraceMeanField_ELBO
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from pyro_ilvae import (
    VAE,
    InverseLipschitzDecoder,
    JointOptim,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    datasets,
    diagnostics,
    likelihoods,
    mlp,
    plots,
    principal_frame,
)

DATA = datasets.digits() if SMOKE else datasets.fashion_mnist()
if not FULL:
    DATA = datasets.ImageData(DATA.name, *(part[:5000] for part in DATA[1:3]), *(part[:1000] for part in DATA[3:]))
SEEDS = chosen(smoke=[0], short=[0], full=[0, 1, 2])
EPOCHS = chosen(smoke=1, short=10, full=20)
NUM_SAMPLES = chosen(smoke=5, short=50, full=100)
NUM_FISHER = chosen(smoke=5, short=50, full=100)
HIDDEN = (32, 32) if SMOKE else (512, 512)
LATENT_DIM, NUM_COMPONENTS, BATCH_SIZE, LEARNING_RATE = 16, 10, 128, 1e-3
IMAGE = tuple(DATA.train.shape[1:])
SWEEP = Sweep("fashion_mnist", f"{DATA.name}_{len(DATA.train)}_{len(DATA.test)}_epochs{EPOCHS}")
print(f"{DATA.name}: {len(DATA.train)} training and {len(DATA.test)} test images of {IMAGE[0]} x {IMAGE[1]}")


# The decoders. All networks but the convolutions have two hidden layers of 512. All decoders but the plain one use the
# leading principal directions as frame. The composition is named by L1 = L2, as in the paper; its constant is the
# square. LIDVAE is the composition with L = 0.
class ConvBackbone(nn.Module):
    """From z to images, by two transposed convolutions that double height and width."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        height, width = -(-IMAGE[0] // 4), -(-IMAGE[1] // 4)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 32 * height * width),
            nn.Softplus(),
            nn.Unflatten(-1, (32, height, width)),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.Softplus(),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z)[:, 0, : IMAGE[0], : IMAGE[1]]
        return images


def plain(latent_dim: int) -> nn.Module:
    return MLPDecoder(latent_dim=latent_dim, event_shape=IMAGE, hidden_features=HIDDEN)


def composition(latent_dim: int, constant: float) -> nn.Module:
    return InverseLipschitzDecoder(
        latent_dim=latent_dim,
        event_shape=IMAGE,
        inverse_lipschitz=(constant, constant),
        map_features=HIDDEN,
        frame=principal_frame(DATA.train, latent_dim),
    )


def projected(latent_dim: int, constant: float, convolutions: bool = False) -> nn.Module:
    backbone = ConvBackbone(latent_dim) if convolutions else mlp(latent_dim, HIDDEN, IMAGE[0] * IMAGE[1])
    return ProjectedDecoder(
        backbone,
        latent_dim=latent_dim,
        event_shape=IMAGE,
        inverse_lipschitz=constant,
        frame=principal_frame(DATA.train, latent_dim),
    )


DECODERS: dict[str, Callable[[int], nn.Module]] = {
    "plain": plain,
    "LIDVAE": lambda latent_dim: composition(latent_dim, 0.0),
    "composition, L1 = L2 = 0.5": lambda latent_dim: composition(latent_dim, 0.5),
    "composition, L1 = L2 = 1.5": lambda latent_dim: composition(latent_dim, 1.5),
    "projected, L = 0.5": lambda latent_dim: projected(latent_dim, 0.5),
    "projected, L = 1": lambda latent_dim: projected(latent_dim, 1.0),
    "projected, L = 2": lambda latent_dim: projected(latent_dim, 2.0),
    "projected, L = 4": lambda latent_dim: projected(latent_dim, 4.0),
    "projected, L = 10": lambda latent_dim: projected(latent_dim, 10.0),
    "projected convolutions, L = 1": lambda latent_dim: projected(latent_dim, 1.0, convolutions=True),
}
LIKELIHOODS: dict[str, Callable[[], nn.Module]] = {
    "Normal": lambda: likelihoods.Normal(0.3, estimate="learned"),
    "Bernoulli": likelihoods.Bernoulli,
}


def images_for(likelihood: str) -> tuple[Tensor, Tensor]:
    """Intensities for Normal noise; binary pixels, 1 above half of the range, for the Bernoulli likelihood."""
    if likelihood == "Normal":
        return DATA.train, DATA.test
    return datasets.binarize(DATA.train, threshold=0.5), datasets.binarize(DATA.test, threshold=0.5)


def train(model: VAE | MixtureVAE, x: Tensor, epochs: int, elbo: ELBO) -> None:
    optimizer = JointOptim(torch.optim.Adam, {"lr": LEARNING_RATE, "fused": True})
    svi = SVI(model.model, model.guide, optimizer, elbo)
    for epoch in range(epochs):
        for batch in x[torch.randperm(len(x))].split(BATCH_SIZE):
            svi.step(batch)
        # Half of the epochs at the full rate, then down to a tenth of it.
        for group in optimizer.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.1 ** max(0.0, 2 * (epoch + 1) / epochs - 1)


def measure(model: VAE | MixtureVAE, train_images: Tensor, test_images: Tensor) -> Run:
    """Measures of held-out images.

    The k-NN accuracy classifies the codes (posterior means) of test images by codes and labels of training images. The
    relative Fisher divergence of the exact posterior from the prior is estimated for some images by importance sampling
    from the guide; ``trusted`` is the fraction of them whose Pareto k allows that.
    """
    pair = (model.model, model.guide)
    evidence = diagnostics.evidence(*pair, test_images, num_samples=NUM_SAMPLES, batch_size=100, seed=0)
    units = diagnostics.active_units(*pair, test_images, batch_size=200, seed=0)
    information = diagnostics.mutual_information(*pair, test_images, num_samples=4, batch_size=200, seed=0)
    fisher = diagnostics.posterior_fisher_divergence(
        *pair, test_images[:NUM_FISHER], sites=["z"], num_samples=2 * NUM_SAMPLES, batch_size=10, seed=0
    )
    classifier = KNeighborsClassifier(5).fit(
        model.encode(train_images, 500)[0].numpy(force=True), DATA.train_labels.numpy(force=True)
    )
    return {
        "log_likelihood": float(evidence.log_likelihood.mean()),
        "elbo": float(evidence.elbo.mean()),
        "kl": information.mean_kl,
        "active": units.num_active,
        "information": information.mutual_information,
        "knn": float(
            classifier.score(model.encode(test_images, 500)[0].numpy(force=True), DATA.test_labels.numpy(force=True))
        ),
        "fisher": float(fisher.values.mean()),
        "trusted": float((fisher.pareto_k < 0.7).float().mean()),
    }


def fit_vae(decoder: str, likelihood: str, seed: int) -> Run:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    train_images, test_images = images_for(likelihood)
    encoder = MLPEncoder(event_shape=IMAGE, latent_dim=LATENT_DIM, hidden_features=HIDDEN)
    vae = VAE(DECODERS[decoder](LATENT_DIM), encoder, LIKELIHOODS[likelihood](), data_size=len(train_images))
    began = time.perf_counter()
    train(vae, train_images, EPOCHS, TraceMeanField_ELBO())
    seconds = time.perf_counter() - began
    kl = diagnostics.kl_per_dimension(vae.model, vae.guide, test_images, batch_size=200).values.mean(0)
    return {"seconds": seconds, "smallest_kl": float(kl.min()), **measure(vae, train_images, test_images)}


# L is in units of the natural parameters for a unit of z: of intensities for Normal noise, and of logits for binary
# pixels, where a step that shows is ten times as large.
IN_LOGITS = ("projected, L = 4", "projected, L = 10")
ROWS = [(decoder, "Normal") for decoder in DECODERS if decoder not in IN_LOGITS]
ROWS += [(decoder, "Bernoulli") for decoder in ("plain", "LIDVAE", "projected, L = 1", *IN_LOGITS)]
FITS = SWEEP.run(fit_vae, [(*row, seed) for seed in SEEDS for row in ROWS])
COLUMNS: dict[str, Column] = {
    "IW log lik. (nats)": median_and_range("log_likelihood", 1),
    "ELBO": median_and_range("elbo", 1),
    "KL": median_and_range("kl", 1),
    "smallest KL": median_and_range("smallest_kl", 2),
    "active": median_and_range("active", 0),
    "information (nats)": median_and_range("information", 2),
    "k-NN": median_and_range("knn", 3),
    "Fisher": median_and_range("fisher", 0),
    "trusted": median_and_range("trusted", 2),
    "seconds": median_and_range("seconds", 0),
}
print_table("VAE", {", ".join(row): [FITS[(*row, seed)] for seed in SEEDS] for row in ROWS}, COLUMNS)

figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for ax, likelihood in zip(axes, LIKELIHOODS, strict=True):
    for i, decoder in enumerate(DECODERS):
        if (decoder, likelihood) in ROWS:
            runs = [FITS[decoder, likelihood, seed] for seed in SEEDS]
            points = [run["smallest_kl"] for run in runs], [run["log_likelihood"] for run in runs]
            ax.scatter(*points, color=f"C{i}", marker="os^v"[i % 4], label=decoder)
    ax.axvline(1.0, color="black", linestyle=":", linewidth=1)
    ax.set(title=likelihood, xlabel="smallest KL of a dimension (nats)", xscale="log")
    ax.set_ylabel("held-out log likelihood (nats per image)")
entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
figure.legend(entries.values(), entries.keys(), fontsize="small", loc="outside right upper")
figure.savefig(OUTPUT / "fashion_vae.png", dpi=120)

# The mixture of ten components. Components that start at random die: all images go to the few that are useful first.
# What helps costs little: train decoder and encoder with the one prior N(0, I), put the components where k-means finds
# clusters of the codes, then train everything together. The component y is summed out of the model, so that an image
# passes the decoder once and not ten times. Nothing here sees a label: the configurations are compared by evidence, and
# labels are used at the end, to measure.
Mixture = tuple[str, str, int, str]  # decoder, likelihood, latent dimension, start of the components


def build_mixture(decoder: str, likelihood: str, latent_dim: int) -> MixtureVAE:
    pyro.clear_param_store()  # it holds the parameters of an earlier model under the same names
    return MixtureVAE(
        DECODERS[decoder](latent_dim),
        MLPEncoder(event_shape=IMAGE, latent_dim=latent_dim, hidden_features=HIDDEN),
        LIKELIHOODS[likelihood](),
        NUM_COMPONENTS,
        data_size=len(DATA.train),
        enumerate_in="model",
    )


def fit_mixture(decoder: str, likelihood: str, latent_dim: int, start: str, seed: int) -> Run:
    """Measures of held-out images, and the state of the model in a file beside them.

    Accuracy, adjusted Rand index and normalized mutual information compare the most probable component with the label,
    matched one to one. The effective number of components is the exponential of the entropy of the aggregate q(y). The
    mean of KL(q(y | x) || pi) splits into KL(q(y) || pi), ``usage_kl``, and the mutual information of x and y. The
    measure ``kl`` is the KL of z from the whole mixture.
    """
    pyro.set_rng_seed(seed)
    train_images, test_images = images_for(likelihood)
    began = time.perf_counter()
    mixture = build_mixture(decoder, likelihood, latent_dim)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    if start == "k-means":
        vae = VAE(mixture.decoder, mixture.encoder, mixture.likelihood, data_size=len(train_images))
        train(vae, train_images, EPOCHS // 2, TraceMeanField_ELBO())
        pyro.clear_param_store()
        mixture.initialize_components(train_images, seed=seed)
        train(mixture, train_images, EPOCHS, elbo)
    else:
        train(mixture, train_images, EPOCHS + EPOCHS // 2, elbo)
    seconds = time.perf_counter() - began
    torch.save(mixture.state_dict(), SWEEP.file(decoder, likelihood, latent_dim, start, seed, suffix=".pt"))
    probs = mixture.predict_component(test_images, 500)
    usage = diagnostics.component_usage(probs)
    agreement = diagnostics.cluster_agreement(DATA.test_labels, probs)
    return {
        "seconds": seconds,
        **measure(mixture, train_images, test_images),
        "accuracy": agreement.accuracy,
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
    ("projected, L = 1", "Normal", LATENT_DIM, "random"),
    ("plain", "Normal", LATENT_DIM, "k-means"),
    ("LIDVAE", "Normal", LATENT_DIM, "k-means"),
    ("composition, L1 = L2 = 1.5", "Normal", LATENT_DIM, "k-means"),
    ("projected, L = 1", "Normal", LATENT_DIM, "k-means"),
    ("projected, L = 1", "Normal", 2 * LATENT_DIM, "k-means"),
    ("projected, L = 10", "Bernoulli", LATENT_DIM, "k-means"),
]
MIXTURE_FITS = SWEEP.run(fit_mixture, [(*row, seed) for seed in SEEDS for row in MIXTURES])
MIXTURE_COLUMNS: dict[str, Column] = {
    "accuracy": median_and_range("accuracy", 3),
    "ARI": median_and_range("adjusted_rand", 3),
    "NMI": median_and_range("nmi", 3),
    "components": median_and_range("effective_number", 1),
    "smallest share": median_and_range(lambda run: min(run["usage"]), 3),
    "KL of y": median_and_range("kl_y", 2),
    "usage KL": median_and_range("usage_kl", 2),
    **{name: column for name, column in COLUMNS.items() if name != "smallest KL"},
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
probs = [restored(best, seed).predict_component(DATA.test, 500) for seed in SEEDS]
for seed, other in zip(SEEDS[1:], probs[1:], strict=True):
    match = diagnostics.match_components(probs[0], other)
    print(f"seeds {SEEDS[0]} and {seed}: agreement {match.agreement:.2f}")
print(f"Pictures are in {OUTPUT.resolve()}")
