// The first pass of rules with a shifted L2 term: shift_kernel reads the weights, and leaves slope and mean of every
// channel.
#pragma once

#include "../norms/shift.h"
#include "look.cuh"

namespace fastwrs::cuda {

// The weights are the only array.
template <class Rule, class P, bool kWalk>
class Shifter : TileArrays<-1, P, P, P, kWalk> {
  static constexpr uint32_t kAllSums = (1u << kShiftSums) - 1;
  using Base = TileArrays<-1, P, P, P, kWalk>;
  using Base::entry_, Base::tile_, Base::cut_, Base::walk_;
  using Base::kArrays, Base::kVector;
  using Base::read, Base::param, Base::find_vectors, Base::values_shift;
  using typename Base::C;
  using RuleRecord = Record<C, typename Rule::template Constants<C>>;

 public:
  FASTWRS_DEVICE Shifter(const Params<kArrays>& params, uint32_t tensor)
      : Base(params, tensor),
        record_(record_of<RuleRecord>(params, params.entries[tensor].record)),
        rows_(params.header, params.entries[tensor]) {
    whole_ = !rows_.in_parts() || entry_.partial.row_tiles == 1;
    at_once_ = tile_.cols == 1 && tile_.unit_size == tile_.n;
    groups_ = tile_.n / tile_.unit_size * tile_.cols;
  }

  FASTWRS_DEVICE void run(const Params<kArrays>& params, uint32_t tensor) {
    find_vectors();
    lists_.first = sums_bytes<C>(groups_, kShiftSums, thread_count()) + values_shift();
    lists_.there = at_once_ ? 0 : 1;
    if (at_once_) origin_ = origin_in_memory<true>(0);
    for_elements<kVector>(
        tile_, cut_, [this](int64_t element, uint32_t place) { measure<kVector>(element, place); },
        [this](int64_t element, uint32_t place) { measure<1>(element, place); });
    leave_sums();
    if (!whole_ && is_last_of_tensor(params, tensor)) finish();
  }

 private:
  template <int N>
  FASTWRS_DEVICE void measure(int64_t element, uint32_t place) {
    P w[N];
    read(param(), element, 0, w);
    C weight[N];
#pragma unroll
    for (int j = 0; j < N; ++j) weight[j] = widen(w[j]);
    if (!at_once_) return put_on_chip(weights() + place, weight);
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int k = 0; k < kShiftSums; ++k) sums_[k].add(shift_term(k, weight[j] - origin_));
    }
  }

  // ---- origins: of a row, by its place among all, and of a group of this tile. kSame: all threads ask for the same
  template <bool kSame>
  FASTWRS_DEVICE C weight_at(int64_t element) const {
    const P* address = param() + (kWalk ? walk_to<kArrays>(walk_, element, 0) : element);
    return widen(kSame ? load_shared_by_all(address) : load(address));
  }
  template <bool kSame>
  FASTWRS_DEVICE C origin_of_row(int64_t row) const {
    const int64_t rows = entry_.rows, cols = kWalk ? 1 : entry_.cols, unit = divide(row, cols);
    const int64_t first = unit * rows * cols + (row - unit * cols);
    ShiftOrigin<C> origin(weight_at<kSame>(first));
#pragma unroll 1
    for (int64_t i = 0; i < rows && i < kOriginWeights; ++i) origin.add(weight_at<kSame>(first + i * cols));
    return origin.value();
  }
  template <bool kSame>
  FASTWRS_DEVICE C origin_in_memory(uint32_t group) const {
    const int64_t cols = kWalk ? 1 : entry_.cols;
    if (!rows_.in_parts()) return origin_of_row<kSame>(groups_of<kArrays, kWalk>(entry_).first + group);
    const int64_t unit = divide(tile_.base, entry_.rows * cols), rest = tile_.base - unit * entry_.rows * cols;
    return origin_of_row<kSame>(unit * cols + rest % cols + group);
  }
  // The same, where the tile has the whole row on chip.
  FASTWRS_DEVICE C origin_on_chip(uint32_t group) const {
    const uint32_t unit = group / tile_.cols, rows = tile_.unit_size / tile_.cols;
    const C* first = weights() + unit * tile_.unit_size + (group - unit * tile_.cols);
    ShiftOrigin<C> origin(*first);
#pragma unroll 1
    for (uint32_t i = 0; i < rows && i < kOriginWeights; ++i) origin.add(first[i * tile_.cols]);
    return origin.value();
  }

  FASTWRS_DEVICE C* weights() const { return on_chip<C>(lists_.template of<C>(0, tile_)); }
  FASTWRS_DEVICE C* origins() const {
    return on_chip<C>(lists_.first - values_shift() - round_to_words(groups_ * uint32_t(sizeof(C))));
  }

  FASTWRS_DEVICE void leave_sums() {
    C* scratch = reinterpret_cast<C*>(shared_memory());
    if (at_once_) {
      C sums[kShiftSums];
#pragma unroll
      for (int k = 0; k < kShiftSums; ++k) {
        sums[k] = sum_over_block(sums_[k].sum, scratch + k * (thread_count() / kWarp));
      }
      if (thread_index() == 0) leave(0, sums, origin_);
      return;
    }
    barrier();  // the weights are complete
#pragma unroll 1
    for (uint32_t group = thread_index(); group < groups_; group += thread_count()) {
      origins()[group] = whole_ ? origin_on_chip(group) : origin_in_memory<false>(group);
    }
    barrier();  // the origins are complete
    sum_groups<C, kShiftSums>(tile_, kAllSums, scratch, [this](int k, uint32_t place, uint32_t group) {
      return shift_term(k, weights()[place] - origins()[group]);
    });
    barrier();  // the partial sums of distances are complete
    const uint32_t lanes = lanes_for(groups_, thread_count());
#pragma unroll 1
    for (uint32_t group = thread_index(); group < groups_; group += thread_count()) {
      C sums[kShiftSums];
#pragma unroll
      for (int k = 0; k < kShiftSums; ++k) sums[k] = sum_of_lanes(scratch, k, lanes, groups_, group);
      leave(group, sums, origins()[group]);
    }
  }

  // What a group of this tile comes to.
  FASTWRS_DEVICE void leave(uint32_t group, C (&sums)[kShiftSums], C origin) const {
    if (!whole_) {
#pragma unroll
      for (int k = 0; k < kShiftSums; ++k) rows_.leave(k, group, sums[k]);
      return;
    }
    const auto places = groups_of<kArrays, kWalk>(entry_);
    conclude((rows_.in_parts() ? places.partial : places.first) + group, sums, origin);
  }
  FASTWRS_DEVICE void conclude(int64_t row, const C (&sums)[kShiftSums], C origin) const {
    const C lam = record_.constants.lam, eps = record_.constants.eps;
    C slope, mean;
    shift_of_channel(sums, origin, C(entry_.rows), lam, eps, &slope, &mean);
    store(rows_.sums(kSlope) + row, slope);
    store(rows_.sums(kMean) + row, mean);
  }

  // By the last block of a tensor whose rows came in parts.
  FASTWRS_DEVICE void finish() const {
    C* scratch = reinterpret_cast<C*>(shared_memory());
    const int64_t all = rows_.count();
#pragma unroll 1
    for (int64_t first = 0; first < all; first += thread_count()) {
      const uint32_t count = uint32_t(all - first < thread_count() ? all - first : thread_count());
      rows_.finish(first, count, scratch);
      if (thread_index() >= count) continue;
      const int64_t row = first + thread_index();
      C sums[kShiftSums];
#pragma unroll
      for (int k = 0; k < kShiftSums; ++k) sums[k] = load_others(rows_.sums(k) + row);
      conclude(row, sums, origin_of_row<false>(row));
    }
  }

  const RuleRecord& record_;
  LookRows<Look::kShift, C, kArrays, kWalk> rows_;
  Lists lists_;
  Compensated<C> sums_[kShiftSums];
  C origin_ = 0;
  uint32_t groups_;
  bool whole_, at_once_;
};

template <class Rule, class P, bool kWalk>
FASTWRS_KERNEL void __launch_bounds__(kMostThreads, kResidentBlocks) shift_kernel(FASTWRS_PARAMETER(Params<1>) params) {
  if (is_skipped(params.header)) return;
  if (block_index() >= params.header.blocks) return;
  const uint32_t tensor = tensor_of(params, block_index());
  Shifter<Rule, P, kWalk>(params, tensor).run(params, tensor);
}

}  // namespace fastwrs::cuda
