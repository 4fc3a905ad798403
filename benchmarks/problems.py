"""The convolutions that are timed, by name. Dtype, layout and device are added by the options of a run.

"mission" is the network that `pyvolconv compare` trains. "suite" holds layers of networks in wide use:
shapes of oneDNN's benchdnn inputs (shapes_3d*, marked b) and of the published architectures.
"""

from __future__ import annotations

from pyvolconv.problem import ConvProblem, Layout

PROBLEM_SETS: dict[str, dict[str, str]] = {
    "quick": {
        "cnn-2": "n2ic16oc24-i15x15x30-k3-p1",
    },
    "mission": {
        "cnn-1": "n32ic1oc16-i29x30x60-k3-p1",
        "cnn-2": "n32ic16oc24-i15x15x30-k3-p1",
        "cnn-3": "n32ic24oc32-i8x8x15-k3-p1",
    },
    "suite": {
        "c3d-1": "n8ic3oc64-i16x112x112-k3-p1",
        "c3d-2": "n8ic64oc128-i16x56x56-k3-p1",
        "c3d-3b": "n8ic256oc256-i8x28x28-k3-p1",
        "i3d-stem": "n2ic3oc64-i64x224x224-k7-s2-p2",  # b
        "i3d-2": "n8ic64oc192-i32x56x56-k3-p1",  # b
        "i3d-3": "n8ic96oc128-i32x28x28-k3-p1",  # b
        "i3d-3-narrow": "n8ic16oc32-i32x28x28-k3-p1",  # b
        "i3d-4": "n8ic24oc64-i16x14x14-k3-p1",  # b
        "i3d-5": "n8ic160oc320-i8x7x7-k3-p1",  # b
        "unet-1": "n1ic3oc32-i116x132x132-k3",  # b
        "unet-3": "n1ic64oc128-i54x62x62-k3",  # b
        "nnunet-1": "n2ic1oc32-i128-k3-p1",
        "nnunet-2": "n2ic32oc32-i128-k3-p1",
        "nnunet-down": "n2ic32oc64-i128-k3-s2-p1",
        "vnet-down": "n2ic32oc64-i64x64x32-k2-s2",  # b
        "r3d-layer1": "n8ic64oc64-i16x56x56-k3-p1",
        "r3d-layer4": "n8ic512oc512-i2x7x7-k3-p1",
        "r2plus1d": "n8ic64oc144-i16x56x56-k1x3x3-p0x1x1",
        "resnext3d": "n6g16ic64oc64-i8x56x56-k3-p1",  # b
        "x3d-depthwise": "n8g54ic54oc54-i8x56x56-k3-p1",  # b
        "small-1": "n32ic1oc8-i32-k3-p1",
        "small-2": "n32ic8oc16-i16-k3-p1",
        "small-3": "n32ic32oc64-i8-k3-p1",
        "dilated": "n4ic32oc32-i32-k3-p2-d2",
        "pointwise-up": "n2ic64oc256-i16-k1",
        "pointwise-down": "n2ic256oc64-i16-k1",
        "in-plane": "n2ic64oc64-i16x28x28-k1x3x3-p0x1x1",
        "along-depth": "n2ic64oc64-i16x28x28-k3x1x1-p1x0x0",
        "depthwise-3": "n2g64ic64oc64-i32-k3-p1",
        "depthwise-5": "n2g64ic64oc64-i32-k5-p2",
        "transposed": "n2ic32oc64-i64-k2-s2",  # its grad_input is the ConvTranspose3d(64, 32, 2, 2) of a 32^3 input
    },
    # Windows that touch: patches cut out of volumes, images and latent videos, and layers that halve.
    "patches": {
        "video-vit": "n2ic3oc768-i16x112x112-k2x16x16-s2x16x16",
        "image-vit": "n1ic3oc1152-i1x448x448-k1x14x14-s1x14x14",
        "volume-4": "n1ic1oc96-i64x96x96-k4-s4",
        "latent-4": "n1ic4oc1536-i16x60x90-k1x2x2-s1x2x2",
        "latent-16": "n1ic16oc1536-i20x32x32-k1x2x2-s1x2x2",
        "halving-16": "n4ic16oc32-i16x64x64-k1x2x2-s1x2x2",
        "halving-96": "n1ic96oc192-i32x32x32-k2-s2",
    },
}


def problem(text: str, layout: Layout, dtype: str, device: str) -> ConvProblem:
    """The problem of an entry above.

    Example:
        >>> str(problem(PROBLEM_SETS["mission"]["cnn-3"], "ndhwc", "float32", "cpu"))
        'cpu-float32-ndhwc-n32ic24oc32-i8x8x15-k3-p1'
    """
    return ConvProblem.parse(f"{device}-{dtype}-{layout}-{text}")
