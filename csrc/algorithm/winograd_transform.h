// The transforms of a 3-D tile, F(m_d) x F(m_h) x F(m_w), for a vector of channels at a time.
//
// One axis, the outer one, is apart: depth, or height where the kernel has one tap in depth. The other two span planes.
// A plane of the source is transformed once for all tiles that share it (neighbours along the outer axis share two);
// the outer axis follows when its products are due, and panel.h transforms it back before anything is stored. Points of
// a plane lie row by row, the width innermost.
#pragma once

#include "winograd_largest.h"
#include "winograd_shape.h"

namespace pvc {
namespace {

// At least `values`, in an odd number of cache lines: what is visited one after another in such steps does not compete
// for the same lines of a cache.
template <typename T>
constexpr int64_t odd_lines(int64_t values) {
    constexpr int64_t line = 64 / sizeof(T);
    return ((values + line - 1) / line | 1) * line;
}

// Whether the last vector of so many channels is half of one.
template <typename T>
constexpr bool fills_half(int64_t channels) {
    constexpr int64_t lanes = Vector<T>::lanes;
    return kHalfVectors && channels % lanes != 0 && channels % lanes <= lanes / 2;
}

// The source of one tile in one plane, written point after point, `lanes` elements apart. Values of a tile that reaches
// beyond the tensor are read through `row` and `column` where it is set, and are zero where `mask` has no bits.
template <typename T>
struct PlaneSource {
    const T* row[kMostPoints];
    int64_t column[kMostPoints];
    typename VectorType<T>::integer mask[kMostPoints];
    T* to;
};

// One point of a plane for all tiles of a box, tile by tile along the outer axis, to rows of panel.h. `plane`, `tile`:
// strides in `from`.
template <typename T>
struct OuterSource {
    const T* from;
    int64_t plane, tile;
    int64_t outer_tiles, plane_tiles;
    T* to;
};

// The outputs of one tile: `point` and `output` are strides in `from`, of plane points and of outputs of the outer
// axis; `outer`, `row` and `column` are strides in `to`.
template <typename T>
struct TileTarget {
    const T* from;
    int64_t point, output;
    const T* initial;
    T* to;
    int64_t outer, row, column;
};

template <typename T>
struct TileWeight {
    const T* from;
    int64_t stride[3];
    T* to;
    int64_t point;
};

// Kinds of axes (winograd_axis.h): M the outer one, P and Q those of a plane. `Half`: of vectors half as long.
template <typename T, int M, int P, int Q, bool Half>
struct WinogradTile {
    using V = VectorPart<T, Half>;
    using vector = typename V::type;
    using AxisO = WinogradAxis<M>;
    using AxisP = WinogradAxis<P>;
    using AxisQ = WinogradAxis<Q>;
    static constexpr int PO = AxisO::points, PP = AxisP::points, PQ = AxisQ::points;
    static constexpr int WO = AxisO::weights, WP = AxisP::weights, WQ = AxisQ::weights;

    template <bool Border>
    static void plane_source(const PlaneSource<T>& a) {
        vector v[PP * PQ];
#pragma GCC unroll 6
        for (int p = 0; p < AxisP::window; ++p) {
#pragma GCC unroll 6
            for (int q = 0; q < AxisQ::window; ++q) {
                v[p * PQ + q] = V::load(a.row[p] + (Border ? a.column[q] : q * a.column[1]));
                if constexpr (Border) v[p * PQ + q] = V::keep(v[p * PQ + q], a.mask[q]);
            }
            AxisQ::source(v + p * PQ, 1);
        }
#pragma GCC unroll 6
        for (int q = 0; q < PQ; ++q) {
            AxisP::source(v + q, PQ);
#pragma GCC unroll 6
            for (int p = 0; p < PP; ++p) V::store(a.to + (p * PQ + q) * Vector<T>::lanes, v[p * PQ + q]);
        }
    }

    static void outer_source(const OuterSource<T>& a) {
        T* to = a.to;
        for (int64_t outer = 0; outer < a.outer_tiles; ++outer) {
            const T* from = a.from + outer * AxisO::advance * a.plane;
            for (int64_t tile = 0; tile < a.plane_tiles; ++tile, from += a.tile, to += PO * Vector<T>::lanes) {
                vector v[PO];
#pragma GCC unroll 6
                for (int o = 0; o < AxisO::window; ++o) v[o] = V::load(from + o * a.plane);
                AxisO::source(v, 1);
#pragma GCC unroll 6
                for (int o = 0; o < PO; ++o) V::store(to + o * Vector<T>::lanes, v[o]);
            }
        }
    }

    // The gradient of the outputs, as plane_source and outer_source.
    template <bool Border>
    static void plane_gradient(const PlaneSource<T>& a) {
        vector v[PP * PQ];
#pragma GCC unroll 2
        for (int p = 0; p < AxisP::outputs; ++p) {
#pragma GCC unroll 2
            for (int q = 0; q < AxisQ::outputs; ++q) {
                v[p * PQ + q] = V::load(a.row[p] + (Border ? a.column[q] : q * a.column[1]));
                if constexpr (Border) v[p * PQ + q] = V::keep(v[p * PQ + q], a.mask[q]);
            }
            AxisQ::gradient(v + p * PQ, 1);
        }
#pragma GCC unroll 5
        for (int q = 0; q < PQ; ++q) {
            AxisP::gradient(v + q, PQ);
#pragma GCC unroll 5
            for (int p = 0; p < PP; ++p) V::store(a.to + (p * PQ + q) * Vector<T>::lanes, v[p * PQ + q]);
        }
    }

    static void outer_gradient(const OuterSource<T>& a) {
        T* to = a.to;
        for (int64_t outer = 0; outer < a.outer_tiles; ++outer) {
            const T* from = a.from + outer * AxisO::outputs * a.plane;
            for (int64_t tile = 0; tile < a.plane_tiles; ++tile, from += a.tile, to += PO * Vector<T>::lanes) {
                vector v[PO];
#pragma GCC unroll 2
                for (int o = 0; o < AxisO::outputs; ++o) v[o] = V::load(from + o * a.plane);
                AxisO::gradient(v, 1);
#pragma GCC unroll 5
                for (int o = 0; o < PO; ++o) V::store(to + o * Vector<T>::lanes, v[o]);
            }
        }
    }

    // Sums, numbered as in `weight`, to taps (o * taps of p + p) * taps of q + q, both `lanes` elements apart.
    static void weight_gradient(const T* sums, T* taps) {
        vector v[WO * WP * WQ];
        for (int i = 0; i < WO * WP * WQ; ++i) v[i] = V::load(sums + i * Vector<T>::lanes);
        for (int i = 0; i < WP * WQ; ++i) AxisO::weight_gradient(v + i, WP * WQ);
        for (int o = 0; o < AxisO::taps; ++o) {
            for (int q = 0; q < WQ; ++q) AxisP::weight_gradient(v + o * WP * WQ + q, WQ);
            for (int p = 0; p < AxisP::taps; ++p) {
                vector* row = v + (o * WP + p) * WQ;
                AxisQ::weight_gradient(row, 1);
                for (int q = 0; q < AxisQ::taps; ++q, taps += Vector<T>::lanes) V::store(taps, row[q]);
            }
        }
    }

    // Adds `initial` and returns whether an output is not finite.
    static bool target(const TileTarget<T>& a) {
        const vector initial = V::load(a.initial);
        vector spoilt = {};
        for (int o = 0; o < AxisO::outputs; ++o) {
            const T* from = a.from + o * a.output;
            vector v[PP * PQ];
            transform_columns<AxisP, AxisQ, V>(from, a.point, v);
#pragma GCC unroll 4
            for (int p = 0; p < AxisP::outputs; ++p) {
                T* to = a.to + o * a.outer + p * a.row;
                AxisQ::target(v + p * PQ, 1);
#pragma GCC unroll 4
                for (int q = 0; q < AxisQ::outputs; ++q) {
                    const vector value = v[p * PQ + q] + initial;
                    spoilt += value - value;  // zero, or NaN for good once a value is infinite or NaN
                    V::store(to + q * a.column, value);
                }
            }
        }
        uint64_t words[V::bytes / 8], any = 0;
        std::memcpy(words, &spoilt, sizeof(words));
        for (const uint64_t word : words) any |= word;
        return any != 0;
    }

    // Of the whole tile; weight (o, p, q) is number (o * WP + p) * WQ + q.
    static void weight(const TileWeight<T>& a) {
        vector v[WO * WP * WQ];
        for (int o = 0; o < AxisO::taps; ++o) {
            for (int p = 0; p < AxisP::taps; ++p) {
                vector* row = v + (o * WP + p) * WQ;
                for (int q = 0; q < AxisQ::taps; ++q) {
                    row[q] = V::load(a.from + o * a.stride[0] + p * a.stride[1] + q * a.stride[2]);
                }
                AxisQ::weight(row, 1);
            }
            for (int q = 0; q < WQ; ++q) AxisP::weight(v + o * WP * WQ + q, WQ);
        }
        for (int i = 0; i < WP * WQ; ++i) AxisO::weight(v + i, WP * WQ);
        for (int i = 0; i < WO * WP * WQ; ++i) V::store(a.to + i * a.point, v[i]);
    }
};

// Indexed by whether the vector is half of one; both are the same where there are no halves. `border`: for tiles that
// reach beyond the tensor.
template <typename T>
struct OperandKernels {
    void (*plane[2])(const PlaneSource<T>&);
    void (*border[2])(const PlaneSource<T>&);
    void (*outer[2])(const OuterSource<T>&);
};

template <typename T>
struct WinogradKernels {
    OperandKernels<T> source, gradient;  // no gradient with F(4)
    void (*weight_gradient)(const T* sums, T* taps);
    bool (*target[2])(const TileTarget<T>&);
    bool (*largest[2])(const TileLargest<T>&);  // with two outputs along the outer axis and even ones in the plane
    void (*weight)(const TileWeight<T>&);
    void (*panel)(int64_t vectors, bool half, int64_t rows, PanelArguments<T>);
};

// One scheme. The outer axis comes first in `axis`, the width last.
template <typename T>
struct WinogradScheme {
    int outputs[3], points[3];  // by depth, height, width
    AxisShape shape[3];
    int axis[3];
    int panel_vectors;
    WinogradKernels<T> kernels;

    int outer() const { return axis[0]; }
    int plane_points() const { return points[axis[1]] * points[axis[2]]; }
    int plane_weights() const { return shape[axis[1]].weights * shape[axis[2]].weights; }
    int weight_count() const { return shape[0].weights * shape[1].weights * shape[2].weights; }

    // The transformed weight of a plane that a point of a plane is multiplied with.
    int plane_weight(int point) const {
        const AxisShape &p = shape[axis[1]], &q = shape[axis[2]];
        return p.point_weight[point / q.points] * q.weights + q.point_weight[point % q.points];
    }

    // Of the source and of the gradient of the target.
    TileWindow source_window() const {
        return {{shape[0].window, shape[1].window, shape[2].window},
                {shape[0].advance, shape[1].advance, shape[2].advance}};
    }
    TileWindow gradient_window() const {
        return {{outputs[0], outputs[1], outputs[2]}, {outputs[0], outputs[1], outputs[2]}};
    }

    // Between the tiles of a transformed plane, for all their points of a vector of channels.
    int64_t tile_pitch() const { return odd_lines<T>(plane_points() * Vector<T>::lanes); }
};

template <typename T, int M, int P, int Q>
constexpr WinogradKernels<T> winograd_kernels() {
    using Whole = WinogradTile<T, M, P, Q, false>;
    using Half = WinogradTile<T, M, P, Q, kHalfVectors>;
    WinogradKernels<T> kernels = {};
    kernels.source = {{Whole::template plane_source<false>, Half::template plane_source<false>},
                      {Whole::template plane_source<true>, Half::template plane_source<true>},
                      {Whole::outer_source, Half::outer_source}};
    if constexpr (M != 4 && P <= 2 && Q <= 2 && Q != kTransposed) {
        kernels.gradient = {{Whole::template plane_gradient<false>, Half::template plane_gradient<false>},
                            {Whole::template plane_gradient<true>, Half::template plane_gradient<true>},
                            {Whole::outer_gradient, Half::outer_gradient}};
        kernels.weight_gradient = Whole::weight_gradient;
    }
    kernels.target[0] = Whole::target;
    kernels.target[1] = Half::target;
    if constexpr (M == 2 && P > 1 && Q > 1) {
        kernels.largest[0] = WinogradLargest<T, P, Q, false>::run;
        kernels.largest[1] = WinogradLargest<T, P, Q, kHalfVectors>::run;
    }
    kernels.weight = Whole::weight;
    kernels.panel = compute_panel<T, M>;
    return kernels;
}

template <typename T, int D, int H, int W>
constexpr WinogradScheme<T> winograd_scheme_of() {
    constexpr AxisShape d = axis_shape<D>(), h = axis_shape<H>(), w = axis_shape<W>();
    WinogradScheme<T> scheme = {};
    scheme.shape[0] = d, scheme.shape[1] = h, scheme.shape[2] = w;
    for (int a = 0; a < 3; ++a) {
        scheme.outputs[a] = scheme.shape[a].outputs;
        scheme.points[a] = scheme.shape[a].points;
    }
    scheme.axis[0] = D == 1, scheme.axis[1] = D != 1, scheme.axis[2] = 2;
    if constexpr (D == 1) {
        scheme.kernels = winograd_kernels<T, H, D, W>();
    } else {
        scheme.kernels = winograd_kernels<T, D, H, W>();
    }
    scheme.panel_vectors = panel_vectors(scheme.outputs[scheme.axis[0]]);
    return scheme;
}

// The scheme with these outputs and strides per axis, for the gradient of the source or not, or null when there is
// none.
template <typename T>
const WinogradScheme<T>* winograd_scheme(const int64_t outputs[3], const int64_t stride[3], bool transposed) {
    constexpr int S = kStrided, X = kTransposed;
    static constexpr WinogradScheme<T> schemes[] = {
        winograd_scheme_of<T, 2, 2, 2>(), winograd_scheme_of<T, 2, 2, 4>(), winograd_scheme_of<T, 2, 4, 2>(),
        winograd_scheme_of<T, 2, 4, 4>(), winograd_scheme_of<T, 4, 4, 4>(), winograd_scheme_of<T, 1, 2, 2>(),
        winograd_scheme_of<T, 1, 2, 4>(), winograd_scheme_of<T, 1, 4, 4>(), winograd_scheme_of<T, 2, 1, 1>(),
        winograd_scheme_of<T, 4, 1, 1>(), winograd_scheme_of<T, S, S, S>(), winograd_scheme_of<T, 2, S, S>(),
        winograd_scheme_of<T, 1, S, S>(), winograd_scheme_of<T, X, X, X>(), winograd_scheme_of<T, 2, X, X>(),
        winograd_scheme_of<T, 1, X, X>(),
    };
    for (const WinogradScheme<T>& scheme : schemes) {
        bool same = true;
        for (int a = 0; a < 3; ++a) {
            const AxisShape& shape = scheme.shape[a];
            same = same && shape.outputs == outputs[a] && shape.stride == stride[a];
            same = same && (shape.stride == 1 || shape.transposed == transposed);
        }
        if (same) return &scheme;
    }
    return nullptr;
}

}  // namespace
}  // namespace pvc
