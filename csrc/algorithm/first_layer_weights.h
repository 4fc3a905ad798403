// The weights of first_layer.h, as they are and transformed, and the inputs for which the transforms cannot overflow.
#pragma once

#include "../arena.h"
#include "../microkernel/first_layer_tile.h"
#include "pack_weight.h"
#include "winograd_axis.h"

namespace pvc {
namespace {

template <typename T>
class FirstLayerWeights {
  public:
    static constexpr int64_t lanes = Vector<T>::lanes, kTaps = 27;

    FirstLayerWeights(const ConvProblem& problem, const T* weight, const T* bias)
        : sources_(problem.in_channels), targets_(problem.out_channels) {
        const int64_t vectors = blocks() * sources_;
        taps_ = scratch<T>(Scratch::shared_weights, (vectors * (kTaps + kFirstLayerPoints) + blocks()) * lanes);
        points_ = taps_ + vectors * kTaps * lanes;
        bias_ = points_ + vectors * kFirstLayerPoints * lanes;
        for (int64_t c = 0; c < blocks() * lanes; ++c) bias_[c] = bias != nullptr && c < targets_ ? bias[c] : 0;
        Gather gather = gather_channels(problem, true);
        for (int axis = 0; axis < 3; ++axis) gather.axis[axis] = forward_axis(problem, axis);
        for (int64_t block = 0; block < blocks(); ++block) {
            for (int64_t source = 0; source < sources_; ++source) {
                T* to = taps_ + (block * sources_ + source) * kTaps * lanes;
                const T* from =
                    weight + source * gather.weight_source_stride + block * lanes * gather.weight_target_stride;
                pack_taps(gather, from, 1, 1, channels(block), lanes, to);
                transform(to, points_ + (block * sources_ + source) * kFirstLayerPoints * lanes);
            }
        }
        find_limit();
    }

    int64_t blocks() const { return ceil_divide(targets_, lanes); }
    int64_t channels(int64_t block) const { return smaller(targets_ - block * lanes, lanes); }
    const T* taps(int64_t block) const { return taps_ + block * sources_ * kTaps * lanes; }
    const T* points(int64_t block) const { return points_ + block * sources_ * kFirstLayerPoints * lanes; }
    const T* bias(int64_t block) const { return bias_ + block * lanes; }

    // Every sum stays finite for source values of this absolute value or less; negative where none does.
    T limit() const { return limit_; }

  private:
    static void transform(const T* taps, T* points) {
        using Axis = WinogradAxis<2>;
        typename Vector<T>::type v[kFirstLayerPoints] = {};
        for (int d = 0; d < 3; ++d) {
            for (int h = 0; h < 3; ++h) {
                for (int w = 0; w < 3; ++w) {
                    v[d * 16 + h * 4 + w] = Vector<T>::load(taps + ((d * 3 + h) * 3 + w) * lanes);
                }
                Axis::weight(v + d * 16 + h * 4, 1);
            }
            for (int w = 0; w < 4; ++w) Axis::weight(v + d * 16 + w, 4);
        }
        for (int i = 0; i < 16; ++i) Axis::weight(v + i, 16);
        for (int i = 0; i < kFirstLayerPoints; ++i) Vector<T>::store(points + i * lanes, v[i]);
    }

    // A transformed value is a sum of eight source values, so these end at an eighth of the range however small the
    // weights are; and what is added up for one output channel is never more than the sum of its products' absolute
    // values and the bias. Half of the range is left to rounding.
    void find_limit() {
        constexpr T kLargest =
            sizeof(T) == 4 ? static_cast<T>(3.4028234663852886e38) : static_cast<T>(1.7976931348623157e308);
        T steepest = 0, offset = 0;
        bool finite = true;
        for (int64_t channel = 0; channel < blocks() * lanes; ++channel) {
            const T* point = points(channel / lanes) + channel % lanes;
            T sum = 0;
            for (int64_t i = 0; i < sources_ * kFirstLayerPoints; ++i) sum += magnitude(point[i * lanes]);
            finite = finite && sum <= kLargest && magnitude(bias_[channel]) <= kLargest / 4;
            steepest = sum > steepest ? sum : steepest;
            offset = magnitude(bias_[channel]) > offset ? magnitude(bias_[channel]) : offset;
        }
        const T room = (kLargest / 2 - offset) / 8, most = kLargest / 16;
        limit_ = !finite ? T(-1) : steepest > room / most ? room / steepest : most;
    }

    static T magnitude(T value) { return value < 0 ? -value : value; }

    int64_t sources_, targets_;
    T* taps_;    // [block][source channel][tap][lanes]
    T* points_;  // [block][source channel][point][lanes]
    T* bias_;
    T limit_;
};

}  // namespace
}  // namespace pvc
