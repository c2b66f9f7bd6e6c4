"""What information costs where the decoder could do without z: the README's tables and picture of sequences.

An autoregressive decoder predicts each token from the tokens before it, and a good one needs no latent variable: no
other decoder's posterior collapses as readily. Here the remedies stand side by side: annealing of the KL, a smaller
weight of the KL, free bits, LIDSVAE, and decoders with an inverse Lipschitz constant L. The data are first names by
letters, and lines of Shakespeare by words.

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
from _sequences import COLUMNS, LEARNING_RATE, SEEDS, log_probability, measure, plain, projected, train
from _sweep import FULL, OUTPUT, SMOKE, Run, Sweep, chosen, front, print_table
from torch import Tensor, nn

from pyro_ilvae import InverseLipschitzDecoder, SequenceDecoder, SequenceEncoder, SequentialVAE, diagnostics
from pyro_ilvae.datasets import text

EPOCHS = chosen(smoke=1, short=4, full=4)
HIDDEN = chosen(smoke=16, short=256, full=256)
LATENT_DIM = 8
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


def plain_decoder(data: text.TextData) -> SequenceDecoder:
    return SequenceDecoder("gru", plain(len(data.vocabulary), LATENT_DIM, HIDDEN))


def projected_decoder(constant: float) -> Callable[[text.TextData], SequenceDecoder]:
    def build(data: text.TextData) -> SequenceDecoder:
        decoder = projected(data.train, len(data.vocabulary), LATENT_DIM, HIDDEN, constant)
        return SequenceDecoder("gru", decoder)

    return build


# The composition has to reduce the state of the history to fit z beside it into the logits: to 19 numbers for 28
# letters.
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

print(f"\nPictures are in {OUTPUT.resolve()}")
