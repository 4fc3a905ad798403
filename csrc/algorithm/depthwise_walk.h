// The walk of a depthwise gather over tensors in ndhwc: tile after tile of microkernel/depthwise_rows.h.
//
// A strip is a few rows of the target through a run of planes; the source planes under it stay in L2. A tile takes one
// line of each voxel, an order in which the processor does not see what comes next, so while a plane of a strip is
// computed, a few lines with every tile, the source of the next one is asked for. A task is a few strips of one sample:
// the first plane of a task is the only one that nobody has asked for before.
//
// Inside a plane, all channels of a tile come before the next tile: what a tile reads of one vector of channels lies in
// lines next to those of the next vector. The last vector of channels ends with the channels and computes some of them
// again.
#pragma once

#include "../microkernel/depthwise_rows.h"
#include "gather.h"

namespace pvc {
namespace {

template <typename T>
bool is_depthwise(const Gather& gather) {
    return gather.layout == Layout::ndhwc && gather.source_channels == 1 && gather.target_channels == 1 &&
           gather.groups >= Vector<T>::lanes;
}

// Whether neighbouring voxels and taps are neighbours in the source, in a kernel that there are tiles for.
inline bool walks_rows(const Gather& gather) {
    const GatherAxis* axis = gather.axis;
    const auto unit = [](const GatherAxis& a) { return a.source_step == 1 && (a.tap_step == 1 || a.taps == 1); };
    return unit(axis[1]) && unit(axis[2]) && axis[0].taps > 0 && axis[1].taps > 0 &&
           (axis[2].taps == 3 || axis[2].taps == 5);
}

// The same run of bytes in several planes, brought into L2 in equal shares.
class PlanesAhead {
  public:
    PlanesAhead(const void* first, int64_t bytes, int64_t planes, int64_t plane_bytes, int64_t shares)
        : begin_(static_cast<const char*>(first)),
          bytes_(bytes),
          planes_(bytes > 0 ? larger(planes, 0) : 0),
          plane_bytes_(plane_bytes),
          lines_(ceil_divide(planes_ * ceil_divide(bytes, kLine), shares)) {}

    void fetch_share() {
        for (int64_t line = 0; line < lines_ && planes_ > 0; ++line) {
            __builtin_prefetch(begin_ + done_, 0, 2);
            done_ += kLine;
            if (done_ >= bytes_) {
                done_ = 0;
                begin_ += plane_bytes_;
                --planes_;
            }
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    const char* begin_;
    int64_t bytes_, done_ = 0, planes_, plane_bytes_, lines_;
};

// The walk over the tiles of one gather, for any of the three kernels.
template <typename T>
struct DepthwiseWalk {
    static constexpr int64_t lanes = Vector<T>::lanes;

    const Gather& gather;
    const DepthwisePass pass;
    const int64_t voxels[2];  // of a sample: source, target
    const int64_t blocks;     // vectors of channels
    const int64_t taps;
    const int64_t row_tile;
    const EvenCut widths;
    EvenCut heights, depths;  // strips of rows, runs of planes
    EvenCut strips;           // of a task
    DepthwiseTile<T> tile = {};

    DepthwiseWalk(const Gather& gather, DepthwisePass pass)
        : gather(gather),
          pass(pass),
          voxels{gather.axis[0].source_size * gather.axis[1].source_size * gather.axis[2].source_size,
                 gather.axis[0].target_size * gather.axis[1].target_size * gather.axis[2].target_size},
          blocks(ceil_divide(gather.groups, lanes)),
          taps(gather.axis[0].taps * gather.axis[1].taps * gather.axis[2].taps),
          row_tile(pass == DepthwisePass::strided ? 1 : 2),
          widths(gather.axis[2].count, kDepthwiseRun),
          heights(gather.axis[1].count, 1),
          depths(gather.axis[0].count, 1),
          strips(1, 1) {
        const GatherAxis* axis = gather.axis;
        constexpr int64_t kTasks = 16, kLeastDepth = 4;
        const int64_t row_bytes = axis[2].source_size * gather.groups * static_cast<int64_t>(sizeof(T));
        const int64_t rows = kL2Bytes / 4 / (larger(axis[0].taps, 1) * row_bytes) - axis[1].taps;
        heights = EvenCut(axis[1].count, larger(rows / larger(axis[1].source_step, 1), 4));
        const int64_t wanted = ceil_divide(kTasks, gather.batch * heights.parts);
        depths = EvenCut(axis[0].count, larger(axis[0].count / wanted, smaller(kLeastDepth, axis[0].count)));
        strips = EvenCut(heights.parts, larger(gather.batch * heights.parts * depths.parts / (2 * kTasks), 1));
        for (int a = 0; a < 3; ++a) {
            tile.size[a] = axis[a].source_size;
            tile.source_step[a] = axis[a].source_step;
            tile.taps[a] = axis[a].taps;
            tile.tap_step[a] = axis[a].tap_step;
        }
        tile.source_stride[2] = gather.groups;
        tile.source_stride[1] = tile.source_stride[2] * axis[2].source_size;
        tile.source_stride[0] = tile.source_stride[1] * axis[1].source_size;
        tile.target_stride[2] = gather.groups * axis[2].target_step;
        tile.target_stride[1] = gather.groups * axis[2].target_size * axis[1].target_step;
        tile.target_stride[0] = gather.groups * axis[2].target_size * axis[1].target_size * axis[0].target_step;
    }

    int64_t tasks() const { return gather.batch * strips.parts * depths.parts; }

    int64_t first_channel(int64_t block) const { return smaller(block * lanes, gather.groups - lanes); }

    // The walk of one task; body(tile, block, kernel) once for every tile and vector of channels. The targets of
    // rows that are computed together go where rows.begin(their place in `target`) says until rows.end.
    template <typename Rows, typename Body>
    void run(int64_t task, const T* source, T* target, Rows rows, const Body& body) const {
        const int64_t group = task % strips.parts, planes = task / strips.parts % depths.parts;
        const int64_t sample = task / strips.parts / depths.parts, last = strips.start(group + 1) - 1;
        const T* from = source + sample * voxels[0] * gather.groups;
        T* to = target + sample * voxels[1] * gather.groups +
                ((gather.axis[0].target_first * gather.axis[1].target_size + gather.axis[1].target_first) *
                     gather.axis[2].target_size +
                 gather.axis[2].target_first) *
                    gather.groups;
        const int64_t begin = depths.start(planes), end = depths.start(planes + 1);
        for (int64_t strip = strips.start(group); strip <= last; ++strip) {
            const int64_t tiles = ceil_divide(heights.size(strip), row_tile) * widths.parts * blocks;
            for (int64_t d = begin; d < end; ++d) {
                const int64_t known = plane_of(d, 1) + 1, none = strip < last ? 0 : plane_of(begin, 1) + 1;
                PlanesAhead ahead = d + 1 < end
                                        ? source_of(from, strip, known, plane_of(d + 1, 1), tiles)
                                        : source_of(from, smaller(strip + 1, last), larger(plane_of(begin, 0), none),
                                                    plane_of(begin, 1), tiles);
                run_plane(strip, d, from, to, ahead, rows, body);
            }
        }
        rows.finish();
    }

  private:
    // The source plane of the first or the last tap.
    int64_t plane_of(int64_t d, bool last_tap) const {
        const GatherAxis& axis = gather.axis[0];
        return axis.source_start + d * axis.source_step + (last_tap ? (axis.taps - 1) * axis.tap_step : 0);
    }

    // What a strip reads of the source planes first .. last.
    PlanesAhead source_of(const T* from, int64_t strip, int64_t first, int64_t last, int64_t shares) const {
        const GatherAxis& axis = gather.axis[1];
        const int64_t row = axis.source_start + heights.start(strip) * axis.source_step;
        const int64_t count = (heights.size(strip) - 1) * axis.source_step + (axis.taps - 1) * axis.tap_step + 1;
        const int64_t begin = larger(row, 0), end = smaller(row + count, axis.source_size);
        first = larger(first, 0);
        last = smaller(last, gather.axis[0].source_size - 1);
        constexpr int64_t bytes = sizeof(T);
        return PlanesAhead(from + first * tile.source_stride[0] + begin * tile.source_stride[1],
                           (end - begin) * tile.source_stride[1] * bytes, last - first + 1,
                           tile.source_stride[0] * bytes, shares);
    }

    template <typename Rows, typename Body>
    void run_plane(int64_t strip, int64_t d, const T* from, T* to, PlanesAhead& ahead, Rows& rows,
                   const Body& body) const {
        const GatherAxis* axis = gather.axis;
        const DepthwiseKernel<T> kernels[2] = {depthwise_kernel<T>(pass, axis[2].taps, widths.low),
                                               depthwise_kernel<T>(pass, axis[2].taps, widths.low + 1)};
        DepthwiseTile<T> now = tile;
        now.origin[0] = plane_of(d, false);
        for (int64_t h = heights.start(strip); h < heights.start(strip + 1); h += row_tile) {
            now.origin[1] = axis[1].source_start + h * axis[1].source_step;
            now.rows = smaller(row_tile, heights.start(strip + 1) - h);
            T* place = to + d * now.target_stride[0] + h * now.target_stride[1];
            T* written = rows.begin(place);
            for (int64_t part = 0; part < widths.parts; ++part) {
                const int64_t w = widths.start(part);
                now.origin[2] = axis[2].source_start + w * axis[2].source_step;
                const DepthwiseKernel<T> kernel = kernels[widths.size(part) - widths.low];
                for (int64_t block = 0; block < blocks; ++block) {
                    const int64_t channel = first_channel(block);
                    now.source = from + channel;
                    now.target = written + w * now.target_stride[2] + channel;
                    ahead.fetch_share();
                    rows.write_share();
                    body(now, block, kernel);
                }
            }
            rows.end(place, now.rows * now.target_stride[1], widths.parts * blocks);
        }
    }
};

}  // namespace
}  // namespace pvc
