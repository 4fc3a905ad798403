// Winograd convolution of one box of tiles, fused: nothing but the box's sums leaves the cache.
//
//     pack:     the source of the box, zeros where the tensor ends             [voxel][source channel]
//     source:   every tile transformed                                        [point][tile][source channel]
//     product:  for each point, tiles x weights of a block of channels         [point][tile][target channel]
//     target:   every tile transformed back                                   [voxel][target channel]
//
// A transform mixes the voxels of a tile. An infinity or NaN would spread over the tile, and sums of large values may
// overflow that the convolution itself does not contain; so a tile with a result that is not finite is computed again,
// directly. Every source value takes part in each output that depends on it with a non-zero factor, so that none which
// must be infinite or NaN can come out finite.
#pragma once

#include "../parallel.h"
#include "pack_weight.h"
#include "winograd_blocking.h"

namespace pvc {
namespace {

// Transformed weights [block][point][source channel][column], and what the sums start from.
template <typename T>
struct WinogradWeights {
    const Gather& gather;
    const WinogradBlocking<T>& blocking;
    const T* weight;
    T* transformed;
    T* initial;

    WinogradWeights(const Gather& gather, const WinogradBlocking<T>& b, const T* weight, const T* bias)
        : gather(gather), blocking(b), weight(weight) {
        const int64_t values = b.transforms->count() * b.sources * b.vectors * b.lanes;
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
        const GatherAxis* axis = gather.axis;
        alignas(64) T taps[kTaps * lanes], points[kPoints * lanes];
        TileTransform<T> a = {};
        a.from = taps;
        a.from_stride[2] = lanes;
        a.from_stride[1] = axis[2].taps * lanes;
        a.from_stride[0] = axis[1].taps * a.from_stride[1];
        a.to = points;
        a.point = lanes;
        for (int64_t block = 0; block < b.blocks; ++block) {
            const int64_t columns = b.block_columns(block);
            for (int64_t column = 0; column < columns; column += lanes) {
                const int64_t first = b.block_first(block) * lanes + column, width = smaller(lanes, columns - column);
                pack_taps(gather, weight + source * gather.weight_source_stride + first * gather.weight_target_stride,
                          1, 1, smaller(lanes, b.targets - first), lanes, taps);
                b.transforms->weight(a);
                T* to = transformed + b.block_weights(block) + source * columns + column;
                for (int64_t p = 0; p < b.transforms->count(); ++p) {
                    for (int64_t i = 0; i < width; ++i) to[p * b.sources * columns + i] = points[p * lanes + i];
                }
            }
        }
    }
};

// The sums of a box for one block of channels: [d][h][w][width], voxels beyond the target computed too.
template <typename T>
struct BoxSums {
    const T* sums;
    int64_t stride[3];
    int64_t channel, channels, width;
};

template <typename T>
class WinogradBox {
  public:
    int64_t sample;
    int64_t first[3], count[3];  // target voxels of the box that exist

    WinogradBox(const Gather& gather, const WinogradBlocking<T>& b, int64_t task) : gather_(gather), b_(b) {
        sample = task / b.box_count();
        int64_t rest = task % b.box_count();
        for (int a = 2; a >= 0; --a) {
            const int64_t outputs = b.transforms->outputs[a], tile = rest % b.boxes[a] * b.box[a];
            rest /= b.boxes[a];
            tiles_[a] = smaller(b.box[a], b.tiles[a] - tile);
            first[a] = tile * outputs;
            count[a] = smaller(tiles_[a] * outputs, b.voxels[a] - first[a]);
            const int64_t voxels = tiles_[a] * outputs;
            packed_[a] = {voxels, voxels + b.transforms->points[a] - outputs, 1, 1, true};
        }
        all_tiles_ = tiles_[0] * tiles_[1] * tiles_[2];
        source_pitch_ = b.point_pitch(all_tiles_ * b.source_width);
        product_pitch_ = b.point_pitch(all_tiles_ * b.widest_block());
        const int64_t points = b.transforms->count();
        input_ = scratch<T>(Scratch::tile_input, packed_[0].rows * packed_[1].rows * packed_[2].rows * b.source_width);
        source_ = scratch<T>(Scratch::tile_accumulators, points * source_pitch_);
        product_ = scratch<T>(Scratch::tile_output, points * product_pitch_);
        sums_ = scratch<T>(Scratch::tile_rows, packed_[0].tile * packed_[1].tile * packed_[2].tile * b.widest_block());
    }

    // Calls store(BoxSums) for each block of target channels.
    template <typename Store>
    void run(const T* source, const WinogradWeights<T>& weights, const Store& store) {
        SourceBlock from = {};
        from.sample = sample;
        from.channels = b_.sources;
        from.width = b_.source_width;
        for (int a = 0; a < 3; ++a) from.origin[a] = gather_.axis[a].source_start + first[a];
        pack_source(gather_, packed_, false, from, source, input_);
        transform_source();
        for (int64_t block = 0; block < b_.blocks; ++block) {
            multiply(block, weights.transformed + b_.block_weights(block));
            BoxSums<T> box;
            box.sums = sums_;
            box.width = b_.block_vectors(block) * b_.lanes;
            box.channel = b_.block_first(block) * b_.lanes;
            box.channels = smaller(box.width, b_.targets - box.channel);
            box.stride[2] = box.width;
            box.stride[1] = packed_[2].tile * box.stride[2];
            box.stride[0] = packed_[1].tile * box.stride[1];
            transform_target(box, weights);
            store(box);
        }
    }

  private:
    // Calls body(index of the tile, its coordinates in the box).
    template <typename Body>
    void for_each_tile(const Body& body) const {
        int64_t tile[3], index = 0;
        for (tile[0] = 0; tile[0] < tiles_[0]; ++tile[0]) {
            for (tile[1] = 0; tile[1] < tiles_[1]; ++tile[1]) {
                for (tile[2] = 0; tile[2] < tiles_[2]; ++tile[2], ++index) body(index, tile);
            }
        }
    }

    int64_t packed_stride(int axis) const {
        int64_t stride = b_.source_width;
        for (int inner = axis + 1; inner < 3; ++inner) stride *= packed_[inner].rows;
        return stride;
    }

    void transform_source() {
        TileTransform<T> a = {};
        for (int axis = 0; axis < 3; ++axis) a.from_stride[axis] = packed_stride(axis);
        a.point = source_pitch_;
        for_each_tile([&](int64_t index, const int64_t tile[3]) {
            const T* from = input_;
            for (int axis = 0; axis < 3; ++axis) {
                from += tile[axis] * b_.transforms->outputs[axis] * a.from_stride[axis];
            }
            for (int64_t c = 0; c < b_.source_width; c += b_.lanes) {
                a.from = from + c;
                a.to = source_ + index * b_.source_width + c;
                b_.transforms->source(a);
            }
        });
    }

    void multiply(int64_t block, const T* weights) {
        PanelArguments<T> a = {};
        a.source_pitch = b_.source_width;
        a.depth = b_.sources;
        a.target_pitch = b_.block_vectors(block) * b_.lanes;
        for (int64_t p = 0; p < b_.transforms->count(); ++p) {
            a.source = source_ + p * source_pitch_;
            a.weight = weights + p * b_.sources * b_.block_columns(block);
            a.target = product_ + p * product_pitch_;
            compute_panel(b_.block_vectors(block), b_.block_half(block), all_tiles_, a);
        }
    }

    void transform_target(const BoxSums<T>& box, const WinogradWeights<T>& weights) {
        using Integers = typename VectorType<T>::integers;
        TileTransform<T> a = {};
        a.point = product_pitch_;
        for (int axis = 0; axis < 3; ++axis) a.to_stride[axis] = box.stride[axis];
        const T* direct_weights = nullptr;
        for_each_tile([&](int64_t index, const int64_t tile[3]) {
            T* to = sums_;
            for (int axis = 0; axis < 3; ++axis) to += tile[axis] * b_.transforms->outputs[axis] * box.stride[axis];
            Integers spoilt = {};
            for (int64_t c = 0; c < box.width; c += b_.lanes) {
                a.from = product_ + index * box.width + c;
                a.to = to + c;
                spoilt |= b_.transforms->target(a, Vector<T>::load(weights.initial + box.channel + c));
            }
            bool any = false;
            for (int lane = 0; lane < b_.lanes; ++lane) any |= spoilt[lane] != 0;
            if (!any) return;
            if (direct_weights == nullptr) direct_weights = pack_direct(box, weights);
            compute_direct(box, tile, direct_weights, weights.initial + box.channel, to);
        });
    }

    // The block's own weights, [tap][source channel][column].
    const T* pack_direct(const BoxSums<T>& box, const WinogradWeights<T>& weights) const {
        const GatherAxis* axis = gather_.axis;
        T* packed =
            scratch<T>(Scratch::tile_lists, axis[0].taps * axis[1].taps * axis[2].taps * b_.sources * box.width);
        pack_taps(gather_, weights.weight + box.channel * gather_.weight_target_stride, b_.sources, b_.sources,
                  box.channels, box.width, packed);
        return packed;
    }

    // The outputs of one tile by the definition of the convolution.
    void compute_direct(const BoxSums<T>& box, const int64_t tile[3], const T* weights, const T* initial, T* to) const {
        using V = Vector<T>;
        const GatherAxis* axis = gather_.axis;
        const int* outputs = b_.transforms->outputs;
        const int64_t taps = axis[0].taps * axis[1].taps * axis[2].taps;
        for (int64_t voxel = 0; voxel < outputs[0] * outputs[1] * outputs[2]; ++voxel) {
            const int64_t at[3] = {voxel / outputs[2] / outputs[1], voxel / outputs[2] % outputs[1],
                                   voxel % outputs[2]};
            const T* from = input_;
            for (int a = 0; a < 3; ++a) from += (tile[a] * outputs[a] + at[a]) * packed_stride(a);
            T* sums = to + at[0] * box.stride[0] + at[1] * box.stride[1] + at[2] * box.stride[2];
            for (int64_t c = 0; c < box.width; c += b_.lanes) {
                typename V::type sum = V::load(initial + c);
                for (int64_t tap = 0; tap < taps; ++tap) {
                    const T* values = from + tap / axis[2].taps / axis[1].taps * packed_stride(0) +
                                      tap / axis[2].taps % axis[1].taps * packed_stride(1) +
                                      tap % axis[2].taps * packed_stride(2);
                    const T* row = weights + tap * b_.sources * box.width + c;
                    for (int64_t s = 0; s < b_.sources; ++s) sum += values[s] * V::load(row + s * box.width);
                }
                V::store(sums + c, sum);
            }
        }
    }

    const Gather& gather_;
    const WinogradBlocking<T>& b_;
    int64_t tiles_[3], all_tiles_;
    PackedAxis packed_[3];
    int64_t source_pitch_, product_pitch_;  // between points
    T* input_;
    T* source_;
    T* product_;
    T* sums_;
};

}  // namespace
}  // namespace pvc
