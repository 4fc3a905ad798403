// Activation and max-pool of convolution results that lie in scratch memory, one pooled row at a time.
//
// As torch's max_pool3d: of equal maxima the first in the order depth, height, width is chosen; a NaN is larger than
// any number and the last NaN stays. Comparing activated values decides ties that the activation makes. ReLU needs no
// activation per value: where the largest pre-activation is not positive, all values are zero and the first wins.
//
// Where the derivative of an activation does not follow from its value (SiLU, GELU), the pre-activation of the chosen
// voxel is written in place of the maximum: the value follows from it.
#pragma once

#include "activation.h"
#include "transpose.h"

namespace pvc {
namespace {

constexpr bool keeps_preactivation(Activation activation) {
    return activation == Activation::silu || activation == Activation::gelu || activation == Activation::gelu_tanh;
}

// One chosen voxel per lane.
template <typename T, Activation A>
class Choice {
  public:
    using vector = typename Vector<T>::type;
    using integers = typename VectorType<T>::integers;
    typedef uint8_t bytes __attribute__((vector_size(Vector<T>::lanes)));

    Choice(vector first, int32_t code, T slope)
        : first_code_(all(code)), codes_(first_code_), slope_(slope), kept_(first) {
        best_ = compared(first);
    }

    inline void offer(vector value, int32_t code) {
        const vector candidate = compared(value);
        const integers better = (candidate > best_) | (candidate != candidate);
        best_ = better ? candidate : best_;
        codes_ = better ? all(code) : codes_;
        if constexpr (keeps_preactivation(A)) kept_ = better ? value : kept_;
    }

    inline vector value() const {
        if constexpr (keeps_preactivation(A)) return kept_;
        if constexpr (A == Activation::relu) return activate<A, T>(best_, slope_);
        return best_;
    }

    inline bytes codes() const {
        if constexpr (A == Activation::relu) {
            return __builtin_convertvector(best_ <= T(0) ? first_code_ : codes_, bytes);
        } else {
            return __builtin_convertvector(codes_, bytes);
        }
    }

  private:
    static inline integers all(int32_t code) { return integers{} + code; }

    inline vector compared(vector value) const {
        if constexpr (A == Activation::relu) return value;
        return activate<A, T>(value, slope_);
    }

    const integers first_code_;
    integers codes_;
    const T slope_;
    vector best_, kept_;
};

// The part of a window that lies inside the output, along one axis: positions begin .. end - 1, the window itself from
// `origin` on.
struct WindowPart {
    int64_t origin, begin, end;
};

inline WindowPart window_part(const PooledProblem& problem, int axis, int64_t cell) {
    const int64_t origin = cell * problem.pool_stride[axis] - problem.pool_padding[axis];
    return {origin, larger(origin, 0), smaller(origin + problem.pool_window[axis], problem.conv.output_size[axis])};
}

// The scratch memory that one pooled row is computed from: values[(d - first[0]) * stride[0] + ...] for output voxel
// (d, h, w). Channels are `channel` apart, and so are the results of neighbouring channels (planar) or of neighbouring
// windows (channels last): `pitch`.
template <typename T>
struct PoolRow {
    const T* values;
    int64_t first[3], stride[3];
    int64_t channel, channels;  // planar: of the block; channels last: whole vectors of them
    WindowPart depth, height;
    int64_t cell, cells;  // windows along the width
    int64_t pitch;
    T* pooled;
    uint8_t* codes;

    const T* at(int64_t d, int64_t h, int64_t w) const {
        return values + (d - first[0]) * stride[0] + (h - first[1]) * stride[1] + (w - first[2]) * stride[2];
    }
};

// One window position for all lanes: `load(pointer)` gives the lanes' values at a voxel.
template <typename T, Activation A, typename Load>
inline Choice<T, A> choose(const PooledProblem& problem, const PoolRow<T>& row, const WindowPart& width, int64_t channel,
                           const Load& load) {
    const T slope = static_cast<T>(problem.negative_slope);
    const T* first = row.at(row.depth.begin, row.height.begin, width.begin) + channel;
    const int64_t* window = problem.pool_window;
    const int64_t counts[3] = {row.depth.end - row.depth.begin, row.height.end - row.height.begin,
                               width.end - width.begin};
    if (counts[0] == 2 && counts[1] == 2 && counts[2] == 2 && window[0] * window[1] * window[2] == 8) {
        Choice<T, A> choice(load(first), 0, slope);
#pragma GCC unroll 8
        for (int i = 1; i < 8; ++i) {
            choice.offer(load(first + (i >> 2) * row.stride[0] + (i >> 1 & 1) * row.stride[1] + (i & 1) * row.stride[2]),
                         i);
        }
        return choice;
    }
    const int64_t offset =
        ((row.depth.begin - row.depth.origin) * window[1] + row.height.begin - row.height.origin) * window[2] +
        width.begin - width.origin;
    Choice<T, A> choice(load(first), static_cast<int32_t>(offset), slope);
    for (int64_t d = 0; d < counts[0]; ++d) {
        for (int64_t h = 0; h < counts[1]; ++h) {
            const T* from = first + d * row.stride[0] + h * row.stride[1];
            const int64_t code = offset + (d * window[1] + h) * window[2];
            for (int64_t w = d + h == 0; w < counts[2]; ++w) {
                choice.offer(load(from + w * row.stride[2]), static_cast<int32_t>(code + w));
            }
        }
    }
    return choice;
}

// Lanes are channels.
template <typename T, Activation A>
void pool_row_channels_last(const PooledProblem& problem, const PoolRow<T>& row) {
    using V = Vector<T>;
    for (int64_t i = 0; i < row.cells; ++i) {
        const WindowPart width = window_part(problem, 2, row.cell + i);
        for (int64_t c = 0; c < row.channels; c += V::lanes) {
            const auto choice = choose<T, A>(problem, row, width, c, [](const T* from) { return V::load(from); });
            const auto codes = choice.codes();
            V::store(row.pooled + i * row.pitch + c, choice.value());
            std::memcpy(row.codes + i * row.pitch + c, &codes, V::lanes);
        }
    }
}

struct EvenLanes {
    static constexpr int lane(int i) { return 2 * i; }
};

// Lanes are neighbouring windows along the width, as many as lie inside the output; a window that does not is computed
// alone. Reads up to two vectors beyond the row.
template <typename T, Activation A>
void pool_row_planar(const PooledProblem& problem, const PoolRow<T>& row) {
    using V = Vector<T>;
    const int64_t stride = problem.pool_stride[2];
    const auto whole = [&](const WindowPart& part) {
        return part.begin == part.origin && part.end == part.origin + problem.pool_window[2];
    };
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
        for (int64_t c = 0; c < row.channels; ++c) {
            const auto choice = choose<T, A>(problem, row, width, c * row.channel, load);
            const auto codes = choice.codes();
            V::store_partial(row.pooled + c * row.pitch + i, choice.value(), count);
            std::memcpy(row.codes + c * row.pitch + i, &codes, static_cast<size_t>(count));
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
