"""IDX files byte by byte: what is read, and that every broken file is refused."""

import gzip
import math

import numpy as np
import pytest
import torch
from helpers.idx_files import idx
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae import datasets

shapes = st.lists(st.integers(0, 5), max_size=4)


@given(shapes, st.randoms(use_true_random=False), st.booleans(), st.sampled_from(["", ".gz"]))
def test_round_trip_of_any_shape(tmp_path_factory, shape, random, compress, suffix):
    array = np.array([random.randrange(256) for _ in range(math.prod(shape))], dtype=np.uint8).reshape(shape)
    path = tmp_path_factory.mktemp("idx") / f"example{suffix}"
    path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    found = datasets.read_idx(str(path))
    assert found.dtype == torch.uint8
    assert found.shape == array.shape
    assert np.array_equal(found.numpy(force=True), array)
    found.fill_(0)  # writable, without a warning


def test_sizes_are_big_endian_and_unsigned(tmp_path):
    path = tmp_path / "example"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 1, 2]) + bytes(258))
    assert datasets.read_idx(path).shape == (258,)
    path.write_bytes(bytes([0, 0, 8, 1, 255, 255, 255, 255]))
    with pytest.raises(ValueError, match=rf"hold {2**32 - 1} entries"):
        datasets.read_idx(path)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzipped"])
def test_every_truncation_and_every_extension_is_refused(tmp_path, compress):
    raw = idx(np.arange(24).reshape(2, 3, 4))
    path = tmp_path / "broken-file"
    for content in [raw[:length] for length in range(len(raw))] + [raw + bytes(more) for more in (1, 4, 24)]:
        path.write_bytes(gzip.compress(content) if compress else content)
        size = len(content)
        what = "start with" if size < 4 else "name 3 dimensions" if size < 16 else "hold 24 entries"
        with pytest.raises(ValueError, match=f"Expected .*broken-file to {what}.*, got"):
            datasets.read_idx(path)


def test_every_truncation_and_damage_of_gzip_is_refused(tmp_path):
    zipped = gzip.compress(idx(np.arange(24).reshape(2, 3, 4)))
    path = tmp_path / "broken-file.gz"
    damaged = [zipped[:i] + bytes([zipped[i] ^ 0xFF]) + zipped[i + 1 :] for i in (2, 10, 20, len(zipped) - 8)]
    for content in [zipped[:length] for length in range(len(zipped))] + [*damaged, zipped + b"more"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"Expected .*broken-file.gz to .*, got"):
            datasets.read_idx(path)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("byte", [1, 8, 255])
def test_wrong_magic_number_is_refused(tmp_path, position, byte):
    raw = bytearray(idx(np.zeros((2, 2))))
    raw[position] = byte
    (tmp_path / "no-idx").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"no-idx to start with 0x0000 .*, got 0x{raw[:4].hex()}"):
        datasets.read_idx(tmp_path / "no-idx")


@pytest.mark.parametrize("code", [0x00, 0x07, 0x09, 0x0B, 0x0C, 0x0D, 0x0E, 0xFF])
def test_other_data_types_are_refused(tmp_path, code):
    (tmp_path / "no-bytes").write_bytes(idx(np.zeros((2, 2)), code))
    with pytest.raises(ValueError, match=rf"no-bytes to hold unsigned bytes, data type 0x08, got 0x{code:02x}"):
        datasets.read_idx(tmp_path / "no-bytes")


def test_missing_file_is_the_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        datasets.read_idx(tmp_path / "none")
