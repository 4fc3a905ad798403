// One tensor of a Winograd convolution, transformed for one box of tiles.
//
//     planes:  every plane transformed, tile by tile          [vector of
//     channels][plane][tile][point of a plane][lane] outer:   one point of all
//     tiles transformed along the outer axis     [vector of
//     channels][tile][outer point][lane]
//
// In ndhwc, tiles inside the tensor are read in place, those at its borders through masks.
#pragma once

#include "pack_source.h"
#include "winograd_blocking.h"

namespace pvc {
namespace {

// Which tiles a box has, of which residue, and where their outputs begin: at `first`, from tile to tile `step` further
// on. Boxes of neighbouring residues, which lie in the same pages, follow one another.
template <typename T>
struct TileBox {
    int64_t sample, samples;  // the first, and how many
    int64_t residue[3], tile[3], tiles[3];
    int64_t first[3], step[3];       // in the target
    int64_t plane_tiles, all_tiles;  // of a sample

    TileBox(const WinogradBlocking<T>& b, int64_t index) {
        const int* axis = b.scheme->axis;
        sample = index / b.box_count() * b.samples;
        samples = smaller(b.samples, b.batch - sample);
        int64_t rest = index % b.box_count();
        for (int a = 2; a >= 0; --a) {
            residue[a] = rest % b.residues[a];
            rest /= b.residues[a];
        }
        for (int a = 2; a >= 0; --a) {
            tile[a] = rest % b.boxes[a] * b.box[a];
            rest /= b.boxes[a];
            tiles[a] = smaller(b.box[a], b.tiles[a] - tile[a]);
            step[a] = b.scheme->outputs[a] * b.lattice[a];
            first[a] = residue[a] + tile[a] * step[a];
        }
        plane_tiles = tiles[axis[1]] * tiles[axis[2]];
        all_tiles = tiles[axis[0]] * plane_tiles;
    }
};

// Channels of a tensor that end at a whole vector or with the last of them.
struct ChannelRange {
    int64_t first, count;
};

// `gather` describes the tensor as its source.
template <typename T>
class WinogradOperand {
  public:
    WinogradOperand(const Gather& gather, const WinogradScheme<T>& scheme, const TileWindow& window,
                    const OperandKernels<T>& kernels, const TileBox<T>& box, Scratch slot)
        : WinogradOperand(gather, scheme, window, kernels, box, slot, {0, gather.source_channels}) {}

    WinogradOperand(const Gather& gather, const WinogradScheme<T>& scheme, const TileWindow& window,
                    const OperandKernels<T>& kernels, const TileBox<T>& box, Scratch slot, const ChannelRange& block)
        : gather_(gather), scheme_(scheme), window_(window), kernels_(kernels), box_(box), block_(block) {
        o_ = scheme.axis[0], p_ = scheme.axis[1], q_ = scheme.axis[2];
        all_channels_ = gather.source_channels;
        vectors_ = ceil_divide(block.count, lanes);
        planes_ = voxels(o_, box.tiles[o_]);
        const int64_t values = vectors_ * box.samples * planes_ * box.plane_tiles * scheme.tile_pitch();
        const int64_t columns = (window.size[q_] - 1) * gather.axis[q_].tap_step + 1;
        const int64_t zeros = columns * all_channels_ + vectors_ * lanes;
        rows_ = scratch<T>(slot, vectors_ * row_pitch() + values + zeros);
        transformed_ = rows_ + vectors_ * row_pitch();
        zeros_ = transformed_ + values;
        fill_zero(zeros_, zeros);
    }

    void transform_planes(const T* tensor) {
        const int64_t size = gather_.axis[o_].source_size;
        for (int64_t plane = 0; plane < box_.samples * planes_; ++plane) {
            const int64_t position = position_of(o_, 0, plane % planes_);
            if (position < 0 || position >= size) {
                for (int64_t vector = 0; vector < vectors_; ++vector) {
                    fill_zero(transformed(vector, plane, 0), box_.plane_tiles * scheme_.tile_pitch());
                }
            } else if (gather_.source_layout == Layout::ndhwc) {
                transform_in_place(tensor, plane);
            } else {
                transform_packed(tensor, plane);
            }
        }
    }

    const T* transform_outer(int64_t point) {
        OuterSource<T> a = {};
        a.plane = box_.plane_tiles * scheme_.tile_pitch();
        a.tile = scheme_.tile_pitch();
        a.outer_tiles = box_.tiles[o_];
        a.plane_tiles = box_.plane_tiles;
        for (int64_t vector = 0; vector < vectors_; ++vector) {
            for (int64_t sample = 0; sample < box_.samples; ++sample) {
                a.from = transformed(vector, sample * planes_, 0) + point * lanes;
                a.to = rows_ + vector * row_pitch() + sample * row_pitch() / box_.samples;
                kernels_.outer[half(vector)](a);
            }
        }
        return rows_;
    }

    // Between the vectors of channels of what transform_outer gives.
    int64_t row_pitch() const { return box_.samples * box_.all_tiles * scheme_.points[o_] * lanes; }

    // The tensor under `tiles` tiles from tile `tile` of the box on, one plane of all samples or the whole of the first
    // sample, [voxel][channel]. Returns the strides too.
    const T* pack(const T* tensor, const int64_t tile[3], const int64_t tiles[3], int64_t plane,
                  int64_t stride[3]) const {
        PackedAxis packed[3];
        SourceBlock from = {};
        from.sample = box_.sample + larger(plane, 0) / planes_;
        from.channel = block_.first;
        from.channels = block_.count;
        from.width = vectors_ * lanes;
        for (int a = 0; a < 3; ++a) {
            packed[a] = {1, voxels(a, tiles[a]), 1, 1, gather_.axis[a].tap_step == 1};
            from.origin[a] = position_of(a, tile[a], 0);
        }
        if (plane >= 0) {
            packed[o_].rows = 1;
            from.origin[o_] = position_of(o_, tile[o_], plane % planes_);
        }
        stride[2] = from.width;
        stride[1] = packed[2].rows * stride[2];
        stride[0] = packed[1].rows * stride[1];
        T* input = scratch<T>(Scratch::tile_input, packed[0].rows * stride[0]);
        pack_source(gather_, packed, false, from, tensor, input);
        return input;
    }

  private:
    static constexpr int64_t lanes = Vector<T>::lanes;

    // Voxels of a residue under `tiles` tiles.
    int64_t voxels(int axis, int64_t tiles) const { return (tiles - 1) * window_.advance[axis] + window_.size[axis]; }

    // In the tensor, of voxel `voxel` of the window of tile `tile` of the box; may be outside.
    int64_t position_of(int axis, int64_t tile, int64_t voxel) const {
        const GatherAxis& a = gather_.axis[axis];
        return a.source_start + box_.residue[axis] * a.source_step +
               ((box_.tile[axis] + tile) * window_.advance[axis] + voxel) * a.tap_step;
    }

    T* transformed(int64_t vector, int64_t plane, int64_t tile) const {
        return transformed_ +
               ((vector * box_.samples * planes_ + plane) * box_.plane_tiles + tile) * scheme_.tile_pitch();
    }

    bool half(int64_t vector) const { return fills_half<T>(block_.count) && vector + 1 == vectors_; }

    void transform_packed(const T* tensor, int64_t plane) {
        const int64_t first[3] = {0, 0, 0};
        int64_t stride[3];
        const T* packed = pack(tensor, first, box_.tiles, plane, stride);
        PlaneSource<T> a = {};
        a.column[1] = stride[q_];
        for (int64_t tile = 0; tile < box_.plane_tiles; ++tile) {
            const T* from = packed + tile / box_.tiles[q_] * window_.advance[p_] * stride[p_] +
                            tile % box_.tiles[q_] * window_.advance[q_] * stride[q_];
            for (int p = 0; p < window_.size[p_]; ++p) a.row[p] = from + p * stride[p_];
            transform_tile(kernels_.plane, a, plane, tile);
        }
    }

    void transform_tile(void (*const kernels[2])(const PlaneSource<T>&), PlaneSource<T>& a, int64_t plane,
                        int64_t tile) {
        for (int64_t vector = 0; vector < vectors_; ++vector) {
            a.to = transformed(vector, plane, tile);
            kernels[half(vector)](a);
            for (const T*& row : a.row) row += lanes;
        }
    }

    // One plane of the ndhwc layout. Whole vectors are read; where those of the plane's last voxel would reach beyond
    // the tensor it is packed.
    void transform_in_place(const T* tensor, int64_t plane) {
        const GatherAxis* axis = gather_.axis;
        const int64_t width = axis[2].source_size * all_channels_;
        const int64_t stride[3] = {axis[1].source_size * width, width, all_channels_};
        const int64_t row_step = axis[p_].tap_step, column_step = axis[q_].tap_step;
        const int64_t sample = box_.sample + plane / planes_;
        const T* all = tensor + sample * axis[0].source_size * stride[0] + block_.first;
        int64_t begin[3];
        begin[o_] = position_of(o_, 0, plane % planes_);
        const int64_t after = (gather_.batch - 1 - sample) * axis[0].source_size * stride[0] +
                              (axis[o_].source_size - 1 - begin[o_]) * stride[o_];
        if (after < vectors_ * lanes - block_.count) return transform_packed(tensor, plane);
        const int rows = window_.size[p_], columns = window_.size[q_];
        PlaneSource<T> a = {};
        for (int64_t tile = 0; tile < box_.plane_tiles; ++tile) {
            begin[p_] = position_of(p_, tile / box_.tiles[q_], 0);
            begin[q_] = position_of(q_, tile % box_.tiles[q_], 0);
            const int64_t last_row = begin[p_] + (rows - 1) * row_step;
            const int64_t last_column = begin[q_] + (columns - 1) * column_step;
            const bool inside = begin[p_] >= 0 && last_row < axis[p_].source_size && begin[q_] >= 0 &&
                                last_column < axis[q_].source_size;
            if (inside) {
                const T* from = all + begin[0] * stride[0] + begin[1] * stride[1] + begin[2] * stride[2];
                for (int p = 0; p < rows; ++p) a.row[p] = from + p * row_step * stride[p_];
                a.column[1] = column_step * stride[q_];
                transform_tile(kernels_.plane, a, plane, tile);
                continue;
            }
            const T* from = all + begin[o_] * stride[o_] + begin[q_] * stride[q_];
            const bool reached = last_column >= 0 && begin[q_] < axis[q_].source_size;
            for (int p = 0; p < rows; ++p) {
                const int64_t position = begin[p_] + p * row_step;
                const bool exists = reached && position >= 0 && position < axis[p_].source_size;
                a.row[p] = exists ? from + position * stride[p_] : zeros_;
            }
            for (int q = 0; q < columns; ++q) {
                const int64_t position = begin[q_] + q * column_step;
                const int64_t existing = larger(smaller(position, axis[q_].source_size - 1), 0);
                a.column[q] = reached ? (existing - begin[q_]) * stride[q_] : 0;
                a.mask[q] = reached && existing == position ? -1 : 0;
            }
            transform_tile(kernels_.border, a, plane, tile);
        }
    }

    const Gather& gather_;
    const WinogradScheme<T>& scheme_;
    const TileWindow window_;
    const OperandKernels<T>& kernels_;
    const TileBox<T>& box_;
    ChannelRange block_;
    int o_, p_, q_;             // axes: the outer one, those of a plane
    int64_t all_channels_;      // of the tensor
    int64_t vectors_, planes_;  // vectors of the block, planes of a sample
    T* rows_;
    T* transformed_;
    T* zeros_;
};

}  // namespace
}  // namespace pvc
