// grad_weight by Winograd: for every point of a tile, a product of the transformed source with the transformed
// gradient, summed over all tiles (winograd_axis.h); sums are transformed to taps at the end.
//
// The sums are [weight of a plane][outer weight][source channel][target channel], one for each point but where points
// share a weight (winograd_strided_axis.h). They are added up box by
// box, in splits of the boxes that the problem alone fixes, and the splits in order.
//
// Where a result is not finite the whole gradient is computed again, directly: a transform spreads an infinity or NaN
// over taps that it does not reach. None can come out finite, because each value takes part with a non-zero factor in
// every tap that depends on it.
#pragma once

#include "../microkernel/rank_update.h"
#include "direct_grad_weight.h"
#include "winograd_operand.h"

namespace pvc {
namespace {

template <typename T>
class WinogradGradWeight {
  public:
    WinogradGradWeight(const ConvProblem& problem, const WinogradScheme<T>& scheme) : scheme_(scheme) {
        source_ = gather_channels(problem, true);
        gradient_ = source_;
        gradient_.source_channels = problem.out_channels;
        for (int a = 0; a < 3; ++a) {
            source_.axis[a] = gradient_.axis[a] = forward_axis(problem, a);
            gradient_.axis[a].source_size = problem.output_size[a];
            gradient_.axis[a].source_start = 0;
            gradient_.axis[a].source_step = 1;
        }
        b_ = choose_winograd(source_, scheme);
        rows_ = b_.source_width();
        width_ = b_.vectors * lanes;
        size_ = scheme.weight_count() * rows_ * width_;
        boxes_ = source_.batch * b_.box_count();
        constexpr int64_t kSplits = 16, kPartialBytes = 64 << 20;
        const int64_t fitting = kPartialBytes / (size_ * static_cast<int64_t>(sizeof(T)));
        splits_ = larger(smaller(smaller(kSplits, boxes_), fitting), 1);
    }

    // Returns whether all results are finite.
    bool run(const T* grad_output, const T* x, T* grad_weight) const {
        T* partials = scratch<T>(Scratch::shared_partials, splits_ * size_);
        parallel_for(splits_, [&](int64_t split) {
            T* sums = partials + split * size_;
            fill_zero(sums, size_);
            for (int64_t box = split * boxes_ / splits_; box < (split + 1) * boxes_ / splits_; ++box) {
                add_box(TileBox<T>(b_, box), grad_output, x, sums);
            }
        });
        bool finite = true;
        parallel_for(b_.source_vectors, [&](int64_t vector) {
            for (int64_t c = vector * lanes; c < smaller((vector + 1) * lanes, b_.sources); ++c) {
                for (int64_t n = 0; n < b_.vectors; ++n) {
                    if (!store(partials + c * width_ + n * lanes, c, n * lanes, grad_weight)) {
                        __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
                    }
                }
            }
        });
        return finite;
    }

  private:
    static constexpr int64_t lanes = Vector<T>::lanes;

    void add_box(const TileBox<T>& box, const T* grad_output, const T* x, T* sums) const {
        WinogradOperand<T> source(source_, scheme_, scheme_.source_window(), scheme_.kernels.source, box,
                                  Scratch::tile_accumulators);
        WinogradOperand<T> gradient(gradient_, scheme_, scheme_.gradient_window(), scheme_.kernels.gradient, box,
                                    Scratch::tile_output);
        source.transform_planes(x);
        gradient.transform_planes(grad_output);
        const AxisShape& outer = scheme_.shape[scheme_.outer()];
        const int outer_points = outer.points;
        RankUpdate<T> a = {};
        a.step = outer_points * lanes;
        a.y_vector = gradient.row_pitch();
        a.count = box.all_tiles;
        a.pitch = width_;
        for (int64_t point = 0; point < scheme_.plane_points(); ++point) {
            const T* source_rows = source.transform_outer(point);
            const T* gradient_rows = gradient.transform_outer(point);
            for (int64_t o = 0; o < outer_points; ++o) {
                const int64_t weight = scheme_.plane_weight(point) * outer.weights + outer.point_weight[o];
                T* to = sums + weight * rows_ * width_;
                for (int64_t n = 0, count = 0; n < b_.vectors; n += count) {
                    count = smaller(kRankUpdateVectors, b_.vectors - n);
                    if (b_.vectors - n == kRankUpdateVectors + 1) count = 2;
                    a.y = gradient_rows + n * a.y_vector + o * lanes;
                    for (int64_t vector = 0; vector < b_.source_vectors; ++vector) {
                        a.x = source_rows + vector * source.row_pitch() + o * lanes;
                        a.sums = to + vector * lanes * width_ + n * lanes;
                        const int64_t rows = smaller(lanes, b_.sources - vector * lanes);
                        count == 1 ? update<1>(rows, a) : count == 2 ? update<2>(rows, a) : update<3>(rows, a);
                    }
                }
            }
        }
    }

    template <int NR>
    static void update(int64_t rows, RankUpdate<T> a) {
        if constexpr (NR <= kRankUpdateVectors) {
            constexpr int R = rank_update_rows<T>(NR);
            for (int64_t r = 0; r < rows; r += R, a.x += R, a.sums += R * a.pitch) rank_update<T, R, NR>(a);
        }
    }

    // One source channel and a vector of target channels; returns whether they are finite.
    bool store(const T* partials, int64_t source, int64_t target, T* grad_weight) const {
        using V = Vector<T>;
        constexpr int64_t kTaps = 27, kWeights = 64;
        alignas(64) T sums[kWeights * lanes], taps[kTaps * lanes];
        const int outer_weights = scheme_.shape[scheme_.outer()].weights, plane_weights = scheme_.plane_weights();
        for (int weight = 0; weight < plane_weights; ++weight) {
            for (int o = 0; o < outer_weights; ++o, partials += rows_ * width_) {
                typename V::type sum = V::load(partials);
                for (int64_t split = 1; split < splits_; ++split) sum += V::load(partials + split * size_);
                V::store(sums + (o * plane_weights + weight) * lanes, sum);
            }
        }
        scheme_.kernels.weight_gradient(sums, taps);
        const GatherAxis* axis = source_.axis;
        const int *role = scheme_.axis,
                  count[3] = {static_cast<int>(axis[role[0]].taps), static_cast<int>(axis[role[1]].taps),
                              static_cast<int>(axis[role[2]].taps)};
        T* to = grad_weight + source * source_.weight_source_stride + target * source_.weight_target_stride;
        const int64_t existing = smaller(lanes, b_.targets - target);
        T spoilt = 0;
        for (int tap = 0; tap < count[0] * count[1] * count[2]; ++tap) {
            const int64_t place = tap / count[2] / count[1] * source_.weight_tap_stride[role[0]] +
                                  tap / count[2] % count[1] * source_.weight_tap_stride[role[1]] +
                                  tap % count[2] * source_.weight_tap_stride[role[2]];
            for (int64_t i = 0; i < existing; ++i) {
                const T value = taps[tap * lanes + i];
                to[place + i * source_.weight_target_stride] = value;
                spoilt += value - value;
            }
        }
        return spoilt == 0;
    }

    const WinogradScheme<T>& scheme_;
    Gather source_, gradient_;
    WinogradBlocking<T> b_;
    int64_t rows_, width_, size_;  // source channels, target channels, sums in all
    int64_t boxes_, splits_;
};

template <typename T>
void winograd_grad_weight(const ConvProblem& problem, const int64_t outputs[3], const T* grad_output, const T* x,
                          T* grad_weight) {
    const WinogradGradWeight<T> pass(problem, *winograd_scheme<T>(outputs, problem.stride, false));
    if (!pass.run(grad_output, x, grad_weight)) direct_grad_weight(problem, grad_output, x, grad_weight);
}

}  // namespace
}  // namespace pvc
