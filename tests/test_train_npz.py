"""A user's volumes: mapped instead of loaded, and one clear line for everything that can be wrong with them."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyvolconv.train import npz
from pyvolconv.train.data import DataError
from pyvolconv.train.npz import load_npz

RNG = np.random.default_rng(0)


def volumes(count=20, dtype="float32"):
    return (
        RNG.integers(0, 100, (count, 3, 4, 5)).astype(dtype) if dtype != "bool" else RNG.random((count, 3, 4, 5)) < 0.3
    )


def labels(count=20, classes=2):
    return np.arange(count) % classes


def indices(data):
    return [part.indices for part in (data.train, data.validation, data.test)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", ">f4"])
def test_volumes_come_back_normalised_and_divided(tmp_path, save, order, dtype):
    x, y = np.asarray(volumes(dtype=dtype), order=order), labels()
    save(tmp_path / "v.npz", x=x, y=y)
    data = load_npz(tmp_path / "v.npz")
    assert data.input_size == (3, 4, 5)
    assert data.classes == 2
    assert data.name == "v.npz"
    assert sorted(np.concatenate(indices(data))) == list(range(20))
    train = x[data.train.indices].astype(np.float64)
    for part in (data.train, data.validation, data.test):
        got, got_labels = part[list(range(len(part)))]
        expected = (x[part.indices].astype(np.float64) - train.mean()) / train.std()
        np.testing.assert_allclose(got[:, 0].numpy(), expected, rtol=1e-5, atol=1e-5)
        assert np.array_equal(got_labels, y[part.indices])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_volumes_are_mapped_not_loaded(tmp_path, save):
    save(tmp_path / "v.npz", x=volumes(), y=labels())
    array = load_npz(tmp_path / "v.npz").train.volumes
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert isinstance(array, np.memmap)
    assert not array.flags.writeable


def test_a_stored_array_is_read_from_the_file_itself(tmp_path):
    np.savez(tmp_path / "v.npz", x=volumes(dtype="uint8"), y=labels())
    data = load_npz(tmp_path / "v.npz")
    before = data.train[0][0].clone()
    raw = bytearray((tmp_path / "v.npz").read_bytes())
    at = raw.index(data.train.volumes[data.train.indices[0]].tobytes())
    with open(tmp_path / "v.npz", "r+b") as file:
        file.seek(at)
        file.write(bytes([raw[at] ^ 0x7F]))
    after = data.train[0][0]
    assert (before != after).sum() == 1


def test_classes_have_the_same_shares_and_the_division_is_repeatable(tmp_path):
    y = np.repeat([0, 1, 2], [100, 40, 3])
    np.savez(tmp_path / "v.npz", x=volumes(143), y=y)
    first, second, other = (load_npz(tmp_path / "v.npz", seed) for seed in (4, 4, 5))
    assert [np.bincount(y[part]).tolist() for part in indices(first)] == [[70, 28, 1], [15, 6, 1], [15, 6, 1]]
    assert all(np.array_equal(a, b) for a, b in zip(indices(first), indices(second), strict=True))
    assert not np.array_equal(indices(first)[0], indices(other)[0])


def test_checks_run_in_slabs(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "VOXELS_AT_ONCE", 7)
    x = volumes()
    np.savez(tmp_path / "v.npz", x=x, y=labels())
    data = load_npz(tmp_path / "v.npz")
    assert data.train.mean == pytest.approx(x[data.train.indices].mean(dtype=np.float64))
    x[13, 2, 3, 4] = np.nan
    np.savez(tmp_path / "v.npz", x=x, y=labels())
    with pytest.raises(DataError, match=r"x\[13\] holds NaN"):
        load_npz(tmp_path / "v.npz")


def with_value(value, dtype="float32"):
    x = volumes(dtype=dtype)
    x[11, 1, 2, 3] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": labels()}, "no array 'x', only y"),
        ({"x": volumes(), "z": labels()}, "no array 'y', only x, z"),
        ({"x": volumes()[:, 0], "y": labels()}, r"x has shape \(20, 4, 5\); expected N x D x H x W"),
        ({"x": volumes()[:, None], "y": labels()}, r"x has shape \(20, 1, 3, 4, 5\)"),
        ({"x": volumes(), "y": labels()[:, None]}, r"y has shape \(20, 1\)"),
        ({"x": volumes(), "y": np.int64(3)}, r"y has shape \(\)"),
        ({"x": volumes(), "y": labels(19)}, "20 volumes and y 19 labels"),
        ({"x": volumes()[:0], "y": labels(0)}, r"x is empty \(shape \(0, 3, 4, 5\)\)"),
        ({"x": volumes()[:, :, :0], "y": labels()}, "x is empty"),
        ({"x": volumes(), "y": labels()[:0]}, "y is empty"),
        ({"x": volumes(dtype="complex64"), "y": labels()}, "x has dtype complex64; expected real numbers"),
        ({"x": volumes().astype("S8"), "y": labels()}, r"x has dtype \|S8"),
        ({"x": volumes(), "y": labels().astype(object)}, "y has dtype object"),
        ({"x": volumes(), "y": labels() + 0.5}, "y has dtype float64; expected integer labels"),
        ({"x": volumes(), "y": labels() - 1}, "y holds the label -1"),
        ({"x": volumes(), "y": labels() * 0}, "the label 0 only; expected at least two classes"),
        ({"x": volumes(), "y": labels() + 1}, "labels up to 2 but no label 0"),
        ({"x": volumes(), "y": labels() * 2}, "labels up to 2 but no label 1"),
        ({"x": volumes(), "y": labels().astype("uint64") * (2**63)}, "labels up to 9223372036854775808 but no label 1"),
        ({"x": volumes(), "y": (np.arange(20) < 2).astype(int)}, "label 1 occurs 2 times"),
        ({"x": with_value(np.nan), "y": labels()}, r"x\[11\] holds NaN"),
        ({"x": with_value(-np.inf), "y": labels()}, r"x\[11\] holds NaN"),
        ({"x": with_value(1e300, "float64"), "y": labels()}, r"x\[11\] holds NaN, infinity or a number too large"),
        ({"x": np.full((20, 1, 2, 3), 7), "y": labels()}, "every training voxel of x is 7"),
    ],
)
def test_wrong_arrays_are_one_clear_line(tmp_path, arrays, message):
    np.savez(tmp_path / "v.npz", **arrays)
    check_refused(tmp_path / "v.npz", message)


def check_refused(path, message):
    with pytest.raises(DataError, match=message) as raised:
        load_npz(path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(path))


def test_files_that_cannot_be_read(tmp_path):
    check_refused(tmp_path / "missing.npz", "cannot be read: No such file")
    check_refused(tmp_path, "cannot be read: Is a directory")
    (tmp_path / "text.npz").write_text("no archive")
    check_refused(tmp_path / "text.npz", "not a readable .npz archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    check_refused(tmp_path / "empty.npz", "not a readable .npz archive")
    np.save(tmp_path / "single.npy", volumes())
    check_refused(tmp_path / "single.npy", "not a readable .npz archive")


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_members(tmp_path, compression):
    x, y = npy(volumes()), npy(labels())
    path = tmp_path / "v.npz"
    archive(path, {"x.npy": b"no numpy", "y.npy": y}, compression)
    check_refused(path, "x is not a numpy array")
    archive(path, {"x.npy": b"", "y.npy": y}, compression)
    check_refused(path, "x is not a numpy array")
    archive(path, {"x.npy": x[:-1], "y.npy": y}, compression)
    check_refused(path, "x is cut off")
    archive(path, {"x.npy": x, "y.npy": y[:200]}, compression)
    check_refused(path, "y is cut off")
    archive(path, {"x.npy": b"\x93NUMPY\x09\x00" + x[8:], "y.npy": y}, compression)
    check_refused(path, "x is not a numpy array")
    archive(path, {"x.npy": b"\x93NUMPY\x01\x00\x20\x00{'descr': 'evil', 'shape': (1,)}", "y.npy": y}, compression)
    check_refused(path, "x is not a numpy array")


def test_a_damaged_compressed_member(tmp_path):
    path = tmp_path / "v.npz"
    np.savez_compressed(path, x=volumes(), y=labels())
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 0xFF
    path.write_bytes(raw)
    check_refused(path, "not a readable .npz archive")


def test_an_encrypted_member(tmp_path):
    path = tmp_path / "v.npz"
    archive(path, {"x.npy": npy(volumes()), "y.npy": npy(labels())})
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    struct.pack_into("<H", raw, at + 8, 1)
    path.write_bytes(raw)
    check_refused(path, "x is encrypted")


@given(cut=st.floats(0, 1), flip=st.floats(0, 1), bit=st.integers(0, 7), compressed=st.booleans())
def test_any_damage_is_refused_or_harmless(tmp_path_factory, cut, flip, bit, compressed):
    path = tmp_path_factory.mktemp("damage") / "v.npz"
    (np.savez_compressed if compressed else np.savez)(path, x=volumes(), y=labels())
    raw = bytearray(path.read_bytes())
    raw[int(flip * (len(raw) - 1))] ^= 1 << bit
    path.write_bytes(raw[: len(raw) - int(cut * len(raw))] if cut > 0.5 else raw)
    try:
        data = load_npz(path)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert torch.isfinite(data.train[list(range(len(data.train)))][0]).all()
