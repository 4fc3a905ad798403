// Codes of pooled voxels from integers, one per lane, to the bytes of the result.
#pragma once

#include "transpose.h"

namespace pvc {
namespace {

template <typename Integer>
void narrow(const Integer* from, uint8_t* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(from[i]);
}

// Codes of neighbouring channels to neighbouring voxels: as many voxels as fit into an integer are put together for a
// run of channels at a time, so that a byte is not moved alone.
template <typename Integer>
void transpose_codes(const Integer* codes, int64_t voxel, uint8_t* code, int64_t channel, int64_t voxels,
                     int64_t channels) {
    constexpr int64_t kWord = sizeof(Integer), kRun = 16;
    int64_t v = 0;
    for (; v + kWord <= voxels; v += kWord) {
        for (int64_t c = 0; c < channels; c += kRun) {
            const int64_t run = smaller(kRun, channels - c);
            Integer words[kRun];
            for (int64_t i = 0; i < run; ++i) {
                Integer word = 0;
                for (int64_t j = 0; j < kWord; ++j) word |= codes[(v + j) * voxel + c + i] << (8 * j);
                words[i] = word;
            }
            for (int64_t i = 0; i < run; ++i) std::memcpy(code + (c + i) * channel + v, words + i, sizeof(Integer));
        }
    }
    for (; v < voxels; ++v) {
        for (int64_t c = 0; c < channels; ++c) code[v + c * channel] = static_cast<uint8_t>(codes[v * voxel + c]);
    }
}

template <typename Integer>
void store_codes(const Integer* codes, RowStrides from, uint8_t* code, RowStrides to, int64_t voxels,
                 int64_t channels) {
    if (from.voxel == channels && to.voxel == channels) {
        narrow(codes, code, voxels * channels);
    } else if (from.channel == 1 && to.channel == 1) {
        for (int64_t v = 0; v < voxels; ++v) narrow(codes + v * from.voxel, code + v * to.voxel, channels);
    } else if (from.voxel == 1 && to.voxel == 1) {
        for (int64_t c = 0; c < channels; ++c) narrow(codes + c * from.channel, code + c * to.channel, voxels);
    } else if (from.channel == 1 && to.voxel == 1) {
        transpose_codes(codes, from.voxel, code, to.channel, voxels, channels);
    } else {
        for (int64_t v = 0; v < voxels; ++v) {
            for (int64_t c = 0; c < channels; ++c) {
                code[v * to.voxel + c * to.channel] = static_cast<uint8_t>(codes[v * from.voxel + c * from.channel]);
            }
        }
    }
}

}  // namespace
}  // namespace pvc
