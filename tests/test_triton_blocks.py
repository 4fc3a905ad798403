"""Blocks as text."""

from __future__ import annotations

import pytest

from pyvolconv.kernels.triton_blocks import Blocks


@pytest.mark.parametrize("blocks", [Blocks(128, 256, 64, 8, 3), Blocks(16, 16, 16, 1, 1), Blocks(1024, 16, 32, 4, 10)])
def test_text_and_back(blocks):
    assert Blocks.parse(str(blocks)) == blocks


@pytest.mark.parametrize(
    "text",
    ["", "m128n128k64w8", "m128n128k64w8s3 ", "M128n128k64w8s3", "m128n128k64w8s3s3", "m-1n128k64w8s3", "m1.5n8k8w4s1"],
)
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match=r"names no blocks; expected a form like 'm128n128k64w8s3'"):
        Blocks.parse(text)


@pytest.mark.parametrize(
    "text", ["m0n128k64w8s3", "m96n128k64w8s3", "m128n100k64w8s3", "m128n128k64w6s3", "m8n8k8w4s0"]
)
def test_what_triton_does_not_take_is_refused(text):
    with pytest.raises(ValueError, match=r"must be powers of two and s at least 1"):
        Blocks.parse(text)
