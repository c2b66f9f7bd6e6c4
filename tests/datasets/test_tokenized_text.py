"""Text that is tokenized already: tokens as published, exact round trips, separate files, and perplexities by hand."""

import functools
import math
import pickle
import re
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pyro_ilvae.datasets import text
from pyro_ilvae.datasets.text import Vocabulary
from pyro_ilvae.diagnostics import perplexity
from pyro_ilvae.distributions import PADDING, TokenSequence

PUBLISHED = ["the <unk> of mr. smith did n't rise N N", "u.s. sales of the <unk> rose $ N billion"]
tokens = st.text("aBN.$'<>_unké😀-1", min_size=1, max_size=6) | st.sampled_from(["<unk>", "u.s.", "n't", "<s>", "@-@"])
documents_of_tokens = st.lists(st.lists(tokens.filter(lambda token: token != "<end>"), max_size=6), max_size=6)


class Tokenizer:
    """As spaCy's and NLTK's: an object with a method."""

    def tokenize(self, document):
        return re.findall(r"\w+|\S", document)

    def __call__(self, document):
        return tuple(document.split("|"))


def pieces(document):
    """Word pieces as SentencePiece makes them: a mark for each space, and pieces of two characters."""
    return [piece for word in document.split(" ") for piece in re.findall(".{1,2}", "▁" + word)]


def whole(pieces):
    return "".join(pieces).replace("▁", " ").removeprefix(" ")


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@given(documents_of_tokens)
@example([line.split() for line in PUBLISHED])
def test_tokens_are_what_white_space_separates_and_come_back_exactly(documents):
    lines = [" ".join(document) for document in documents]
    vocabulary = Vocabulary.of(lines, level="tokens")
    counts = Counter(token for document in documents for token in document if token != "<unk>")
    assert vocabulary.tokens == ("<end>", "<unk>", *sorted(counts, key=lambda token: (-counts[token], token)))
    x = vocabulary.encode(lines, unknown="error")
    assert vocabulary.decode(x) == lines
    assert (x >= 0).sum(1).tolist() == [len(document) + 1 for document in documents]
    assert (x == vocabulary.unknown).sum() == sum(document.count("<unk>") for document in documents)
    assert vocabulary == pickle.loads(pickle.dumps(vocabulary))


@pytest.mark.parametrize("space", ["  ", "\t", " \t ", "\u00a0"])
def test_any_white_space_separates_tokens(space):
    vocabulary = Vocabulary.of([f"a{space}B"], level="tokens")
    assert vocabulary.tokens == ("<end>", "<unk>", "B", "a")
    assert vocabulary.decode(vocabulary.encode([f" a{space}B "])) == ["a B"]


def test_a_token_outside_the_vocabulary_is_the_unknown_token_of_the_file():
    vocabulary = Vocabulary.of(["the <unk> rose"], level="tokens", max_size=3)
    assert vocabulary.tokens == ("<end>", "<unk>", "rose")
    assert vocabulary.encode(["the <unk> rose"]).tolist() == [[1, 1, 2, 0]]
    with pytest.raises(ValueError, match="Expected known tokens, got 'the' in document 2"):
        vocabulary.encode(["<unk> rose", "<unk> the rose"], unknown="error")


@pytest.mark.parametrize(
    ("level", "join", "document", "expected", "shown"),
    [
        (str.split, None, "Mr. N  rose", ["Mr.", "N", "rose"], "Vocabulary(5 tokens of split)"),
        (list, "".join, "ab a", ["a", "b", " ", "a"], "Vocabulary(5 tokens of list)"),
        (pieces, whole, "abc de", ["▁a", "bc", "▁d", "e"], "Vocabulary(6 tokens of pieces)"),
        (Tokenizer().tokenize, None, "a.b", ["a", ".", "b"], "Vocabulary(5 tokens of tokenize)"),
        (Tokenizer(), "|".join, "a b|c", ["a b", "c"], "Vocabulary(4 tokens of Tokenizer)"),
        (re.compile(r"\w").findall, None, "ab", ["a", "b"], "Vocabulary(4 tokens of findall)"),
        (functools.partial(re.split, ","), ",".join, "a,,b", ["a", "", "b"], "Vocabulary(5 tokens of partial)"),
        (lambda document: iter(document.split()), None, "a b", ["a", "b"], "Vocabulary(4 tokens of <lambda>)"),
        (
            lambda document: ["<unk>" if t == "_UNK" else t for t in document.split()],
            None,
            "_UNK a",
            ["<unk>", "a"],
            "",
        ),
    ],
)
def test_any_function_can_be_the_tokenizer(level, join, document, expected, shown, tmp_path):
    vocabulary = Vocabulary.of([document], level, join=join)
    (numbers,) = vocabulary.encode([document], unknown="error").tolist()
    assert [vocabulary.tokens[number] for number in numbers] == [*expected, "<end>"]
    assert vocabulary.decode(torch.tensor([numbers])) == [(join or " ".join)(expected)]
    assert repr(vocabulary) == shown or not shown
    data = text.from_file(write(tmp_path / "some.txt", [document] * 4), level, join=join, test_fraction=0.5)
    assert data.vocabulary == vocabulary
    assert torch.equal(data.test, torch.tensor([numbers] * 2))


@pytest.mark.parametrize("level", ["characters", "words", "tokens"])
def test_join_goes_before_the_level(level):
    vocabulary = Vocabulary.of(["a b"], level, join="+".join)
    assert vocabulary.decode(torch.tensor([[2, 3, 0]])) == ["+".join(vocabulary.tokens[2:4])]


@pytest.mark.parametrize(
    ("level", "error", "message"),
    [
        ("bytes", ValueError, "level to be one of 'characters', 'words', 'tokens' or a function, got 'bytes'"),
        (None, ValueError, "level to be one of .*, got None"),
        (3, ValueError, "level to be one of .*, got 3"),
        (["words"], ValueError, "level to be one of .*, got"),
        (Tokenizer, TypeError, "level to be a function from a document to its tokens, got the class Tokenizer"),
        (str, TypeError, "level to be a function .*, got the class str"),
        (lambda a, b: [a, b], TypeError, "level to be a function of a document, got one with missing a required"),
        (lambda: [], TypeError, "level to be a function of a document, got one with too many positional"),
        (str.lower, TypeError, "level to return a list of str, got 'a b' from lower"),
        (len, TypeError, "level to return a list of str, got 3 from len"),
        (str.encode, TypeError, "level to return a list of str, got b'a b' from encode"),
        (lambda document: None, TypeError, "level to return a list of str, got None"),
        (lambda document: {"input_ids": [1, 2]}, TypeError, "level to return a list of str, got {'input_ids'"),
        (lambda document: [1, 2], TypeError, r"level to return a list of str, got \[1, 2\]"),
        (lambda document: ["a", None], TypeError, "level to return a list of str, got"),
        (lambda document: ["a", "<end>"], ValueError, "documents without the token <end>, .* in document 1, 'a b'"),
    ],
)
def test_levels_that_are_refused(level, error, message, tmp_path):
    path = write(tmp_path / "some.txt", ["a b"] * 10)
    calls = [
        lambda: Vocabulary.of(["a b"], level),
        lambda: Vocabulary(level, ("<end>", "<unk>")).encode(["a b"]),
        lambda: text.from_file(path, level),
        lambda: text.from_files(train=path, test=path, level=level),
    ]
    for call in calls:
        with pytest.raises(error, match=f"Expected {message}"):
            call()


@pytest.mark.parametrize("join", [" ", 3, str, lambda a, b: a])
def test_joins_that_are_refused(join):
    with pytest.raises(TypeError, match="Expected join to be a function"):
        Vocabulary.of(["a"], "tokens", join=join)
    with pytest.raises(TypeError, match=r"Expected join to return a str, got \['a'\]"):
        Vocabulary.of(["a"], "tokens", join=lambda tokens: tokens).decode(torch.tensor([[2, 0]]))


@pytest.mark.parametrize("tokens", [("<end>", "<unk>", 3), 3, None, ("<end>", "<unk>", ["a"])])
def test_tokens_are_strings(tokens):
    with pytest.raises(TypeError, match="Expected tokens to be a tuple of str"):
        Vocabulary("tokens", tokens)


def test_the_end_of_a_document_is_no_token_of_a_file(tmp_path):
    path = write(tmp_path / "ends.txt", ["a b", "a <end> b"])
    good = write(tmp_path / "good.txt", ["a b"])
    for files in ({"train": path, "test": good}, {"train": good, "test": path}):
        with pytest.raises(ValueError, match=r"Expected documents without the token <end>, .* document 2, 'a <end> b'"):
            text.from_files(**files, level="tokens")
    # Where no token can be "<end>", it is text like any other.
    assert text.from_files(train=path, test=path).vocabulary.tokens[:2] == ("<end>", "<unk>")


# Files for training, validation and test.


def test_the_vocabulary_is_the_training_file_s(tmp_path):
    train = write(tmp_path / "ptb.train.txt", [" " + line + " " for line in PUBLISHED])
    test = write(tmp_path / "test.txt", ["the new <unk> rose", "U.S. sales"])
    validation = write(tmp_path / "valid.txt", ["N", "N N", "other N"])
    data = text.from_files(train=train, validation=validation, test=str(test), level="tokens")
    assert (data.name, data.num_left_out) == ("ptb.train", 0)
    assert data.vocabulary == Vocabulary.of(PUBLISHED, "tokens")
    decode = data.vocabulary.decode
    assert decode(data.train) == PUBLISHED
    assert decode(data.test) == ["the <unk> <unk> rose", "<unk> sales"]
    assert decode(data.validation) == ["N", "N N", "<unk> N"]
    assert (data.test >= 0).sum(1).tolist() == [5, 3]
    assert text.from_files(train=train, test=test).validation is None
    assert len(text.from_files(train=train, test=test, level="tokens", max_vocabulary=5).vocabulary) == 5
    shown = "TextData(name='ptb.train', train=int64 (2, 11), test=int64 (2, 5), vocabulary=Vocabulary(15 tokens), "
    assert repr(data).startswith(shown)


@pytest.mark.parametrize("part", ["train", "test", "validation"])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path.write_text(""), ValueError, r"Expected .*bad\.txt to hold a document per line"),
        (lambda path: path.write_bytes(b"a\n\xff"), ValueError, r"Expected .*bad\.txt to be UTF-8, .* in line 2"),
        (
            lambda path: path.write_text("a\na a a\n"),
            ValueError,
            r"at most 3 tokens .* in document 2, 'a a a' of .*bad",
        ),
        (lambda path: path.mkdir(), OSError, r"bad\.txt"),
        (lambda path: None, FileNotFoundError, r"bad\.txt"),
    ],
)
def test_files_that_are_refused(tmp_path, part, make, error, message):
    make(tmp_path / "bad.txt")
    paths = dict.fromkeys(("train", "test", "validation"), write(tmp_path / "good.txt", ["a a"]))
    with pytest.raises(error, match=message):
        text.from_files(**paths | {part: tmp_path / "bad.txt"}, level="tokens", max_length=3, too_long="error")


@pytest.mark.parametrize("part", ["train", "test", "validation"])
@pytest.mark.parametrize("path", [3, ["a b"], b"file.txt"])
def test_what_is_no_path(tmp_path, part, path):
    paths = dict.fromkeys(("train", "test"), write(tmp_path / "good.txt", ["a"]))
    with pytest.raises(TypeError, match=f"Expected {part} to be a path, got"):
        text.from_files(**paths | {part: path})
    for function, name in ((text.from_file, "path"), (text.read_documents, "path"), (text.names, "folder")):
        with pytest.raises(TypeError, match=f"Expected {name} to be a path, got"):
            function(path)


def test_documents_that_are_dropped_are_counted_over_all_files(tmp_path):
    train = write(tmp_path / "train.txt", ["a a a", "a", "a a"])
    test = write(tmp_path / "test.txt", ["a a a a", "a"])
    data = text.from_files(train=train, test=test, level="tokens", max_length=3, too_long="drop")
    assert (data.num_left_out, data.train.tolist(), data.test.tolist()) == (2, [[2, 0, -1], [2, 2, 0]], [[2, 0]])
    long = write(tmp_path / "long.txt", ["a a a a", "a a a"])
    with pytest.raises(ValueError, match=r"Expected documents within max_length in .*long\.txt, got none of 2"):
        text.from_files(train=train, test=long, level="tokens", max_length=3, too_long="drop")


@pytest.mark.parametrize("size", [0, 1, 2.5, "a", True])
def test_the_size_of_the_vocabulary_has_its_own_name(tmp_path, size):
    path = write(tmp_path / "some.txt", ["a"] * 10)
    with pytest.raises(ValueError, match="Expected max_vocabulary to be an int >= 2"):
        text.from_file(path, max_vocabulary=size)
    with pytest.raises(ValueError, match="Expected max_vocabulary to be an int >= 2"):
        text.from_files(train=path, test=path, max_vocabulary=size)


def test_tokenized_text_read_as_words_is_warned_of(tmp_path):
    path = write(tmp_path / "some.txt", PUBLISHED * 5)
    for read in (
        lambda level: text.from_file(path, level),
        lambda level: text.from_files(train=path, test=path, level=level),
    ):
        with pytest.warns(UserWarning, match='level="words" reads as three tokens; level="tokens"') as record:
            read("words")
        assert record[0].filename == __file__
        for level in ("characters", "tokens"):  # without a warning
            read(level)
    text.from_file(write(path, ["a <unknown> b"] * 10), "words")


# Perplexity.


def log_likelihood_of_frequencies(data, x):
    """log p(x_n) of independent tokens, ends among them, with their frequencies in the training data."""
    counts = torch.bincount(data.train[data.train != PADDING], minlength=len(data.vocabulary)).double()
    return TokenSequence((counts / counts.sum()).log().expand(*x.shape, -1), x).log_prob(x)


def test_a_perplexity_by_hand(tmp_path):
    # Training: a three times, b twice, <unk> once and two ends, 8 tokens. Test: 3/8, 1/8 and the end, 2/8.
    data = text.from_files(
        train=write(tmp_path / "train.txt", ["a b <unk>", "a a b"]),
        test=write(tmp_path / "test.txt", ["a <unk>"]),
        level="tokens",
    )
    found = perplexity(log_likelihood_of_frequencies(data, data.test), (data.test >= 0).sum(1))
    assert float(found) == pytest.approx((8**3 / (3 * 1 * 2)) ** (1 / 3))


def test_a_perplexity_from_the_lines_of_the_files(tmp_path):
    train, test = PUBLISHED * 3 + ["the U.S. rose N"], ["mr. smith rose <unk> N", "the u.s. <unk>", "unseen sales"]
    counts = Counter(token for line in train for token in [*line.split(), "</s>"])
    predicted = [token for line in test for token in [*line.replace("unseen", "<unk>").split(), "</s>"]]
    nats = sum(math.log(counts[token] / counts.total()) for token in predicted)
    data = text.from_files(
        train=write(tmp_path / "train.txt", train), test=write(tmp_path / "test.txt", test), level="tokens"
    )
    found = perplexity(log_likelihood_of_frequencies(data, data.test), (data.test >= 0).sum(1))
    assert float(found) == pytest.approx(math.exp(-nats / len(predicted)))
