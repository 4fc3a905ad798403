"""The numeric kernels written in Python: loops (Numba), im2col (torch operations), implicit GEMM (Triton).

Every path has the same three functions, which write their result into the last tensor they are given:

    forward(x, weight, bias, stride, padding, dilation, groups, y)
    grad_input(grad_output, weight, stride, padding, dilation, groups, grad_x)
    grad_weight(grad_output, x, stride, padding, dilation, groups, grad_w)

Activations are (N, C, D, H, W), weights (C_out, C_in / groups, K_d, K_h, K_w), in either memory layout and
both in the same one. `padding` is the number of zeros before each axis; how many come after it follows from
the size of the output. No tensor is empty. What is written in Triton returns launches, which write the result when
they are run, and may leave out arguments that it takes one value of. A kernel knows nothing of autograd, modules or
dispatch, and importing this package loads none of them: each backend imports its own kernels when it first runs.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is installed as pyvolconv.kernels and was found as 'kernels' only because the repository's "
        "root is on sys.path: import pyvolconv.kernels instead"
    )
