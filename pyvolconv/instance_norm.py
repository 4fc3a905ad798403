"""Instance or batch normalization and the activation behind it in one pass, for ordinary calls on the CPU.

Where a mode, transform, tracer, compiler, autocast or another dtype has a say (`ordinary.is_ordinary`) nothing is done
here and torch's modules run. So there is no operator, whose transforms and formulas would have to be torch's again: one
autograd node is enough, and where its own backward pass is differentiated, or steps out of the ordinary, that is
computed by torch's functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from .backends import cpp_instance_norm
from .epilogue import Activation
from .layouts import in_layout
from .ordinary import is_ordinary
from .problem import Layout
from .shortcut import is_differentiated

VOXEL_AXES = (2, 3, 4)


def is_compiled() -> bool:
    """Whether the compiled pass is there."""
    return cpp_instance_norm.is_available()


@dataclass(frozen=True)
class RunningStatistics:
    """What a batch normalization remembers of its batches.

    Attributes:
        mean, variance: (C,).
        factor: the share of the batch at hand in them.
        batches: how many there were, or None.
    """

    mean: Tensor
    variance: Tensor
    factor: float
    batches: Tensor | None = None

    def fit(self, x: Tensor) -> bool:
        """Whether they are ordinary, dense and of the channels and the dtype of x."""
        return all(
            not has_torch_function_unary(one)
            and _is_ordinary(one)
            and one.is_cpu
            and one.dtype == x.dtype
            and one.shape == x.shape[1:2]
            and one.is_contiguous()
            and not one.requires_grad
            for one in (self.mean, self.variance)
        )


@dataclass(frozen=True)
class _Call:
    layout: Layout
    result_layout: Layout
    batch: bool
    eps: float
    activation: Activation
    negative_slope: float
    running: RunningStatistics | None = None

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        operands = (x, self.layout, self.result_layout, self.batch, weight, bias, slopes)
        y, statistics = cpp_instance_norm.forward(*operands, self.eps, self.activation, self.negative_slope)
        if self.running is not None:
            # Here, because a checkpoint that computes the call anew may stop it when operands are saved.
            if self.running.batches is not None:
                self.running.batches.add_(1)
            into = (self.running.factor, self.running.mean, self.running.variance)
            cpp_instance_norm.update_running_statistics(x, self.layout, statistics, *into)
        return y, statistics

    def kept(self, bias: Tensor | None, slopes: Tensor | None) -> Tensor | None:
        """What backward needs of a bias, which others may change meanwhile as torch lets them.

        But for slopes, whose gradient depends on the bias itself.
        """
        if bias is None or slopes is not None:
            return bias
        return None if self.activation == "none" else bias.detach().clone()

    def backward(self, grad: Tensor, saved: tuple[Tensor | None, ...], wanted: tuple[bool, ...]) -> Any:
        x, weight, bias, slopes, statistics = saved
        assert x is not None
        assert statistics is not None
        ordinary = not torch.is_grad_enabled() and _is_ordinary(grad, x, weight, bias, slopes, statistics)
        if not ordinary or not self.takes(grad, x, weight, bias, slopes, statistics):
            return self.formula(grad, x, weight, bias, slopes, wanted)
        grad, x = in_layout(grad, self.layout), in_layout(x, self.layout)
        operands = (grad, x, self.layout, self.batch, weight, bias, slopes, statistics, wanted)
        return cpp_instance_norm.backward(*operands, self.eps, self.activation, self.negative_slope)  # type: ignore[arg-type]

    def takes(self, grad: Tensor, x: Tensor, *parameters_and_statistics: Tensor | None) -> bool:
        """Whether saved tensors are what the kernel reads, whatever hooks made of them in between."""
        weight, bias, slopes, statistics = parameters_and_statistics
        assert statistics is not None
        if grad.shape != x.shape or grad.dtype != x.dtype or not (grad.is_cpu and x.is_cpu):
            return False
        samples, channels = grad.shape[:2]
        planes = channels if self.batch and self.layout == "ndhwc" else samples * channels
        return (
            statistics.shape == (3, planes)
            and statistics.dtype == torch.float64
            and statistics.is_cpu
            and statistics.is_contiguous()
            and _fit(x, weight, bias, slopes)
        )

    def formula(self, grad: Tensor, x: Any, weight: Any, bias: Any, slopes: Any, wanted: tuple[bool, ...]) -> Any:
        """The same gradients by torch's functions, which everybody can differentiate and transform."""
        axes = (0, *VOXEL_AXES) if self.batch else VOXEL_AXES
        centred = x - x.mean(axes, keepdim=True)
        inverse = (centred.square().mean(axes, keepdim=True) + self.eps).rsqrt()
        normal = centred * inverse
        z = normal if weight is None else normal * weight.view(-1, 1, 1, 1)
        z = z if bias is None else z + bias.view(-1, 1, 1, 1)
        grad_slopes = None
        if slopes is not None:
            below = torch.where(z > 0, 0, grad * z)
            grad_slopes = below.sum().view(1) if slopes.numel() == 1 else below.sum((0, *VOXEL_AXES))
            grad = torch.where(z > 0, grad, grad * slopes.view(-1, 1, 1, 1))
        elif self.activation == "relu":
            grad = torch.where(z <= 0, 0, grad)
        elif self.activation == "leaky_relu":
            grad = torch.where(z > 0, grad, grad * self.negative_slope)
        scaled = inverse if weight is None else inverse * weight.view(-1, 1, 1, 1)
        along = (grad * normal).mean(axes, keepdim=True)
        grads = (
            scaled * (grad - grad.mean(axes, keepdim=True) - normal * along),
            (grad * normal).sum((0, *VOXEL_AXES)) if wanted[1] else None,
            grad.sum((0, *VOXEL_AXES)) if wanted[2] else None,
            grad_slopes,
        )
        return tuple(one if is_wanted else None for one, is_wanted in zip(grads, wanted, strict=True))


class InstanceNormFunction(torch.autograd.Function):
    """Autograd node of an ordinary call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, slopes: Any, call: _Call) -> Tensor:
        y, statistics = call.forward(x, weight, bias, slopes)
        ctx.save_for_backward(x, weight, call.kept(bias, slopes), slopes, statistics)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *ctx.call.backward(grad, ctx.saved_tensors, ctx.needs_input_grad[:4]), None


class BatchNormFunction(InstanceNormFunction):
    """The same under the name of the other."""


def instance_norm_activation(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: Activation = "none",
    negative_slope: float = 0.01,
    keep_channels_last: bool = False,
) -> Tensor | None:
    """f((x - mean) / sqrt(variance + eps) * weight + bias) over the voxels of each channel and sample, or None.

    Args:
        x: (N, C, D, H, W).
        weight, bias: (C,) or None.
        slopes: the weight of a PReLU, (1,) or (C,), in place of `activation`; or None.
        eps: added to the variance.
        activation: what f is: none, relu or leaky_relu.
        negative_slope: of leaky_relu.
        keep_channels_last: whether the result of a channels_last_3d tensor is so too, as torch's is not.

    Returns:
        The result, contiguous as torch's but for `keep_channels_last`; None for torch to compute, or to refuse: the
        call is not ordinary, a dtype or device is another, x is not dense, or something does not fit.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 4, 4, 4)
        >>> expected = torch.relu(torch.nn.functional.instance_norm(x))
        >>> torch.allclose(instance_norm_activation(x, None, None, activation="relu"), expected, atol=1e-5)
        True
        >>> instance_norm_activation(x.half(), None, None) is None
        True
    """
    return _normalized(x, weight, bias, slopes, False, eps, activation, negative_slope, keep_channels_last)


def batch_norm_activation(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None = None,
    *,
    running: RunningStatistics | None = None,
    eps: float = 1e-5,
    activation: Activation = "none",
    negative_slope: float = 0.01,
) -> Tensor | None:
    """f((x - mean) / sqrt(variance + eps) * weight + bias) over the voxels of each channel in all samples, or None.

    Args:
        x, weight, bias, slopes, eps, activation, negative_slope: as for `instance_norm_activation`.
        running: statistics that follow those of the batch, or None.

    Returns:
        The result in the layout of x; None as for `instance_norm_activation`, and nothing has changed.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 4, 4, 4)
        >>> mean, variance = torch.zeros(3), torch.ones(3)
        >>> running = RunningStatistics(mean, variance, factor=0.1)
        >>> y = batch_norm_activation(x, None, None, running=running, activation="relu")
        >>> torch.allclose(y, torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True)), atol=1e-5)
        True
        >>> torch.allclose(mean, 0.1 * x.mean((0, 2, 3, 4)), atol=1e-6)
        True
    """
    if running is not None and not running.fit(x):
        return None
    return _normalized(x, weight, bias, slopes, True, eps, activation, negative_slope, True, running)


def _normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    batch: bool,
    eps: float,
    activation: Activation,
    negative_slope: float,
    keep_channels_last: bool,
    running: RunningStatistics | None = None,
) -> Tensor | None:
    """The result, or None for torch to compute or to refuse."""
    parameters = [parameter for parameter in (weight, bias, slopes) if parameter is not None]
    if not isinstance(x, Tensor) or has_torch_function_variadic(x, *parameters) or not _is_ordinary(x, *parameters):
        return None
    if x.dim() != 5 or not x.is_cpu or x.dtype not in (torch.float32, torch.float64):
        return None
    channels = x.shape[1]
    # Of a mean over one voxel, or none, torch complains in its own words.
    if x.numel() <= (1 if batch else x.shape[0]) * channels or not cpp_instance_norm.is_available():
        return None
    if not _fit(x, weight, bias, slopes):
        return None
    layout: Layout
    if x.is_contiguous():
        layout = "ncdhw"
    elif x.is_contiguous(memory_format=torch.channels_last_3d):
        layout = "ndhwc"
    else:
        return None
    result_layout: Layout = layout if keep_channels_last else "ncdhw"
    call = _Call(layout, result_layout, batch, float(eps), activation, float(negative_slope), running)
    if not is_differentiated(x, *parameters):
        return call.forward(x, weight, bias, slopes)[0]
    function = BatchNormFunction if batch else InstanceNormFunction
    y: Tensor = function.apply(x, weight, bias, slopes, call)  # type: ignore[no-untyped-call]
    return y


def _fit(x: Tensor, weight: Tensor | None, bias: Tensor | None, slopes: Tensor | None) -> bool:
    """Whether parameters are dense vectors of the channels, the dtype and the device of x; slopes perhaps only one."""
    channels = x.shape[1]
    return all(
        one is None or (one.shape in sizes and one.dtype == x.dtype and one.device == x.device and one.is_contiguous())
        for one, sizes in ((weight, [(channels,)]), (bias, [(channels,)]), (slopes, [(1,), (channels,)]))
    )


def _is_ordinary(*tensors: Tensor | None) -> bool:
    # A profiler sees the node of a call; without this a model would be another one while it is profiled.
    return is_ordinary(*tensors, under_profiler=True)
