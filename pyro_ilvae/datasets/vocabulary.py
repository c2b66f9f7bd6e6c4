"""Vocabularies: from documents to rows of token numbers and back."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from reprlib import repr as shortened
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.distributions import PADDING

__all__ = ["Vocabulary"]

Level: TypeAlias = str | Callable[[str], Sequence[str]]  #: what a token is, by name or by a function
Join: TypeAlias = Callable[[list[str]], str]  #: from the tokens of a document to its text

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
_LEVELS: dict[str, Callable[[str], list[str]]] = {
    "characters": list,
    "words": lambda document: _WORD.findall(document.lower()),
    "tokens": str.split,
}


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """Tokens and their numbers: 0 is the end of a document, 1 an unknown token, and real tokens start at 2.

    Args:
        level: what a token is: "characters" are tokens as they are; "words" are in lower case, and a token is a run of
            letters, digits and inner apostrophes, or a single punctuation mark; "tokens" are what white space separates
            in a text that is tokenized already, such as the Penn Treebank's. For other tokens, a function from a
            document to the list of its tokens. In the last two cases "<unk>" in a document is the unknown token.
        tokens: the token of each number. The first two are "<end>" and "<unk>".
        join: a function from the list of a document's tokens to the document, for :meth:`decode`; if None, characters
            are joined directly and other tokens by spaces.

    Raises:
        ValueError: for another level, for other first tokens, and for a token that occurs twice.
        TypeError: for tokens that are no strings, and for a ``join`` that is no function.

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
        >>> vocabulary = Vocabulary.of(["the <unk> of mr. N", "the u.s."], level="tokens")
        >>> vocabulary.decode(vocabulary.encode(["the <unk> of mr. N"]))
        ['the <unk> of mr. N']
    """

    end: ClassVar[int] = 0  #: the number of the token that ends a document
    unknown: ClassVar[int] = 1  #: the number of a token that is not in the vocabulary
    level: Level
    tokens: tuple[str, ...]
    join: Join | None = None

    def __post_init__(self) -> None:
        _tokenizer(self.level)
        if self.join is not None:
            _checks.function("join", self.join, "a function from a list of str to a str")
            _checks.takes("join", self.join, "a list of str")
        tokens = tuple(self.tokens) if isinstance(self.tokens, Iterable) else (self.tokens,)
        if not all(isinstance(token, str) for token in tokens):
            raise TypeError(f"Expected tokens to be a tuple of str, got {shortened(self.tokens)}")
        object.__setattr__(self, "tokens", tokens)
        if tuple(self.tokens[:2]) != ("<end>", "<unk>") or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"Expected distinct tokens that start with <end> and <unk>, got {shortened(self.tokens)}")

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        level = self.level if isinstance(self.level, str) else f"tokens of {_name(self.level)}"
        return f"{type(self).__name__}({len(self)} {level})"

    @classmethod
    def of(
        cls,
        documents: list[str],
        level: Level = "characters",
        max_size: int | None = None,
        *,
        join: Join | None = None,
    ) -> Self:
        """The vocabulary of documents: tokens by falling frequency, and alphabetically where frequencies are equal.

        Args:
            documents: the texts whose tokens are counted.
            level: "characters", "words", "tokens" or a function, as in :class:`Vocabulary`.
            max_size: the largest number of tokens, with "<end>" and "<unk>" among them; no limit if None.
            join: a function from tokens to a document, as in :class:`Vocabulary`.

        Raises:
            ValueError: for documents that are not a list of str or hold the token "<end>", another level, and a size
                below 2.
            TypeError: for a function as level that does not return a list of str.
        """
        if max_size is not None:
            _checks.positive_int("max_size", max_size, at_least=2)  # for "<end>" and "<unk>"
        counts = Counter(token for tokens in _tokenized(documents, level) for token in tokens)
        del counts["<unk>"]  # a Counter has no error for a missing key
        real = sorted(counts, key=lambda token: (-counts[token], token))
        return cls(level, ("<end>", "<unk>", *real)[:max_size], join)

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
            ValueError: for documents that are not a list of str or hold the token "<end>", for other values of the
                arguments, and, with "error", for a document that is too long or has a token that the vocabulary lacks.
                The message counts documents from 1.
            TypeError: for a function as level that does not return a list of str.
        """
        return padded(rows_of_numbers(self, documents, max_length, too_long, unknown))

    def decode(self, x: Tensor) -> list[str]:
        """The documents in rows of token numbers, each up to its end token or padding.

        Characters are joined directly, and words and other tokens by spaces, unless ``join`` says otherwise. The
        unknown token appears as ``<unk>``. Decoding gives back a document that was encoded without truncation and
        without tokens outside the vocabulary, if its tokens are "characters", or "tokens" with one space between them.

        Args:
            x: token numbers and ``PADDING``, of an integer dtype and shape (N, T).

        Raises:
            ValueError: for another shape or dtype, and for numbers that belong to no token and are not ``PADDING``.
            TypeError: for an ``x`` that is no array, and for a ``join`` that does not return a str.

        Example:
            >>> Vocabulary.of(["Don't go!"], level="words").decode(torch.tensor([[3, 4, 2, 0], [4, 0, -1, -1]]))
            ["don't go !", 'go']
        """
        x = _checks.tensor("x", x)
        if x.dim() != 2 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"Expected x to be integers of shape (N, T), got {x.dtype} of shape {tuple(x.shape)}")
        x = x.long()  # comparing an unsigned integer with -1 would turn -1 into an unsigned integer
        outside = x[(x < PADDING) | (x >= len(self))]
        if len(outside):
            raise ValueError(f"Expected x in {PADDING}, ..., {len(self) - 1}, got {int(outside[0])}")
        join = self.join or ("" if self.level == "characters" else " ").join
        rows = (takewhile(lambda number: number not in (self.end, PADDING), row) for row in x.tolist())
        documents = [join([self.tokens[number] for number in row]) for row in rows]
        if wrong := [document for document in documents if not isinstance(document, str)]:
            raise TypeError(f"Expected join to return a str, got {shortened(wrong[0])}")
        return documents


def rows_of_numbers(
    vocabulary: Vocabulary, documents: list[str], max_length: int | None, too_long: str, unknown: str
) -> list[list[int]]:
    """The row of each document without its padding. A dropped document has an empty row, and no other document has."""
    limit = None if max_length is None else _checks.positive_int("max_length", max_length)
    _checks.choice("too_long", too_long, ("truncate", "drop", "error"))
    _checks.choice("unknown", unknown, ("replace", "error"))
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    rows: list[list[int]] = []
    for i, tokens in enumerate(_tokenized(documents, vocabulary.level), start=1):
        fits = limit is None or len(tokens) < limit
        if not fits and too_long == "drop":
            rows.append([])
            continue
        where = f"in document {i}, {shortened(documents[i - 1])}"
        if not fits and too_long == "error":
            raise ValueError(f"Expected at most {limit} tokens with the end token, got {len(tokens) + 1} {where}")
        row = [numbers.get(token, vocabulary.unknown) for token in tokens[:limit]]
        if unknown == "error" and (missing := [token for token in tokens[:limit] if token not in numbers]):
            raise ValueError(f"Expected known tokens, got {missing[0]!r} {where}")
        rows.append([*row, vocabulary.end] if fits else row)
    return rows


def padded(rows: list[list[int]]) -> Tensor:
    """The rows that are not empty, as a tensor of shape (N, T)."""
    kept = [row for row in rows if row]
    length = max(map(len, kept), default=0)
    filled = [row + [PADDING] * (length - len(row)) for row in kept]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(kept), length)


def _tokenized(documents: list[str], level: Level) -> Iterator[list[str]]:
    """The tokens of each document."""
    # A single str would pass as a sequence of documents of one character each.
    if not isinstance(documents, list | tuple) or not all(isinstance(document, str) for document in documents):
        raise ValueError(f"Expected documents to be a list of str, got {shortened(documents)}")
    tokens_of = _tokenizer(level)
    for i, document in enumerate(documents, start=1):
        tokens = tokens_of(document)
        if "<end>" in tokens:  # decoding would stop there
            raise ValueError(
                f"Expected documents without the token <end>, which is put after each document, got it in document "
                f"{i}, {shortened(document)}"
            )
        yield tokens


def _tokenizer(level: Level) -> Callable[[str], list[str]]:
    if isinstance(level, str) and level in _LEVELS:
        return _LEVELS[level]
    if not callable(level):
        raise ValueError(f"Expected level to be one of {', '.join(map(repr, _LEVELS))} or a function, got {level!r}")
    if isinstance(level, type) and not issubclass(level, list | tuple):
        raise TypeError(f"Expected level to be a function from a document to its tokens, got the class {_name(level)}")
    if not isinstance(level, type):
        _checks.takes("level", level, "a document")

    def checked(document: str) -> list[str]:
        tokens: Any = level(document)
        # Other iterables can lead astray: the tokenizers of transformers return a mapping when they are called.
        tokens = list(tokens) if isinstance(tokens, list | tuple | Iterator) else tokens
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise TypeError(f"Expected level to return a list of str, got {shortened(tokens)} from {_name(level)}")
        return tokens

    return checked


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
