"""One training loop: it learns, stops for the stated reasons, and goes on after a stop as if there had been none."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from pyvolconv.train import loop
from pyvolconv.train.checkpoint import CheckpointError
from pyvolconv.train.data import make_splits
from pyvolconv.train.loop import TrainConfig, TrainResult, accuracy, train, training_step
from pyvolconv.train.models import build

SIZE = (4, 5, 6)
CONFIG = TrainConfig(batch_size=8, learning_rate=1e-3, target_accuracy=1.0, max_epochs=3, seed=1)


@pytest.fixture
def data():
    """44 volumes: in class 1 the second half of the frames is brighter."""
    rng = np.random.default_rng(0)
    labels = np.arange(44) % 2
    volumes = rng.standard_normal((44, *SIZE)).astype(np.float32)
    volumes[:, 2:] += labels[:, None, None, None] * 3
    return make_splits(volumes, labels, np.split(np.arange(44), [28, 36]), "made up")


class WithDropout(nn.Module):
    """Draws random numbers in training, so that a random state that is not restored shows."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.dense = nn.Linear(math.prod(SIZE), 2)

    def forward(self, x):
        return self.dense(self.dropout(x.flatten(1)))


def fresh(name):
    if name != "dropout":
        return build(name, SIZE, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return WithDropout()


def measured(result):
    """What must not depend on when a run was stopped: everything but the clock."""
    return [(r.epoch, r.samples, r.train_loss, r.train_accuracy, r.validation_accuracy) for r in result.history]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["cnn", "lstm", "bilstm"])
def test_networks_learn(name, data):
    model = build(name, SIZE)
    result = train(model, data, dataclasses.replace(CONFIG, max_epochs=60, learning_rate=1e-2))
    assert result.stopped == "target"
    assert result.at_target is result.history[-1]
    assert accuracy(model, data.validation) == 1.0
    assert accuracy(model, data.test) > 0.7
    assert not model.training


def test_epoch_records_are_what_a_plain_loop_gives(data):
    model, twin = fresh("cnn"), fresh("cnn")
    result = train(model, data, CONFIG)
    optimizer = torch.optim.Adam(twin.parameters(), lr=CONFIG.learning_rate)
    shuffle = torch.Generator().manual_seed(CONFIG.seed)
    for record in result.history:
        losses, correct = [], 0
        for x, y in loop.batches(data.train, 8, shuffle):
            optimizer.zero_grad()
            logits = twin(x)
            loss = nn.functional.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(y)
            correct += (logits.argmax(1) == y).sum().item()
        assert len(losses) == record.samples == 28
        assert record.train_loss == pytest.approx(np.mean(losses))
        assert record.train_accuracy == correct / 28
        x, y = data.validation[list(range(8))]
        assert record.validation_accuracy == (twin(x).argmax(1) == y).double().mean().item()
    assert same_weights(model, twin)
    assert [record.epoch for record in result.history] == [1, 2, 3]


def test_seconds_add_up(data):
    history = train(fresh("lstm"), data, CONFIG).history
    for record in history:
        assert record.train_seconds > 0
        assert record.validation_seconds > 0
    assert sum(r.train_seconds + r.validation_seconds for r in history) <= history[-1].wall_seconds
    assert [r.wall_seconds for r in history] == sorted(r.wall_seconds for r in history)


@pytest.mark.parametrize("name", ["cnn", "lstm", "dropout"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(name, data, tmp_path):
    config = dataclasses.replace(CONFIG, max_epochs=5)
    whole = fresh(name)
    expected = train(whole, data, config)
    for epochs in (2, 4, 5):
        part = fresh(name)
        result = train(
            part,
            data,
            dataclasses.replace(config, max_epochs=epochs),
            checkpoint_path=tmp_path / "run.pt",
            resume=True,
        )
        torch.randn(epochs)
    assert measured(result) == measured(expected)
    assert same_weights(part, whole)
    assert [r.wall_seconds for r in result.history] == sorted(r.wall_seconds for r in result.history)


def test_random_state_of_the_caller_is_left_alone_and_does_not_matter(data):
    first, second = fresh("dropout"), fresh("dropout")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train(first, data, CONFIG)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    train(second, data, CONFIG)
    assert same_weights(first, second)


def test_a_finished_run_is_not_trained_further(data, tmp_path):
    path = tmp_path / "run.pt"
    config = dataclasses.replace(CONFIG, max_epochs=60, learning_rate=1e-2)
    done = train(fresh("cnn"), data, config, checkpoint_path=path)
    assert done.stopped == "target"
    again = train(fresh("cnn"), data, config, checkpoint_path=path, resume=True)
    assert again == done


class _InterruptAfter(nn.Module):
    def __init__(self, model, calls):
        super().__init__()
        self.model, self.calls = model, calls

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.model(x)


@pytest.mark.parametrize(
    ("calls", "epochs", "cut"),
    [
        (0, 0, None),
        (2, 0, 16),  # in the first epoch's training: 4 batches of at most 8
        (4, 0, 28),  # in the first validation
        (7, 1, 16),
    ],
)
def test_ctrl_c_keeps_what_was_measured(data, calls, epochs, cut):
    result = train(_InterruptAfter(fresh("cnn"), calls), data, CONFIG)
    assert result.stopped == "interrupted"
    assert len(result.complete_epochs) == epochs
    cut_short = [record.samples for record in result.history if record.validation_accuracy is None]
    assert cut_short == ([] if cut is None else [cut])
    assert result.at_target is None


def test_a_run_stopped_by_ctrl_c_resumes_from_its_last_whole_epoch(data, tmp_path):
    whole, model = fresh("cnn"), fresh("cnn")
    expected = train(whole, data, CONFIG)
    train(_InterruptAfter(model, 7), data, CONFIG, checkpoint_path=tmp_path / "run.pt")
    resumed = _InterruptAfter(fresh("cnn"), 10**9)
    result = train(resumed, data, CONFIG, checkpoint_path=tmp_path / "run.pt", resume=True)
    assert measured(result) == measured(expected)
    assert same_weights(resumed.model, whole)


def test_time_budget_ends_a_run_in_the_middle_of_an_epoch(data, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    result = train(fresh("cnn"), data, dataclasses.replace(CONFIG, time_budget=8.0))
    assert result.stopped == "time_budget"
    assert result.history[-1].validation_accuracy is None
    assert 0 < result.history[-1].samples < 28


def test_max_epochs(data):
    result = train(fresh("lstm"), data, dataclasses.replace(CONFIG, max_epochs=1, learning_rate=1e-9))
    assert result.stopped == "max_epochs"
    assert len(result.complete_epochs) == 1


def test_a_loss_that_is_not_finite_ends_the_run(data):
    model = fresh("cnn")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    result = train(model, data, CONFIG)
    assert result.stopped == "diverged"
    assert [record.samples for record in result.history] == [8]
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["history"][0]["train_loss"] is None
    assert math.isnan(TrainResult.from_dict(json.loads(text)).history[0].train_loss)


def test_results_survive_json(data):
    result = train(fresh("cnn"), data, CONFIG)
    assert TrainResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result


@pytest.mark.parametrize("channels", [1, 2])
def test_one_channel_is_not_copied_for_its_memory_format(channels):
    x = torch.randn(2, channels, 3, 4, 5)
    to = loop.to_device(x, torch.device("cpu"), torch.channels_last_3d)
    assert torch.equal(to, x)
    assert to.stride() == x.to(memory_format=torch.channels_last_3d).stride()
    assert (to.data_ptr() == x.data_ptr()) == (channels == 1)


def test_memory_format_reaches_the_model(data):
    seen = []
    model = fresh("cnn").to(memory_format=torch.channels_last_3d)
    model.features[3].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last_3d))
    )
    train(model, data, dataclasses.replace(CONFIG, max_epochs=1), memory_format=torch.channels_last_3d)
    assert seen
    assert all(seen)


def test_training_step_returns_loss_and_correct_answers_before_the_update():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x, y = torch.randn(6, 1, 1, 2, 2), torch.arange(6) % 2
    logits = model(x)
    loss, correct = training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, y).item())
    assert correct == (logits.argmax(1) == y).sum()
    assert not torch.equal(model(x), logits)


@pytest.fixture
def checkpoint(data, tmp_path):
    path = tmp_path / "run.pt"
    train(fresh("cnn"), data, dataclasses.replace(CONFIG, max_epochs=1), checkpoint_path=path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    return path


def refused(checkpoint, data, match, config=CONFIG, model=None):
    """Resuming is refused in one line with the file's name, and the model keeps its weights."""
    model = model or fresh("cnn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as raised:
        train(model, data, config, checkpoint_path=checkpoint, resume=True)
    assert str(raised.value).startswith(str(checkpoint))
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"learning_rate": 0.1}, {"seed": 2}])
def test_a_checkpoint_of_other_settings_is_refused(checkpoint, data, change):
    refused(checkpoint, data, f"with {next(iter(change))}=", dataclasses.replace(CONFIG, **change))


def test_a_checkpoint_of_other_data_is_refused(checkpoint, data):
    other = make_splits(data.train.volumes * 2, np.arange(44) % 2, np.split(np.arange(44), [28, 36]), "made up")
    refused(checkpoint, other, "with data=")


def test_a_checkpoint_of_another_model_is_refused(checkpoint, data):
    refused(checkpoint, data, r"its lstm1.weight_ih_l0 is missing, expected \(64, 30\)", model=fresh("lstm"))
    refused(
        checkpoint,
        data,
        r"its classifier.3.weight is \(2, 16\), expected \(3, 16\)",
        model=build("cnn", SIZE, classes=3),
    )


def test_a_damaged_checkpoint_is_refused(checkpoint, data):
    whole = checkpoint.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"junk" * 99):
        checkpoint.write_bytes(damaged)
        refused(checkpoint, data, "not a readable checkpoint")
    torch.save({"epoch": 3}, checkpoint)
    refused(checkpoint, data, "not a training checkpoint of this version")


@pytest.mark.parametrize("part", ["optimizer", "random", "shuffle", "history", "model"])
def test_a_checkpoint_with_a_wrong_part_is_refused(checkpoint, data, part):
    state = torch.load(checkpoint, weights_only=True)
    state[part] = {"what": 1}
    torch.save(state, checkpoint)
    refused(checkpoint, data, "damaged|another model")


def test_a_checkpoint_cannot_run_code(checkpoint, data):
    torch.save({"format": 1, "model": Console}, checkpoint)
    refused(checkpoint, data, "not a readable checkpoint")


def test_resuming_without_a_checkpoint_starts_from_the_beginning(data, tmp_path):
    result = train(fresh("cnn"), data, CONFIG, checkpoint_path=tmp_path / "new" / "run.pt", resume=True)
    assert len(result.history) == 3
    assert (tmp_path / "new" / "run.pt").exists()
    with pytest.raises(ValueError, match="needs checkpoint_path"):
        train(fresh("cnn"), data, CONFIG, resume=True)


def test_a_failed_write_keeps_the_old_checkpoint(checkpoint, data, monkeypatch):
    old = checkpoint.read_bytes()

    def half(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match=r"cannot be written.*No space left"):
        train(fresh("cnn"), data, CONFIG, checkpoint_path=checkpoint)
    assert checkpoint.read_bytes() == old
    assert [file.name for file in checkpoint.parent.iterdir()] == ["run.pt"]


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(data):
    def drawn(terminal, show=None):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
        train(fresh("cnn"), data, CONFIG, console=console, label="CNN", show_progress=show)
        return console.file.getvalue()

    assert drawn(terminal=False) == ""
    assert drawn(terminal=True, show=False) == ""
    text = drawn(terminal=True)
    for word in ("CNN", "epoch", "loss", "accuracy", "samples/s"):
        assert word in text


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"max_epochs": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"target_accuracy": 1.1},
        {"target_accuracy": 0.0},
        {"time_budget": 0.0},
    ],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        dataclasses.replace(CONFIG, **change)
