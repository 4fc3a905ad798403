"""cpp.direct's fused passes (convolution, activation, max-pool) over the shapes at which their blocking changes.

Codes, ties and NaN are compared with torch's max_pool3d of the float64 convolution. Every problem runs with the kernels
of each instruction set of this machine and, built here by the local compiler, with 64-byte vectors.
"""
