// Products of matrices on a processor's matrix unit (AMX), which multiplies bfloat16 and sums in float32.
//
// A bfloat16 value is one part and a float16 value exactly the sum of two, of which the product of the second ones,
// below 2^-17 of the whole, is left out.
//
// A float32 value is the sum of three bfloat16 ones, x = x0 + x1 + x2, each the rest rounded to the nearest, so that
// x1 is at most 2^-8 and x2 2^-17 of x, and products of parts are exact in float32. Of the nine in x * y those with an
// x_i y_j of i + j <= 2 are summed, six; what is left out is below 2^-24 of the product (G. Henry, P. Tang, A.
// Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019). With
// two parts and three products the error is below 2^-15 of the product.
//
// A tile register has 16 rows of 64 bytes: 16 x 16 sums, 16 rows of the left operand with 32 values each, or 16 pairs
// of rows of the right one, a pair's two values of a column side by side. Eight of them hold a block of 2 x 2 sums and
// two tiles of each operand. A multiplication takes 16 cycles, and the 16 loads for 24 of them hide behind it.
#pragma once

#include "../narrow.h"

namespace pvc {
namespace {

#if defined(PVC_BFLOAT_PAIRS)

constexpr int64_t kTileRows = 16, kTileValues = 32;  // values of a row of an operand, and of a column

// The processor's tile registers. They are part of the thread's state, and others (oneDNN) remember how they configured
// them, so what was found is put back.
class MatrixUnit {
  public:
    MatrixUnit() {
        asm volatile("sttilecfg %0" : "=m"(before_));
        Configuration all = {};
        all.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            all.row_bytes[tile] = 64;
            all.rows[tile] = kTileRows;
        }
        asm volatile("ldtilecfg %0" : : "m"(all));
    }
    ~MatrixUnit() {
        if (before_.palette != 0) {
            asm volatile("ldtilecfg %0" : : "m"(before_));
        } else {
            asm volatile("tilerelease");
        }
    }
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;

    // Rows lie `stride` bytes apart.
    template <int Tile>
    void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
    }
    template <int Tile>
    void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Tile) : "memory");
    }
    template <int Sum, int Left, int Right>
    void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Left), "i"(Right));
    }

  private:
    struct Configuration {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    static_assert(sizeof(Configuration) == 64, "what ldtilecfg reads");

    Configuration before_;
};

// The same in plain C++, for processors without a matrix unit: so that what surrounds it can be tested on all. It gives
// the same bits: a multiplication sums the products of the first values of its pairs, and of the second ones, by FMAs,
// adds the two sums, and that to what was there; numbers below the smallest normal one count as zero everywhere.
class PlainMatrixUnit {
  public:
    template <int Tile>
    __attribute__((noinline)) void load(const void* from, int64_t stride) {
        for (int64_t row = 0; row < kTileRows; ++row) {
            std::memcpy(tiles_[Tile][row], static_cast<const char*>(from) + row * stride, 64);
        }
    }
    template <int Tile>
    __attribute__((noinline)) void store(void* to, int64_t stride) {
        for (int64_t row = 0; row < kTileRows; ++row) {
            std::memcpy(static_cast<char*>(to) + row * stride, tiles_[Tile][row], 64);
        }
    }
    template <int Sum, int Left, int Right>
    __attribute__((noinline)) void multiply() {
        for (int64_t row = 0; row < kTileRows; ++row) {
            float products[2][kTileRows] = {};
            for (int64_t pair = 0; pair < kTileRows; ++pair) {
                for (int half = 0; half < 2; ++half) {
                    const float left = number(half_of(tiles_[Left][row][pair], half));
                    for (int64_t column = 0; column < kTileRows; ++column) {
                        const float right = number(half_of(tiles_[Right][pair][column], half));
                        float& sum = products[half][column];
                        sum = normal(__builtin_fmaf(left, right, sum));
                    }
                }
            }
            for (int64_t column = 0; column < kTileRows; ++column) {
                const float added = normal(products[0][column] + products[1][column]);
                const float sum = normal(number(tiles_[Sum][row][column]) + added);
                std::memcpy(&tiles_[Sum][row][column], &sum, sizeof(sum));
            }
        }
    }

  private:
    static uint32_t half_of(uint32_t pair, int half) { return half == 0 ? pair << 16 : pair & 0xffff0000; }
    static float number(uint32_t bits) {
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        return normal(value);
    }
    static float normal(float value) {
        constexpr float kSmallest = 0x1p-126f;
        return __builtin_fabsf(value) < kSmallest ? __builtin_copysignf(0, value) : value;
    }

    uint32_t tiles_[8][kTileRows][kTileRows];
};

// A block of 16 * Rows x 16 * Columns sums over `steps` times 32 products. Parts of an operand follow one another.
struct TileProduct {
    const Bfloat16* left[2];  // of each tile of rows, the first row's value that offset 0 means
    int64_t left_part;        // values from one part to the next
    int64_t left_row;         // bytes from one row to the next
    const int32_t* offsets;   // of each step, in values
    int64_t steps;
    const Bfloat16* right;  // [step][part][column tile][16 pairs][16 columns][2]
    const float* initial;   // what the sums start from
    int64_t initial_row;    // bytes from one row to the next; 0 for the same row everywhere
    float* sums;
    int64_t sums_row;  // bytes
};

template <int N>
struct Number {
    static constexpr int number = N;
};

template <typename T>
struct Type {
    using type = T;
};

template <typename Unit, int Parts, int Rows, int Columns>
void tile_product(Unit& unit, const TileProduct& p) {
    static_assert(Rows <= 2 && Columns <= 2, "sums are tiles 0 to 3, left operands 4 and 5, right ones 6 and 7");
    constexpr int64_t kTile = kTileRows * kTileValues;
    const auto for_sums = [&](auto&& body) {
        body(Number<0>{}, 0, 0);
        if constexpr (Columns == 2) body(Number<1>{}, 0, 1);
        if constexpr (Rows == 2) body(Number<2>{}, 1, 0);
        if constexpr (Rows == 2 && Columns == 2) body(Number<3>{}, 1, 1);
    };
    for_sums([&](auto tile, int64_t row, int64_t column) {
        const char* from =
            reinterpret_cast<const char*>(p.initial + column * kTileRows) + row * kTileRows * p.initial_row;
        unit.template load<decltype(tile)::number>(from, p.initial_row);
    });
    const auto left = [&](int64_t offset) {
        unit.template load<4>(p.left[0] + offset, p.left_row);
        if constexpr (Rows == 2) unit.template load<5>(p.left[1] + offset, p.left_row);
    };
    const auto right = [&](const Bfloat16* from) {
        unit.template load<6>(from, 64);
        if constexpr (Columns == 2) unit.template load<7>(from + kTile, 64);
    };
    const auto multiply = [&] {
        unit.template multiply<0, 4, 6>();
        if constexpr (Columns == 2) unit.template multiply<1, 4, 7>();
        if constexpr (Rows == 2) unit.template multiply<2, 5, 6>();
        if constexpr (Rows == 2 && Columns == 2) unit.template multiply<3, 5, 7>();
    };
    const Bfloat16* weights = p.right;
    for (int64_t step = 0; step < p.steps; ++step, weights += Parts * Columns * kTile) {
        const auto source_part = [&](int64_t part) { return p.offsets[step] + part * p.left_part; };
        const auto weight_part = [&](int64_t part) { return weights + part * Columns * kTile; };
        left(source_part(0));
        right(weight_part(0));
        multiply();
        if constexpr (Parts >= 2) {
            right(weight_part(1));
            multiply();
        }
        if constexpr (Parts == 3) {
            right(weight_part(2));
            multiply();
        }
        if constexpr (Parts >= 2) {
            left(source_part(1));
            if constexpr (Parts == 3) {
                right(weight_part(1));
                multiply();
            }
            right(weight_part(0));
            multiply();
        }
        if constexpr (Parts == 3) {
            left(source_part(2));
            multiply();
        }
    }
    for_sums([&](auto tile, int64_t row, int64_t column) {
        unit.template store<decltype(tile)::number>(
            reinterpret_cast<char*>(p.sums + column * kTileRows) + row * kTileRows * p.sums_row, p.sums_row);
    });
}

// The upper halves of 32 values.
inline void store_upper(Words first, Words second, Bfloat16* to) {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    typedef Halves UnalignedHalves __attribute__((aligned(2), may_alias));
    constexpr Halves kUpper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                               33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    *reinterpret_cast<UnalignedHalves*>(to) =
        __builtin_shuffle(reinterpret_cast<Halves>(first), reinterpret_cast<Halves>(second), kUpper);
}

// Splits values off one after another: `next` gives those of the next part, in the upper halves of words, and keeps the
// rest. Ties are rounded away from zero.
class Splitter {
  public:
    Words next(typename Vector<float>::type& rest, bool first) {
        constexpr uint32_t kHalf = 0x8000, kUpper = 0xffff0000, kMagnitude = 0x7fffffff;
        const Words bits = reinterpret_cast<Words>(rest), part = (bits + kHalf) & kUpper;
        if (first) largest_ = largest_ > (bits & kMagnitude) ? largest_ : bits & kMagnitude;
        rest -= reinterpret_cast<typename Vector<float>::type>(part);
        return part;
    }

    // Whether all first parts were finite. Asked of the values: rounding takes the largest NaNs to zero.
    bool splits() const {
        constexpr uint32_t kInfinite = 0x7f800000, kHalf = 0x8000;
        uint32_t all = 0;
        for (int lane = 0; lane < Vector<float>::lanes; ++lane) all = all > largest_[lane] ? all : largest_[lane];
        return all < kInfinite - kHalf;
    }

  private:
    Words largest_ = {};
};

// value(i, n), a vector of values i to i + lanes - 1 of which n exist, is split for i < count: its parts are to[i],
// to[part_stride + i], ... Returns whether all values are finite and have finite first parts.
template <int Parts, typename Value>
bool split_values(int64_t count, const Value& value, Bfloat16* to, int64_t part_stride) {
    using V = Vector<float>;
    Splitter splitter;
    int64_t i = 0;
    const auto split = [&](int64_t first_count, int64_t second_count, Bfloat16* place, int64_t stride) {
        typename V::type first = value(i, first_count), second = value(i + V::lanes, second_count);
        for (int part = 0; part < Parts; ++part) {
            const Words upper = splitter.next(first, part == 0);
            store_upper(upper, splitter.next(second, part == 0), place + part * stride);
        }
    };
    for (; i + kTileValues <= count; i += kTileValues) split(V::lanes, V::lanes, to + i, part_stride);
    if (const int64_t left = count - i; left > 0) {
        alignas(64) Bfloat16 last[Parts * kTileValues];
        const int64_t first_count = left < V::lanes ? left : V::lanes;
        split(first_count, left - first_count, last, kTileValues);
        for (int part = 0; part < Parts; ++part) {
            std::memcpy(to + part * part_stride + i, last + part * kTileValues,
                        static_cast<size_t>(left) * sizeof(Bfloat16));
        }
    }
    return splitter.splits();
}

// The same for an array of float, Float16 or Bfloat16.
template <int Parts, typename S>
bool split_array(const S* from, int64_t count, Bfloat16* to, int64_t part_stride) {
    return split_values<Parts>(count, [&](int64_t i, int64_t n) { return load_wide(from + i, n); }, to, part_stride);
}

// The parts of from[32][16] as tiles of a right operand, [pair of rows][16 columns][2]. As split_values otherwise.
template <int Parts>
bool split_row_pairs(const float* from, Bfloat16* to, int64_t part_stride) {
    using V = Vector<float>;
    Splitter splitter;
    for (int64_t pair = 0; pair < kTileRows; ++pair, from += kTileValues, to += kTileValues) {
        typename V::type first = V::load(from), second = V::load(from + V::lanes);
        for (int part = 0; part < Parts; ++part) {
            const Words lower = splitter.next(first, part == 0) >> 16;
            const Words both = lower | splitter.next(second, part == 0);
            V::store(reinterpret_cast<float*>(to + part * part_stride), reinterpret_cast<typename V::type>(both));
        }
    }
    return splitter.splits();
}

#endif

}  // namespace
}  // namespace pvc
