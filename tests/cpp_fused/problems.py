"""The problems at which the blocking of the fused passes changes."""

from __future__ import annotations

from pyvolconv.problem import ConvProblem

CUT = (
    # The three layers of the mission's network, and its ceil_mode: windows of 1 and 2 voxels at every end.
    "n2ic1oc16-i9x10x21-k3-p1-bias-relu-pool2ceil",
    "n2ic16oc24-i7x5x15-k3-p1-bias-relu-pool2ceil",
    "n1ic24oc32-i4x5x9-k3-p1-bias-relu-pool2",
    # Channels around whole vectors; the planar kernel's blocks of 1 to 4; rows around whole vectors of windows.
    *(f"n1ic3oc{channels}-i4x5x11-k3-p1-bias-relu-pool2" for channels in (1, 2, 3, 7, 8, 9, 17, 33)),
    *(f"n1ic2oc3-i2x4x{width}-k3-p1-relu-pool2ceil" for width in (1, 2, 3, 15, 16, 17, 31, 32, 33, 70)),
    # Few input channels, at which a vector holds more than one tap.
    *(f"n2ic{channels}oc12-i6x7x10-k3-p1-relu-pool2" for channels in (1, 2, 3, 4, 5)),
    # Segments of several vectors and pieces; several chunks of source channels.
    *(f"n1ic{channels}oc5-i4x4x6-k3-p1-relu-pool2" for channels in (11, 40, 70)),
    "n2ic300oc20-i2x3x4-k3-p1-bias-relu-pool2ceil",
    "n1ic70oc140-i3x4x5-k3-p1-bias-none-pool2",
    # Windows that overlap, leave gaps, are padded, are flat or hold many voxels.
    "n2ic4oc9-i9x10x11-k3-p1-bias-relu-pool3s2p1",
    "n1ic4oc9-i9x10x31-k3-p1-bias-relu-pool3s2ceil",
    "n1ic5oc8-i5x6x19-k3-p1-leaky_relu(0.25)-pool2s1",
    "n1ic4oc9-i9x10x21-k3-p1-bias-relu-pool2s3",
    "n2ic4oc9-i5x9x16-k3-p1-relu-pool1x2x2",
    "n2ic4oc9-i5x6x21-k3-p1-silu-pool1x3x4s2x1x5p0x1x2",
    "n1ic3oc8-i8x8x9-k3-p1-relu-pool6x6x7",
    "n1ic4oc9-i5x6x7-k3-p1-bias-gelu-pool1",
    "n1ic4oc9-i2x2x3-k3-p1-bias-leaky_relu(0.0)-pool2s2p1ceil",
    # Strides, dilation, groups, depthwise, one-sided padding; input that nothing reads.
    "n1ic3oc16-i17x18x19-k7-s2-p3-bias-relu-pool3s2p1",
    "n1ic6oc9-i9x11x37-k1x2x2-s3x3x4-relu-pool2ceil",
    "n1ic4oc8-i9x10x21-k3-p2-d2-relu-pool2",
    "n1ic9oc8-i9x10x21-k2x3x2-s2x1x3-p1x2x3-d2x2x4-gelu_tanh-pool2",
    "n2g3ic9oc51-i3x4x6-k3-p1-bias-relu-pool2",
    *(f"n1g{groups}ic{groups}oc{groups}-i4x5x11-k3-p1-bias-relu-pool2" for groups in (2, 8, 70)),
    "n2ic4oc8-i5x6x7-k4x2x2-p1+2x0+1x0+1-bias-relu-pool2",
    "n1ic3oc4-i2x3x4-k2-p5+0x0+6x7+3-bias-relu-pool2",
    # Whole vectors of input channels, and a half one; taps that move along a row.
    *(f"n1ic{channels}oc18-i4x5x9-k3-p1-relu-pool2ceil" for channels in (6, 8, 9, 12, 20, 25, 32, 48)),
    "n1ic24oc40-i5x6x20-k5-p2-relu-pool2",
    "n1ic16oc16-i9x10x21-k3-s2x2x1-p1-bias-relu-pool2",
    "n1ic16oc17-i9x10x21-k3x5x3-p2x4x1-d2x2x1-relu-pool2",
    "n2g2ic32oc36-i5x6x21-k1x2x3-p0x1x1-relu-pool2ceil",
    # Bits of more channels than a word has, half vectors, padding of all kinds and several slabs of depths.
    "n1ic16oc70-i9x6x7-k3-p1-relu-pool2ceil",
    "n2ic24oc12-i5x6x7-k3-relu-pool2ceil",
    "n1ic40oc9-i21x6x7-k3-p2+1x0+2x1+0-relu-pool2",
    "n1ic12oc20-i3x4x5-k3-p3-bias-none-pool2ceil",
    # Lists of more codes than a vector has lanes; codes transposed in blocks of bytes.
    "n1ic20oc18-i6x7x17-k3-p1-relu-pool3x2x3",
    "n2ic1oc32-i6x36x40-k3-p1-relu-pool2",
    # Volumes of several tiles and slabs.
    "n1ic32oc8-i21x23x19-k3-p1-bias-relu-pool2ceil",
    "n1ic2oc16-i19x20x210-k3-p1-relu-pool2",
)


def parse(text: str, layout: str, dtype: str = "float32") -> ConvProblem:
    return ConvProblem.parse(f"cpu-{dtype}-{layout}-{text.replace('-none', '')}")


def plain(problem: ConvProblem) -> ConvProblem:
    return problem.with_(activation="none", negative_slope=0.01, pool=None)
