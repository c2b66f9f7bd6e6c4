"""What information costs where the decoder could do without z: the README's tables and picture of sequences.

An autoregressive decoder predicts each token from the tokens before it, and a good one needs no latent variable: no
other decoder's posterior collapses as readily. Here the remedies stand side by side: annealing of the KL, a smaller
weight of the KL, free bits, LIDSVAE, and decoders with an inverse Lipschitz constant L. The data are first names by
letters, lines of Shakespeare by words, and sequences from languages whose latent variable is known.

``PYRO_ILVAE_DATA`` names a folder with ``names.txt`` and ``tinyshakespeare.txt``. Without it the words in the names of
Unicode's characters stand in for the first names, and Shakespeare is left out.

``PYRO_ILVAE_FULL=1 python experiments/text.py`` fits all decoders with three seeds in about an hour on two cores.
Without the variable one seed of a few decoders is fitted to the names. ``PYRO_ILVAE_SMOKE=1`` takes seconds, for tests.
Results are kept in experiments/output/text, and none is made twice.
"""

import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from _sweep import FULL, OUTPUT, SMOKE, Column, Run, Sweep, chosen, front, median_and_range, print_table
from pyro.infer import SVI, TraceMeanField_ELBO
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from pyro_ilvae import (
    AnnealedELBO,
    InverseLipschitzDecoder,
    InverseLipschitzScheduler,
    JointOptim,
    MLPDecoder,
    ProjectedDecoder,
    SequenceDecoder,
    SequenceEncoder,
    SequentialVAE,
    diagnostics,
    principal_token_frame,
    schedules,
)
from pyro_ilvae.datasets import text
from pyro_ilvae.distributions import TokenSequence

SEEDS = chosen(smoke=[0], short=[0], full=[0, 1, 2])
EPOCHS = chosen(smoke=1, short=4, full=4)
NUM_SAMPLES = chosen(smoke=3, short=50, full=50)
HIDDEN = chosen(smoke=16, short=256, full=256)
LATENT_DIM, LEARNING_RATE = 8, 5e-3
SWEEP = Sweep("text", f"epochs{EPOCHS}")


def first_part(data: text.TextData, num_train: int | None, num_test: int | None) -> text.TextData:
    return data._replace(train=data.train[:num_train], test=data.test[:num_test])


def corpora() -> list[text.TextData]:
    if SMOKE:
        return [first_part(text.words(), 300, 50)]
    try:
        names = first_part(text.names(), None, 2000)
        return [names, first_part(text.tinyshakespeare(), None, 500)] if FULL else [names]
    except FileNotFoundError:
        return [text.words()]


CORPORA = {data.name: data for data in corpora()}
# Shakespeare's lines are fewer and longer, and logits over 5,000 words are what a step spends its time on.
SETTINGS = {name: {"epochs": EPOCHS, "batch_size": 128} for name in CORPORA}
SETTINGS["tinyshakespeare"] = {"epochs": -(-EPOCHS // 2), "batch_size": 64}
for name, data in CORPORA.items():
    print(
        f"{name}: {len(data.train):,} training and {len(data.test):,} test sequences, "
        f"{len(data.vocabulary):,} tokens, {float((data.test >= 0).sum(1).float().mean()):.1f} per sequence"
    )


# The decoders. The frame of the projected decoder holds the leading principal directions of token counts: a step of z
# then moves the logits of tokens that occur together. The composition has to reduce the state
# of the history to fit z beside it into the logits: to 19 numbers for 28 letters.
def plain(vocab_size: int, latent_dim: int, width: int) -> MLPDecoder:
    return MLPDecoder(latent_dim=latent_dim, event_shape=vocab_size, context_dim=width, hidden_features=(width,))


def projected(x: Tensor, vocab_size: int, latent_dim: int, width: int, constant: float) -> ProjectedDecoder:
    return ProjectedDecoder(
        plain(vocab_size, latent_dim, width),
        latent_dim=latent_dim,
        event_shape=vocab_size,
        context_dim=width,
        inverse_lipschitz=constant,
        frame=principal_token_frame(x, vocab_size=vocab_size, latent_dim=latent_dim),
    )


def plain_decoder(data: text.TextData) -> SequenceDecoder:
    return SequenceDecoder("gru", plain(len(data.vocabulary), LATENT_DIM, HIDDEN))


def projected_decoder(constant: float) -> Callable[[text.TextData], SequenceDecoder]:
    def build(data: text.TextData) -> SequenceDecoder:
        decoder = projected(data.train, len(data.vocabulary), LATENT_DIM, HIDDEN, constant)
        return SequenceDecoder("gru", decoder)

    return build


def composition(constant: float) -> Callable[[text.TextData], SequenceDecoder]:
    def build(data: text.TextData) -> SequenceDecoder:
        decoder = InverseLipschitzDecoder(
            latent_dim=LATENT_DIM,
            event_shape=len(data.vocabulary),
            context_dim=HIDDEN,
            inverse_lipschitz=constant,
            map_features=(256, 256),
            frame="centered",
        )
        return SequenceDecoder("gru", decoder)

    return build


# Name: family, decoder, and what differs from training with the ELBO.
RECIPES: dict[str, tuple[str, Callable[[text.TextData], SequenceDecoder], dict[str, Any]]] = {
    "SVAE": ("plain", plain_decoder, {}),
    "SVAE, KL annealed": ("plain, KL weighted", plain_decoder, {"beta": (0.0, 1.0)}),
    "SVAE, beta = 0.2": ("plain, KL weighted", plain_decoder, {"beta": (0.2, 0.2)}),
    "SVAE, 0.4 free nats": ("plain, free bits", plain_decoder, {"free_nats": 0.4}),
    "LIDSVAE": ("composition", composition(0.0), {}),
    "composition, L = 2": ("composition", composition(2.0), {}),
    "projected, L = 1": ("projected", projected_decoder(1.0), {}),
    "projected, L = 2": ("projected", projected_decoder(2.0), {}),
    "projected, L = 2.5": ("projected", projected_decoder(2.5), {}),
    "projected, L = 3": ("projected", projected_decoder(3.0), {}),
    "projected, L = 1, 0.4 free nats": ("projected, variants", projected_decoder(1.0), {"free_nats": 0.4}),
    "projected, L from 12 to 3": ("projected, variants", projected_decoder(3.0), {"constant": (12.0, 3.0)}),
}


def with_free_nats(vae: SequentialVAE, free_nats: float) -> Callable[[Tensor], Tensor]:
    """The model with a factor that gives back what a dimension's KL is below the free nats (Kingma et al. 2016).

    A dimension whose KL, averaged over the batch, is below the free nats then has no reason to lower it.
    """

    def model(x: Tensor) -> Tensor:
        posterior = Normal(*vae.encoder(x))
        kl = kl_divergence(posterior, Normal(0.0, 1.0)).mean(0)
        pyro.factor("free_nats", vae.data_size * (kl - kl.clamp(min=free_nats)).sum())
        value: Tensor = vae.model(x)
        return value

    return model


def train(
    vae: SequentialVAE,
    x: Tensor,
    epochs: int,
    batch_size: int,
    beta: tuple[float, float] = (1.0, 1.0),
    constant: tuple[float, float] | None = None,
    free_nats: float | None = None,
) -> None:
    """Fit by SVI.

    The weight of the KL and the constant L follow schedules over the first half of the steps, and the learning rate a
    cosine over all of them.
    """
    num_steps = epochs * -(-len(x) // batch_size)
    weight = schedules.linear(*beta, num_steps=num_steps // 2)
    scheduler = None
    if constant is not None:
        scheduler = InverseLipschitzScheduler(vae.decoder, schedules.linear(*constant, num_steps=num_steps // 2))
    optimizer = JointOptim(torch.optim.Adam, {"lr": LEARNING_RATE, "fused": True}, {"clip_norm": 5 * len(x)})
    model = vae.model if free_nats is None else with_free_nats(vae, free_nats)
    svi = SVI(model, vae.guide, optimizer, AnnealedELBO(TraceMeanField_ELBO(), beta=weight))
    step = 0
    for _ in range(epochs):
        for batch in x[torch.randperm(len(x))].split(batch_size):
            svi.step(batch)
            weight.step()
            if scheduler is not None:
                scheduler.step()
            step += 1
            for group in optimizer.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / num_steps))


def measure(vae: SequentialVAE, test: Tensor) -> Run:
    """Measures of held-out sequences.

    The importance-weighted log likelihood in nats per sequence and the perplexity per token from it, the KL and its
    smallest dimension, active units, the mutual information of x and z, and the fraction of the tokens that a greedy
    search from the posterior mean gets back, each in its place.
    """
    pair = (vae.model, vae.guide)
    evidence = diagnostics.evidence(*pair, test, num_samples=NUM_SAMPLES, batch_size=50, seed=0)
    kl = diagnostics.kl_per_dimension(*pair, test, batch_size=200).values.mean(0)
    information = diagnostics.mutual_information(*pair, test, num_samples=4, batch_size=200, seed=0)
    found = vae.reconstruct(test, 200)[:, : test.shape[1]]
    return {
        "log_likelihood": float(evidence.log_likelihood.mean()),
        "perplexity": float(diagnostics.perplexity(evidence.log_likelihood, (test >= 0).sum(1))),
        "kl": float(kl.sum()),
        "smallest_kl": float(kl.min()),
        "active": diagnostics.active_units(*pair, test, batch_size=200, seed=0).num_active,
        "information": information.mutual_information,
        "reconstructed": float(((found == test) & (test >= 0)).sum() / (test >= 0).sum()),
    }


def build(corpus: str, recipe: str) -> SequentialVAE:
    pyro.clear_param_store()  # it holds the parameters of an earlier model under the same names
    data = CORPORA[corpus]
    return SequentialVAE(
        RECIPES[recipe][1](data),
        SequenceEncoder(vocab_size=len(data.vocabulary), latent_dim=LATENT_DIM, hidden_features=HIDDEN // 2),
        data_size=len(data.train),
        end_token=data.vocabulary.end,
        max_length=data.train.shape[1],
    )


def fit(corpus: str, recipe: str, seed: int) -> Run:
    """Measures of held-out sequences, and the state of the model in a file beside them."""
    pyro.set_rng_seed(seed)
    vae = build(corpus, recipe)
    began = time.perf_counter()
    train(vae, CORPORA[corpus].train, **SETTINGS[corpus], **RECIPES[recipe][2])
    seconds = time.perf_counter() - began
    torch.save(vae.state_dict(), SWEEP.file(corpus, recipe, seed, suffix=".pt"))
    return {"seconds": seconds, **measure(vae, CORPORA[corpus].test)}


def log_probability(decoder: SequenceDecoder, z: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) in nats, for each sequence."""
    value: Tensor = TokenSequence(decoder(z, x), x).log_prob(x)
    return value


def fit_language_model(corpus: str, seed: int) -> Run:
    """A model without z: the plain decoder, which is always given z = 0."""
    pyro.set_rng_seed(seed)
    data, settings = CORPORA[corpus], SETTINGS[corpus]
    decoder = plain_decoder(data)

    def log_likelihood(x: Tensor) -> Tensor:
        return log_probability(decoder, torch.zeros(len(x), LATENT_DIM), x)

    optimizer = torch.optim.Adam(decoder.parameters(), lr=LEARNING_RATE, fused=True)
    num_steps = settings["epochs"] * -(-len(data.train) // settings["batch_size"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(settings["epochs"]):
        for batch in data.train[torch.randperm(len(data.train))].split(settings["batch_size"]):
            loss = -log_likelihood(batch).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        nats = torch.cat([log_likelihood(batch) for batch in data.test.split(200)])
    return {
        "log_likelihood": float(nats.mean()),
        "perplexity": float(diagnostics.perplexity(nats, (data.test >= 0).sum(1))),
    }


SHORT = ["SVAE", "SVAE, KL annealed", "LIDSVAE", "projected, L = 1", "projected, L = 3"]
WORDS = ["SVAE", "SVAE, KL annealed", "SVAE, 0.4 free nats", "LIDSVAE", "projected, L = 3"]
CHOSEN = {name: (WORDS if name == "tinyshakespeare" else list(RECIPES)) if FULL else SHORT for name in CORPORA}
ROWS = [(corpus, recipe) for corpus in CORPORA for recipe in CHOSEN[corpus]]
LANGUAGE_MODELS = SWEEP.run(fit_language_model, [(corpus, seed) for seed in SEEDS for corpus in CORPORA])
FITS = SWEEP.run(fit, [(*row, seed) for seed in SEEDS for row in ROWS])
COLUMNS: dict[str, Column] = {
    "perplexity": median_and_range("perplexity", 3),
    "IW log lik. (nats)": median_and_range("log_likelihood", 2),
    "KL": median_and_range("kl", 2),
    "smallest KL": median_and_range("smallest_kl", 3),
    "active": median_and_range("active", 0),
    "information (nats)": median_and_range("information", 2),
    "reconstructed": median_and_range("reconstructed", 3),
    "seconds": median_and_range("seconds", 0),
}
for corpus in CORPORA:
    rows = {"language model": [LANGUAGE_MODELS[corpus, seed] for seed in SEEDS]}
    rows |= {recipe: [FITS[corpus, recipe, seed] for seed in SEEDS] for recipe in CHOSEN[corpus]}
    print_table(corpus, rows, COLUMNS)

# What information costs. Each point is a fit: to the right the mutual information of x and z, upwards the perplexity,
# where less is better. The dotted line is 2 percent above the best of all fits; the front is what no other fit beats in
# both. What lies far above the others is named at the top, outside.
OFFSET = {"textcoords": "offset points", "fontsize": "small"}
figure, axes = plt.subplots(1, len(CORPORA), figsize=(5 * len(CORPORA) + 2, 4.4), layout="constrained", squeeze=False)
for ax, corpus in zip(axes[0], CORPORA, strict=True):
    everything = []
    for i, family in enumerate(dict.fromkeys(RECIPES[recipe][0] for recipe in CHOSEN[corpus])):
        recipes = [recipe for recipe in CHOSEN[corpus] if RECIPES[recipe][0] == family]
        points = [
            (FITS[corpus, recipe, seed]["information"], FITS[corpus, recipe, seed]["perplexity"])
            for recipe in recipes
            for seed in SEEDS
        ]
        everything += points
        ax.scatter(*zip(*points, strict=True), color=f"C{i}", marker="osD^vP"[i], label=family, alpha=0.8)
        if family == "projected":
            for recipe in recipes:
                runs = [FITS[corpus, recipe, seed] for seed in SEEDS]
                place = [np.median([run[key] for run in runs]) for key in ("information", "perplexity")]
                ax.annotate(recipe.split(", ")[1], place, xytext=(-6, 6), ha="right", **OFFSET)
    ax.plot(*zip(*front(everything), strict=True), color="black", linewidth=0.8, label="front")
    best = min(perplexity for _, perplexity in everything)
    beyond = [point for point in everything if point[1] > 1.15 * best]
    if beyond and not SMOKE:
        ax.set_ylim(top=1.15 * best)
        place, height = np.median(beyond, axis=0)
        place = np.clip(place, *(fraction * max(everything)[0] for fraction in (0.12, 0.88)))
        ax.annotate(f"{len(beyond)} fits at {height:.1f}", (place, 1.15 * best), xytext=(0, -12), ha="center", **OFFSET)
    ax.axhline(1.02 * best, color="black", linestyle=":", linewidth=1, label="2 % above the best")
    ax.axhline(
        np.median([LANGUAGE_MODELS[corpus, seed]["perplexity"] for seed in SEEDS]),
        color="gray",
        linestyle="--",
        linewidth=1,
        label="language model without z",
    )
    ax.set(title=corpus, xlabel="mutual information of x and z (nats)", ylabel="held-out perplexity per token")
entries = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
figure.legend(entries.values(), entries.keys(), fontsize="small", loc="outside right upper")
figure.savefig(OUTPUT / "text_tradeoff.png", dpi=120)


# Samples and interpolations of the plain SVAE and of the projected decoder at L = 3, with the first seed. Where z says
# nothing, all points on a line decode to the same sequence.
def restored(corpus: str, recipe: str, seed: int) -> SequentialVAE:
    vae = build(corpus, recipe)
    vae.load_state_dict(torch.load(SWEEP.file(corpus, recipe, seed, suffix=".pt")))
    return vae


for corpus, data in CORPORA.items():
    for recipe in ("SVAE", "projected, L = 3"):
        vae = restored(corpus, recipe, SEEDS[0])
        pyro.set_rng_seed(0)
        show = data.vocabulary.decode
        kl = diagnostics.kl_per_dimension(vae.model, vae.guide, data.test, batch_size=200).values.mean(0)
        print(f"\n{corpus}, {recipe}; KL by dimension (nats): {' '.join(f'{value:.2f}' for value in kl)}")
        print("  samples:        ", " / ".join(show(vae.sample_prior(6))))
        print("  colder (0.5):   ", " / ".join(show(vae.sample_prior(6, temperature=0.5))))
        print("  held out:       ", " / ".join(show(data.test[:6])))
        print("  reconstructed:  ", " / ".join(show(vae.reconstruct(data.test[:6]))))
        print("  beam of 10:     ", " / ".join(show(vae.reconstruct(data.test[:6], num_beams=10))))
        print("  interpolated:   ", " / ".join(show(vae.interpolate(data.test[0], data.test[1], 6, num_beams=10))))


# Languages whose latent variable is known: sequences drawn from an LSTM with random weights and a 2-D z, a setting of
# He et al. 2019. How much they say about z, and how probable they are, can be computed by integrating over z on a grid.
# Models are then fitted to the sequences alone. ``information`` is what the fitted guide's z says about held-out
# sequences, next to the truth. ``z explained`` is the part of the true z's variance that is linear in the fitted
# posterior means, next to the part that is linear in the exact ones.
VOCAB, LENGTH = 20, 10
NUM_SEQUENCES = chosen(smoke=300, short=10_000, full=10_000)
SYNTHETIC: dict[str, tuple[float | None, dict[str, Any]]] = {
    "SVAE": (None, {}),
    "SVAE, KL annealed": (None, {"beta": (0.0, 1.0)}),
    "projected, L = 0.5": (0.5, {}),
    "projected, L = 1": (1.0, {}),
    "projected, L = 2": (2.0, {}),
    "projected, L = 4": (4.0, {}),
}


def sequential_vae(decoder: SequenceDecoder, hidden_features: int, data_size: int | None = None) -> SequentialVAE:
    pyro.clear_param_store()
    encoder = SequenceEncoder(vocab_size=VOCAB, latent_dim=2, hidden_features=hidden_features)
    return SequentialVAE(decoder, encoder, data_size=data_size, max_length=LENGTH)


def random_language(seed: int) -> tuple[Tensor, Tensor, SequentialVAE]:
    """Sequences, the z of each, and the model they are from."""
    pyro.set_rng_seed(seed)
    readout = plain(VOCAB, 2, 32)
    vae = sequential_vae(SequenceDecoder("lstm", readout), 8)
    first, _, output = readout.network
    # The order of the draws is part of the recipe: another order gives other languages.
    parameters = [*vae.decoder.history.parameters(), readout.from_context.weight, first.bias, first.weight]
    with torch.no_grad():
        for parameter in [*parameters, *output.parameters()]:
            parameter.normal_()
        output.weight.mul_(0.3)
    z = torch.randn(NUM_SEQUENCES, 2)
    return vae.sample(z), z, vae


@torch.no_grad()
def truth(vae: SequentialVAE, x: Tensor, z: Tensor) -> tuple[float, float, Tensor]:
    """The mutual information of x and z, the mean of log p(x), and E[z | x], by the trapezoidal rule on a grid."""
    line = torch.linspace(-4.5, 4.5, 61)
    grid = torch.cartesian_prod(line, line)
    log_weights = torch.log_softmax(-0.5 * grid.square().sum(-1), 0)
    given_z, evidence, means = [], [], []
    for batch, own in zip(x.split(20), z.split(20), strict=True):
        given_z.append(log_probability(vae.decoder, own, batch))
        joint = log_probability(vae.decoder, grid.unsqueeze(1), batch) + log_weights.unsqueeze(1)
        evidence.append(joint.logsumexp(0))
        means.append(joint.softmax(0).T @ grid)
    log_likelihood = torch.cat(evidence)
    information = torch.cat(given_z) - log_likelihood
    return float(information.mean()), float(log_likelihood.mean()), torch.cat(means)


def explained(z: Tensor, codes: Tensor) -> float:
    return float(LinearRegression().fit(codes.numpy(), z.numpy()).score(codes.numpy(), z.numpy()))


def fit_synthetic(seed: int) -> Run:
    """Measures by recipe, and the true values."""
    x, z, language = random_language(seed)
    test, test_z = x[-len(x) // 10 :], z[-len(x) // 10 :]
    x = x[: -len(x) // 10]
    information, log_likelihood, means = truth(language, test, test_z)
    results = {
        "truth": {"information": information, "log_likelihood": log_likelihood, "explained": explained(test_z, means)}
    }
    for recipe, (constant, options) in SYNTHETIC.items():
        pyro.set_rng_seed(seed)
        decoder = plain(VOCAB, 2, 64) if constant is None else projected(x, VOCAB, 2, 64, constant)
        vae = sequential_vae(SequenceDecoder("lstm", decoder), 64, data_size=len(x))
        train(vae, x, epochs=1 if SMOKE else 20, batch_size=128, **options)
        results[recipe] = {**measure(vae, test), "explained": explained(test_z, vae.encode(test)[0])}
    return results


LANGUAGES = SWEEP.run(fit_synthetic, [(seed,) for seed in SEEDS])
columns = {name: COLUMNS[name] for name in ("information (nats)", "IW log lik. (nats)", "KL")}
columns |= {"z explained": median_and_range("explained", 2)}
recipes = ["truth", *SYNTHETIC]
print_table("synthetic", {recipe: [LANGUAGES[seed,][recipe] for seed in SEEDS] for recipe in recipes}, columns)
print(f"\nPictures are in {OUTPUT.resolve()}")
