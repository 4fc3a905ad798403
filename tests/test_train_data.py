"""Datasets, batches and running moments."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pyvolconv.train.data import Moments, VolumeDataset, batches, make_splits

DTYPES = ("bool", "uint8", "int16", "uint16", "int32", "int64", "uint64", "float16", "float32", "float64", ">f4", ">i2")


def dataset(count=7, dtype="uint8"):
    volumes = (np.arange(count * 24).reshape(count, 2, 3, 4) % 120).astype(dtype)
    return VolumeDataset(volumes, np.arange(count) % 3, np.arange(count)[::-1].copy(), 2.0, 4.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_items_are_normalised_float32_whatever_the_array_holds(dtype):
    data = dataset(dtype=dtype)
    x, y = data[[0, 3]]
    expected = (data.volumes[[6, 3]].astype(np.float64) - 2) / 4
    assert x.shape == (2, 1, 2, 3, 4)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x[:, 0], expected, rtol=1e-6)
    assert y.tolist() == [0, 0]
    one, label = data[3]
    assert torch.equal(one, x[1])
    assert label == y[1]


def test_large_integers_are_centred_before_they_are_rounded():
    volumes = np.full((2, 1, 1, 2), 2**40, np.int64)
    volumes[..., 1] += 3
    x, _ = VolumeDataset(volumes, np.array([0, 1]), np.arange(2), 2.0**40, 1.0)[[0]]
    assert x.flatten().tolist() == [0.0, 3.0]


def test_items_do_not_share_memory_with_the_array():
    volumes = np.ones((2, 1, 2, 2), np.float32)
    data = VolumeDataset(volumes, np.array([0, 1]), np.arange(2), 0.0, 1.0)
    data[0][0].fill_(5)
    data[[0]][0].fill_(5)
    assert (volumes == 1).all()


def test_usable_by_a_plain_dataloader():
    x, y = next(iter(DataLoader(dataset(), batch_size=3)))
    assert x.shape == (3, 1, 2, 3, 4)
    assert torch.equal(x, dataset()[[0, 1, 2]][0])
    assert torch.equal(y, dataset()[[0, 1, 2]][1])


def test_shuffled_batches_hold_every_sample_once_in_a_new_order_each_time():
    data, shuffle = dataset(50), torch.Generator().manual_seed(3)
    loader = batches(data, 8, shuffle)
    before = torch.get_rng_state()
    passes = [torch.cat([x[:, 0, 0, 0, 0] for x, _ in loader]) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*passes)
    everything = data[list(range(50))][0][:, 0, 0, 0, 0]
    assert all(torch.equal(p.sort().values, everything.sort().values) for p in passes)


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), min_size=1, max_size=9),
    st.floats(-1e9, 1e9),
)
def test_moments_are_those_of_all_values_together(pieces, offset):
    moments = Moments()
    for piece in pieces:
        moments.add(np.array(piece) + offset)
    values = np.concatenate([np.array(piece) + offset for piece in pieces])
    assert moments.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-6)
    assert moments.std == pytest.approx(values.std(), rel=1e-6, abs=1e-4)


def test_splits_are_normalised_by_the_training_part_alone():
    volumes = np.zeros((6, 1, 1, 2), np.float32)
    volumes[:2] = [[[[1.0, 3.0]]]]
    volumes[2:] = 1e6
    data = make_splits(volumes, np.array([0, 1] * 3), [np.array(p) for p in ([0, 1], [2, 3], [4, 5])], "made up")
    assert (data.train.mean, data.train.std) == (2.0, 1.0)
    assert data.test[0][0].flatten().tolist() == [1e6 - 2] * 2
