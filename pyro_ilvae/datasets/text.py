"""Text as tensors of token numbers: files with a document per line, and data for tutorials and tests."""

import codecs
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import seeded
from pyro_ilvae.datasets._printing import names_and_shapes
from pyro_ilvae.datasets.images import FOLDER_VARIABLE
from pyro_ilvae.datasets.vocabulary import Join, Level, Vocabulary, padded, rows_of_numbers

__all__ = ["TextData", "Vocabulary", "from_file", "from_files", "names", "read_documents", "tinyshakespeare", "words"]


def __dir__() -> list[str]:
    return __all__


class TextData(NamedTuple):
    """Documents as token numbers, split into training and test data, with the vocabulary of the training data.

    The numbers of tokens that :func:`~pyro_ilvae.diagnostics.perplexity` takes are ``(test >= 0).sum(1)``, which counts
    the end of each document as a token.
    """

    name: str  #: the name of the data: the file's name without its suffix, or "words"
    train: Tensor  #: int64 of shape (N, T), as :meth:`Vocabulary.encode` returns it
    test: Tensor  #: int64 of shape (M, T')
    vocabulary: Vocabulary  #: the tokens of the training documents
    num_left_out: int  #: the number of documents that were dropped because they were too long
    validation: Tensor | None = None  #: int64 of shape (L, T''), from a file of its own; None without one

    def __repr__(self) -> str:
        return names_and_shapes(self)


def read_documents(path: str | os.PathLike[str], *, errors: str = "strict") -> list[str]:
    r"""The documents in a text file in UTF-8, a document per line.

    White space around a line is stripped, and a line that is then empty is skipped. A line ends with ``\n``, ``\r\n``
    or ``\r``, and with no other character. A byte order mark at the start of the file is skipped.

    Args:
        path: the file.
        errors: what happens to bytes that are not UTF-8: "strict" raises an error; "replace" puts U+FFFD in their
            place.

    Returns:
        The documents, in the order of the file.

    Raises:
        ValueError: for a file without documents, and for bytes that are not UTF-8; the message names line and byte.
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
    # bytes.splitlines knows only these three ends of a line; str.splitlines knows others too.
    for i, raw in enumerate(
        _checks.path("path", path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1
    ):
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
    level: Level = "characters",
    *,
    join: Join | None = None,
    max_vocabulary: int | None = None,
    max_length: int | None = None,
    too_long: str = "truncate",
    test_fraction: float = 0.1,
    seed: int | None = 0,
    errors: str = "strict",
) -> TextData:
    """The documents of a text file, a document per line, as training and test data.

    Args:
        path: the file, for :func:`read_documents`.
        level: "characters", "words", "tokens" for text that is tokenized already, or a function from a document to the
            list of its tokens, as in :class:`Vocabulary`.
        join: a function from tokens to a document, as in :class:`Vocabulary`.
        max_vocabulary: the largest size of the vocabulary; all tokens of the training documents if None.
        max_length: the largest number of tokens of a document, with its end token; no limit if None.
        too_long: "truncate", "drop" or "error", as in :meth:`Vocabulary.encode`. The split and the vocabulary do not
            depend on this choice.
        test_fraction: the fraction of the documents that become test data, in (0, 1).
        seed: a seed for the split; the global random state if None.
        errors: "strict" or "replace", for :func:`read_documents`.

    Returns:
        The training and test data.

    Raises:
        ValueError: as :func:`read_documents`, :meth:`Vocabulary.of` and :meth:`Vocabulary.encode`, for a test fraction
            outside (0, 1), and for training or test data without a document.
        OSError: for a file that cannot be read.

    Warns:
        UserWarning: for a document with the token "<unk>", which "words" takes apart.
    """
    documents = read_documents(path, errors=errors)
    _warn_of_tokens(documents, level)
    name = Path(path).stem
    return _split(name, documents, level, max_vocabulary, max_length, too_long, test_fraction, seed, join=join)


def from_files(
    *,
    train: str | os.PathLike[str],
    test: str | os.PathLike[str],
    validation: str | os.PathLike[str] | None = None,
    level: Level = "characters",
    join: Join | None = None,
    max_vocabulary: int | None = None,
    max_length: int | None = None,
    too_long: str = "truncate",
    errors: str = "strict",
) -> TextData:
    r"""The documents of separate files for training and test data, a document per line, as published data come.

    The vocabulary is the vocabulary of the training file, in which "tokens" keeps "<unk>" as the unknown token. For a
    file with another name of it, pass a function as level, such as
    ``lambda line: ["<unk>" if token == "_UNK" else token for token in line.split()]``.

    A published perplexity per token counts the end of each document as a token, as
    ``diagnostics.perplexity(log_likelihood, (data.test >= 0).sum(1))`` does: the test data of the Penn Treebank have
    82,430 tokens, of which 3,761 are ends. Perplexities compare if vocabulary and documents are the same. So
    ``max_vocabulary`` must be the published one, and ``max_length`` must be None, because neither the rest of a
    truncated document nor its end is counted, nor a document that is dropped.

    Args:
        train: the file with the training data, for :func:`read_documents`.
        test: the file with the test data.
        validation: the file with the validation data; None if there are none.
        level: "characters", "words", "tokens" or a function, as in :func:`from_file`.
        join: a function from tokens to a document, as in :class:`Vocabulary`.
        max_vocabulary: the largest size of the vocabulary; all tokens of the training file if None.
        max_length: the largest number of tokens of a document, with its end token; no limit if None.
        too_long: "truncate", "drop" or "error", as in :meth:`Vocabulary.encode`.
        errors: "strict" or "replace", for :func:`read_documents`.

    Returns:
        The data in the order of the files, with the name of the training file.

    Raises:
        ValueError: as :func:`read_documents`, :meth:`Vocabulary.of` and :meth:`Vocabulary.encode`, and for a file all
            of whose documents are dropped.
        OSError: for a file that cannot be read.

    Warns:
        UserWarning: for a document with the token "<unk>", which "words" takes apart.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     train, test = Path(folder) / "train.txt", Path(folder) / "test.txt"
        ...     _ = train.write_text(" mr. <unk> did n't rise N N \n the u.s. rose \n")
        ...     _ = test.write_text(" mr. N rose \n")
        ...     data = from_files(train=train, test=test, level="tokens")
        >>> data.vocabulary.decode(data.test), (data.test >= 0).sum(1)
        (['mr. N rose'], tensor([4]))
    """
    paths = {"train": train, "test": test} | ({} if validation is None else {"validation": validation})
    # All paths are checked before the first file is read.
    found = {part: _checks.path(part, path) for part, path in paths.items()}
    documents = {part: read_documents(path, errors=errors) for part, path in found.items()}
    _warn_of_tokens((document for part in documents.values() for document in part), level)
    vocabulary = _vocabulary(documents["train"], level, max_vocabulary, join)
    parts, num_left_out = {}, 0
    for part, path in found.items():
        try:
            rows = rows_of_numbers(vocabulary, documents[part], max_length, too_long, "replace")
        except ValueError as error:
            raise ValueError(f"{error} of {path}") from error
        parts[part] = padded(rows)
        if not len(parts[part]):
            raise ValueError(f"Expected documents within max_length in {path}, got none of {len(rows)}")
        num_left_out += rows.count([])
    return TextData(found["train"].stem, vocabulary=vocabulary, num_left_out=num_left_out, **parts)


def names(folder: str | os.PathLike[str] | None = None) -> TextData:
    """The 32,033 first names of makemore [1], as characters. Some names occur twice, and so can be in both parts.

    Args:
        folder: the folder that holds ``names.txt`` or ``text/names.txt``; the environment variable ``PYRO_ILVAE_DATA``
            names it if None.

    Raises:
        FileNotFoundError: if there is no such file. :func:`words` needs no file.

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
    """Lines of Shakespeare [1] as words, truncated to 24 tokens, with a vocabulary of 5,000 tokens.

    Lines that end in a colon are left out, because they name the speaker.

    Args:
        folder: the folder that holds ``tinyshakespeare.txt`` or ``text/tinyshakespeare.txt``, as for :func:`names`.

    Raises:
        FileNotFoundError: if there is no such file. :func:`words` needs no file.

    References:
        [1] Karpathy 2015, char-rnn, https://github.com/karpathy/char-rnn, text in the public domain
    """
    path = _found("tinyshakespeare.txt", folder)
    lines = [line for line in read_documents(path) if not line.endswith(":")]
    return _split(path.stem, lines, "words", max_vocabulary=5000, max_length=24)


def words() -> TextData:
    """The 3,892 words of at least three letters in the names of Unicode's characters, as rows of characters.

    No file is needed. A word is a run of letters, in lower case, in the name of a character below U+20000 in version
    3.2 of Unicode, except CJK characters and Hangul syllables. Every Python has that version of Unicode, so the words
    are always the same.

    Example:
        >>> data = words()
        >>> data.train.shape, data.test.shape
        (torch.Size([3503, 22]), torch.Size([389, 17]))
        >>> data.vocabulary
        Vocabulary(28 characters)
    """
    in_order = (unicodedata.ucd_3_2_0.name(chr(code), "") for code in range(0x20000))
    text = " ".join(name for name in in_order if not name.startswith(("CJK", "HANGUL SYLL")))
    return _split("words", list(dict.fromkeys(re.findall("[a-z]{3,}", text.lower()))))


def _split(
    name: str,
    documents: list[str],
    level: Level = "characters",
    max_vocabulary: int | None = None,
    max_length: int | None = None,
    too_long: str = "truncate",
    test_fraction: float = 0.1,
    seed: int | None = 0,
    *,
    join: Join | None = None,
) -> TextData:
    """Training and test data as :func:`from_file` describes them."""
    _checks.fraction("test_fraction", test_fraction, ends=False)
    with seeded(seed):
        order = torch.randperm(len(documents), device="cpu").tolist()
    num_test = round(test_fraction * len(documents))
    parts = order[num_test:], order[:num_test]
    vocabulary = _vocabulary([documents[i] for i in parts[0]], level, max_vocabulary, join)
    # The documents in the order of the file, so that an error counts them as the file does.
    rows = rows_of_numbers(vocabulary, documents, max_length, too_long, "replace")
    train, test = (padded([rows[i] for i in part]) for part in parts)
    if not len(train) or not len(test):
        sizes = f"{len(train)} and {len(test)} of {len(documents)}, without {rows.count([])} that are too long"
        raise ValueError(f"Expected training and test documents in {name}, got {sizes}")
    return TextData(name, train, test, vocabulary, rows.count([]))


def _vocabulary(documents: list[str], level: Level, max_vocabulary: int | None, join: Join | None) -> Vocabulary:
    """The vocabulary of documents, whose size callers know by another name."""
    if max_vocabulary is not None:
        _checks.positive_int("max_vocabulary", max_vocabulary, at_least=2)  # for "<end>" and "<unk>"
    return Vocabulary.of(documents, level, max_vocabulary, join=join)


def _warn_of_tokens(documents: Iterable[str], level: Level) -> None:
    """Warn the caller's caller of tokenized text whose tokens the level takes apart."""
    if level == "words" and any("<unk>" in document.split() for document in documents):
        warnings.warn(
            'These documents hold the token <unk>, which level="words" reads as three tokens; level="tokens" reads '
            "text that is tokenized already",
            stacklevel=3,
        )


def _found(file: str, folder: str | os.PathLike[str] | None) -> Path:
    """The path of a file in the folder, or in the folder that the environment variable names."""
    root = os.environ.get(FOLDER_VARIABLE) if folder is None else _checks.path("folder", folder)
    paths = [Path(root) / subfolder / file for subfolder in (".", "text")] if root else []
    if found := [path for path in paths if path.is_file()]:
        return found[0]
    raise FileNotFoundError(
        f"Expected {' or '.join(map(str, paths)) or file}, got no such file. Name the folder by the argument or by the "
        f"environment variable {FOLDER_VARIABLE}; words() needs no file."
    )
