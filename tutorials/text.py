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
# # A latent variable for words
#
# An autoregressive decoder predicts each letter of a word from the letters before it, and a good one needs no latent
# variable: no other decoder's posterior collapses as readily. Here the logits of every letter are inverse Lipschitz
# in z, whatever the letters before it, so z cannot be ignored.
#
# The data are the 3,892 words in the names of Unicode's characters, which need no download.
# `datasets.text.from_file("documents.txt", level="words")` reads documents of your own, one per line.

# %%
import os

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from tqdm import trange

import pyro_ilvae as ilvae

SMOKE = bool(os.environ.get("PYRO_ILVAE_SMOKE"))  # runs every line in seconds, for tests: its numbers mean nothing
EPOCHS, NUM_SAMPLES = (1, 5) if SMOKE else (8, 100)

data = ilvae.datasets.text.words()
train, test = data.train, data.test
vocab_size = len(data.vocabulary)
print(f"{len(train)} training words, {len(test)} held-out words, {vocab_size} tokens")
print(train[0].tolist(), "is", data.vocabulary.decode(train[:1]))

# %% [markdown]
# Tokens are rows of numbers. They end with the end token 0 and are padded with -1, which no density counts.
#
# ## The model
#
# A `SequenceDecoder` has two parts. Its history, here a GRU, reads the letters before a position; its decoder maps z to
# the logits of the letter there, with the state of the history as its context. Any decoder with a `context_dim` will
# do: `MLPDecoder` alone is the ordinary decoder, and `ProjectedDecoder` makes it inverse Lipschitz. `initialize`
# starts the model where the data are: the logits at the frequencies of the letters, and the frame at directions along
# which letters occur together, so a step of z moves their logits together.

# %%
pyro.set_rng_seed(0)
SIZES = {"latent_dim": 8, "event_shape": vocab_size, "context_dim": 128}
plain = ilvae.MLPDecoder(**SIZES, hidden_features=(128,))
projected = ilvae.ProjectedDecoder(plain, **SIZES, inverse_lipschitz=3.0, frame="centered")
vae = ilvae.SequentialVAE(
    ilvae.SequenceDecoder("gru", projected),
    ilvae.SequenceEncoder(vocab_size=vocab_size, latent_dim=8, hidden_features=64),
    data_size=len(train),
    end_token=data.vocabulary.end,
    max_length=20,
)
vae.initialize(train)

# %% [markdown]
# ## The fit
#
# `JointOptim` is one PyTorch optimizer for all parameters, so the whole gradient can be clipped by its norm.

# %%
optimizer = ilvae.JointOptim(torch.optim.Adam, {"lr": 3e-3}, {"clip_norm": 5.0 * len(train)})
svi = SVI(vae.model, vae.guide, optimizer, TraceMeanField_ELBO())
for _ in trange(EPOCHS, desc="epochs", mininterval=1.0):
    for batch in train[torch.randperm(len(train))].split(64):
        svi.step(batch)

# %% [markdown]
# ## Does z say anything?
#
# The perplexity per letter comes from the importance-weighted log likelihood of the held-out words. The mutual
# information of x and z says how much of a word z carries, in nats; a collapsed model has 0. The last number is the
# part of the held-out letters that a greedy search from the posterior mean gets back, each in its place.

# %%
pair = (vae.model, vae.guide)
evidence = ilvae.diagnostics.evidence(*pair, test, num_samples=NUM_SAMPLES, batch_size=50, seed=0)
lengths = (test >= 0).sum(1)
information = ilvae.diagnostics.mutual_information(*pair, test, num_samples=4, batch_size=200, seed=0)
kl = ilvae.diagnostics.kl_per_dimension(*pair, test, batch_size=200).values.mean(0)
found = vae.reconstruct(test)[:, : test.shape[1]]
print(f"perplexity per letter: {float(ilvae.diagnostics.perplexity(evidence.log_likelihood, lengths)):.2f}")
print(f"mutual information of x and z: {information.mutual_information:.2f} nats")
print(f"KL by dimension: {[round(value, 2) for value in kl.tolist()]} nats")
print(f"letters found again: {float((found == test)[test >= 0].float().mean()):.2f}")

# %% [markdown]
# With `plain` in place of `projected` the same fit ends at 0.03 nats of information and finds 0.09 of the letters: it
# has collapsed. Its perplexity is 10.8, and the 3 nats that z carries here raise it to 11.2.
#
# ## Words from z
#
# The lines are draws from the prior, at the model's own temperature and at a lower one; held-out words and what a beam
# search finds at their posterior means; and the words on the line between two posterior means. Three nats do not spell
# a word: what comes back are some of its letters, often in another order. The collapsed model gives the same word every
# time.

# %%
show = data.vocabulary.decode
print("drawn:        ", show(vae.sample_prior(8, seed=0)))
print("colder:       ", show(vae.sample_prior(8, temperature=0.5, seed=0)))
print("held out:     ", show(test[:8]))
print("reconstructed:", show(vae.reconstruct(test[:8], num_beams=10)))
print("interpolated: ", show(vae.interpolate(test[0], test[1], num_steps=8, num_beams=10)))

# %% [markdown]
# What the information costs in perplexity, against annealing of the KL, free bits and other decoders, is measured by
# `experiments/text.py`.
