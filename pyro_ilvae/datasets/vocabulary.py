"""Vocabularies: from documents to rows of token numbers and back."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from reprlib import repr as shortened
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.distributions import PADDING

__all__ = ["Vocabulary"]

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """Tokens and their numbers: 0 is the end of a document, 1 an unknown token, and real tokens start at 2.

    Args:
        level: what a token is: "characters" are tokens as they are; "words" are in lower case, and a token is a run of
            letters, digits and inner apostrophes, or a single punctuation mark.
        tokens: the token of each number. The first two are "<end>" and "<unk>".

    Raises:
        ValueError: for another level, for other first tokens, and for a token that occurs twice.

    Example:
        >>> vocabulary = Vocabulary.of(["abba", "ab"])
        >>> vocabulary
        Vocabulary(4 characters)
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
    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        _tokenizer(self.level)
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if tuple(self.tokens[:2]) != ("<end>", "<unk>") or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"Expected distinct tokens that start with <end> and <unk>, got {shortened(self.tokens)}")

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} {self.level})"

    @classmethod
    def of(cls, documents: list[str], level: str = "characters", max_size: int | None = None) -> Self:
        """The vocabulary of documents: tokens by falling frequency, and alphabetically where frequencies are equal.

        Args:
            documents: the texts whose tokens are counted.
            level: "characters" or "words".
            max_size: the largest number of tokens, with "<end>" and "<unk>" among them; no limit if None.

        Raises:
            ValueError: for documents that are not a list of str, another level, and a size below 2.
        """
        tokens_of = _tokenizer(level)
        if max_size is not None:
            _checks.positive_int("max_size", max_size, at_least=2)  # for "<end>" and "<unk>"
        counts = Counter(token for document in _texts(documents) for token in tokens_of(document))
        real = sorted(counts, key=lambda token: (-counts[token], token))
        return cls(level, ("<end>", "<unk>", *real)[:max_size])

    def encode(
        self, documents: list[str], max_length: int | None = None, too_long: str = "truncate", unknown: str = "replace"
    ) -> Tensor:
        """The token numbers of documents: each row holds the tokens of one document, the end token, and padding.

        Args:
            documents: the N texts.
            max_length: the largest number of tokens of a document, with its end token; no limit if None.
            too_long: what happens to a document above the limit: "truncate" keeps its first ``max_length`` tokens,
                without an end token, because the document does not end there; "drop" leaves the document out; "error"
                raises an error.
            unknown: what happens to a token that is not in the vocabulary: "replace" puts the unknown token in its
                place; "error" raises an error.

        Returns:
            The numbers, int64 of shape (N, T) with T the length of the longest row, and ``PADDING`` after the end. A
            document without tokens is a row with the end token only.

        Raises:
            ValueError: for documents that are not a list of str, for other values of the arguments, and, with "error",
                for a document that is too long or has an unknown token. The message counts documents from 1.
        """
        return padded(rows_of_numbers(self, documents, max_length, too_long, unknown))

    def decode(self, x: Tensor) -> list[str]:
        """The documents in rows of token numbers, each up to its end token or padding.

        Characters are joined directly: decoding gives back a document that was encoded without unknown tokens and
        without truncation. Words are joined by spaces. The unknown token appears as ``<unk>``.

        Args:
            x: token numbers and ``PADDING``, of an integer dtype and shape (N, T).

        Raises:
            ValueError: for another shape or dtype, and for numbers that belong to no token and are not ``PADDING``.

        Example:
            >>> Vocabulary.of(["Don't go!"], level="words").decode(torch.tensor([[3, 4, 2, 0], [4, 0, -1, -1]]))
            ["don't go !", 'go']
        """
        if x.dim() != 2 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"Expected x to be integers of shape (N, T), got {x.dtype} of shape {tuple(x.shape)}")
        x = x.long()  # comparing an unsigned integer with -1 would turn -1 into an unsigned integer
        outside = x[(x < PADDING) | (x >= len(self))]
        if len(outside):
            raise ValueError(f"Expected x in {PADDING}, ..., {len(self) - 1}, got {int(outside[0])}")
        separator = "" if self.level == "characters" else " "
        rows = (takewhile(lambda number: number not in (self.end, PADDING), row) for row in x.tolist())
        return [separator.join(self.tokens[number] for number in row) for row in rows]


def rows_of_numbers(
    vocabulary: Vocabulary, documents: list[str], max_length: int | None, too_long: str, unknown: str
) -> list[list[int]]:
    """The row of each document without its padding. A dropped document has an empty row, and no other document has."""
    limit = None if max_length is None else _checks.positive_int("max_length", max_length)
    _checks.choice("too_long", too_long, ("truncate", "drop", "error"))
    _checks.choice("unknown", unknown, ("replace", "error"))
    tokens_of = _tokenizer(vocabulary.level)
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
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
        row = [numbers.get(token, vocabulary.unknown) for token in tokens[:limit]]
        if unknown == "error" and vocabulary.unknown in row:
            raise ValueError(f"Expected known tokens, got {tokens[row.index(vocabulary.unknown)]!r} {where}")
        rows.append([*row, vocabulary.end] if fits else row)
    return rows


def padded(rows: list[list[int]]) -> Tensor:
    """The rows that are not empty, as a tensor of shape (N, T)."""
    kept = [row for row in rows if row]
    length = max(map(len, kept), default=0)
    filled = [row + [PADDING] * (length - len(row)) for row in kept]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(kept), length)


def _texts(documents: list[str]) -> list[str]:
    # A single str would pass as a sequence of documents of one character each.
    if not isinstance(documents, list | tuple) or not all(isinstance(document, str) for document in documents):
        raise ValueError(f"Expected documents to be a list of str, got {shortened(documents)}")
    return documents


def _tokenizer(level: str) -> Callable[[str], list[str]]:
    return list if _checks.choice("level", level, ("characters", "words")) == "characters" else _words


def _words(document: str) -> list[str]:
    return _WORD.findall(document.lower())
