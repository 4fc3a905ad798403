"""Hand-written 3-D convolution for PyTorch, and the instrument that shows where its cost goes.

conv3d, conv_transpose3d        functions, as in torch.nn.functional
conv3d_activation               convolution, residual and activation in one pass
conv3d_max_pool                 convolution, activation and max-pool in one pass
Conv3d, ConvTranspose3d         modules, as in torch.nn; also LazyConv3d, LazyConvTranspose3d
InstanceNorm3d, BatchNorm3d     torch.nn's, forward and backward by one pass each
accelerate(model), revert       swap a model's convolutions and norms in place, and back
patch()                         a block in which torch's own functions are computed by these
fusion_report(model)            what became of each convolution and norm, and why no more
use_backend(name), backends()   choose who computes
set_precision("high")           allow algorithms that round more for speed
ConvProblem                     one convolution as a value
decompositions()                exported programs in torch's own operators
keep_pages()                    stop glibc from returning freed pages between steps
"""

from __future__ import annotations

from .accelerate import accelerate, revert
from .activation_functional import conv3d_activation
from .cost.pages import keep_pages
from .decompositions import decompositions
from .dispatch import backends, set_precision, use_backend
from .errors import BackendError, UnsupportedProblemError
from .functional import conv3d, conv_transpose3d
from .fused_functional import conv3d_max_pool
from .fusion_report import fusion_report
from .nn import BatchNorm3d, Conv3d, ConvTranspose3d, InstanceNorm3d, LazyConv3d, LazyConvTranspose3d
from .patch import patch
from .precision import get_precision
from .problem import ConvProblem

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BatchNorm3d",
    "Conv3d",
    "ConvProblem",
    "ConvTranspose3d",
    "InstanceNorm3d",
    "LazyConv3d",
    "LazyConvTranspose3d",
    "UnsupportedProblemError",
    "accelerate",
    "backends",
    "conv3d",
    "conv3d_activation",
    "conv3d_max_pool",
    "conv_transpose3d",
    "decompositions",
    "fusion_report",
    "get_precision",
    "keep_pages",
    "patch",
    "revert",
    "set_precision",
    "use_backend",
]
