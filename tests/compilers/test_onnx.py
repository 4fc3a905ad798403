"""ONNX of an accelerated model is the ONNX of the model before, operator by operator, and computes the same."""

from __future__ import annotations

import io

import pytest
import torch

import pyvolconv

from .models import MODELS, assert_close, pair, sample

onnx = pytest.importorskip("onnx", reason="pip install 'pyvolconv[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'pyvolconv[onnx]'")
pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = ({0: torch.export.Dim("batch", min=2, max=16)},)


def by_export(model, **options):
    options.setdefault("dynamic_shapes", BATCH)
    return torch.onnx.export(model, (sample(),), dynamo=True, verbose=False, **options).model_proto


def by_trace(model):
    buffer = io.BytesIO()
    names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model, (sample(),), buffer, dynamo=False, **names)
    return onnx.load_from_string(buffer.getvalue())


def nodes(proto):
    return [
        (node.op_type, node.domain, sorted(map(str, node.attribute)))
        for node in proto.graph.node
        if node.op_type != "Constant"
    ]


def weights(proto):
    return [torch.from_numpy(onnx.numpy_helper.to_array(value).copy()) for value in proto.graph.initializer]


def evaluate(proto, x):
    """By onnx's reference implementation."""
    session = onnx.reference.ReferenceEvaluator(proto)
    (y,) = session.run(None, {session.input_names[0]: x.numpy()})
    return torch.from_numpy(y)


@pytest.mark.parametrize("export", [by_export, by_trace])
@pytest.mark.parametrize("name", MODELS)
def test_same_operators_and_weights(name, export):
    reference, model = pair(name)
    expected, proto = export(reference), export(model)
    kinds = [kind for kind, _, _ in nodes(proto)]
    assert {"Conv", "ConvTranspose", "MaxPool"} <= set(kinds)
    assert nodes(proto) == nodes(expected)
    assert_close(weights(proto), weights(expected))
    onnx.checker.check_model(proto)
    # Its transposed convolution has one group, which is what the evaluator can do.
    for batch in (2, 3):
        x = sample(batch)
        assert_close(evaluate(proto, x), reference(x).detach())


def test_an_exported_program_is_decomposed_first():
    # The other model pools behind SiLU, and the evaluator has no gather of more than 64 voxels.
    reference, model = pair("code")
    program = torch.export.export(model, (sample(),), dynamic_shapes=BATCH)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"pyvolconv\.conv3d"):
        by_export(program)
    proto = by_export(program.run_decompositions(pyvolconv.decompositions()))
    assert {domain for _, domain, _ in nodes(proto)} == {""}
    x = sample(3)
    assert_close(evaluate(proto, x), reference(x).detach())


def test_groups_strides_dilation_and_the_fused_function():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = pyvolconv.Conv3d(3, 6, (1, 3, 2), stride=(1, 2, 1), groups=3, dilation=(1, 1, 2))
            self.weight = torch.nn.Parameter(torch.randn(4, 6, 1, 2, 2))

        def forward(self, x):
            return pyvolconv.conv3d_max_pool(self.conv(x), self.weight, activation="relu", pool_size=(2, 1, 2))

    net, x = Net(), sample()
    proto = by_export(net)
    assert [kind for kind, _, _ in nodes(proto)] == ["Conv", "Conv", "Relu", "MaxPool"]
    assert_close(evaluate(proto, x), net(x).detach())
