"""Draws and searches against all sequences that there are: every one of a small vocabulary, cut-off ones included."""

import itertools

import pytest
import torch
from helpers.decoders import perturb
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_ilvae import InverseLipschitzDecoder, MLPDecoder, ProjectedDecoder, SequenceDecoder
from pyro_ilvae.distributions import PADDING, TokenSequence
from pyro_ilvae.sequences.generation import Exclusions, ancestral_sample, beam_search

LATENT = 1
KINDS = ["plain", "projected", "composition"]
HISTORIES = ["gru", "lstm", "transformer"]


def small(kind, vocab_size, history="gru", seed=0, scale=0.7, inverse_lipschitz=1.0, word_dropout=0.0):
    torch.manual_seed(seed)
    sizes = {"latent_dim": LATENT, "event_shape": vocab_size, "context_dim": 8}
    options = {"inverse_lipschitz": inverse_lipschitz, "map_features": (8,), "frame": "centered"}
    if kind == "composition":
        decoder = InverseLipschitzDecoder(**sizes, **options)
    else:
        decoder = MLPDecoder(**sizes, hidden_features=(8,))
        if kind == "projected":
            decoder = ProjectedDecoder(decoder, **sizes, **options)
    return perturb(SequenceDecoder(history, decoder, word_dropout=word_dropout).double(), scale).eval()


@st.composite
def decoders(draw):
    """Any decoder of two to four tokens, and a token that ends a sequence, or None."""
    kind = draw(st.sampled_from(KINDS))
    # The composition needs a direction for z and one for the history.
    vocab_size = draw(st.integers(3 if kind == "composition" else 2, 4))
    constant = draw(st.sampled_from([0.0, 1.0, 3.0]))
    history, seed = draw(st.sampled_from(HISTORIES)), draw(st.integers(0, 2**31))
    decoder = small(kind, vocab_size, history, seed, inverse_lipschitz=constant)
    return decoder, draw(st.sampled_from([None, *range(vocab_size)]))


def all_sequences(vocab_size, max_length, end_token):
    """Every padded sequence there is: up to the first end token, or of max_length tokens."""
    rows = set()
    for row in itertools.product(range(vocab_size), repeat=max_length):
        length = row.index(end_token) + 1 if end_token in row else max_length
        rows.add(row[:length] + (PADDING,) * (max_length - length))
    return torch.tensor(sorted(rows))


@torch.no_grad()
def log_probs(decoder, z, x, temperature=1.0):
    """The log probability of each row of ``x`` at a single point ``z``, shape (K,)."""
    return TokenSequence(decoder(z.expand(len(x), -1), x) / temperature, x).log_prob(x)


def codes(count):
    return 2 * torch.randn(count, LATENT, dtype=torch.float64)


@given(decoders(), st.integers(1, 4))
def test_probabilities_of_all_sequences_sum_to_one(decoder_and_end, max_length):
    decoder, end_token = decoder_and_end
    x = all_sequences(decoder.vocab_size, max_length, end_token)
    for z in codes(3):
        total = log_probs(decoder, z, x).exp().sum()
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-9, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end_token", [None, 0, 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@torch.no_grad()
def test_frequencies_of_draws_are_the_probabilities(kind, end_token, temperature):
    vocab_size = 3 if kind == "composition" else 2
    decoder, count = small(kind, vocab_size, seed=1, scale=0.4), 10_000
    x = all_sequences(vocab_size, 3, end_token)
    points = codes(2)
    # Both points in one batch, in turns.
    draws = ancestral_sample(decoder, points.repeat(count, 1), 3, end_token, temperature)
    for z, drawn in zip(points, (draws[::2], draws[1::2]), strict=True):
        found = (drawn.unsqueeze(1) == x).all(-1).double()
        # Each draw is one of them: end tokens and padding stand where they should.
        assert found.sum(1).eq(1).all()
        exact = log_probs(decoder, z, x, temperature).exp()
        standard_error = (exact * (1 - exact)).clamp(min=1 / count).div(count).sqrt()
        assert ((found.mean(0) - exact).abs() < 5 * standard_error).all()
    assert (log_probs(decoder, points[0], x) - log_probs(decoder, points[1], x)).abs().max() > 0.1


@given(decoders(), st.integers(1, 6))
@torch.no_grad()
def test_draws_are_reproducible_and_of_the_shape_asked_for(decoder_and_end, max_length):
    decoder, end_token = decoder_and_end
    z = codes(50)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(ancestral_sample(decoder, z, max_length, end_token, temperature=5.0))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.long
    allowed = all_sequences(decoder.vocab_size, max_length, end_token)
    assert (draws[0].unsqueeze(1) == allowed).all(-1).any(1).all()


@given(decoders())
@torch.no_grad()
def test_cold_draws_are_the_greedy_sequence(decoder_and_end):
    decoder, end_token = decoder_and_end
    z = codes(10)
    assert torch.equal(ancestral_sample(decoder, z, 4, end_token, 1e-9), beam_search(decoder, z, 4, end_token))


def greedy(decoder, z, max_length, end_token):
    """The most probable token at each place, by teacher forcing on those before."""
    row = []
    while len(row) < max_length and (not row or row[-1] != end_token):
        x = torch.tensor([[*row, 0]])
        row.append(int(decoder(z.unsqueeze(0), x)[0, -1].argmax()))
    return row + [PADDING] * (max_length - len(row))


@pytest.mark.slow
@given(decoders(), st.integers(1, 5))
@torch.no_grad()
def test_one_beam_is_greedy(decoder_and_end, max_length):
    decoder, end_token = decoder_and_end
    z = codes(4)
    assert beam_search(decoder, z, max_length, end_token).tolist() == [
        greedy(decoder, point, max_length, end_token) for point in z
    ]


def best(decoder, z, max_length, end_token):
    """The most probable of all sequences."""
    x = all_sequences(decoder.vocab_size, max_length, end_token)
    return x[log_probs(decoder, z, x).argmax()].tolist()


@given(decoders(), st.integers(1, 4))
@torch.no_grad()
def test_enough_beams_find_the_most_probable_sequence(decoder_and_end, max_length):
    decoder, end_token = decoder_and_end
    z = codes(3)
    found = beam_search(decoder, z, max_length, end_token, num_beams=decoder.vocab_size**max_length)
    assert found.tolist() == [best(decoder, point, max_length, end_token) for point in z]


class Table:
    """Any distribution there is over sequences of three tokens: free logits after every prefix."""

    vocab_size = 3

    def __init__(self, max_length):
        prefixes = sum(3**length for length in range(max_length))
        self.logits = 3 * torch.randn(prefixes, 3, dtype=torch.float64)

    def begin(self, z):
        prefix = torch.zeros(len(z), dtype=torch.long)
        return self.logits[prefix], (prefix,)

    def step(self, tokens, state):
        prefix = 3 * state[0] + tokens + 1
        return self.logits[prefix], (prefix,)

    def __call__(self, z, x):
        logits, state = self.begin(z)
        every = [logits]
        for column in x.T[:-1].clamp(min=0):
            logits, state = self.step(column, state)
            every.append(logits)
        return torch.stack(every, dim=1)


def test_the_most_probable_sequence_may_end_early_late_or_not_at_all():
    """All three are found, whether the greedy sequence is the same one or not."""
    kinds, greedy_is_best = set(), []
    for _ in range(40):
        decoder, (z,) = Table(max_length=3), codes(1)
        row = best(decoder, z, 3, end_token=0)
        assert beam_search(decoder, z.unsqueeze(0), 3, 0, num_beams=27).tolist() == [row]
        kinds.add("early" if PADDING in row else "late" if 0 in row else "cut off")
        greedy_is_best.append(beam_search(decoder, z.unsqueeze(0), 3, 0).tolist() == [row])
    assert kinds == {"early", "late", "cut off"}
    assert 0 < sum(greedy_is_best) < len(greedy_is_best)


@given(st.integers(0, 2**31), st.sampled_from([None, 0, 1, 2]), st.integers(1, 9))
def test_beams_over_any_distribution(seed, end_token, num_beams):
    torch.manual_seed(seed)
    decoder, z = Table(max_length=4), codes(2)
    expected = plain_beam_search(decoder, z[0], 4, end_token, num_beams)
    assert beam_search(decoder, z, 4, end_token, num_beams).tolist() == [expected, expected]


def plain_beam_search(decoder, z, max_length, end_token, num_beams):
    """A beam search over lists, each prefix scored by itself."""
    beams = [[]]
    for _ in range(max_length):
        ended = [row for row in beams if row and row[-1] == end_token]
        running = [row for row in beams if row not in ended]
        candidates = ended + [[*row, token] for row in running for token in range(decoder.vocab_size)]
        scores = [float(log_probs(decoder, z, torch.tensor([row]))) for row in candidates]
        order = sorted(range(len(candidates)), key=lambda i, scores=scores: -scores[i])
        beams = [candidates[i] for i in order[:num_beams]]
    return beams[0] + [PADDING] * (max_length - len(beams[0]))


@given(
    st.integers(0, 2**31),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([[], [2], [0], [2, 0]]),
    st.integers(0, 3),
    st.floats(-2.0, 5.0),
)
def test_the_best_sequence_among_those_that_are_left(seed, end_token, exclude, min_length, bonus):
    torch.manual_seed(seed)
    decoder, z = Table(max_length=3), codes(2)
    exclusions = Exclusions(exclude, min_length)
    x = all_sequences(3, 3, end_token)
    lengths = (x >= 0).sum(1)
    allowed = ~torch.isin(x, torch.tensor(exclude, dtype=torch.long)).any(1)
    if end_token is not None:
        early = (x[:, :min_length] == end_token).any(1)
        allowed &= ~early
    left = set(range(3)) - set(exclude) - {end_token}
    if not left and min_length + (end_token is None):
        with pytest.raises(ValueError, match="Expected exclude to leave a token"):
            beam_search(decoder, z, 3, end_token, exclusions=exclusions)
        return
    scores = log_probs(decoder, z[0], x) + bonus * lengths
    expected = x[scores.masked_fill(~allowed, -torch.inf).argmax()].tolist()
    found = beam_search(decoder, z, 3, end_token, 27, length_bonus=bonus, exclusions=exclusions)
    assert found.tolist() == [expected, expected]
    drawn = ancestral_sample(decoder, z.repeat(20, 1), 3, end_token, exclusions=exclusions)
    assert (drawn.unsqueeze(1) == x[allowed]).all(-1).any(1).all()


@torch.no_grad()
def test_draws_without_a_token_have_the_probabilities_of_the_others():
    torch.manual_seed(0)
    decoder, count = Table(max_length=2), 20_000
    (z,) = codes(1)
    x = all_sequences(3, 2, 0)
    drawn = ancestral_sample(decoder, z.expand(count, -1), 2, 0, exclusions=Exclusions([2], 1))
    exact = []
    for row in x.tolist():
        logits, state = decoder.begin(z.unsqueeze(0))
        probability = 1.0
        for t, token in enumerate(row):
            if token == PADDING:
                break
            gone = [2, 0] if t == 0 else [2]
            logits = logits.clone()
            logits[0, gone] = -torch.inf
            probability *= float(logits.softmax(-1)[0, token])
            logits, state = decoder.step(torch.tensor([token]), state) if t == 0 else (logits, state)
        exact.append(probability)
    exact = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(exact.sum(), torch.tensor(1.0, dtype=torch.float64))
    found = (drawn.unsqueeze(1) == x).all(-1).double().mean(0)
    assert ((found - exact).abs() < 5 * (exact * (1 - exact) / count).sqrt() + 1e-12).all()


@pytest.mark.slow
@settings(max_examples=10)
@given(decoders(), st.integers(2, 5))
@torch.no_grad()
def test_some_beams_are_those_of_a_search_over_lists(decoder_and_end, num_beams):
    decoder, end_token = decoder_and_end
    z = codes(2)
    found = beam_search(decoder, z, 4, end_token, num_beams)
    assert found.tolist() == [plain_beam_search(decoder, point, 4, end_token, num_beams) for point in z]


@pytest.mark.slow
@given(decoders(), st.sampled_from([1, 2, 5, 100]))
@torch.no_grad()
def test_each_z_is_searched_for_by_itself(decoder_and_end, num_beams):
    decoder, end_token = decoder_and_end
    z = codes(5)
    together = beam_search(decoder, z, 4, end_token, num_beams)
    alone = [beam_search(decoder, point.unsqueeze(0), 4, end_token, num_beams) for point in z]
    assert torch.equal(together, torch.cat(alone))
    assert together.shape == (5, 4)
    assert together.dtype == torch.long


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_hides_no_tokens(kind):
    """Word dropout is of training, where the tokens are the data's."""
    decoder, blind = (small(kind, 4, seed=2, word_dropout=rate) for rate in (0.0, 1.0))
    z = codes(20)
    for generate in (ancestral_sample, beam_search):
        draws = []
        for one in (decoder, blind.train()):
            torch.manual_seed(0)
            draws.append(generate(one, z, 5, 0))
        assert torch.equal(*draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_gradients(dtype):
    decoder = small("projected", 4).to(dtype)
    z = codes(3).to(dtype)
    for generate in (ancestral_sample, beam_search):
        assert not generate(decoder, z, 4, 0).is_floating_point()
        with torch.inference_mode():
            assert generate(decoder, z, 4, None).shape == (3, 4)


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        (lambda decoder: ancestral_sample(decoder, codes(3), 4, 0, 0.0), "temperature .*> 0, got 0"),
        (lambda decoder: ancestral_sample(decoder, codes(3), 4, 0, -1.0), "temperature"),
        (lambda decoder: ancestral_sample(decoder, codes(3), 4, 0, float("nan")), "temperature"),
        (lambda decoder: ancestral_sample(decoder, codes(3), 4, 0, float("inf")), "temperature"),
        (lambda decoder: beam_search(decoder, codes(3), 4, 0, 0), "num_beams"),
        (lambda decoder: beam_search(decoder, codes(3), 4, 0, 1.5), "num_beams"),
        (lambda decoder: ancestral_sample(decoder, torch.zeros(3, 2), 4, 0), r"Expected z of shape \(..., 1\)"),
        (lambda decoder: beam_search(decoder, torch.zeros(3, 2), 4, 0), r"Expected z of shape \(..., 1\)"),
    ],
)
def test_refuses(generate, message):
    with pytest.raises(ValueError, match=message):
        generate(small("plain", 2))
