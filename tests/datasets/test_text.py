"""Text: round trips, what becomes of documents that are too long or unknown, and files line by line."""

import codecs
import hashlib
import math
import os
import sys
import unicodedata
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pyro_ilvae.datasets import text
from pyro_ilvae.datasets.text import Vocabulary
from pyro_ilvae.distributions import PADDING

REAL_FOLDER = os.environ.get("PYRO_ILVAE_DATA")
FILES = {"names.txt": text.names, "tinyshakespeare.txt": text.tinyshakespeare}
LINE_ENDS = ("\n", "\r\n", "\r")
# str.splitlines ends a line at each of these, and a file does not.
NO_LINE_ENDS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"

few = st.lists(st.text("abcdE \n", max_size=8), max_size=8)
documents_of_any_text = st.lists(st.text(max_size=12), max_size=8)
words_of_any_text = st.lists(st.text("aBΣİé9_'’.-! \t", max_size=12), max_size=8)  # noqa: RUF001 - both apostrophes
lines = st.lists(st.text("ab é€😀" + NO_LINE_ENDS, min_size=1).map(str.strip).filter(bool), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch):
    monkeypatch.delenv("PYRO_ILVAE_DATA", raising=False)


def equal(a, b):
    same = (a.name, a.vocabulary, a.num_left_out) == (b.name, b.vocabulary, b.num_left_out)
    return same and torch.equal(a.train, b.train) and torch.equal(a.test, b.test)


def all_documents(data):
    return data.vocabulary.decode(data.train) + data.vocabulary.decode(data.test)


# Vocabularies.


@given(few, st.sampled_from(["characters", "words"]), st.integers(2, 8), st.randoms(use_true_random=False))
def test_vocabulary_is_by_frequency_and_then_the_alphabet(documents, level, max_size, random):
    vocabulary = Vocabulary.of(documents, level=level)
    assert (vocabulary.end, vocabulary.unknown, vocabulary.level) == (0, 1, level)
    assert vocabulary.tokens[:2] == ("<end>", "<unk>")
    counts = Counter(token for d in documents for token in (d if level == "characters" else d.lower().split()))
    assert set(vocabulary.tokens[2:]) == set(counts)
    assert len(vocabulary) == len(counts) + 2
    ranks = [(-counts[token], token) for token in vocabulary.tokens[2:]]
    assert ranks == sorted(ranks)
    smaller = Vocabulary.of(documents, level=level, max_size=max_size)
    assert smaller.tokens == vocabulary.tokens[:max_size]
    random.shuffle(documents)
    assert Vocabulary.of(documents, level=level) == vocabulary


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ("Don't go!", ["don't", "go", "!"]),
        ("rock 'n' roll", ["rock", "'", "n", "'", "roll"]),
        ("the poets' o’er-hasty ’tis", ["the", "poets", "'", "o’er", "-", "hasty", "’", "tis"]),  # noqa: RUF001
        ("fo'c's'le...", ["fo'c's'le", ".", ".", "."]),
        ("a 12 É\tb_c\n?!", ["a", "12", "é", "b_c", "?", "!"]),
        ("<unk> <end>", ["<", "unk", ">", "<", "end", ">"]),
        (" \t", []),
    ],
)
def test_words_and_punctuation_marks(monkeypatch, document, tokens):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)  # which is not needed
    vocabulary = Vocabulary.of([document], level="words")
    (numbers,) = vocabulary.encode([document]).tolist()
    assert [vocabulary.tokens[number] for number in numbers] == [*tokens, "<end>"]
    assert vocabulary.decode(torch.tensor([numbers])) == [" ".join(tokens)]


@given(words_of_any_text)
@example(["ΣΊΣΥΦΟΣ İstanbul ß ǅ", "naïve—co-op’s 3.14 _x_ a\u0301 \u200b", "'tis the ’n’ ''\x1c𝒳 😀!"])  # noqa: RUF001
def test_words_are_the_tokens_of_scikit_learn(documents):
    sklearn_text = pytest.importorskip("sklearn.feature_extraction.text")
    pattern = r"\w+(?:['\u2019]\w+)*|[^\w\s]"
    tokens_of = sklearn_text.CountVectorizer(lowercase=True, token_pattern=pattern).build_analyzer()
    vocabulary = Vocabulary.of(documents, level="words")
    for row, document in zip(vocabulary.encode(documents).tolist(), documents, strict=True):
        tokens = [vocabulary.tokens[number] for number in row if number not in (vocabulary.end, PADDING)]
        assert tokens == tokens_of(document)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("characters", ()), "distinct tokens that start with <end> and <unk>"),
        (("characters", ("<unk>", "<end>", "a")), "distinct tokens that start with"),
        (("characters", ("<end>", "<unk>", "a", "a")), "distinct tokens that start with"),
        (
            ("bytes", ("<end>", "<unk>")),
            "level to be one of 'characters', 'words', 'tokens' or a function, got 'bytes'",
        ),
    ],
)
def test_vocabularies_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        Vocabulary(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_size": size}, f"max_size to be .*, got {size}") for size in (-1, 0, 1, 2.5)]
    + [({"level": "bytes"}, "level to be one of 'characters', 'words', 'tokens' or a function, got 'bytes'")]
    + [({"documents": value}, "documents to be a list of str, got") for value in ("abc", [b"a"], ["a", 1], iter("ab"))],
)
def test_what_makes_no_vocabulary(arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        Vocabulary.of(**{"documents": ["a"], **arguments})


# Rows of token numbers.


@given(documents_of_any_text)
@example([])
@example(["", "a"])
def test_round_trip_of_any_characters(documents):
    vocabulary = Vocabulary.of(documents)
    x = vocabulary.encode(documents, unknown="error")
    assert x.dtype == torch.int64
    assert x.shape == (len(documents), max([len(d) + 1 for d in documents], default=0))
    for row, document in zip(x.tolist(), documents, strict=True):
        length = len(document)
        assert min(row[:length], default=2) >= 2
        assert row[length:] == [vocabulary.end] + [PADDING] * (x.shape[1] - length - 1)
    assert vocabulary.decode(x) == documents
    assert vocabulary.decode(x.int()) == documents
    # Padding or not, and whatever comes after the end.
    for more in (PADDING, len(vocabulary) - 1):
        assert vocabulary.decode(torch.nn.functional.pad(x, (0, 2), value=more)) == documents
    assert vocabulary.decode(x.where(x != vocabulary.end, PADDING)) == documents


@given(words_of_any_text)
def test_words_are_those_of_the_decoded_text(documents):
    vocabulary = Vocabulary.of(documents, level="words")
    x = vocabulary.encode(documents, unknown="error")
    assert len(x) == len(documents)
    decoded = vocabulary.decode(x)
    assert torch.equal(vocabulary.encode(decoded, unknown="error"), x)
    assert [d.replace(" ", "") for d in decoded] == ["".join(d.lower().split()) for d in documents]


@given(few, st.integers(1, 9))
def test_three_ways_for_what_is_too_long(documents, max_length):
    vocabulary = Vocabulary.of(documents)
    whole = [d for d in documents if len(d) < max_length]
    truncated = vocabulary.encode(documents, max_length)
    assert vocabulary.decode(truncated) == [d[:max_length] for d in documents]
    assert truncated.shape[1] == min(max_length, max([len(d) + 1 for d in documents], default=0))
    # A row has an end where the document ends in it, and is full where not.
    assert (truncated == vocabulary.end).sum(1).tolist() == [int(len(d) < max_length) for d in documents]
    assert all((row > 0).sum() == max_length for row, d in zip(truncated, documents, strict=True) if d not in whole)
    dropped = vocabulary.encode(documents, max_length, too_long="drop")
    assert torch.equal(dropped, vocabulary.encode(whole))
    if whole == documents:
        assert torch.equal(vocabulary.encode(documents, max_length, too_long="error"), dropped)
        return
    i, first = next((i, d) for i, d in enumerate(documents, start=1) if d not in whole)
    message = rf"at most {max_length} tokens .*, got {len(first) + 1} in document {i}, "
    with pytest.raises(ValueError, match=f"Expected {message}"):
        vocabulary.encode(documents, max_length, too_long="error")


@given(few, few)
def test_two_ways_for_what_is_unknown(known, documents):
    vocabulary = Vocabulary.of(known)
    x = vocabulary.encode(documents)
    expected = [[c if c in vocabulary.tokens else "<unk>" for c in d] for d in documents]
    assert vocabulary.decode(x) == ["".join(tokens) for tokens in expected]
    assert (x == vocabulary.unknown).sum() == sum(tokens.count("<unk>") for tokens in expected)
    unknown = [(c, i) for i, d in enumerate(documents, start=1) for c in d if c not in vocabulary.tokens]
    if not unknown:
        assert torch.equal(vocabulary.encode(documents, unknown="error"), x)
        return
    with pytest.raises(ValueError, match="Expected known tokens, got") as error:
        vocabulary.encode(documents, unknown="error")
    token, i = unknown[0]
    assert f"got {token!r} in document {i}, " in str(error.value)


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_what_is_left_out_is_not_unknown(too_long):
    x = Vocabulary.of(["ab"]).encode(["ab", "abc"], max_length=2 if too_long == "truncate" else 3, too_long=too_long)
    y = Vocabulary.of(["ab"]).encode(["ab", "abc"], x.shape[1], too_long=too_long, unknown="error")
    assert torch.equal(x, y)
    assert not (x == Vocabulary.unknown).any()


@pytest.mark.parametrize("level", ["characters", "words"])
def test_a_vocabulary_of_nothing_knows_nothing(level):
    vocabulary = Vocabulary.of([], level=level)
    assert vocabulary.tokens == ("<end>", "<unk>")
    assert vocabulary.encode(["a", ""]).tolist() == [[1, 0], [0, PADDING]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_length": length}, "max_length to be an int >= 1, got") for length in (0, -1, 1.5, True)]
    + [
        ({"too_long": "cut"}, "too_long to be one of 'truncate', 'drop', 'error', got 'cut'"),
        ({"unknown": "drop"}, "unknown to be one of 'replace', 'error', got 'drop'"),
        ({"documents": "abc"}, "documents to be a list of str, got 'abc'"),
    ],
)
def test_what_encode_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        Vocabulary.of(["a"]).encode(**{"documents": ["a"], **arguments})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_decode_takes_every_integer_dtype(dtype):
    assert Vocabulary.of(["ab"]).decode(torch.tensor([[2, 1, 3, 0], [0, 1, 1, 1]], dtype=dtype)) == ["a<unk>b", ""]


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.zeros(shape, dtype=torch.int64), r"x to be integers of shape \(N, T\)") for shape in ((), (3,), (1, 2, 3))]
    + [(torch.zeros(1, 2, dtype=t), f"x to be integers .*{t}") for t in (torch.float32, torch.bool, torch.complex64)]
    + [(torch.tensor([[0, number]]), rf"x in -1, \.\.\., 3, got {number}") for number in (-2, -100, 4, 2**40)]
    + [(torch.tensor([[255]], dtype=torch.uint8), r"x in -1, \.\.\., 3, got 255")],
)
def test_what_decode_refuses(x, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        Vocabulary.of(["ab"]).decode(x)


# Files.


@given(lines, st.data())
def test_documents_are_lines_whatever_ends_them(tmp_path_factory, documents, data):
    blank = st.lists(st.sampled_from([" ", "\t", "\f", "\u2028", *LINE_ENDS]), max_size=3).map("".join)
    space = st.text(" \t\u00a0", max_size=2)
    content = data.draw(blank)
    for document in documents:
        ends = data.draw(st.sampled_from(LINE_ENDS)) + data.draw(blank)
        content += data.draw(space) + document + data.draw(space) + ends
    if data.draw(st.booleans()):
        content = content.rstrip()
    mark = codecs.BOM_UTF8 if data.draw(st.booleans()) else b""
    path = tmp_path_factory.mktemp("text") / "example.txt"
    path.write_bytes(mark + content.encode())
    for errors in ("strict", "replace"):
        assert text.read_documents(path, errors=errors) == documents
    assert text.read_documents(str(path)) == documents


@pytest.mark.parametrize("content", ["", "\n", " \t\r\n\r\u2028\n\f", "\ufeff", "\ufeff\n\n"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_file_without_documents_is_named(tmp_path, content, errors):
    path = tmp_path / "nothing.txt"
    path.write_bytes(content.encode())
    for function in (text.read_documents, text.from_file):
        with pytest.raises(ValueError, match=r"Expected .*nothing\.txt to hold a document per line, got no line"):
            function(path, errors=errors)


@pytest.mark.parametrize("bad", [b"\xff", b"\x80", b"\xc3", b"\xc0", b"\xed\xa0\x80"])
@pytest.mark.parametrize("end", LINE_ENDS)
@pytest.mark.parametrize("line", [1, 2, 4])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_bytes_that_are_not_utf_8(tmp_path, bad, end, line, mark):
    raw = ["één".encode(), b"two", b"", b"four", b"five"]
    raw[line - 1] = b"a " + bad + b" b"
    path = tmp_path / "no-utf-8.txt"
    path.write_bytes(mark + end.encode().join(raw))
    for function in (text.read_documents, text.from_file):
        with pytest.raises(ValueError, match=r"Expected .*no-utf-8\.txt to be UTF-8, got byte") as error:
            function(path)
        assert f"byte 0x{bad[0]:02x} in line {line}, which errors='replace'" in str(error.value)
    raw[line - 1] = ("a " + "\ufffd" * len(bad) + " b").encode()
    assert text.read_documents(path, errors="replace") == [r.decode() for r in raw if r]


def test_files_that_cannot_be_read_are_the_error_of_the_system(tmp_path):
    for function in (text.read_documents, text.from_file):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "none.txt")
        with pytest.raises(OSError, match=str(tmp_path)):
            function(tmp_path)
        with pytest.raises(ValueError, match="Expected errors to be one of 'strict', 'replace', got 'ignore'"):
            function(tmp_path / "none.txt", errors="ignore")


# Training and test data.


def write(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(documents), encoding="utf-8")
    return path


@given(st.integers(0, 2**31), st.integers(4, 20), st.floats(0.2, 0.8))
def test_split_has_each_document_once_and_depends_on_its_seed_only(tmp_path_factory, seed, count, fraction):
    documents = [f"{i:05b}01" for i in range(count)]
    path = write(tmp_path_factory.mktemp("text") / "some.day.txt", documents)
    state = torch.get_rng_state()
    data = text.from_file(path, test_fraction=fraction, seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    assert (data.name, data.num_left_out) == ("some.day", 0)
    assert len(data.test) == round(fraction * count)
    assert (data.train.dtype, data.test.dtype) == (torch.int64, torch.int64)
    assert data.vocabulary == Vocabulary.of(data.vocabulary.decode(data.train))
    assert sorted(all_documents(data)) == documents
    torch.randn(3)
    assert equal(text.from_file(str(path), test_fraction=fraction, seed=seed), data)


def test_each_document_has_its_share_of_the_test_data(tmp_path):
    documents, draws, fraction = list("abcdefgh"), 300, 0.25
    path = write(tmp_path / "letters.txt", documents)
    counts, different = Counter(), set()
    for seed in range(draws):
        data = text.from_file(path, test_fraction=fraction, seed=seed)
        # No training document has the letter of a test document.
        assert data.vocabulary.decode(data.test) == ["<unk>", "<unk>"]
        counts.update(set(documents) - set(data.vocabulary.tokens))
        different.add(tuple(data.vocabulary.decode(data.train)))
    error = math.sqrt(fraction * (1 - fraction) / draws)
    assert all(abs(counts[document] / draws - fraction) < 5 * error for document in documents)
    assert len(different) > 0.9 * draws  # the order is random too


@given(st.lists(st.integers(1, 9), min_size=6, max_size=12), st.integers(3, 10))
def test_lengths_and_sizes_are_passed_on(tmp_path_factory, lengths, max_length):
    documents = [" ".join("abcdefghi"[:length]) for length in lengths]
    path = write(tmp_path_factory.mktemp("text") / "lengths.txt", documents)
    data = text.from_file(path, "words", max_vocabulary=6, max_length=max_length, test_fraction=0.3)
    assert (data.vocabulary.level, data.num_left_out) == ("words", 0)
    assert len(data.vocabulary) <= 6
    kept = sorted(min(length, max_length) for length in lengths)
    assert sorted(len(document.split()) for document in all_documents(data)) == kept
    # The split and the vocabulary are those of all documents.
    whole = text.from_file(path, "words", test_fraction=0.3)
    parts = [whole.vocabulary.decode(x) for x in (whole.train, whole.test)]
    short = [[document for document in part if len(document.split()) < max_length] for part in parts]
    num_left_out = sum(length >= max_length for length in lengths)
    if all(short):
        dropped = text.from_file(path, "words", max_length=max_length, too_long="drop", test_fraction=0.3)
        assert (dropped.vocabulary, dropped.num_left_out) == (whole.vocabulary, num_left_out)
        assert [whole.vocabulary.decode(x) for x in (dropped.train, dropped.test)] == short
    else:
        with pytest.raises(ValueError, match=f"of {len(lengths)}, without {num_left_out} that are too long"):
            text.from_file(path, "words", max_length=max_length, too_long="drop", test_fraction=0.3)
    if not num_left_out:
        assert equal(text.from_file(path, "words", max_length=max_length, too_long="error", test_fraction=0.3), whole)
        return
    # Counted as in the file and not as in the split.
    i = next(i for i, length in enumerate(lengths) if length >= max_length)
    with pytest.raises(ValueError, match=rf"at most {max_length} tokens .* got {lengths[i] + 1} in document {i + 1}, "):
        text.from_file(path, "words", max_length=max_length, too_long="error", test_fraction=0.3)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, math.nan])
def test_fractions_that_are_refused(tmp_path, fraction):
    with pytest.raises(ValueError, match=r"Expected test_fraction to be a number in \(0, 1\), got"):
        text.from_file(write(tmp_path / "some.txt", ["a"] * 10), test_fraction=fraction)


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (1, 0.9), (4, 0.1), (4, 0.9), (10, 0.01), (10, 0.99)])
def test_parts_without_documents_are_refused(tmp_path, count, fraction):
    num_test = round(count * fraction)
    message = f"Expected training and test documents in some, got {count - num_test} and {num_test} of {count}"
    with pytest.raises(ValueError, match=message):
        text.from_file(write(tmp_path / "some.txt", ["a"] * count), test_fraction=fraction)


# Known data sets.


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("subfolder", [".", "text"])
def test_folder_by_the_argument_and_by_the_variable(tmp_path, monkeypatch, file, subfolder):
    load = FILES[file]
    write(tmp_path / subfolder / file, [f"line {i}" for i in range(10)])
    data = load(tmp_path)
    assert data.name == file.removesuffix(".txt")
    assert (len(data.train), len(data.test)) == (9, 1)
    assert equal(load(str(tmp_path)), data)
    monkeypatch.setenv("PYRO_ILVAE_DATA", str(tmp_path))
    assert equal(load(), data)
    # The argument goes before the variable, and a folder before its subfolder.
    write(tmp_path / "other" / file, ["other"] * 10)
    write(tmp_path / "other" / "text" / file, ["another"] * 10)
    assert set(all_documents(load(tmp_path / "other"))) == {"other"}


@pytest.mark.parametrize("file", FILES)
def test_missing_file_says_where_it_was_looked_for_and_what_to_do(tmp_path, monkeypatch, file):
    write(tmp_path / "elsewhere" / file, ["a"] * 10)
    (tmp_path / file).mkdir()  # a folder is no file
    helps = (file, "PYRO_ILVAE_DATA", "words() needs no file")
    for folder in (tmp_path, None):
        with pytest.raises(FileNotFoundError, match=r"Expected .*, got no such file") as error:
            FILES[file](folder)
        looked = [str(tmp_path / file), str(tmp_path / "text" / file)] if folder else []
        assert all(part in str(error.value) for part in (*helps, *looked))
    for value in (str(tmp_path), ""):
        monkeypatch.setenv("PYRO_ILVAE_DATA", value)
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "text") if value else "PYRO_ILVAE_DATA"):
            FILES[file]()


def test_lines_of_shakespeare_are_words_without_speakers(tmp_path):
    line = "I " * 23
    documents = ["All:", "Speak, speak.", "First Citizen: ", f"{line}end", f"{line}the end", "Go: go", " "] * 10
    data = text.tinyshakespeare(write(tmp_path / "tinyshakespeare.txt", documents).parent)
    expected = ["speak , speak .", f"{line.lower()}end", f"{line.lower()}the", "go : go"]
    assert Counter(all_documents(data)) == Counter(expected * 10)
    assert data.train.shape[1] == 24
    rows = torch.cat([data.train, data.test])
    full = rows[rows[:, 23] != PADDING]
    assert len(full) == 20
    assert not (full == data.vocabulary.end).any()


def test_words_of_shakespeare_are_the_5000_most_frequent(tmp_path):
    documents = [f"w{i} " * 2 for i in range(6000)] + [f"w{i}" for i in range(0, 6000, 2)]
    data = text.tinyshakespeare(write(tmp_path / "tinyshakespeare.txt", documents).parent)
    assert len(data.vocabulary) == 5000
    assert (data.train == data.vocabulary.unknown).any()


def test_words_of_unicode_are_the_same_everywhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    state = torch.get_rng_state()
    data = text.words()
    assert torch.equal(state, torch.get_rng_state())
    assert equal(data, text.words())
    assert (data.name, data.num_left_out, len(data.train), len(data.test)) == ("words", 0, 3503, 389)
    found = all_documents(data)
    assert len(set(found)) == len(found) == 3892
    assert all(len(word) >= 3 and set(word) <= set("abcdefghijklmnopqrstuvwxyz") for word in found)
    assert set(data.vocabulary.tokens[2:]) == set("abcdefghijklmnopqrstuvwxyz")
    current = "|".join(unicodedata.name(chr(code), "") for code in range(0x20000)).lower()
    assert all(word in current for word in found)
    # In their order too: the split never changes.
    assert found[:4] == ["dul", "nur", "section", "mgo"]
    assert hashlib.sha256("\n".join(found).encode()).hexdigest().startswith("08f755b77a33775c")


def test_data_are_on_the_default_device():
    with torch.device("meta"):
        data = text.words()
    assert (data.train.device.type, data.test.device.type) == ("meta", "meta")
    assert data.train.shape == text.words().train.shape


@pytest.mark.skipif(not REAL_FOLDER, reason="PYRO_ILVAE_DATA is not set")
def test_real_files():
    data = text.names(REAL_FOLDER)
    assert (len(data.train), len(data.test), data.num_left_out) == (28_830, 3_203, 0)
    assert set(data.vocabulary.tokens[2:]) == set("abcdefghijklmnopqrstuvwxyz")
    documents = all_documents(data)
    assert {"emma", "olivia", "liam"} <= set(documents)
    assert max(map(len, documents)) == 15
    data = text.tinyshakespeare(REAL_FOLDER)
    assert len(data.vocabulary) == 5000
    assert data.train.shape[1] <= 24
    assert "before we proceed any further , hear me speak ." in {d.replace("<unk>", "") for d in all_documents(data)}
    assert not any(document.endswith(":") for document in all_documents(data))
    # As most tokens are of few words, few tokens are unknown.
    for x in (data.train, data.test):
        assert 0 < (x == data.vocabulary.unknown).sum() < 0.1 * (x > 0).sum()
