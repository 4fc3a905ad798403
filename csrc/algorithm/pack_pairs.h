// Source and weights of a gather whose reduction goes by pairs of source channels (bfloat_pair.h), packed from float32
// or bfloat16 in the order of pack_source.h and pack_weight.h. The last of an odd number of channels is paired with
// zero. One group.
#pragma once

#include "../bfloat_pair.h"
#include "blocking.h"
#include "pack_source.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

// S is float or Bfloat16. Channels of `block`, as those of `gather`, are pairs.
template <typename S>
class PairPacking {
  public:
    PairPacking(const Gather& gather, const PackedAxis packed[3], const SourceBlock& block, const S* source)
        : gather_(gather), packed_(packed), block_(block), values_(gather.paired_channels - 2 * block.channel) {
        const GatherAxis* axis = gather.axis;
        voxels_ = axis[0].source_size * axis[1].source_size * axis[2].source_size;
        const int64_t channel = gather.source_layout == Layout::ndhwc ? 1 : voxels_;
        source_ = source + block.sample * gather.paired_channels * voxels_ + 2 * block.channel * channel;
    }

    // [axis 0 rows][axis 1 rows][axis 2 rows][block.width]
    void run(BfloatPair* to) const {
        const GatherAxis* axis = gather_.axis;
        const int64_t row_pairs = packed_[2].rows * block_.width;
        if (block_.width > block_.channels) zero(to, packed_[0].rows * packed_[1].rows * row_pairs);
        for (int64_t d = 0; d < packed_[0].rows; ++d) {
            const int64_t depth = block_.origin[0] + source_position(axis[0], packed_[0], d);
            for (int64_t h = 0; h < packed_[1].rows; ++h, to += row_pairs) {
                const int64_t height = block_.origin[1] + source_position(axis[1], packed_[1], h);
                if (depth < 0 || depth >= axis[0].source_size || height < 0 || height >= axis[1].source_size) {
                    zero(to, row_pairs);
                    continue;
                }
                const int64_t row = (depth * axis[1].source_size + height) * axis[2].source_size;
                gather_.source_layout == Layout::ndhwc ? row_ndhwc(row, to) : row_ncdhw(row, to);
            }
        }
    }

  private:
    static void zero(BfloatPair* to, int64_t count) { fill_zero(reinterpret_cast<float*>(to), count); }

    // The source voxel along the width that a packed one holds, or -1.
    int64_t voxel(int64_t w) const {
        const int64_t position = block_.origin[2] + source_position(gather_.axis[2], packed_[2], w);
        return position < gather_.axis[2].source_size ? larger(position, -1) : -1;
    }

    void row_ndhwc(int64_t row, BfloatPair* to) const {
        const int64_t count = smaller(2 * block_.channels, values_);
        for (int64_t w = 0; w < packed_[2].rows; ++w, to += block_.width) {
            const int64_t from = voxel(w);
            if (from < 0 || count < 2 * block_.channels) zero(to, block_.channels);
            if (from >= 0) copy_bfloat16(source_ + (row + from) * gather_.paired_channels, &to->first, count);
        }
    }

    void row_ncdhw(int64_t row, BfloatPair* to) const {
        const int64_t rows = packed_[2].rows;
        const int64_t begin = smaller(larger(-block_.origin[2], 0), rows);
        const int64_t end = larger(smaller(gather_.axis[2].source_size - block_.origin[2], rows), begin);
        BfloatPair* planes = scratch<BfloatPair>(Scratch::tile_rows, rows * block_.channels);
        for (int64_t c = 0; c < block_.channels; ++c) {
            const S* first = source_ + 2 * c * voxels_ + row;
            const S* second = 2 * c + 1 < values_ ? first + voxels_ : nullptr;
            BfloatPair* plane = planes + c * rows;
            if (packed_[2].dense) {
                zero(plane, begin);
                zero(plane + end, rows - end);
                const int64_t from = block_.origin[2] + begin;
                copy_pairs(first + from, second == nullptr ? second : second + from, plane + begin, end - begin);
                continue;
            }
            for (int64_t w = 0; w < rows; ++w) {
                const int64_t from = voxel(w);
                plane[w] = {};
                if (from >= 0) plane[w].first = to_bfloat16(first[from]);
                if (from >= 0 && second != nullptr) plane[w].second = to_bfloat16(second[from]);
            }
        }
        transpose(reinterpret_cast<const float*>(planes), rows, reinterpret_cast<float*>(to), block_.width,
                  block_.channels, rows);
    }

    const Gather& gather_;
    const PackedAxis* packed_;
    const SourceBlock& block_;
    int64_t values_;  // source channels from the block's first one on
    int64_t voxels_;
    const S* source_;
};

template <typename S>
void pack_source(const Gather& gather, const PackedAxis packed[3], bool /* planar */, const SourceBlock& block,
                 const S* source, BfloatPair* to) {
    PairPacking<S>(gather, packed, block, source).run(to);
}

// One block: all its chunks; `packed` is the start of all packed weights.
template <typename S>
void pack_weight_pairs(const Gather& gather, const Blocking<BfloatPair>& b, int64_t block, const S* weight,
                       BfloatPair* packed) {
    const GatherAxis* axis = gather.axis;
    const int64_t channel = b.block_first(block) * b.grain, width = b.block_grains(block) * b.grain;
    const int64_t targets = smaller(width, b.unit_targets - channel), stride = gather.weight_source_stride;
    const int64_t taps[3] = {axis[0].taps, axis[1].taps, axis[2].taps};
    BfloatPair* to = packed + b.block_weights(block);
    for (int64_t chunk = 0; chunk < b.chunks; ++chunk) {
        for (int64_t tap = 0; tap < taps[0] * taps[1] * taps[2]; ++tap) {
            const int64_t index[3] = {tap / taps[2] / taps[1], tap / taps[2] % taps[1], tap % taps[2]};
            const S* from = weight + channel * gather.weight_target_stride;
            for (int a = 0; a < 3; ++a) {
                from += (axis[a].weight_first + index[a] * axis[a].weight_step) * gather.weight_tap_stride[a];
            }
            for (int64_t pair = chunk * b.chunk; pair < (chunk + 1) * b.chunk; ++pair, to += width) {
                const int64_t existing = gather.paired_channels - 2 * pair;
                for (int64_t o = 0; o < width; ++o) {
                    const S* value = from + 2 * pair * stride + o * gather.weight_target_stride;
                    to[o] = {};
                    if (o < targets && existing > 0) to[o].first = to_bfloat16(value[0]);
                    if (o < targets && existing > 1) to[o].second = to_bfloat16(value[stride]);
                }
            }
        }
    }
}

#endif

}  // namespace
}  // namespace pvc
