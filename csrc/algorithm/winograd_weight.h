// The weights of a Winograd convolution, transformed in the order in which panel.h reads them.
#pragma once

#include "../parallel.h"
#include "pack_weight.h"
#include "winograd_blocking.h"

namespace pvc {
namespace {

// [panel][weight of the plane], and there [source channel][shared weight of the outer axis][column], then [source
// channel][weight apart][column], where panels are paired [pair of source channels][weight][column][of the pair]; and
// what the sums start from.
template <typename T>
struct WinogradWeights {
    const Gather& gather;
    const WinogradBlocking<T>& blocking;
    const T* weight;
    T* transformed;
    T* initial;

    WinogradWeights(const Gather& gather, const WinogradBlocking<T>& b, const T* weight, const T* bias)
        : gather(gather), blocking(b), weight(weight) {
        const int64_t values = b.scheme->weight_count() * b.sources * b.vectors * b.lanes;
        transformed = scratch<T>(Scratch::shared_weights, values + b.vectors * b.lanes);
        initial = transformed + values;
        for (int64_t c = 0; c < b.vectors * b.lanes; ++c) initial[c] = bias != nullptr && c < b.targets ? bias[c] : 0;
        constexpr int64_t kParallel = 1 << 15;  // values; less is quicker than waking a thread
        if (values >= kParallel) {
            parallel_for(b.sources, [&](int64_t source) { transform(source); });
        } else {
            for (int64_t source = 0; source < b.sources; ++source) transform(source);
        }
    }

  private:
    void transform(int64_t source) const {
        constexpr int64_t lanes = Vector<T>::lanes, kTaps = 27, kPoints = 216;
        const WinogradBlocking<T>& b = blocking;
        const WinogradScheme<T>& scheme = *b.scheme;
        const GatherAxis* axis = gather.axis;
        alignas(64) T taps[kTaps * lanes], points[kPoints * lanes];
        const int64_t stride[3] = {axis[1].taps * axis[2].taps * lanes, axis[2].taps * lanes, lanes};
        TileWeight<T> a = {};
        a.from = taps;
        for (int i = 0; i < 3; ++i) a.stride[i] = stride[scheme.axis[i]];
        a.to = points;
        a.point = lanes;
        for (int64_t panel = 0; panel < b.vectors; panel += b.panel_vectors) {
            const int64_t columns = b.panel_columns(panel);
            for (int64_t column = 0; column < columns; column += lanes) {
                const int64_t first = panel * lanes + column, width = smaller(lanes, columns - column);
                pack_taps(gather, weight + source * gather.weight_source_stride + first * gather.weight_target_stride,
                          1, 1, smaller(lanes, b.targets - first), lanes, taps);
                scheme.kernels.weight(a);
                store(points, source, panel, column, width);
            }
        }
    }

    // Columns from `column` on of a panel.
    void store(const T* points, int64_t source, int64_t panel, int64_t column, int64_t width) const {
        const WinogradScheme<T>& scheme = *blocking.scheme;
        const AxisShape& outer = scheme.shape[scheme.outer()];
        const int64_t lanes = blocking.lanes, sources = blocking.sources, plane_weights = scheme.plane_weights();
        const int64_t step = blocking.panel_paired(panel) ? 2 : 1, columns = blocking.panel_columns(panel);
        T* to = transformed + blocking.panel_weights(panel) + step * column + source % step;
        for (int64_t weight = 0; weight < plane_weights; ++weight, to += outer.weights * sources * columns) {
            for (int64_t o = 0; o < outer.weights; ++o) {
                const int64_t apart = outer.is_shared[o] ? 0 : sources * outer.shared * columns;
                const int64_t count = outer.is_shared[o] ? outer.shared : outer.apart;
                T* row = to + apart + (source / step * count + outer.weight_row[o]) * step * columns;
                const T* from = points + (o * plane_weights + weight) * lanes;
                for (int64_t i = 0; i < width; ++i) row[i * step] = from[i];
            }
        }
    }
};

}  // namespace
}  // namespace pvc
