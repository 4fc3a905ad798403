// What is known of one axis of a Winograd scheme (winograd_axis.h) where its kind is not a constant.
#pragma once

#include "../microkernel/panel.h"

namespace pvc {
namespace {

constexpr int kMostPoints = 6;  // of an axis

// The voxels that a tile reads of a tensor per axis, and how much further on those of the next tile begin.
struct TileWindow {
    int size[3], advance[3];
};

// The taps that an output needs: from `voxel` of the window on, `count` of them, with those of the filter from `tap`
// on.
struct OutputTaps {
    int voxel, count, tap, tap_step;
};

// What tiles have along one axis (winograd_axis.h).
struct AxisShape {
    int outputs, taps, stride, window, advance, points, weights;
    bool transposed;
    int point_weight[kMostPoints];               // the weight that a point is multiplied with
    int shared, apart, weight_row[kMostPoints];  // numbers of weights, and their order among shared ones or those apart
    bool is_shared[kMostPoints];

    OutputTaps output_taps(int output) const {
        if (!transposed) return {output * stride, taps, 0, 1};
        return output % 2 == 0 ? OutputTaps{output / 2, 1, 1, 0} : OutputTaps{output / 2, 2, 2, -2};
    }
};

template <int Kind>
constexpr AxisShape axis_shape() {
    using Axis = WinogradAxis<Kind>;
    AxisShape shape = {};
    shape.outputs = Axis::outputs;
    shape.taps = Axis::taps;
    shape.stride = Kind < 0 ? 2 : 1;
    shape.transposed = Kind == kTransposed;
    shape.window = Axis::window;
    shape.advance = Axis::advance;
    shape.points = Axis::points;
    shape.weights = Axis::weights;
    if constexpr (Axis::taps > 1) {
        using Weights = PanelWeights<Kind>;
        shape.shared = Weights::shared;
        shape.apart = Weights::apart;
        for (const PointProduct& product : Axis::shared) shape.point_weight[product.point] = product.weight;
        for (const PointProduct& product : Axis::apart) shape.point_weight[product.point] = product.weight;
        for (int weight = 0; weight < Axis::weights; ++weight) {
            shape.is_shared[weight] = Weights::is_shared(weight);
            shape.weight_row[weight] = Weights::row(weight);
        }
    }
    return shape;
}

}  // namespace
}  // namespace pvc
