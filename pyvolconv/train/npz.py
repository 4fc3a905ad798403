"""A user's own volumes from an .npz file, read through a memory map however large they are.

An .npz file is a zip archive of .npy members, and `numpy.load(mmap_mode="r")` does not map inside of it. But a member
that is stored without compression (`numpy.savez`) is a plain .npy at some offset of the file, and the zip's local
header tells where: that is mapped here, and nothing is copied. A compressed member (`numpy.savez_compressed`) is
unpacked once into a nameless temporary file, which is mapped instead and disappears with the last reference to it.

Local header: PKWARE .ZIP File Format Specification 4.3.7. Array header: `numpy.lib.format`.
"""

from __future__ import annotations

import math
import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
from numpy.typing import NDArray

from .data import DataError, Moments, Splits, splits_of

SPLIT_SHARES = (0.15, 0.15)
"""Of each class: how much goes to validation and to test, at least one sample each."""
VOXELS_AT_ONCE = 1 << 22

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"


def load_npz(path: str | Path, seed: int = 0) -> Splits:
    """Volumes `x` (N x D x H x W, any real numeric dtype and size) with labels `y` (N integers 0 to classes - 1).

    Every volume is read once, to check it and to find the mean and deviation of the training part; after that only the
    batches asked for are read. Each class is divided into 70 % training, 15 % validation and 15 % test, drawn from
    `seed`.

    Args:
        path: an .npz file as `numpy.savez(path, x=..., y=...)` writes it.
        seed: of the division.

    Raises:
        DataError: the file or its arrays cannot be used; one line says what was found, expected and to be done.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            x = _map_member(path, file, archive, "x")
            y = np.array(_map_member(path, file, archive, "y"))
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError) as error:
        raise DataError(
            f"{path}: not a readable .npz archive ({error}); write it with numpy.savez(path, x=..., y=...)"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    _check_shapes(path, x, y)
    labels = _check_labels(path, y)
    parts = _divide(labels, np.random.default_rng(seed))
    moments = _check_voxels(path, x, np.isin(np.arange(len(x)), parts[0]))
    return splits_of(x, labels, parts, moments, path.name)


def _map_member(path: Path, file: IO[bytes], archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    """The array `name` of an archive as a read-only memory map."""
    member = f"{name}.npy"
    if member not in archive.namelist():
        found = ", ".join(sorted(entry.removesuffix(".npy") for entry in archive.namelist())) or "nothing"
        raise DataError(
            f"{path}: holds no array {name!r}, only {found}; expected x (N x D x H x W) and y (N), "
            "as numpy.savez(path, x=..., y=...) writes them"
        )
    entry = archive.getinfo(member)
    if entry.flag_bits & 1:
        raise DataError(f"{path}: {name} is encrypted; write the file with numpy.savez, which does not encrypt")
    if entry.compress_type == zipfile.ZIP_STORED:
        return _map_array(path, name, file, _data_offset(file, entry), entry.file_size)
    with tempfile.TemporaryFile() as unpacked:
        with archive.open(entry) as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        return _map_array(path, name, unpacked, 0, unpacked.tell())


def _data_offset(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin; only the local header knows how long itself is."""
    file.seek(entry.header_offset)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != _LOCAL_MAGIC:
        raise zipfile.BadZipFile(f"no local header for {entry.filename}")
    return int(entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length)


def _map_array(path: Path, name: str, file: IO[bytes], start: int, length: int) -> NDArray[np.generic]:
    """Map the .npy that fills `length` bytes of a file from `start`."""
    file.seek(start)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read_header(file)
    except (ValueError, KeyError, SyntaxError, TokenError) as error:
        raise DataError(f"{path}: {name} is not a numpy array ({error}); write it with numpy.savez") from error
    if dtype.kind not in "buif":
        raise DataError(f"{path}: {name} has dtype {dtype}; expected real numbers, for example float32 or uint8")
    if min(shape, default=1) < 1:
        raise DataError(f"{path}: {name} is empty (shape {shape}); expected at least one sample and one voxel")
    values = math.prod(shape)
    if start + length < file.tell() + values * dtype.itemsize:
        raise DataError(f"{path}: {name} is cut off: shape {shape} of {dtype} does not fit into it; write it again")
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")


def _check_shapes(path: Path, x: NDArray[np.generic], y: NDArray[np.generic]) -> None:
    if x.ndim != 4:
        raise DataError(f"{path}: x has shape {x.shape}; expected N x D x H x W, one grey value per voxel")
    if y.ndim != 1:
        raise DataError(f"{path}: y has shape {y.shape}; expected one label per volume, shape ({len(x)},)")
    if len(x) != len(y):
        raise DataError(f"{path}: x holds {len(x)} volumes and y {len(y)} labels; expected equally many")


def _check_labels(path: Path, y: NDArray[np.generic]) -> NDArray[np.int64]:
    if y.dtype.kind not in "iu":
        raise DataError(f"{path}: y has dtype {y.dtype}; expected integer labels, for example y.astype(numpy.int64)")
    found, counts = np.unique(y, return_counts=True)
    if int(found[0]) < 0:
        raise DataError(f"{path}: y holds the label {found[0]}; expected labels from 0 to classes - 1")
    if len(found) < 2:
        raise DataError(f"{path}: y holds the label {found[0]} only; expected at least two classes")
    if int(found[-1]) != len(found) - 1:
        missing = int(np.flatnonzero(found != np.arange(len(found), dtype=found.dtype))[0])
        raise DataError(
            f"{path}: y has labels up to {found[-1]} but no label {missing}; expected labels 0 to classes - 1 "
            "without a gap: numpy.unique(y, return_inverse=True)[1] makes them so"
        )
    if counts.min() < 3:
        raise DataError(
            f"{path}: label {int(counts.argmin())} occurs {counts.min()} times; expected at least 3 volumes of every "
            "class, for training, validation and test"
        )
    return y.astype(np.int64)


def _divide(labels: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Indices of the training, validation and test samples, the same share of every class, each in ascending order."""
    parts: list[list[NDArray[np.int64]]] = [[], [], []]
    for label in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        validation, test = (max(1, round(share * len(members))) for share in SPLIT_SHARES)
        cuts = np.split(members, [len(members) - validation - test, len(members) - test])
        for part, cut in zip(parts, cuts, strict=True):
            part.append(cut)
    return [np.sort(np.concatenate(part)) for part in parts]


def _check_voxels(path: Path, x: NDArray[np.generic], in_training: NDArray[np.bool_]) -> Moments:
    """Read every voxel once, a slab of frames at a time; the mean and deviation of the training volumes."""
    moments = Moments()
    largest = float(np.finfo(np.float32).max)
    frames = max(1, VOXELS_AT_ONCE // (x.shape[2] * x.shape[3]))
    for index in range(len(x)):
        for first in range(0, x.shape[1], frames):
            slab = np.asarray(x[index, first : first + frames])
            if slab.dtype.kind == "f" and not float(np.abs(slab).max()) <= largest:
                raise DataError(
                    f"{path}: x[{index}] holds NaN, infinity or a number too large for float32; expected finite "
                    "values: numpy.isfinite finds them"
                )
            if in_training[index]:
                moments.add(slab)
    if moments.std == 0:
        raise DataError(f"{path}: every training voxel of x is {moments.mean:g}; there is nothing to learn from")
    return moments
