from typing import final

_Size3 = tuple[int, int, int]

@final
class Plan:
    def __init__(
        self,
        *,
        batch: int,
        in_channels: int,
        out_channels: int,
        input_size: _Size3,
        output_size: _Size3,
        kernel_size: _Size3,
        stride: _Size3,
        padding_begin: _Size3,
        padding_end: _Size3,
        dilation: _Size3,
        groups: int,
        channels_last: bool,
        double_precision: bool,
    ) -> None: ...

@final
class PooledPlan:
    def __init__(
        self,
        plan: Plan,
        *,
        activation: str,
        negative_slope: float,
        window: _Size3,
        stride: _Size3,
        padding: _Size3,
        pooled_size: _Size3,
    ) -> None: ...

@final
class InstanceNorm:
    def __init__(
        self,
        *,
        samples: int,
        voxels: int,
        channels: int,
        parameters: int,
        eps: float,
        activation: str,
        negative_slope: float,
        slopes: int,
    ) -> None: ...

def forward(plan: Plan, x: int, weight: int, bias: int, y: int) -> None: ...
def grad_input(plan: Plan, grad_output: int, weight: int, grad_input: int) -> None: ...
def grad_weight(plan: Plan, grad_output: int, x: int, grad_weight: int) -> None: ...
def forward_max_pool(plan: PooledPlan, x: int, weight: int, bias: int, pooled: int, code: int) -> None: ...
def grad_input_max_pool(plan: PooledPlan, grad_pooled: int, code: int, weight: int, grad_input: int) -> None: ...
def grad_weight_max_pool(
    plan: PooledPlan, grad_pooled: int, code: int, x: int, grad_weight: int, grad_bias: int
) -> None: ...
def winograd_forward(plan: Plan, outputs: _Size3, x: int, weight: int, bias: int, y: int) -> None: ...
def winograd_grad_input(plan: Plan, outputs: _Size3, grad_output: int, weight: int, grad_input: int) -> None: ...
def winograd_forward_max_pool(
    plan: PooledPlan, outputs: _Size3, x: int, weight: int, bias: int, pooled: int, code: int
) -> None: ...
def first_layer_forward(plan: Plan, x: int, weight: int, bias: int, y: int) -> None: ...
def first_layer_grad_weight(plan: Plan, grad_output: int, x: int, grad_weight: int) -> None: ...
def first_layer_forward_max_pool(plan: PooledPlan, x: int, weight: int, bias: int, pooled: int, code: int) -> None: ...
def bfloat16_forward(plan: Plan, float32: bool, x: int, weight: int, bias: int, y: int) -> None: ...
def bfloat16_grad_input(plan: Plan, float32: bool, grad_output: int, weight: int, grad_input: int) -> None: ...
def has_bfloat16() -> bool: ...
def instance_norm_forward(
    plan: InstanceNorm, double_precision: bool, x: int, weight: int, bias: int, slopes: int, y: int, statistics: int
) -> None: ...
def instance_norm_backward(
    plan: InstanceNorm,
    double_precision: bool,
    grad_output: int,
    x: int,
    weight: int,
    bias: int,
    slopes: int,
    statistics: int,
    grad_input: int,
    grad_weight: int,
    grad_bias: int,
    grad_slopes: int,
) -> None: ...
def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def current_isa() -> str: ...
def use_isa(isa: str) -> None: ...
def measure_fma_peak(seconds: float = 0.1) -> float: ...
def measure_copy_bandwidth(seconds: float = 0.2) -> float: ...
def compiler() -> str: ...
def openmp_runtime() -> str: ...
def openmp_threads() -> int: ...
