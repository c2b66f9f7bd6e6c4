"""Text as tensors of token numbers: vocabularies, files with a document per line, and data for tutorials and tests."""

import codecs
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from reprlib import repr as shortened
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.datasets.images import _FOLDER_VARIABLE
from pyro_ilvae.distributions import PADDING

_LEVELS = ("characters", "words")


_WORD = r"\w+(?:['\u2019]\w+)*|[^\w\s]"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their numbers: 0 the end of a document, 1 a token that is unknown, and from 2 on the real tokens.

    Args:
        level: what a token is: "characters" as they are, or "words" in lower case, by scikit-learn: runs of letters,
            digits and inner apostrophes, or single punctuation marks.
        tokens: the token of each number, of which the first two are "<end>" and "<unk>".

    Raises:
        ValueError: for another level, other first tokens, and a token that is there twice.

    Example:
        >>> vocabulary = Vocabulary.of(["abba", "ab"])
        >>> vocabulary.tokens
        ('<end>', '<unk>', 'a', 'b')
        >>> vocabulary.encode(["ab", "cabs", ""], max_length=3)
        tensor([[ 2,  3,  0],
                [ 1,  2,  3],
                [ 0, -1, -1]])
    """

    end: ClassVar[int] = 0  #: the number of the token that ends a document
    unknown: ClassVar[int] = 1  #: the number of a token that is not in the vocabulary
    level: str
    tokens: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        _checks.choice("level", self.level, _LEVELS)
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if tuple(self.tokens[:2]) != ("<end>", "<unk>") or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"Expected distinct tokens that start with <end> and <unk>, got {shortened(self.tokens)}")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, documents: list[str], level: str = "characters", max_size: int | None = None) -> Self:
        """The tokens of documents, the most frequent first and those of one frequency in alphabetical order.

        Args:
            documents: the texts whose tokens are counted.
            level: "characters" or "words".
            max_size: how many tokens to keep, the end and the unknown token among them; all if None.

        Raises:
            ValueError: for documents that are not a list of str, another level, and a size below 2.
            ImportError: for words without scikit-learn.
        """
        tokens_of = _tokenizer(level)
        if max_size is not None and _checks.positive_int("max_size", max_size) < 2:
            raise ValueError(f"Expected max_size to be at least 2, for <end> and <unk>, got {max_size}")
        counts = Counter(token for document in _texts(documents) for token in tokens_of(document))
        real = sorted(counts, key=lambda token: (-counts[token], token))
        return cls(level, ("<end>", "<unk>", *real)[:max_size])

    def encode(
        self, documents: list[str], max_length: int | None = None, too_long: str = "truncate", unknown: str = "replace"
    ) -> Tensor:
        """The token numbers of documents: in each row those of one document, the end token, and padding.

        Args:
            documents: the N texts.
            max_length: the most tokens of a document, its end token among them; no limit if None.
            too_long: what becomes of a document above the limit: "truncate" keeps its first ``max_length`` tokens, so
                that its row has no end token, as the document does not end there; "drop" leaves it out; "error".
            unknown: what becomes of a token that is not in the vocabulary: "replace" by the unknown token, or "error".

        Returns:
            The numbers, int64 of shape (N, T) with T the length of the longest row, and ``PADDING`` after the end. A
            document without tokens is a row with the end token only.

        Raises:
            ValueError: for documents that are not a list of str, a document (counted from 1) that is too long or has an
                unknown token where that is an error, and arguments other than those above.
        """
        return _padded(self._rows(documents, max_length, too_long, unknown))

    def decode(self, x: Tensor) -> list[str]:
        """The documents in rows of token numbers, each up to its end token or padding.

        Characters are joined as they are, which gives back a document that was encoded with nothing unknown or too
        long. Words are joined by spaces. The unknown token is shown as ``<unk>``.

        Args:
            x: token numbers and ``PADDING``, of an integer dtype and shape (N, T).

        Raises:
            ValueError: for another shape or dtype, and numbers that are neither of a token nor ``PADDING``.

        Example:
            >>> Vocabulary.of(["Don't go!"], level="words").decode(torch.tensor([[3, 4, 2, 0], [4, 0, -1, -1]]))
            ["don't go !", 'go']
        """
        if x.dim() != 2 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"Expected x to be integers of shape (N, T), got {x.dtype} of shape {tuple(x.shape)}")
        x = x.long()  # unsigned integers are compared with -1 as unsigned ones
        outside = x[(x < PADDING) | (x >= len(self))]
        if len(outside):
            raise ValueError(f"Expected x in {PADDING}, ..., {len(self) - 1}, got {int(outside[0])}")
        separator = "" if self.level == "characters" else " "
        rows = (takewhile(lambda number: number not in (self.end, PADDING), row) for row in x.tolist())
        return [separator.join(self.tokens[number] for number in row) for row in rows]

    def _rows(self, documents: list[str], max_length: int | None, too_long: str, unknown: str) -> list[list[int]]:
        """The row of each document without its padding, empty (as no other is) for one that is dropped."""
        limit = None if max_length is None else _checks.positive_int("max_length", max_length)
        _checks.choice("too_long", too_long, ("truncate", "drop", "error"))
        _checks.choice("unknown", unknown, ("replace", "error"))
        tokens_of = _tokenizer(self.level)
        numbers = {token: number for number, token in enumerate(self.tokens)}
        rows: list[list[int]] = []
        for i, document in enumerate(_texts(documents), start=1):
            tokens = tokens_of(document)
            fits = limit is None or len(tokens) < limit
            if not fits and too_long == "drop":
                rows.append([])
                continue
            where = f"in document {i}, {shortened(document)}"
            if not fits and too_long == "error":
                raise ValueError(f"Expected at most {limit} tokens with the end token, got {len(tokens) + 1} {where}")
            row = [numbers.get(token, self.unknown) for token in tokens[:limit]]
            if unknown == "error" and self.unknown in row:
                raise ValueError(f"Expected known tokens, got {tokens[row.index(self.unknown)]!r} {where}")
            rows.append([*row, self.end] if fits else row)
        return rows


class TextData(NamedTuple):
    """Documents as token numbers, split into training and test data, and the vocabulary of the training data."""

    name: str  #: what was loaded: the name of the file without its suffix, or "words"
    train: Tensor  #: int64 of shape (N, T), as :meth:`Vocabulary.encode` returns it
    test: Tensor  #: int64 of shape (M, T')
    vocabulary: Vocabulary  #: the tokens of the training documents
    num_left_out: int  #: the number of documents that were too long and dropped


def read_documents(path: str | os.PathLike[str], *, errors: str = "strict") -> list[str]:
    r"""The documents in a text file in UTF-8, a document per line.

    White space around a line is stripped, and a line of nothing else is no document. A line ends with ``\n``,
    ``\r\n`` or ``\r``, and with no other character. A byte order mark is no part of the first document.

    Args:
        path: the file.
        errors: what becomes of bytes that are not UTF-8: "strict" for an error, or "replace" by U+FFFD.

    Raises:
        ValueError: for a file without documents, and for bytes that are not UTF-8, with the line and the byte.
        OSError: for a file that cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (path := Path(folder) / "example.txt").write_bytes(b"One line.\r\n\r\n  Another.\r\n")
        ...     read_documents(path)
        ['One line.', 'Another.']
    """
    _checks.choice("errors", errors, ("strict", "replace"))
    documents = []
    # Split as bytes, for which splitlines has these ends of a line only.
    for i, raw in enumerate(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        try:
            document = raw.decode(errors=errors).strip()
        except UnicodeDecodeError as error:
            bad = f"byte 0x{raw[error.start]:02x} in line {i}, which errors='replace' reads as U+FFFD"
            raise ValueError(f"Expected {path} to be UTF-8, got {bad}") from error
        if document:
            documents.append(document)
    if not documents:
        raise ValueError(f"Expected {path} to hold a document per line, got no line with text")
    return documents


def from_file(
    path: str | os.PathLike[str],
    level: str = "characters",
    *,
    max_vocabulary: int | None = None,
    max_length: int | None = None,
    too_long: str = "truncate",
    test_fraction: float = 0.1,
    seed: int = 0,
    errors: str = "strict",
) -> TextData:
    """The documents of a text file, a document per line, as training and test data.

    Args:
        path: the file, for :func:`read_documents`.
        level: "characters" or "words", as in :class:`Vocabulary`.
        max_vocabulary: the size of the vocabulary; all tokens of the training documents if None.
        max_length: the most tokens of a document, its end token among them; no limit if None.
        too_long: "truncate", "drop" or "error", as in :meth:`Vocabulary.encode`, after the split and the vocabulary.
        test_fraction: the part of the documents, in (0, 1) and rounded to a whole number of them, that is test data.
        seed: a seed for the split, which leaves the global random state of PyTorch as it was.
        errors: "strict" or "replace", for :func:`read_documents`.

    Raises:
        ValueError: for what :func:`read_documents`, :meth:`Vocabulary.of` and :meth:`Vocabulary.encode` refuse, a test
            fraction outside (0, 1), and training or test data without a document.
        OSError: for a file that cannot be read.
    """
    documents = read_documents(path, errors=errors)
    return _split(Path(path).stem, documents, level, max_vocabulary, max_length, too_long, test_fraction, seed)


def names(folder: str | os.PathLike[str] | None = None) -> TextData:
    """The 32,033 first names of makemore [1], as characters. Some are there twice, and can be in both parts.

    Args:
        folder: holds ``names.txt`` or ``text/names.txt``; the environment variable ``PYRO_ILVAE_DATA`` if None.

    Raises:
        FileNotFoundError: without the file. :func:`words` needs none.

    References:
        [1] Karpathy 2022, makemore, https://github.com/karpathy/makemore, MIT license

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "names.txt").write_text("anna\\n" * 10)
        ...     names(folder).vocabulary.tokens
        ('<end>', '<unk>', 'a', 'n')
    """
    return from_file(_found("names.txt", folder))


def tinyshakespeare(folder: str | os.PathLike[str] | None = None) -> TextData:
    """Lines of Shakespeare [1] that do not end in a colon, as words, 4,998 of them known, truncated to 24 tokens.

    Args:
        folder: holds ``tinyshakespeare.txt``, as for :func:`names`.

    Raises:
        FileNotFoundError: without the file. :func:`words` needs none.
        ImportError: without scikit-learn.

    References:
        [1] Karpathy 2015, char-rnn, https://github.com/karpathy/char-rnn, text in the public domain
    """
    path = _found("tinyshakespeare.txt", folder)
    lines = [line for line in read_documents(path) if not line.endswith(":")]  # without the names of speakers
    return _split(path.stem, lines, "words", max_vocabulary=5000, max_length=24)


def words() -> TextData:
    """The 3,892 words of at least three letters in the names of Unicode's characters, which need no file.

    They are the distinct runs of letters, in lower case, in the names that version 3.2 has below U+20000, without
    those of CJK characters and Hangul syllables. Python keeps that version, so the words are the same in each.

    Example:
        >>> data = words()
        >>> data.train.shape, data.test.shape, len(data.vocabulary)
        (torch.Size([3503, 22]), torch.Size([389, 17]), 28)
    """
    in_order = (unicodedata.ucd_3_2_0.name(chr(code), "") for code in range(0x20000))
    text = " ".join(name for name in in_order if not name.startswith(("CJK", "HANGUL SYLL")))
    return _split("words", list(dict.fromkeys(re.findall("[a-z]{3,}", text.lower()))))


def _texts(documents: list[str]) -> list[str]:
    # Each character of a str would be taken for a document.
    if not isinstance(documents, list | tuple) or not all(isinstance(document, str) for document in documents):
        raise ValueError(f"Expected documents to be a list of str, got {shortened(documents)}")
    return documents


def _tokenizer(level: str) -> Callable[[str], list[str]]:
    if _checks.choice("level", level, _LEVELS) == "characters":
        return list
    try:
        from sklearn.feature_extraction.text import CountVectorizer  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("text as words needs scikit-learn: pip install scikit-learn") from error
    return CountVectorizer(lowercase=True, token_pattern=_WORD).build_analyzer()


def _padded(rows: list[list[int]]) -> Tensor:
    """The rows that are kept, of shape (N, T)."""
    kept = [row for row in rows if row]
    length = max(map(len, kept), default=0)
    padded = [row + [PADDING] * (length - len(row)) for row in kept]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(kept), length)


def _split(
    name: str,
    documents: list[str],
    level: str = "characters",
    max_vocabulary: int | None = None,
    max_length: int | None = None,
    too_long: str = "truncate",
    test_fraction: float = 0.1,
    seed: int = 0,
) -> TextData:
    """Training and test data as :func:`from_file` describes them."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"Expected test_fraction in (0, 1), got {test_fraction!r}")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    num_test = round(test_fraction * len(documents))
    parts = order[num_test:], order[:num_test]
    vocabulary = Vocabulary.of([documents[i] for i in parts[0]], level, max_vocabulary)
    # In their own order, so that an error counts the documents as the file does.
    rows = vocabulary._rows(documents, max_length, too_long, "replace")
    train, test = (_padded([rows[i] for i in part]) for part in parts)
    if not len(train) or not len(test):
        sizes = f"{len(train)} and {len(test)} of {len(documents)}, without {rows.count([])} that are too long"
        raise ValueError(f"Expected training and test documents in {name}, got {sizes}")
    return TextData(name, train, test, vocabulary, rows.count([]))


def _found(file: str, folder: str | os.PathLike[str] | None) -> Path:
    """The path of a file in the folder or in that of the environment variable."""
    root = folder if folder is not None else os.environ.get(_FOLDER_VARIABLE)
    paths = [Path(root) / subfolder / file for subfolder in (".", "text")] if root else []
    if found := [path for path in paths if path.is_file()]:
        return found[0]
    raise FileNotFoundError(
        f"Expected {' or '.join(map(str, paths)) or file}, got no such file. Name its folder by the argument or by the "
        f"environment variable {_FOLDER_VARIABLE}; words() needs no file."
    )
