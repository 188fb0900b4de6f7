// Rules that look at whole tensors first: what the kernels of all kinds of looks have in common. gate_kernel or
// shift_kernel sums over every row of dimension 0 and leaves what it finds out in the workspace; step_kernel then
// changes the weights, and asks here what it is told of an element.
#pragma once

#include "../norms/looks.h"
#include "arrays.cuh"

namespace fastwrs::cuda {

// ---- the second pass asks ------------------------------------------------------------------------------------------

// The look numbers of the tensors of a launch lie in front of its pool.
template <int kArrays>
FASTWRS_DEVICE const int64_t* look_numbers_of(const Params<kArrays>& params, uint32_t tensor) {
  return pool_of(params) - kLookNumbers * int64_t(params.header.tensors - tensor);
}

FASTWRS_DEVICE int64_t divide(int64_t a, int64_t b) {
  return uint64_t(a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

// What a look at a tensor tells the elements of a tile.
template <Look kLook, class C>
class LookAnswers {
  using L = LookOf<kLook>;
  using Answer = typename L::template Answer<C>;

 public:
  bool tells = false;

  FASTWRS_DEVICE void ask(const Header& header, const int64_t* numbers, const Tile& tile) {
    if (numbers[kLookPlace] < 0) return;
    const C* found = static_cast<const C*>(header.workspace) + numbers[kLookPlace];
    tells = true;
    if constexpr (kLook == Look::kGate) {
      const C decision = load_shared_by_all(found + kGateDecision);
      tells = decision != C(int(Gate::kClosed));
      told_[0] = load_shared_by_all(found + kGateAlong);
      if (decision != C(int(Gate::kByChannel))) return;
    }
    inner_ = numbers[kChannelInner];
    channels_ = numbers[kChannels];
    const int64_t first = divide(tile.base, inner_);
    rows_ = found + L::kHead;
    if (tile.width == tile.n && tile.base + tile.n <= (first + 1) * inner_) {  // one channel has the whole tile
      take(first % channels_, told_);
      rows_ = nullptr;
    }
  }

  // Gives what is told of an element, then of those after it.
  class Next {
   public:
    FASTWRS_DEVICE Next(const LookAnswers& look, int64_t element) : look_(look) {
      if (!look.rows_) return;
      const int64_t row = divide(element, look.inner_);
      rest_ = element - row * look.inner_;
      channel_ = row - divide(row, look.channels_) * look.channels_;
    }
    FASTWRS_DEVICE Answer next() {
      if (!look_.rows_) return L::answer(look_.told_, look_.tells);
      C told[L::kEach];
      look_.take(channel_, told);
      if (++rest_ == look_.inner_) {
        rest_ = 0;
        if (++channel_ == look_.channels_) channel_ = 0;
      }
      return L::answer(told, look_.tells);
    }

   private:
    const LookAnswers& look_;
    int64_t rest_ = 0, channel_ = 0;
  };

 private:
  FASTWRS_DEVICE void take(int64_t channel, C (&told)[L::kEach]) const {
#pragma unroll
    for (int k = 0; k < L::kEach; ++k) told[k] = load_shared_by_all(rows_ + k * channels_ + channel);
  }

  const C* rows_ = nullptr;
  C told_[L::kEach] = {};
  int64_t inner_ = 1, channels_ = 1;
};

// Of a rule that does not look.
template <class C>
class LookAnswers<Look::kNone, C> {
 public:
  static constexpr bool tells = false;
  struct Next {
    FASTWRS_DEVICE Next(const LookAnswers&, int64_t) {}
  };
};

// ---- the first pass leaves sums of rows, or of parts of them -------------------------------------------------------

// Of one tensor in the workspace: the head, then [sum][row], then [sum][row of tiles][row] where rows come in parts.
template <Look kLook, class C, int kArrays, bool kWalk>
class LookRows {
  using L = LookOf<kLook>;

 public:
  FASTWRS_DEVICE LookRows(const Header& header, const Entry<kArrays>& entry) : header_(header), entry_(entry) {}

  // Made where it is needed, from constant memory.
  FASTWRS_DEVICE C* head() const { return static_cast<C*>(header_.workspace) + entry_.workspace; }
  FASTWRS_DEVICE bool in_parts() const { return entry_.kind == TileKind::kPartial; }
  FASTWRS_DEVICE int64_t count() const {
    return in_parts() ? int64_t(entry_.partial.per_sum / entry_.partial.row_tiles) : divide(entry_.numel, entry_.rows);
  }
  FASTWRS_DEVICE C* sums(int k) const { return head() + L::kHead + k * count(); }

  // The sums of a group of this tile: of a row, or of a part of one.
  FASTWRS_DEVICE void leave(int k, uint32_t group, C sum) const {
    const auto places = groups_of<kArrays, kWalk>(entry_);
    store((in_parts() ? parts(k) + places.partial : sums(k) + places.first) + group, sum);
  }

  // The sums of some rows that came in parts, in a fixed order; each thread may then read those of its row.
  FASTWRS_DEVICE void finish(int64_t first, uint32_t rows, C* scratch) const {
    const uint32_t lanes = lanes_for(rows, thread_count());
    const int64_t tiles = entry_.partial.row_tiles, cols = kWalk ? 1 : entry_.cols;
    barrier();  // the sums of the rows before are taken
#pragma unroll 1
    for (uint32_t task = thread_index(); task < rows * lanes; task += thread_count()) {
      const uint32_t lane = task / rows;
      const int64_t row = first + task % rows, unit = divide(row, cols);
      const int64_t begin = unit * tiles * cols + (row - unit * cols);
#pragma unroll
      for (int k = 0; k < L::kSums; ++k) {
        Compensated<C> sum;
#pragma unroll 1
        for (int64_t tile = lane; tile < tiles; tile += lanes) sum.add(load_others(parts(k) + begin + tile * cols));
        scratch[k * rows * lanes + task] = sum.sum;
      }
    }
    barrier();  // the parts of these rows are complete
    if (thread_index() >= rows) return;
#pragma unroll
    for (int k = 0; k < L::kSums; ++k) {
      store(sums(k) + first + thread_index(), sum_of_lanes(scratch, k, lanes, rows, thread_index()));
    }
  }

 private:
  FASTWRS_DEVICE C* parts(int k) const { return sums(L::kSums) + k * int64_t(entry_.partial.per_sum); }

  const Header& header_;
  const Entry<kArrays>& entry_;
};

}  // namespace fastwrs::cuda
