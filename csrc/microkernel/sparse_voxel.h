// The register tile of the sparse input gradient that goes from output voxel to output voxel: 3 x 3 x 3 input voxels x
// one vector of input channels (or half of one), for windows of two voxels that touch.
//
// An output voxel's gradients are those of its window whose codes name it: a bit per channel says which, so nothing has
// to be sorted. Each is multiplied with the 27 weights of its channel, which follow one another in memory; bound by two
// loads per cycle. Nine sums leave the registers with each step along the width, to be added to memory.
#pragma once

#include "../isa.h"
#include "sparse_list.h"

namespace pvc {
namespace {

constexpr int64_t kMaskChannels = 64;

// For each of the two voxels along the width of a window whose codes are `code` and `code` + 1, the bits of those of
// `channels` (at most kMaskChannels) whose gradients are theirs and not zero. Codes beyond the window are read as 0.
template <typename T>
inline void list_chosen(const T* gradients, const uint8_t* codes, int64_t channels, int code, uint64_t masks[2]) {
#if defined(__AVX512BW__) && PVC_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        const auto first = [](int64_t count) {
            return count >= kMaskChannels ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
        };
        const __mmask64 exist = first(channels);
        const __m512i all = _mm512_maskz_loadu_epi8(exist, codes);
        const auto equal = [&](int value) {
            return _mm512_cmpeq_epi8_mask(all, _mm512_set1_epi8(static_cast<char>(value)));
        };
        uint64_t nonzero = 0;
        for (int64_t c = 0; c < channels; c += 16) {
            const auto some = static_cast<__mmask16>(exist >> c);
            const __m512i bits = _mm512_maskz_loadu_epi32(some, gradients + c);
            nonzero |= static_cast<uint64_t>(_mm512_test_epi32_mask(bits, _mm512_set1_epi32(INT32_MAX))) << c;
        }
        uint64_t zero = 0;
        if (code == 0) zero = _mm512_cmpge_epu8_mask(all, _mm512_set1_epi8(8)) & ~equal(kNoVoxel);
        masks[0] = (equal(code) | zero) & nonzero;
        masks[1] = equal(code + 1) & nonzero;
        return;
    }
#endif
    masks[0] = masks[1] = 0;
    for (int64_t c = 0; c < channels; ++c) {
        const int chosen = codes[c] < 8 || codes[c] == kNoVoxel ? codes[c] : 0;
        const uint64_t bit = nonzero(gradients[c]);
        masks[0] |= (bit & (chosen == code)) << c;
        masks[1] |= (bit & (chosen == code + 1)) << c;
    }
}

// A row of output voxels. Voxel w has the gradients gradients[w / 2 * gradient_pitch + c] of the channels c of
// masks[w * words ...], and reaches the voxels w .. w + 2 of the three rows from sums[kd] on, `row_pitch` apart.
template <typename T>
struct VoxelRow {
    const uint64_t* masks;
    int64_t words, count;
    const T* gradients;
    int64_t gradient_pitch;
    const T* weights;  // [channel][tap][lane]
    T* sums[3];        // [row][voxel][lane]
    int64_t row_pitch;
};

template <typename T, bool Half>
void add_voxel_row(const VoxelRow<T>& row) {
    using V = VectorPart<T, Half>;
    using vector = typename V::type;
    constexpr int64_t lanes = V::lanes;
    vector sum[3][3][3] = {};  // [width][depth][height]
    T* to[3] = {row.sums[0], row.sums[1], row.sums[2]};
    const auto retire = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 3
        for (int d = 0; d < 3; ++d) {
#pragma GCC unroll 3
            for (int h = 0; h < 3; ++h) {
                T* at = to[d] + h * row.row_pitch;
                V::store(at, V::load(at) + sum[0][d][h]);
                sum[0][d][h] = sum[1][d][h];
                sum[1][d][h] = sum[2][d][h];
                sum[2][d][h] = vector{};
            }
            to[d] += lanes;
        }
    };
    for (int64_t w = 0; w < row.count; ++w) {
        const T* gradients = row.gradients + w / 2 * row.gradient_pitch;
        const T* weights = row.weights;
        for (int64_t word = 0; word < row.words; ++word) {
            for (uint64_t mask = row.masks[w * row.words + word]; mask != 0; mask &= mask - 1) {
                const int64_t c = __builtin_ctzll(mask);
                const T value = gradients[c];
                const T* filter = weights + c * (27 * lanes);
#pragma GCC unroll 3
                for (int d = 0; d < 3; ++d) {
#pragma GCC unroll 3
                    for (int h = 0; h < 3; ++h) {
#pragma GCC unroll 3
                        for (int k = 0; k < 3; ++k) {
                            sum[k][d][h] += value * V::load(filter + ((d * 3 + h) * 3 + k) * lanes);
                        }
                    }
                }
            }
            gradients += kMaskChannels;
            weights += kMaskChannels * 27 * lanes;
        }
        retire();
    }
    retire();
    retire();
}

}  // namespace
}  // namespace pvc
