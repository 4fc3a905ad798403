"""Which schemes there are: for which problems, and at which precision."""

from __future__ import annotations

import pytest

from pyvolconv import get_precision, set_precision
from pyvolconv.backends.cpp import plan_of, pooled_plan_of
from pyvolconv.backends.cpp_winograd import CppWinograd
from pyvolconv.problem import ConvProblem

from .problems import _C, needs_extension, problem_of

pytestmark = needs_extension


def test_scheme_that_does_not_fit_is_refused():
    problem = problem_of("n1ic4oc8-i6x6x8", (3, 3, 3), "float32", "ndhwc")
    for outputs in ((2, 2, 3), (1, 2, 2), (0, 0, 0)):
        with pytest.raises(ValueError, match="no Winograd scheme with these outputs"):
            _C.winograd_forward(plan_of(problem), outputs, 0, 0, 0, 0)
    strided = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i6x6x8-k3-s2x2x3-p1")
    with pytest.raises(ValueError, match="no Winograd scheme with these outputs"):
        _C.winograd_forward(plan_of(strided), (2, 2, 2), 0, 0, 0, 0)
    for text in ("s2-p1", "s2-p2", "s2-p2-d3"):
        strided = ConvProblem.parse(f"cpu-float32-ndhwc-n1ic4oc8-i6x6x8-k3-{text}")
        with pytest.raises(ValueError, match="no Winograd scheme with these outputs"):
            _C.winograd_forward(plan_of(strided), (4, 4, 4), 0, 0, 0, 0)
        with pytest.raises(ValueError, match="no Winograd scheme with these outputs"):
            _C.winograd_grad_input(plan_of(strided), (2, 2, 2) if text == "s2-p1" else (4, 4, 4), 0, 0, 0)
    pooled = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i6x6x8-k3-p1-relu-pool3")
    with pytest.raises(ValueError, match="windows of the pool do not fit"):
        _C.winograd_forward_max_pool(pooled_plan_of(pooled), (2, 2, 2), 0, 0, 0, 0, 0)
    dilated = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i6x6x8-k3-p2-d2-relu-pool2")
    with pytest.raises(ValueError, match="windows of the pool do not fit"):
        _C.winograd_forward_max_pool(pooled_plan_of(dilated), (2, 2, 2), 0, 0, 0, 0, 0)


def test_precision_allows_schemes_that_round_more():
    problem = problem_of("n2ic64oc64-i32", (3, 3, 3), "float32", "ndhwc")
    backend = CppWinograd()
    assert get_precision() == "default"
    usual = backend.accuracy(problem, "forward")
    try:
        set_precision("high")
        faster = backend.accuracy(problem, "forward")
        assert faster.constant > usual.constant
        assert not faster.exact_integers
    finally:
        set_precision("default")
    assert backend.accuracy(problem, "forward") == usual
    with pytest.raises(ValueError, match="precision='low' is unknown; expected 'default' or 'high'"):
        set_precision("low")
    assert get_precision() == "default"


def test_refusals_name_the_reason():
    backend = CppWinograd()
    refusals = {
        "k5-p2": "kernel size is",
        "k3-s2x1x2-p1": "it computes (1, 1, 1), (2, 2, 2), (1, 2, 2)",
        "k3x1x1-s2x1x1-p1x0x0": "it computes (1, 1, 1)",
        "k3-p2-d2-relu-pool2": "dilation",
        "k3-p1-relu-pool3": "windows must touch",
    }
    for text, reason in refusals.items():
        problem = ConvProblem.parse(f"cpu-float32-ndhwc-n1ic4oc8-i8-{text}")
        assert any(reason in each for each in backend.unsupported_reasons(problem, "forward")), text
    plain = ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i8-k3-p1")
    assert backend.unsupported_reasons(plain, "forward") == []
    assert backend.unsupported_reasons(plain, "grad_weight") == []
    for text in ("k3-s2-p2", "k3-s2-p1-d2"):
        strided = ConvProblem.parse(f"cpu-float32-ndhwc-n1ic4oc8-i8-{text}")
        assert backend.unsupported_reasons(strided, "forward") == []
        assert "an odd padding" in backend.unsupported_reasons(strided, "grad_input")[0]
    pooled = plain.with_(
        activation="relu", pool=ConvProblem.parse("cpu-float32-ndhwc-n1ic4oc8-i8-k3-p1-relu-pool2").pool
    )
    assert backend.unsupported_reasons(pooled, "grad_weight") == ["it has no grad_weight fused with a pool"]
