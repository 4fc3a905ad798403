"""Moving digits: repeatable, divided by image, and of no use to a model without both space and time."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pyvolconv.train import digits
from pyvolconv.train.data import VolumeDataset, batches, frame_average_accuracy
from pyvolconv.train.digits import FIELD, moving_digits


@pytest.fixture(scope="module")
def many():
    return moving_digits(train=600, validation=2, test=600, seed=5)


def test_shapes_and_normalisation():
    data = moving_digits(40, 8, 12, seed=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 8, 12)
    assert data.input_size == FIELD
    assert data.classes == 2
    x, y = data.train[list(range(40))]
    assert x.shape == (40, 1, *FIELD)
    assert x.dtype == torch.float32
    assert abs(x.mean().item()) < 1e-3
    assert abs(x.std().item() - 1) < 1e-3
    assert y.sum() == 20
    assert [int(part.labels.sum()) for part in (data.validation, data.test)] == [4, 6]


def test_equal_arguments_give_equal_videos_and_seeds_differ():
    first, second, other = (moving_digits(6, 4, 4, seed=seed) for seed in (7, 7, 8))
    for name in ("train", "validation", "test"):
        a, b, c = (getattr(data, name) for data in (first, second, other))
        assert torch.equal(a[list(range(4))][0], b[list(range(4))][0])
        assert not torch.equal(a[list(range(4))][0], c[list(range(4))][0])


def test_test_videos_do_not_depend_on_the_number_of_training_videos():
    few, more = moving_digits(4, 4, 6, seed=1), moving_digits(9, 4, 6, seed=1)
    assert np.array_equal(few.test.volumes[few.test.indices], more.test.volumes[more.test.indices])


def test_no_digit_image_is_in_two_splits(monkeypatch):
    seen = []
    make = digits._videos
    monkeypatch.setattr(digits, "_videos", lambda images, count, rng: seen.append(images) or make(images, count, rng))
    moving_digits(4, 4, 4, seed=2)
    keys = [{image.tobytes() for image in images} for images in seen]
    assert len(keys) == 3
    assert sum(len(images) for images in seen) == 1797
    # Two scans that happen to be equal pixel by pixel could be in two splits; there are none.
    assert len(set.union(*keys)) == sum(map(len, keys))


def test_digits_stay_whole_inside_the_field():
    rng = np.random.default_rng(0)
    corners = digits._paths(np.arange(2000) % 2, 16, rng)
    assert corners.min() >= 0
    assert (corners[..., 0] + 16 <= FIELD[1] - 1).all()
    assert (corners[..., 1] + 16 <= FIELD[2] - 1).all()
    ink = rng.random((2000, 16, 16)).astype(np.float32)
    drawn = digits._draw(ink[:50], corners[:50])
    np.testing.assert_allclose(drawn.sum((2, 3)), np.repeat(ink[:50].sum((1, 2))[:, None], FIELD[0], 1), rtol=1e-4)


def test_classes_are_the_two_senses_of_rotation():
    labels = np.arange(200) % 2
    corners = digits._paths(labels, 16, np.random.default_rng(0))
    step, turn = np.diff(corners, axis=1)[:, :-1], np.diff(corners, axis=1)[:, 1:]
    cross = (step[..., 1] * turn[..., 0] - step[..., 0] * turn[..., 1]).sum(1)
    # y points down: a positive cross product of (x, y) steps is a turn to the right, clockwise.
    assert np.array_equal(cross > 0, labels == 0)


def test_a_linear_model_on_frame_averages_stays_near_chance(many):
    assert 0.4 < frame_average_accuracy(many) < 0.6


@pytest.mark.parametrize("frame", [0, 14, 28])
def test_a_linear_model_on_a_single_frame_stays_near_chance(many, frame):
    def frames(part: VolumeDataset):
        return torch.cat([x[:, 0, frame].flatten(1) for x, _ in batches(part, 100)]).numpy(), part.labels.numpy()

    with threadpool_limits(1):
        model = LogisticRegression(max_iter=1000).fit(*frames(many.train))
    assert 0.4 < model.score(*frames(many.test)) < 0.6


def test_the_linear_check_would_find_a_leak(many):
    leaking = many.train.volumes.copy()
    labels = np.concatenate([part.labels.numpy() for part in (many.train, many.validation, many.test)])
    leaking[:, :, 0, 0] = 100 * labels[:, None]
    leaky = digits.make_splits(leaking, labels, [many.train.indices, many.validation.indices, many.test.indices], "")
    assert frame_average_accuracy(leaky) > 0.95


@pytest.mark.parametrize("counts", [(1, 2, 2), (2, 0, 2), (2, 2, 1)])
def test_too_few_videos_are_refused(counts):
    with pytest.raises(ValueError, match="at least 2 videos"):
        moving_digits(*counts)
