// From the partial sums of groups that fit no tile to a factor for each group. Partial sums lie
// [sum][unit][row of tiles][column] in the workspace; behind them is a factor for each group.
#pragma once

#include "tiles.cuh"

namespace fastwrs::cuda {

template <class C>
class Finisher {
 public:
  uint32_t wants;  // 0: this step does nothing to the groups

  template <int kArrays>
  FASTWRS_DEVICE Finisher(const Params<kArrays>& params, uint32_t tensor, const Control<C>& control, int64_t cols)
      : header_(params.header), cols_(cols) {
    const Entry<kArrays>& entry = params.entries[tensor];
    const Moment<C> moment = moment_of(control, entry.step);
    projection_ = projection_of(control, moment.rescale, moment.shrink);
    about_ = entry.measure == kNone ? nullptr : pool_of(params) + entry.measure;
    wants = wanted_sums(moment.rescale, moment.shrink, about_ != nullptr);
    row_tiles_ = entry.partial.row_tiles;
    per_sum_ = entry.partial.per_sum;
    workspace_ = static_cast<C*>(header_.workspace) + entry.workspace;
  }

  // One group, by the whole block.
  FASTWRS_DEVICE void finish_one(int64_t unit, int64_t col) const {
    C sums[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      sums[k] = 0;
      if (!(wants >> k & 1)) continue;
      Compensated<C> mine;
      for (int64_t row = thread_index(); row < row_tiles_; row += thread_count()) mine.add(part(k, unit, row, col));
      sums[k] = sum_over_block(mine.sum, partial() + k * (thread_count() / kWarp));
    }
    if (thread_index() == 0) conclude(sums, unit * cols_ + col);
  }

  // Some groups side by side: lanes share a group.
  FASTWRS_DEVICE void finish_some(int64_t unit, int64_t first_col, uint32_t groups) const {
    const uint32_t lanes = lanes_for(groups, thread_count());
#pragma unroll 1
    for (uint32_t task = thread_index(); task < groups * lanes; task += thread_count()) {
      const uint32_t group = task % groups, lane = task / groups;
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        if (!(wants >> k & 1)) continue;
        Compensated<C> sum;
        for (int64_t row = lane; row < row_tiles_; row += lanes) sum.add(part(k, unit, row, first_col + group));
        partial()[(k * lanes + lane) * groups + group] = sum.sum;
      }
    }
    barrier();  // the sums of the lanes are complete
#pragma unroll 1
    for (uint32_t group = thread_index(); group < groups; group += thread_count()) {
      C sums[kSums];
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        sums[k] = wants >> k & 1 ? sum_of_lanes(partial(), k, lanes, groups, group) : C(0);
      }
      conclude(sums, unit * cols_ + first_col + group);
    }
  }

 private:
  FASTWRS_DEVICE C* partial() const { return reinterpret_cast<C*>(shared_memory()); }
  FASTWRS_DEVICE C part(int k, int64_t unit, int64_t row, int64_t col) const {
    return load_others(workspace_ + k * per_sum_ + (unit * row_tiles_ + row) * cols_ + col);
  }
  FASTWRS_DEVICE void conclude(const C (&sums)[kSums], int64_t group) const {
    C norm[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) norm[k] = square_root(sums[k]);
    const C factor = projection_factor(projection_, norm[kBefore], norm[kUpdated]);
    store(workspace_ + header_.sum_kinds * per_sum_ + group, factor);
    if (about_) measure(measured_row(header_, about_, group), norm, factor, projection_);
  }

  const Header& header_;
  const int64_t* about_;
  Projection<C> projection_;
  C* workspace_;
  int64_t cols_, row_tiles_, per_sum_;
};

}  // namespace fastwrs::cuda
