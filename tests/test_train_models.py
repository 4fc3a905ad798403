"""The two networks: the sizes that the comparison states, any input size, the same weights for the same seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvolconv.train.models import NETWORKS, FrameLSTM, VolumeCNN, build, parameter_count

from .closeness import assert_close


@pytest.mark.parametrize(("name", "parameters"), [("cnn", 97_194), ("lstm", 118_562), ("bilstm", 239_170)])
def test_parameter_counts_are_those_stated(name, parameters):
    assert parameter_count(build(name)) == parameters


def test_cnn_has_the_layers_of_the_published_network():
    convs = [layer for layer in VolumeCNN().modules() if isinstance(layer, torch.nn.Conv3d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(1, 16), (16, 24), (24, 32)]
    assert {(c.kernel_size, c.stride, c.padding) for c in convs} == {((3,) * 3, (1,) * 3, (1,) * 3)}
    dense = [layer for layer in VolumeCNN().modules() if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in dense] == [16, 2]


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=25)
@given(size=st.tuples(*[st.integers(1, 9)] * 3), classes=st.integers(2, 5), batch=st.integers(1, 3))
def test_any_size_and_number_of_classes(name, size, classes, batch):
    model = build(name, size, classes)
    x = torch.randn(batch, 1, *size)
    logits = model(x)
    assert logits.shape == (batch, classes)
    assert torch.equal(logits, model(x.squeeze(1)))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_lstm_reads_frames_in_order():
    model, x = build("lstm", (5, 3, 4)), torch.randn(2, 1, 5, 3, 4)
    assert not torch.allclose(model(x), model(x.flip(2)))
    sequence, _ = model.lstm1(x.reshape(2, 5, 12))
    output, _ = model.lstm2(sequence)
    assert_close(model(x), model.classifier(output[:, -1]))


def test_bidirectional_lstm_ends_at_both_ends():
    model, x = build("bilstm", (5, 3, 4)), torch.randn(2, 1, 5, 3, 4)
    output, _ = model.lstm2(model.lstm1(x.reshape(2, 5, 12))[0])
    ends = torch.cat([output[:, -1, :16], output[:, 0, 16:]], dim=1)
    assert_close(model(x), model.classifier(ends))


@pytest.mark.parametrize("name", NETWORKS)
def test_build_depends_on_the_seed_alone_and_leaves_torchs_state(name):
    before = torch.get_rng_state()
    first = build(name, (3, 4, 5), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    second, other = build(name, (3, 4, 5), seed=1), build(name, (3, 4, 5), seed=2)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("network", [VolumeCNN, FrameLSTM])
@pytest.mark.parametrize(("size", "classes"), [((0, 3, 3), 2), ((3, 3), 2), ((3, 3, 3), 1)])
def test_impossible_sizes_are_refused(network, size, classes):
    with pytest.raises(ValueError, match=r"input_size=|classes="):
        network(size, classes)


def test_unknown_network_is_named():
    with pytest.raises(ValueError, match=r"'gru'; expected one of cnn, lstm, bilstm"):
        build("gru")
