// Activation and max-pool of convolution results that lie in scratch memory, one pooled row at a time.
//
// As torch's max_pool3d: of equal maxima the first in the order depth, height, width is chosen; a NaN is larger than
// any number and the last NaN stays. Comparing activated values decides ties that the activation makes. ReLU needs no
// activation per value: where the largest pre-activation is not positive, all values are zero and none is chosen
// (kNoVoxel).
//
// Where the derivative of an activation does not follow from its value (SiLU, GELU), the pre-activation of the chosen
// voxel is written in place of the maximum: the value follows from it.
#pragma once

#include "activation.h"
#include "transpose.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pvc {
namespace {

// The lowest byte of each lane, packed. With AVX2, GCC 12 would move them one by one.
template <typename T, int Bytes = PVC_VECTOR_BYTES>
struct LaneBytes {
    typedef uint8_t type __attribute__((vector_size(Bytes / sizeof(T))));
    typedef typename VectorType<T>::integer integers __attribute__((vector_size(Bytes)));

    static inline type narrow(integers lanes) {
#if defined(__AVX2__) && PVC_VECTOR_BYTES == 32
        if constexpr (sizeof(T) == 4 && Bytes == 32) {
            const __m256i all = reinterpret_cast<__m256i>(lanes);
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
            const __m128i bytes = _mm_packus_epi16(words, words);
            type result;
            std::memcpy(&result, &bytes, sizeof(result));
            return result;
        }
#endif
        return __builtin_convertvector(lanes, type);
    }
};

constexpr bool keeps_preactivation(Activation activation) {
    return activation == Activation::silu || activation == Activation::gelu || activation == Activation::gelu_tanh;
}

// One chosen voxel per lane.
template <typename T, Activation A>
class Choice {
  public:
    using vector = typename Vector<T>::type;
    using integers = typename VectorType<T>::integers;

    Choice(vector first, int32_t code, T slope) : codes_(all(code)), code_(codes_), slope_(slope), kept_(first) {
        best_ = compared(first);
    }

    inline void offer(vector value, int32_t code) {
        code_ = all(code);
        compare(value);
    }

    // The code after that of the value before.
    inline void offer_next(vector value) {
        code_ += 1;
        compare(value);
    }

    inline vector value() const {
        if constexpr (keeps_preactivation(A)) return kept_;
        if constexpr (A == Activation::relu) return activate<A, T>(best_, slope_);
        return best_;
    }

    inline integers codes() const {
        if constexpr (A == Activation::relu) return best_ <= T(0) ? all(kNoVoxel) : codes_;
        return codes_;
    }

  private:
    static inline integers all(int32_t code) { return integers{} + code; }

    inline void compare(vector value) {
        const vector candidate = compared(value);
        const integers better = (candidate > best_) | (candidate != candidate);
        best_ = better ? candidate : best_;
        codes_ = better ? code_ : codes_;
        if constexpr (keeps_preactivation(A)) kept_ = better ? value : kept_;
    }

    inline vector compared(vector value) const {
        if constexpr (A == Activation::relu) return value;
        return activate<A, T>(value, slope_);
    }

    integers codes_, code_;
    const T slope_;
    vector best_, kept_;
};

// The part of a window that lies inside the output, along one axis: positions begin .. end - 1, the window itself from
// `origin` on.
struct WindowPart {
    int64_t origin, begin, end;

    int64_t size() const { return end - begin; }
};

inline WindowPart window_part(const PooledProblem& problem, int axis, int64_t cell) {
    const int64_t origin = cell * problem.pool_stride[axis] - problem.pool_padding[axis];
    return {origin, larger(origin, 0), smaller(origin + problem.pool_window[axis], problem.conv.output_size[axis])};
}

// The scratch memory that one pooled row is computed from: values[(d - first[0]) * stride[0] + ...] for output voxel
// (d, h, w). Channels are `channel` apart, and so are the results of neighbouring channels (planar) or of neighbouring
// windows (channels last): `pitch`, `code_pitch`. Channels last, whole vectors are read beyond `channels`.
template <typename T>
struct PoolRow {
    const T* values;
    int64_t first[3], stride[3];
    int64_t channel, channels;
    WindowPart depth, height;
    int64_t cell, cells;  // windows along the width
    int64_t pitch;
    T* pooled;
    int64_t code_pitch;
    uint8_t* codes;  // or null

    const T* at(int64_t d, int64_t h, int64_t w) const {
        return values + (d - first[0]) * stride[0] + (h - first[1]) * stride[1] + (w - first[2]) * stride[2];
    }
};

// The window at `width` for all lanes: `load(pointer)` gives the lanes' values at a voxel.
template <typename T, Activation A, typename Load>
inline Choice<T, A> choose(const PooledProblem& problem, const PoolRow<T>& row, const WindowPart& width,
                           int64_t channel, const Load& load) {
    const T* first = row.at(row.depth.begin, row.height.begin, width.begin) + channel;
    const int64_t* window = problem.pool_window;
    const int64_t offset =
        ((row.depth.begin - row.depth.origin) * window[1] + row.height.begin - row.height.origin) * window[2] +
        width.begin - width.origin;
    Choice<T, A> choice(load(first), static_cast<int32_t>(offset), static_cast<T>(problem.negative_slope));
    for (int64_t d = 0; d < row.depth.size(); ++d) {
        for (int64_t h = 0; h < row.height.size(); ++h) {
            const T* from = first + d * row.stride[0] + h * row.stride[1];
            const int64_t code = offset + (d * window[1] + h) * window[2];
            for (int64_t w = d + h == 0; w < width.size(); ++w) {
                choice.offer(load(from + w * row.stride[2]), static_cast<int32_t>(code + w));
            }
        }
    }
    return choice;
}

// A whole window of 2 x 2 x 2 voxels of which `first` is the first.
template <typename T, Activation A, typename Load>
inline Choice<T, A> choose_of_eight(const T* first, int64_t depth, int64_t height, int64_t width, T slope,
                                    const Load& load) {
    Choice<T, A> choice(load(first), 0, slope);
    choice.offer_next(load(first + width));
    choice.offer_next(load(first + height));
    choice.offer_next(load(first + height + width));
    first += depth;
    choice.offer_next(load(first));
    choice.offer_next(load(first + width));
    choice.offer_next(load(first + height));
    choice.offer_next(load(first + height + width));
    return choice;
}

template <typename T>
bool eight(const PooledProblem& problem, const PoolRow<T>& row) {
    const int64_t* window = problem.pool_window;
    return window[0] == 2 && window[1] == 2 && window[2] == 2 && row.depth.size() == 2 && row.height.size() == 2;
}

// The first `count` (1 or more) lanes.
template <typename T, Activation A>
inline void store_choice(const PoolRow<T>& row, int64_t line, int64_t item, int64_t count, const Choice<T, A>& choice) {
    using V = Vector<T>;
    T* pooled = row.pooled + line * row.pitch + item;
    const auto bytes = LaneBytes<T>::narrow(choice.codes());
    uint8_t* codes = row.codes + line * row.code_pitch + item;
    if (count >= V::lanes) {
        V::store(pooled, choice.value());
        if (row.codes != nullptr) std::memcpy(codes, &bytes, sizeof(bytes));
    } else if (count == V::lanes / 2) {  // often; a copy of known size is no call
        const auto value = choice.value();
        std::memcpy(pooled, &value, sizeof(value) / 2);
        if (row.codes != nullptr) std::memcpy(codes, &bytes, sizeof(bytes) / 2);
    } else {
        V::store_partial(pooled, choice.value(), count);
        if (row.codes != nullptr) std::memcpy(codes, &bytes, static_cast<size_t>(count));
    }
}

// Lanes are channels.
template <typename T, Activation A>
void pool_row_channels_last(const PooledProblem& problem, const PoolRow<T>& row) {
    using V = Vector<T>;
    const auto load = [](const T* from) { return V::load(from); };
    const T slope = static_cast<T>(problem.negative_slope);
    const int64_t depth = row.stride[0], height = row.stride[1], width = row.stride[2], channels = row.channels;
    const bool of_eight = eight(problem, row);
    for (int64_t i = 0; i < row.cells; ++i) {
        const WindowPart part = window_part(problem, 2, row.cell + i);
        if (of_eight && part.size() == 2) {
            const T* first = row.at(row.depth.begin, row.height.begin, part.begin);
            for (int64_t c = 0; c < channels; c += V::lanes) {
                store_choice(row, i, c, channels - c,
                             choose_of_eight<T, A>(first + c, depth, height, width, slope, load));
            }
        } else {
            for (int64_t c = 0; c < channels; c += V::lanes) {
                store_choice(row, i, c, channels - c, choose<T, A>(problem, row, part, c, load));
            }
        }
    }
}

// Lanes are neighbouring windows along the width, as many as lie inside the output; a window that does not is computed
// alone. Reads up to two vectors beyond the row.
template <typename T, Activation A>
void pool_row_planar(const PooledProblem& problem, const PoolRow<T>& row) {
    using V = Vector<T>;
    const T slope = static_cast<T>(problem.negative_slope);
    const int64_t stride = problem.pool_stride[2];
    const bool of_eight = eight(problem, row);
    const auto whole = [&](const WindowPart& part) { return part.size() == problem.pool_window[2]; };
    for (int64_t i = 0, count = 0; i < row.cells; i += count) {
        const WindowPart width = window_part(problem, 2, row.cell + i);
        count = 1;
        while (whole(width) && count < V::lanes && i + count < row.cells &&
               whole(window_part(problem, 2, row.cell + i + count))) {
            ++count;
        }
        const auto load = [&](const T* from) {
            if (stride == 1 || count == 1) return V::load(from);
            if (stride == 2) return Transpose<T>::template pick<EvenLanes>(V::load(from), V::load(from + V::lanes));
            typename V::type lanes = {};
            for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane * stride];
            return lanes;
        };
        if (of_eight && stride == 2 && whole(width)) {
            const auto load_even = [](const T* from) {
                return Transpose<T>::template pick<EvenLanes>(V::load(from), V::load(from + V::lanes));
            };
            const T* first = row.at(row.depth.begin, row.height.begin, width.begin);
            for (int64_t c = 0; c < row.channels; ++c) {
                store_choice(
                    row, c, i, count,
                    choose_of_eight<T, A>(first + c * row.channel, row.stride[0], row.stride[1], 1, slope, load_even));
            }
        } else {
            for (int64_t c = 0; c < row.channels; ++c) {
                store_choice(row, c, i, count, choose<T, A>(problem, row, width, c * row.channel, load));
            }
        }
    }
}

template <typename T>
using PoolKernel = void (*)(const PooledProblem&, const PoolRow<T>&);

template <typename T, Activation A>
PoolKernel<T> pool_kernel_of(bool planar) {
    return planar ? pool_row_planar<T, A> : pool_row_channels_last<T, A>;
}

template <typename T>
PoolKernel<T> pool_kernel(Activation activation, bool planar) {
    switch (activation) {
        case Activation::relu:
            return pool_kernel_of<T, Activation::relu>(planar);
        case Activation::leaky_relu:
            return pool_kernel_of<T, Activation::leaky_relu>(planar);
        case Activation::silu:
            return pool_kernel_of<T, Activation::silu>(planar);
        case Activation::gelu:
            return pool_kernel_of<T, Activation::gelu>(planar);
        case Activation::gelu_tanh:
            return pool_kernel_of<T, Activation::gelu_tanh>(planar);
        default:
            return pool_kernel_of<T, Activation::none>(planar);
    }
}

}  // namespace
}  // namespace pvc
