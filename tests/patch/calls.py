"""What a call returns or raises, and what it asks of the dispatcher."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from pyvolconv import dispatch


def heard(function, *args, **options):
    """What a call returns, and the passes that the dispatcher was asked for meanwhile."""
    with dispatch.listen() as asked:
        result = function(*args, **options)
    return result, sorted(pass_ for _, pass_ in asked)


def is_patched(x, w):
    return heard(F.conv3d, x, w)[1] == ["forward"]


def error_of(function, *args, **options):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        function(*args, **options)
    return caught.type, str(caught.value)
