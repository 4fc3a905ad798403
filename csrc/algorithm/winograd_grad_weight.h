// grad_weight by Winograd: for every point of a tile, a product of the transformed source with the transformed
// gradient, summed over all tiles (winograd_axis.h); sums are transformed to taps at the end.
//
// The sums of all points are read and written for every box of tiles, so they have to stay in a cache: channels are cut
// into blocks, and a pair of a block of source channels with one of target channels transforms what it needs itself. A
// block of 64 source channels is transformed once for every 128 target channels that it is multiplied by, the gradient
// once for every 64 source channels. That is a sixth of the products, and nothing is kept that grows with the channels.
//
// Sums are [weight of a plane][outer weight][source channel][target channel], one for each point but where points share
// a weight (winograd_strided_axis.h). Where there are few pairs, the boxes too
// are cut, into splits that the problem alone fixes; sums are added up box by box, and the splits in order.
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

// The channels of one operand, cut into blocks of whole vectors, as even as can be.
template <typename T>
struct ChannelBlocks {
    int64_t channels;
    EvenCut cut;

    ChannelBlocks(int64_t channels, int64_t most)
        : channels(channels), cut(ceil_divide(channels, lanes), larger(most / lanes, 1)) {}
    ChannelRange block(int64_t index) const {
        const int64_t first = cut.start(index) * lanes;
        return {first, smaller(cut.size(index) * lanes, channels - first)};
    }
    int64_t widest() const { return cut.size(cut.parts - 1) * lanes; }

  private:
    static constexpr int64_t lanes = Vector<T>::lanes;
};

template <typename T>
class WinogradGradWeight {
  public:
    WinogradGradWeight(const ConvProblem& problem, const WinogradScheme<T>& scheme)
        : scheme_(scheme),
          sources_(problem.in_channels, kSourceBytes / bytes),
          targets_(problem.out_channels, kTargetBytes / bytes) {
        source_ = gather_channels(problem, true);
        gradient_ = source_;
        gradient_.source_channels = problem.out_channels;
        for (int a = 0; a < 3; ++a) {
            source_.axis[a] = gradient_.axis[a] = forward_axis(problem, a);
            gradient_.axis[a].source_size = problem.output_size[a];
            gradient_.axis[a].source_start = 0;
            gradient_.axis[a].source_step = 1;
        }
        pairs_ = sources_.cut.parts * targets_.cut.parts;
        size_ = scheme.weight_count() * sources_.widest() * targets_.widest();
        constexpr int64_t kTasks = 16;
        const int64_t wanted = ceil_divide(kTasks, pairs_);
        Gather block = source_;
        block.source_channels = smaller(source_.source_channels, sources_.widest());
        block.target_channels = smaller(source_.target_channels, targets_.widest());
        // Half of the sums: larger boxes leave L2, smaller ones read and write the sums more often.
        const int64_t box_bytes = larger(kL2Bytes, size_ * bytes / 2);
        b_ = choose_winograd(block, scheme, {wanted, box_bytes});
        if (b_.box_count() == 1) {
            const int64_t fitting =
                smaller(kMostTiles / (b_.tiles[0] * b_.tiles[1] * b_.tiles[2]), box_bytes / b_.box_bytes(b_.box));
            const int64_t most = larger(smaller(fitting, b_.batch / wanted), 1);
            b_.samples = ceil_divide(b_.batch, ceil_divide(b_.batch, most));
        }
        splits_ = smaller(wanted, b_.all_boxes());
    }

    // Returns whether all results are finite.
    bool run(const T* grad_output, const T* x, T* grad_weight) const {
        bool finite = true;
        const auto store = [&](int64_t pair, int64_t vector, const T* sums) {
            if (!store_vector(pair, vector, sums, grad_weight)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
        };
        if (splits_ == 1) {
            parallel_for(pairs_, [&](int64_t pair) {
                T* sums = scratch<T>(Scratch::tile_rows, size_);
                add_boxes(pair, 0, b_.all_boxes(), grad_output, x, sums);
                for (int64_t vector = 0; vector < vectors(source_block(pair)); ++vector) store(pair, vector, sums);
            });
            return finite;
        }
        T* partials = scratch<T>(Scratch::shared_partials, splits_ * pairs_ * size_);
        parallel_for(splits_ * pairs_, [&](int64_t task) {
            const int64_t split = task / pairs_, boxes = b_.all_boxes();
            add_boxes(task % pairs_, split * boxes / splits_, (split + 1) * boxes / splits_, grad_output, x,
                      partials + task * size_);
        });
        const int64_t most = sources_.widest() / lanes;
        parallel_for(pairs_ * most, [&](int64_t task) {
            const int64_t pair = task / most, vector = task % most;
            if (vector < vectors(source_block(pair))) store(pair, vector, partials + pair * size_);
        });
        return finite;
    }

  private:
    static constexpr int64_t lanes = Vector<T>::lanes, bytes = static_cast<int64_t>(sizeof(T));
    static constexpr int64_t kSourceBytes = 256, kTargetBytes = 512;  // of a voxel's channels in a block

    ChannelRange source_block(int64_t pair) const { return sources_.block(pair / targets_.cut.parts); }
    ChannelRange target_block(int64_t pair) const { return targets_.block(pair % targets_.cut.parts); }
    static int64_t vectors(const ChannelRange& block) { return ceil_divide(block.count, lanes); }

    void add_boxes(int64_t pair, int64_t begin, int64_t end, const T* grad_output, const T* x, T* sums) const {
        fill_zero(sums, size_);
        for (int64_t box = begin; box < end; ++box) add_box(pair, TileBox<T>(b_, box), grad_output, x, sums);
    }

    void add_box(int64_t pair, const TileBox<T>& box, const T* grad_output, const T* x, T* sums) const {
        const ChannelRange sources = source_block(pair), targets = target_block(pair);
        WinogradOperand<T> source(source_, scheme_, scheme_.source_window(), scheme_.kernels.source, box,
                                  Scratch::tile_accumulators, sources);
        WinogradOperand<T> gradient(gradient_, scheme_, scheme_.gradient_window(), scheme_.kernels.gradient, box,
                                    Scratch::tile_output, targets);
        source.transform_planes(x);
        gradient.transform_planes(grad_output);
        const AxisShape& outer = scheme_.shape[scheme_.outer()];
        const int outer_points = outer.points;
        const int64_t columns = vectors(targets), width = columns * lanes, size = vectors(sources) * lanes * width;
        RankUpdate<T> a = {};
        a.step = outer_points * lanes;
        a.y_vector = gradient.row_pitch();
        a.count = box.samples * box.all_tiles;
        a.pitch = width;
        for (int64_t point = 0; point < scheme_.plane_points(); ++point) {
            const T* source_rows = source.transform_outer(point);
            const T* gradient_rows = gradient.transform_outer(point);
            for (int64_t o = 0; o < outer_points; ++o) {
                T* to = sums + (scheme_.plane_weight(point) * outer.weights + outer.point_weight[o]) * size;
                for (int64_t n = 0, count = 0; n < columns; n += count) {
                    count = smaller(kRankUpdateVectors, columns - n);
                    if (columns - n == kRankUpdateVectors + 1) count = 2;
                    a.y = gradient_rows + n * a.y_vector + o * lanes;
                    for (int64_t first = 0; first < sources.count; first += lanes) {
                        a.x = source_rows + first / lanes * source.row_pitch() + o * lanes;
                        a.sums = to + first * width + n * lanes;
                        const int64_t rows = smaller(lanes, sources.count - first);
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
            if constexpr (NR == 1) {
                if (rows <= R / 2) return rank_update<T, R / 2, NR>(a);
            }
            for (int64_t r = 0; r < rows; r += R, a.x += R, a.sums += R * a.pitch) rank_update<T, R, NR>(a);
        }
    }

    // A vector of source channels of a pair, for all of its target channels. Returns whether all are finite.
    bool store_vector(int64_t pair, int64_t vector, const T* sums, T* grad_weight) const {
        using V = Vector<T>;
        constexpr int64_t kTaps = 27;
        alignas(64) T taps[lanes * kTaps * lanes];  // [source channel][tap][target channel]
        const ChannelRange sources = source_block(pair), targets = target_block(pair);
        const int64_t width = vectors(targets) * lanes, size = vectors(sources) * lanes * width;
        const int64_t first = vector * lanes, rows = smaller(lanes, sources.count - first);
        const GatherAxis* axis = source_.axis;
        const int64_t tap_count = axis[0].taps * axis[1].taps * axis[2].taps, tap_stride = source_.weight_tap_stride[2];
        const int64_t target_stride = source_.weight_target_stride;
        bool finite = true;
        for (int64_t n = 0; n < width; n += lanes) {
            typename V::type spoilt = {};
            for (int64_t row = 0; row < rows; ++row) {
                T* of_row = taps + row * tap_count * lanes;
                transform_sums(sums + (first + row) * width + n, size, of_row);
                for (int64_t tap = 0; tap < tap_count; ++tap) {
                    const typename V::type value = V::load(of_row + tap * lanes);
                    spoilt += value - value;
                }
            }
            const int64_t columns = smaller(lanes, targets.count - n);
            for (int64_t i = 0; i < columns; ++i) finite &= spoilt[i] == 0;
            T* to = grad_weight + (sources.first + first) * source_.weight_source_stride +
                    (targets.first + n) * target_stride;
            if (source_.layout == Layout::ndhwc) {
                for (int64_t tap = 0; tap < tap_count; ++tap) {
                    transpose(taps + tap * lanes, tap_count * lanes, to + tap * tap_stride, target_stride, rows,
                              columns);
                }
            } else {
                transpose(taps, lanes, to, target_stride, rows * tap_count, columns);
            }
        }
        return finite;
    }

    // The taps of one source channel and a vector of target channels; `pitch`: between weights.
    void transform_sums(const T* sums, int64_t pitch, T* taps) const {
        using V = Vector<T>;
        constexpr int64_t kWeights = 64;
        alignas(64) T totals[kWeights * lanes];
        const int outer_weights = scheme_.shape[scheme_.outer()].weights, plane_weights = scheme_.plane_weights();
        for (int weight = 0; weight < plane_weights; ++weight) {
            for (int o = 0; o < outer_weights; ++o, sums += pitch) {
                typename V::type total = V::load(sums);
                for (int64_t split = 1; split < splits_; ++split) total += V::load(sums + split * pairs_ * size_);
                V::store(totals + (o * plane_weights + weight) * lanes, total);
            }
        }
        scheme_.kernels.weight_gradient(totals, taps);
    }

    const WinogradScheme<T>& scheme_;
    ChannelBlocks<T> sources_, targets_;
    Gather source_, gradient_;
    WinogradBlocking<T> b_;  // of the widest pair
    int64_t pairs_;          // of a block of source channels with one of target channels
    int64_t size_;           // sums of the widest pair
    int64_t splits_;
};

template <typename T>
void winograd_grad_weight(const ConvProblem& problem, const int64_t outputs[3], const T* grad_output, const T* x,
                          T* grad_weight) {
    const WinogradGradWeight<T> pass(problem, *winograd_scheme<T>(outputs, problem.stride, false));
    if (!pass.run(grad_output, x, grad_weight)) direct_grad_weight(problem, grad_output, x, grad_weight);
}

}  // namespace
}  // namespace pvc
