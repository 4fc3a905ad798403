"""The convolutions that `benchmarks.gpu_suite` times: layers reported as slow, and those of networks in wide use.

Each is the text of a `ConvProblem` without device and layout. Rows of the survey behind them which name two dtypes or
two numbers of input channels are two entries here, each counted for itself: 23 rows, 25 entries.
"""

from __future__ import annotations

from pyvolconv.problem import ConvProblem, Layout

GPU_PROBLEMS: dict[str, str] = {
    # Patch embeddings of vision-language models: the kernel is its own stride and covers the input.
    "qwen2-vl": "bfloat16-n12920ic3oc1280-i2x14x14-k2x14x14-s2x14x14",
    "minimax-m3": "bfloat16-n522240ic3oc1280-i2x14x14-k2x14x14-s2x14x14",
    # Video autoencoders. The depth is padded by two cached frames beforehand, which are part of the input.
    "wan2.1-384": "bfloat16-n1ic384oc384-i3x60x104-k3-p0x1x1",
    "wan2.1-192": "bfloat16-n1ic192oc192-i6x240x416-k3-p0x1x1",
    "wan2.1-96": "bfloat16-n1ic96oc96-i6x480x832-k3-p0x1x1",
    "wan2.1-out": "bfloat16-n1ic96oc3-i6x480x832-k3-p0x1x1",
    "wan-time-conv": "bfloat16-n1ic384oc768-i3x60x104-k3x1x1",
    "wan2.2-5b": "bfloat16-n1ic1024oc1024-i4x88x160-k3-p0x1x1",
    "wan2.2-5b-fp32": "float32-n1ic1024oc1024-i4x88x160-k3-p0x1x1",
    "valid-384": "bfloat16-n8ic384oc384-i3x34x34-k3",
    "open-sora": "bfloat16-n1ic512oc512-i17x64x64-k3-p1",
    "widening": "bfloat16-n1ic128oc512-i21x60x106-k3-p1",
    "large-frames": "bfloat16-n1ic256oc64-i5x1090x1922-k3",
    # Segmentation of volumes: nnU-Net at 128^3, batch 2.
    "nnunet-first-1": "float16-n2ic1oc32-i128-k3-p1",
    "nnunet-first-4": "float16-n2ic4oc32-i128-k3-p1",
    "nnunet-32": "float16-n2ic32oc32-i128-k3-p1",
    "nnunet-down": "float16-n2ic32oc64-i128-k3-s2-p1",
    "nnunet-128": "float16-n2ic128oc128-i32-k3-p1",
    "nnunet-decoder": "float16-n2ic640oc320-i8-k3-p1",
    # Classification of videos, lidar, and groups.
    "video-stem": "float16-n48ic3oc64-i64x224x224-k1x7x7-s1x2x2-p0x3x3",
    "aspp-dilated": "float16-n1ic256oc256-i8x16x16-k3-p6-d6",
    "resnext3d": "float16-n1g32ic64oc128-i8x28x28-k3-p1",
    "x3d-depthwise": "float16-n8g54ic54oc54-i13x40x40-k3-p1",
    "depthwise-512": "bfloat16-n1g512ic512oc512-i61x45x80-k3x5x5-p0x2x2",
    "lidar-depthwise": "float16-n1g64ic64oc64-i15x75x315-k3-p1",
}


def gpu_problem(name: str, layout: Layout, device: str = "cuda") -> ConvProblem:
    """The problem of an entry above.

    Raises:
        ValueError: there is no such entry.

    Example:
        >>> str(gpu_problem("nnunet-32", "ndhwc"))
        'cuda-float16-ndhwc-n2ic32oc32-i128x128x128-k3-p1'
    """
    if name not in GPU_PROBLEMS:
        raise ValueError(f"no entry {name!r}; expected one of: {', '.join(GPU_PROBLEMS)}")
    dtype, _, sizes = GPU_PROBLEMS[name].partition("-")
    return ConvProblem.parse(f"{device}-{dtype}-{layout}-{sizes}")
