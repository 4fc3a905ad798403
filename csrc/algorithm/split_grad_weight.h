// grad_weight on a matrix unit that multiplies bfloat16: both operands split into parts
// (algorithm/split_grad_weight_plan.h). Tensors of S: float, Float16 or Bfloat16. One group.
//
// An operand with an infinity, a NaN or a value that rounds to an infinite first part has no such parts; then nothing
// is promised about the result, and the caller computes it otherwise.
#pragma once

#include "../parallel.h"
#include "pack_source.h"
#include "split_grad_weight_plan.h"
#include "store_target.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

// The sums of one task: boxes of one split for a group of blocks of source channels.
template <typename Unit, typename S, int Parts>
class SplitGradWeightTask {
  public:
    SplitGradWeightTask(const Gather& gather, const SplitGradWeightPlan& plan, const S* grad_output, const S* x)
        : gather_(gather), plan_(plan), grad_output_(grad_output), x_(x) {}

    // sums: those of `first_block`, then those of the following ones. Returns whether all values can be split.
    bool run(int64_t first_block, int64_t last_block, int64_t first_box, int64_t last_box, float* sums) {
        bool splits = true;
        for (int64_t index = first_box; index < last_box; ++index) {
            const SplitBox box = place_box(index, first_sample_, first_);
            list_steps(box);
            splits &= pack_gradient(box);
            float* of_block = sums;
            for (int64_t block = first_block; block < last_block; ++block) {
                splits &= pack_source_block(box, block);
                multiply(box, block, index == first_box, of_block);
                of_block += plan_.block_tiles(block) * plan_.target_tiles() * kTileSums;
            }
        }
        return splits;
    }

  private:
    using V = Vector<float>;
    static_assert(V::lanes == kTileRows, "a vector is a row of sums");

    static Moved<S>* moved(S* values) { return reinterpret_cast<Moved<S>*>(values); }

    SplitBox place_box(int64_t index, int64_t& first_sample, int64_t first[3]) const {
        const int64_t* boxes = plan_.boxes;
        const int64_t place[3] = {index / (boxes[1] * boxes[2]) % boxes[0], index / boxes[2] % boxes[1],
                                  index % boxes[2]};
        first_sample = index / (boxes[0] * boxes[1] * boxes[2]) * plan_.samples;
        int64_t extent[3];
        for (int a = 0; a < 3; ++a) {
            first[a] = place[a] * plan_.extent[a];
            extent[a] = smaller(plan_.extent[a], gather_.axis[a].count - first[a]);
        }
        return SplitBox(gather_.axis, smaller(plan_.samples, plan_.batch - first_sample), extent);
    }

    // Of each step, where in the packed source it begins; makes room for `voxels_`, of each voxel of a row, where in a
    // split plane its first channel lies.
    void list_steps(const SplitBox& box) {
        offsets_ = scratch<int32_t>(Scratch::tile_lists, box.steps() + box.pitch);
        voxels_ = offsets_ + box.steps();
        for (int64_t panel = 0; panel < box.panels; ++panel) {
            for (int64_t step = 0; step < box.panel_steps; ++step) {
                const int64_t voxel = panel * box.height.rows * box.pitch + step * kTileValues;
                offsets_[panel * box.panel_steps + step] = static_cast<int32_t>(voxel * kTileRows);
            }
        }
    }

    // ---- the gradient: [tile of 16 target channels][part][step][16 channels][32 voxels]

    // Voxels of a step that follow one another in the gradient too.
    struct Piece {
        int64_t first, count;  // in the step
        int64_t from;          // tensor_voxel of the first one
    };

    bool pack_gradient(const SplitBox& box) {
        const int64_t part = box.steps() * kTile;
        gradient_ = scratch<Bfloat16>(Scratch::tile_output, plan_.target_tiles() * Parts * part);
        const int64_t row_voxels = box.samples * box.extent[2];
        bool splits = true;
        for (int64_t step = 0; step < box.steps(); ++step) {
            const int64_t begin = step % box.panel_steps * kTileValues;
            const int64_t end = smaller(begin + kTileValues, box.panel_voxels);
            Piece pieces[kTileValues];
            int64_t count = 0;
            for (int64_t voxel = begin; voxel < end;) {
                const int64_t row = voxel / box.pitch, in_row = voxel % box.pitch;
                const int64_t h = row % box.height.rows, d = step / box.panel_steps + row / box.height.rows;
                const int64_t w = in_row % box.extent[2], sample = in_row / box.extent[2];
                if (in_row >= row_voxels || h >= box.extent[1]) {
                    voxel += in_row >= row_voxels ? box.pitch - in_row : (box.height.rows - h) * box.pitch - in_row;
                    continue;
                }
                const int64_t run = smaller(box.extent[2] - w, end - voxel);
                const int64_t from = tensor_voxel(sample, d, h, w);
                Piece* last = count > 0 ? &pieces[count - 1] : nullptr;
                if (last != nullptr && last->first + last->count == voxel - begin && last->from + last->count == from &&
                    box.samples == 1) {
                    last->count += run;
                } else {
                    pieces[count++] = {voxel - begin, run, from};
                }
                voxel += run;
            }
            if (gather_.layout == Layout::ndhwc) read_rows(pieces, count);
            for (int64_t tile = 0; tile < plan_.target_tiles(); ++tile) {
                splits &= pack_gradient_step(pieces, count, tile * kTileRows,
                                             gradient_ + tile * Parts * part + step * kTile, part);
            }
        }
        return splits;
    }

    // How far into the gradient a voxel of the box lies: in ndhwc in voxels, in ncdhw (first channel) in values.
    int64_t tensor_voxel(int64_t sample, int64_t d, int64_t h, int64_t w) const {
        const GatherAxis* axis = gather_.axis;
        const int64_t depth = axis[0].count, height = axis[1].count, width = axis[2].count;
        const int64_t samples = (first_sample_ + sample) * depth * height * width;
        const int64_t in_sample = ((first_[0] + d) * height + first_[1] + h) * width + first_[2] + w;
        return samples * (gather_.layout == Layout::ndhwc ? 1 : plan_.targets) + in_sample;
    }

    // Row after row: processors see that coming, and find in L1 what is then read in another order.
    void read_rows(const Piece* pieces, int64_t count) const {
        constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(S));
        for (int64_t i = 0; i < count; ++i) {
            const S* from = grad_output_ + pieces[i].from * plan_.targets;
            for (int64_t k = 0; k < pieces[i].count * plan_.targets; k += line) {
                asm volatile("" : : "r"(*reinterpret_cast<const Bits16*>(from + k)));
            }
        }
    }

    bool pack_gradient_step(const Piece* pieces, int64_t count, int64_t target, Bfloat16* to, int64_t part) const {
        alignas(64) float values[kTileRows * kTileValues];
        const int64_t targets = smaller(plan_.targets - target, kTileRows);
        if (!(count == 1 && pieces[0].count == kTileValues) || targets < kTileRows) {
            std::memset(values, 0, sizeof(values));
        }
        if (gather_.layout == Layout::ndhwc) {
            voxel_rows(pieces, count, target, targets, values);
        } else {
            const int64_t channel = gather_.axis[0].count * gather_.axis[1].count * gather_.axis[2].count;
            for (int64_t i = 0; i < count; ++i) {
                const S* from = grad_output_ + pieces[i].from + target * channel;
                float* row = values + pieces[i].first;
                for (int64_t k = 0; k < targets; ++k, from += channel, row += kTileValues) {
                    copy_wide(from, row, pieces[i].count);
                }
            }
        }
        Splitter splitter;
        for (int64_t k = 0; k < kTileRows; ++k, to += kTileValues) {
            V::type first = V::load(values + k * kTileValues), second = V::load(values + k * kTileValues + V::lanes);
            for (int p = 0; p < Parts; ++p) {
                const Words upper = splitter.next(first, p == 0);
                store_upper(upper, splitter.next(second, p == 0), to + p * part);
            }
        }
        return splitter.splits();
    }

    // values[target channel][voxel]
    void voxel_rows(const Piece* pieces, int64_t count, int64_t target, int64_t targets, float* values) const {
        int64_t piece = 0, inside = 0;
        for (int64_t half = 0; half < kTileValues; half += V::lanes) {
            V::type rows[V::lanes] = {};
            bool any = false;
            while (piece < count) {
                const int64_t voxel = pieces[piece].first + inside;
                if (voxel >= half + V::lanes) break;
                const S* from = grad_output_ + (pieces[piece].from + inside) * plan_.targets + target;
                rows[voxel - half] = load_wide(from, targets);
                any = true;
                if (++inside == pieces[piece].count) ++piece, inside = 0;
            }
            if (!any) continue;
            Transpose<float>::registers(rows);
            for (int64_t k = 0; k < V::lanes; ++k) V::store(values + k * kTileValues + half, rows[k]);
        }
    }

    // ---- the source: [tile of 16 columns][part][pair of voxels][16 columns][2]

    bool pack_source_block(const SplitBox& box, int64_t block) {
        const int64_t channels = plan_.block_channels(block), tiles = plan_.column_tiles(channels);
        const int64_t row_values = box.width.rows * channels, plane = box.height.rows * row_values;
        // Of a plane of all samples, split into parts; the last tile of a run reads behind the last value.
        const int64_t padded = ceil_divide(box.samples * plane + kTileRows, kTileValues) * kTileValues;
        S* values = scratch<S>(Scratch::tile_rows, padded);
        Bfloat16* parts = scratch<Bfloat16>(Scratch::tile_accumulators, Parts * padded);
        source_ = scratch<Bfloat16>(Scratch::tile_input, tiles * Parts * box.part_values());
        for (int64_t v = 0; v < box.pitch; ++v) {
            const int64_t sample = smaller(v / box.extent[2], box.samples - 1), w = v % box.extent[2];
            voxels_[v] = static_cast<int32_t>(sample * plane + w * box.width.voxel_step * channels);
        }
        fill_zero(moved(values + box.samples * plane), padded - box.samples * plane);
        bool splits = true;
        for (int64_t d = 0; d < box.depth.rows; ++d) {
            for (int64_t sample = 0; sample < box.samples; ++sample) {
                pack_plane_values(box, block, sample, box.depth.position(d), values + sample * plane);
            }
            splits &= split_array<Parts>(values, padded, parts, padded);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t run_tiles = plan_.run_tiles(channels), run = tile / run_tiles;
                const int64_t first = run * box.width.tap_step * channels + tile % run_tiles * kTileRows;
                for (int part = 0; part < Parts; ++part) {
                    const Bfloat16* from = parts + part * padded + first;
                    Bfloat16* to = source_ + (tile * Parts + part) * box.part_values() +
                                   d * box.height.rows * box.pitch * kTileRows;
                    for (int64_t h = 0; h < box.height.rows; ++h) {
                        pair_voxels(from + h * row_values, box.pitch, to + h * box.pitch * kTileRows);
                    }
                }
            }
        }
        for (int64_t i = 0; i < tiles * Parts; ++i) {
            std::memset(source_ + (i + 1) * box.part_values() - kTile, 0, kTile * sizeof(Bfloat16));
        }
        return splits;
    }

    // The source of one depth of a sample, [packed row][voxel][channel].
    void pack_plane_values(const SplitBox& box, int64_t block, int64_t sample, int64_t depth, S* to) const {
        SourceBlock from = {};
        from.sample = first_sample_ + sample;
        from.channel = plan_.block_first(block);
        from.channels = from.width = plan_.block_channels(block);
        for (int a = 0; a < 3; ++a) {
            from.origin[a] = gather_.axis[a].source_start + first_[a] * gather_.axis[a].source_step;
        }
        from.origin[0] += depth;
        const bool dense = box.height.dense();
        const PackedAxis packed[3] = {{1, 1, 1, 1, true}, {1, dense ? box.height.rows : 1, 1, 1, true}, box.width};
        const int64_t origin = from.origin[1];
        for (int64_t h = 0; h < box.height.rows; h += packed[1].rows) {
            from.origin[1] = origin + box.height.position(h);
            pack_source(gather_, packed, false, from, reinterpret_cast<const Moved<S>*>(x_),
                        moved(to + h * box.width.rows * from.width));
        }
    }

    // 16 values of each of `count` voxels, those of a pair side by side.
    void pair_voxels(const Bfloat16* from, int64_t count, Bfloat16* to) const {
        typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
        typedef uint16_t Pairs __attribute__((vector_size(64), may_alias));
        for (int64_t v = 0; v < count; v += 2, to += kTileValues) {
            const Halves a = *reinterpret_cast<const Halves*>(from + voxels_[v]);
            const Halves b = *reinterpret_cast<const Halves*>(from + voxels_[v + 1]);
            *reinterpret_cast<Pairs*>(to) =
                __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10,
                                        26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    }

    // ---- products

    void multiply(const SplitBox& box, int64_t block, bool first, float* sums) {
        const int64_t columns = plan_.column_tiles(plan_.block_channels(block)), tiles = plan_.taps * columns;
        const int64_t targets = plan_.target_tiles(), heights = gather_.axis[1].taps;
        VoxelProduct product = {};
        product.left_part = box.steps() * kTile;
        product.right_part = box.part_values();
        product.offsets = offsets_;
        product.steps = box.steps();
        product.first = first;
        const auto right = [&](int64_t tile) {
            const int64_t tap = tile / columns;
            const int64_t row = box.depth.of_tap(tap / heights) * box.height.rows + box.height.of_tap(tap % heights);
            return source_ + tile % columns * Parts * box.part_values() + row * box.pitch * kTileRows;
        };
        for (int64_t row = 0; row < targets; row += 2) {
            const int64_t rows = smaller(targets - row, 2);
            for (int64_t i = 0; i < rows; ++i) product.left[i] = gradient_ + (row + i) * Parts * product.left_part;
            for (int64_t tile = 0; tile < tiles; tile += 2) {
                const int64_t now = smaller(tiles - tile, 2);
                for (int64_t i = 0; i < now; ++i) product.right[i] = right(tile + i);
                for (int64_t i = 0; i < rows; ++i) product.sums[i] = sums + ((row + i) * tiles + tile) * kTileSums;
                const int64_t ahead = smaller(tile + 2, tiles - now);
                for (int64_t i = 0; i < rows && !first; ++i) {
                    const float* next = sums + ((row + i) * tiles + ahead) * kTileSums;
                    for (int64_t line = 0; line < now * kTileSums; line += kTileRows) {
                        __builtin_prefetch(next + line, 1, 2);
                    }
                }
                if (rows == 1) {
                    now == 1 ? voxel_product<Unit, Parts, 1, 1>(unit_, product)
                             : voxel_product<Unit, Parts, 1, 2>(unit_, product);
                } else {
                    now == 1 ? voxel_product<Unit, Parts, 2, 1>(unit_, product)
                             : voxel_product<Unit, Parts, 2, 2>(unit_, product);
                }
            }
        }
    }

    const Gather& gather_;
    const SplitGradWeightPlan& plan_;
    const S* grad_output_;
    const S* x_;
    Unit unit_;
    int64_t first_sample_, first_[3];
    int32_t *offsets_, *voxels_;
    Bfloat16 *gradient_, *source_;
};

// Adds the splits' sums of one block of source channels and one tile of target channels and stores them; `sums` are
// those of the first split.
template <typename S>
void store_split_sums(const Gather& gather, const SplitGradWeightPlan& plan, int64_t block, int64_t target_tile,
                      const float* sums, int64_t partial_size, S* grad_weight) {
    using V = Vector<float>;
    const int64_t channels = plan.block_channels(block), columns = plan.column_tiles(channels);
    const int64_t first = plan.block_first(block), targets = smaller(plan.targets - target_tile * kTileRows, kTileRows);
    const int64_t taps = plan.taps * plan.widths, width = columns * kTileRows;
    const int64_t tap_width = plan.joined ? channels : plan.run_tiles(channels) * kTileRows;
    const bool last = gather.layout == Layout::ndhwc;
    const int64_t row_size = plan.taps * width;
    float* rows = scratch<float>(Scratch::tile_rows, kTileRows * row_size);  // [target channel][tile][column]
    float* packed = scratch<float>(Scratch::tile_output, taps * channels);
    for (int64_t tile = 0; tile < plan.taps * columns; ++tile, sums += kTileSums) {
        for (int64_t k = 0; k < targets; ++k) {
            V::type total = V::load(sums + k * kTileRows);
            for (int64_t split = 1; split < plan.splits; ++split) {
                total += V::load(sums + k * kTileRows + split * partial_size);
            }
            V::store(rows + k * row_size + tile * kTileRows, total);
        }
    }
    for (int64_t k = 0; k < targets; ++k) {
        S* to = grad_weight + (target_tile * kTileRows + k) * gather.weight_target_stride +
                first * gather.weight_source_stride;
        const bool in_place = last || taps == 1;
        for (int64_t tap = 0; tap < taps; ++tap) {
            const float* from = rows + k * row_size + tap / plan.widths * width + tap % plan.widths * tap_width;
            if (in_place) {
                copy_narrow(from, to + tap * gather.weight_tap_stride[2], channels);
            } else {
                copy_values(from, packed + tap * channels, channels);
            }
        }
        if (!in_place) transpose(packed, channels, to, taps, taps, channels);
    }
}

// Returns whether operands could be split; if not, the result is to be computed otherwise.
template <typename Unit, int Parts, typename S>
bool split_grad_weight(const ConvProblem& given, const S* grad_output, const S* x, S* grad_weight) {
    const ConvProblem problem = with_long_rows(given);
    Gather gather = gather_channels(problem, true);
    for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
    const SplitGradWeightPlan plan = make_split_grad_weight_plan(gather, Parts);
    // Where each block's sums begin, and all end.
    int64_t* starts = scratch<int64_t>(Scratch::tables, plan.blocks() + 1);
    starts[0] = 0;
    for (int64_t block = 0; block < plan.blocks(); ++block) {
        starts[block + 1] = starts[block] + plan.block_tiles(block) * plan.target_tiles() * kTileSums;
    }
    const int64_t partial_size = starts[plan.blocks()], boxes = plan.all_boxes();
    float* partials = scratch<float>(Scratch::shared_partials, plan.splits * partial_size);
    if (boxes == 0) fill_zero(partials, partial_size);
    bool splits = true;
    parallel_for(plan.splits * plan.groups, [&](int64_t task) {
        const int64_t split = task / plan.groups, group = task % plan.groups;
        const int64_t first = group * plan.blocks() / plan.groups, last = (group + 1) * plan.blocks() / plan.groups;
        SplitGradWeightTask<Unit, S, Parts> sums(gather, plan, grad_output, x);
        if (!sums.run(first, last, split * boxes / plan.splits, (split + 1) * boxes / plan.splits,
                      partials + split * partial_size + starts[first])) {
            __atomic_store_n(&splits, false, __ATOMIC_RELAXED);
        }
    });
    if (!splits) return false;
    parallel_for(plan.blocks() * plan.target_tiles(), [&](int64_t task) {
        const int64_t block = task / plan.target_tiles(), tile = task % plan.target_tiles();
        const float* sums = partials + starts[block] + tile * plan.block_tiles(block) * kTileSums;
        store_split_sums(gather, plan, block, tile, sums, partial_size, grad_weight);
    });
    return true;
}

#endif

}  // namespace
}  // namespace pvc
