// The source of a task as left operands of a matrix unit: packed, transformed where the plan says so, split into parts.
#pragma once

#include "pack_source.h"
#include "split_plan.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

// Splits `count` values of first + sign * second.
template <int Parts, typename S>
bool split_combined(const S* first, const S* second, int sign, int64_t count, Bfloat16* to, int64_t stride) {
    if (sign > 0) {
        const auto sum = [&](int64_t i, int64_t n) { return load_wide(first + i, n) + load_wide(second + i, n); };
        return split_values<Parts>(count, sum, to, stride);
    }
    const auto difference = [&](int64_t i, int64_t n) { return load_wide(first + i, n) - load_wide(second + i, n); };
    return split_values<Parts>(count, difference, to, stride);
}

// S is float, Float16 or Bfloat16.
template <typename S, int Parts>
class SplitSource {
  public:
    SplitSource(const Gather& gather, const SplitPlan& plan) : gather_(gather), plan_(plan) {
        const PackedAxis* packed = plan.tiling.axis;
        plane_axes_[0] = {1, 1, 0, 0, true};
        plane_axes_[1] = plan.transformed == 1 ? PackedAxis{0, 2 * packed[1].tile + 2, 1, 1, true} : packed[1];
        plane_axes_[2] = packed[2];
        row_values_ = packed[2].rows * plan.chunk;
        plane_values_ = plane_axes_[1].rows * row_values_;
        planes_ = scratch<S>(Scratch::tile_output, kPlanes * plane_values_);
    }

    // parts[point][sample][voxel][channel], for `samples` from block.sample on. Returns whether all values can be
    // split.
    bool pack(SourceBlock block, int64_t samples, const S* source, Bfloat16* parts) const {
        // What the last step of a run may read behind a point's last value; a task may have fewer samples than others.
        for (int part = 0; part < Parts; ++part) {
            for (int64_t point = 0; point < plan_.points(); ++point) {
                std::memset(
                    parts + part * plan_.part_values() + point * plan_.point_values() + samples * plan_.sample_values(),
                    0, kTileValues * sizeof(Bfloat16));
            }
        }
        bool splits = true;
        for (int64_t sample = 0; sample < samples; ++sample, ++block.sample) {
            for (int64_t d = 0; d < plan_.tiling.axis[0].rows; ++d) {
                Bfloat16* to = parts + sample * plan_.sample_values() + d * plan_.row_values(0);
                splits &= plan_.transformed == 0 ? depth_tiles(block, d, source, to) : plane(block, d, source, to);
            }
        }
        return splits;
    }

  private:
    static constexpr int64_t kPlanes = 4;

    void pack_plane(const SourceBlock& block, const S* source, S* to) const {
        pack_source(gather_, plane_axes_, false, block, reinterpret_cast<const Moved<S>*>(source),
                    reinterpret_cast<Moved<S>*>(to));
    }

    bool plane(SourceBlock block, int64_t d, const S* source, Bfloat16* to) const {
        block.origin[0] += source_position(gather_.axis[0], plan_.tiling.axis[0], d);
        pack_plane(block, source, planes_);
        const int64_t stride = plan_.part_values();
        if (plan_.transformed < 0) return split_array<Parts>(planes_, plane_values_, to, stride);
        bool splits = true;
        for (const SplitPoint& point : kSplitPoints) {
            for (int64_t h = 0; h < plan_.tiling.axis[1].tile; ++h) {
                const S* rows = planes_ + 2 * h * row_values_;
                splits &= split_combined<Parts>(rows + point.first * row_values_, rows + point.second * row_values_,
                                                point.sign, row_values_, to + h * row_values_, stride);
            }
            to += plan_.point_values();
        }
        return splits;
    }

    // A plane of tiles along the depth. Source planes are in a ring: neighbouring tiles share two.
    bool depth_tiles(SourceBlock block, int64_t d, const S* source, Bfloat16* to) const {
        const auto ring = [&](int64_t index) { return planes_ + index % kPlanes * plane_values_; };
        const int64_t origin = block.origin[0];
        for (int64_t index = d == 0 ? 0 : 2 * d + 2; index < 2 * d + 4; ++index) {
            block.origin[0] = origin + index;
            pack_plane(block, source, ring(index));
        }
        bool splits = true;
        for (const SplitPoint& point : kSplitPoints) {
            splits &= split_combined<Parts>(ring(2 * d + point.first), ring(2 * d + point.second), point.sign,
                                            plane_values_, to, plan_.part_values());
            to += plan_.point_values();
        }
        return splits;
    }

    const Gather& gather_;
    const SplitPlan& plan_;
    PackedAxis plane_axes_[3];
    int64_t row_values_, plane_values_;
    S* planes_;
};

#endif

}  // namespace
}  // namespace pvc
