// Rules with a gate (AdamP, SGDP): gate_kernel changes the states and sums over every row of dimension 0; the last
// block of each tensor decides. step_kernel then changes the weights, and asks here what is taken out of an element's
// step.
#pragma once

#include "../norms/gate.h"
#include "arrays.cuh"

namespace fastwrs::cuda {

// ---- the second pass asks ------------------------------------------------------------------------------------------

// The gate numbers of the tensors of a launch lie in front of its pool.
template <int kArrays>
FASTWRS_DEVICE const int64_t* gate_numbers_of(const Params<kArrays>& params, uint32_t tensor) {
  return pool_of(params) - kGateNumbers * int64_t(params.header.tensors - tensor);
}

FASTWRS_DEVICE int64_t divide(int64_t a, int64_t b) {
  return uint64_t(a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

// What the gate of a tensor says to the elements of a tile.
template <class C>
class GateAnswer {
 public:
  bool open = false;

  FASTWRS_DEVICE void ask(const Header& header, const int64_t* numbers, const Tile& tile) {
    if (numbers[kGatePlace] < 0) return;
    const C* gate = static_cast<const C*>(header.workspace) + numbers[kGatePlace];
    const C decision = load_shared_by_all(gate + kGateDecision);
    open = decision != C(int(Gate::kClosed));
    along_ = load_shared_by_all(gate + kGateAlong);
    if (decision != C(int(Gate::kByChannel))) return;
    inner_ = numbers[kChannelInner];
    channels_ = numbers[kChannels];
    const int64_t first = divide(tile.base, inner_);
    rows_ = gate + kGateRows;
    if (tile.width == tile.n && tile.base + tile.n <= (first + 1) * inner_) {  // one channel has the whole tile
      along_ = load_shared_by_all(rows_ + first % channels_);
      rows_ = nullptr;
    }
  }

  // Gives what is taken out of the step of an element, then of those after it.
  class Next {
   public:
    FASTWRS_DEVICE Next(const GateAnswer& gate, int64_t element) : gate_(gate) {
      if (!gate.rows_) return;
      const int64_t row = divide(element, gate.inner_);
      rest_ = element - row * gate.inner_;
      channel_ = row - divide(row, gate.channels_) * gate.channels_;
    }
    FASTWRS_DEVICE C next() {
      if (!gate_.rows_) return gate_.along_;
      const C along = load_shared_by_all(gate_.rows_ + channel_);
      if (++rest_ == gate_.inner_) {
        rest_ = 0;
        if (++channel_ == gate_.channels_) channel_ = 0;
      }
      return along;
    }

   private:
    const GateAnswer& gate_;
    int64_t rest_ = 0, channel_ = 0;
  };

 private:
  const C* rows_ = nullptr;
  C along_ = 0;
  int64_t inner_ = 1, channels_ = 1;
};

// ---- the first pass ------------------------------------------------------------------------------------------------

template <class Rule, class P, class G, class S, bool kWalk>
class Advancer : TileArrays<Rule::kMaxSlots, P, G, S, kWalk> {
  static constexpr int kSlots = Rule::kMaxSlots;
  static constexpr uint32_t kAllSums = (1u << kGateSums) - 1;
  using Base = TileArrays<kSlots, P, G, S, kWalk>;
  using Base::header_, Base::entry_, Base::tile_, Base::cut_;
  using Base::kArrays, Base::kVector;
  using Base::read, Base::write, Base::param, Base::grad, Base::state, Base::find_vectors, Base::values_shift;
  using typename Base::C;
  using RuleRecord = Record<C, typename Rule::template Constants<C>>;

 public:
  FASTWRS_DEVICE Advancer(const Params<kArrays>& params, uint32_t tensor)
      : Base(params, tensor), record_(record_of<RuleRecord>(params, params.entries[tensor].record)) {
    const Moment<C> moment = moment_of(record_.control, entry_.step);
    scalars_ = Rule::prepare(record_.constants, moment.lr, moment.t, moment.t == C(1) || (entry_.flags & kFresh));
    gated_ = entry_.kind != TileKind::kElements;
    partial_ = entry_.kind == TileKind::kPartial;
    at_once_ = tile_.cols == 1 && tile_.unit_size == tile_.n;
    groups_ = tile_.n / tile_.unit_size * tile_.cols;
  }

  FASTWRS_DEVICE void run(const Params<kArrays>& params, uint32_t tensor) {
    find_vectors();
    lists_.first = sums_bytes<C>(groups_, kGateSums, thread_count()) + values_shift();
    lists_.there = gated_ && !at_once_ ? (1u << kGateLists) - 1 : 0;
    for_elements<kVector>(
        tile_, cut_, [this](int64_t element, uint32_t place) { advance<kVector>(element, place); },
        [this](int64_t element, uint32_t place) { advance<1>(element, place); });
    if (!gated_) return;
    leave_sums();
    if (is_last_of_tensor(params, tensor)) decide();
  }

 private:
  template <int N>
  FASTWRS_DEVICE void advance(int64_t element, uint32_t place) {
    P w[N] = {};
    G g[N];
    S s[kSlots][N];
    if (gated_) read(param(), element, 0, w);
    read(grad(), element, 1, g);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) read(state(k), element, 2 + k, s[k]);
    C gradient[N], step[N];
#pragma unroll
    for (int j = 0; j < N; ++j) gradient[j] = widen(g[j]);
    if (header_.grad_scale) {
      const C scale = C(load_shared_by_all(header_.grad_scale));
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = narrow(gradient[j] = quotient(gradient[j], scale), G());
      if (scalars_.nesterov == 0) write(grad(), element, 1, g);  // else the second pass does, which reads it again
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      gradient[j] = record_.control.maximize ? -gradient[j] : gradient[j];
      C states[kSlots];
#pragma unroll
      for (int k = 0; k < kSlots; ++k) states[k] = widen(s[k][j]);
      Rule::advance(gradient[j], states, scalars_);
      // The second pass reads what is stored: the gate judges the step that it will make of that.
#pragma unroll
      for (int k = 0; k < kSlots; ++k) states[k] = widen(s[k][j] = narrow(states[k], S()));
      step[j] = Rule::direction(gradient[j], states, scalars_);
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) write(state(k), element, 2 + k, s[k], true);
    if (!gated_) return;
    C weight[N];
#pragma unroll
    for (int j = 0; j < N; ++j) weight[j] = widen(w[j]);
    if (at_once_) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int k = 0; k < kGateSums; ++k) sums_[k].add(gate_term(k, step[j], gradient[j], weight[j]));
      }
      return;
    }
    put_on_chip(list(kStepList) + place, step);
    put_on_chip(list(kGradList) + place, gradient);
    put_on_chip(list(kWeightList) + place, weight);
  }

  FASTWRS_DEVICE C* list(int k) const { return on_chip<C>(lists_.template of<C>(k, tile_)); }

  // ---- sums of the rows, or of parts of them, to the workspace: [sum][row] or [sum][row of tiles][row]
  FASTWRS_DEVICE C* gate() const { return static_cast<C*>(header_.workspace) + entry_.workspace; }
  FASTWRS_DEVICE int64_t rows() const {
    return partial_ ? int64_t(entry_.partial.per_sum / entry_.partial.row_tiles) : divide(entry_.numel, entry_.rows);
  }
  FASTWRS_DEVICE C* sums_of_rows() const { return gate() + kGateRows; }
  FASTWRS_DEVICE C* parts() const { return sums_of_rows() + (partial_ ? kGateSums * rows() : 0); }
  FASTWRS_DEVICE int64_t per_sum() const { return partial_ ? int64_t(entry_.partial.per_sum) : rows(); }

  FASTWRS_DEVICE void leave_sums() {
    const auto places = groups_of<kArrays, kWalk>(entry_);
    C* to = parts() + (partial_ ? places.partial : places.first);
    const int64_t pitch = per_sum();
    C* scratch = reinterpret_cast<C*>(shared_memory());
    if (at_once_) {
#pragma unroll
      for (int k = 0; k < kGateSums; ++k) {
        const C sum = sum_over_block(sums_[k].sum, scratch + k * (thread_count() / kWarp));
        if (thread_index() == 0) store(to + k * pitch, sum);
      }
      return;
    }
    barrier();  // the gate's values are complete
    sum_groups<C, kGateSums>(tile_, kAllSums, scratch, [this](int k, uint32_t place) {
      return gate_term(k, list(kStepList)[place], list(kGradList)[place], list(kWeightList)[place]);
    });
    barrier();  // the gate's partial sums are complete
    const uint32_t lanes = lanes_for(groups_, thread_count());
#pragma unroll 1
    for (uint32_t group = thread_index(); group < groups_; group += thread_count()) {
#pragma unroll
      for (int k = 0; k < kGateSums; ++k)
        store(to + k * pitch + group, sum_of_lanes(scratch, k, lanes, groups_, group));
    }
  }

  // ---- the decision
  FASTWRS_DEVICE void decide() {
    C* scratch = reinterpret_cast<C*>(shared_memory());
    const int64_t all = rows();
    C largest = 0;
    Compensated<C> whole[kGateSums];
#pragma unroll 1
    for (int64_t first = 0; first < all; first += thread_count()) {
      const uint32_t count = uint32_t(all - first < thread_count() ? all - first : thread_count());
      if (partial_) finish_rows(first, count, scratch);
      if (thread_index() >= count) continue;
      C sums[kGateSums];
#pragma unroll
      for (int k = 0; k < kGateSums; ++k) {
        sums[k] = load_others(sums_of_rows() + k * all + first + thread_index());
        whole[k].add(sums[k]);
      }
      largest = maximum(largest, gate_cosine(sums, scalars_.eps));
    }
    scratch += kGateSums * thread_count();  // the sums of the last rows may still be read
    largest = largest_of_block(largest, scratch);
    C total[kGateSums];
#pragma unroll
    for (int k = 0; k < kGateSums; ++k) total[k] = sum_over_block(whole[k].sum, scratch + (1 + k) * kWarp);
    const int64_t numel = all * entry_.rows;
    const bool by_channel = gate_opens(largest, scalars_.delta, entry_.rows);
    const bool opens = by_channel || gate_opens(gate_cosine(total, scalars_.eps), scalars_.delta, numel);
    if (thread_index() == 0) {
      store(gate() + kGateDecision, C(int(by_channel ? Gate::kByChannel : opens ? Gate::kWhole : Gate::kClosed)));
      store(gate() + kGateAlong, opens && !by_channel ? gate_along(total, scalars_.eps) : C(0));
    }
    if (!by_channel) return;
#pragma unroll 1
    for (int64_t row = thread_index(); row < all; row += thread_count()) {
      C sums[kGateSums];
#pragma unroll
      for (int k = 0; k < kGateSums; ++k) sums[k] = load_others(sums_of_rows() + k * all + row);
      store(sums_of_rows() + row, gate_along(sums, scalars_.eps));
    }
  }

  // The sums of some rows that came in parts, in a fixed order.
  FASTWRS_DEVICE void finish_rows(int64_t first, uint32_t count, C* scratch) {
    const uint32_t lanes = lanes_for(count, thread_count());
    const int64_t tiles = entry_.partial.row_tiles, cols = kWalk ? 1 : entry_.cols;
    barrier();  // the sums of the rows before are taken
#pragma unroll 1
    for (uint32_t task = thread_index(); task < count * lanes; task += thread_count()) {
      const uint32_t lane = task / count;
      const int64_t row = first + task % count, unit = divide(row, cols);
      const C* from = parts() + unit * tiles * cols + (row - unit * cols);
#pragma unroll
      for (int k = 0; k < kGateSums; ++k) {
        Compensated<C> sum;
#pragma unroll 1
        for (int64_t tile = lane; tile < tiles; tile += lanes) sum.add(load_others(from + k * per_sum() + tile * cols));
        scratch[k * count * lanes + task] = sum.sum;
      }
    }
    barrier();  // the parts of these rows are complete
    if (thread_index() >= count) return;
#pragma unroll
    for (int k = 0; k < kGateSums; ++k) {
      store(sums_of_rows() + k * rows() + first + thread_index(),
            sum_of_lanes(scratch, k, lanes, count, thread_index()));
    }
  }

  const RuleRecord& record_;
  typename Rule::template Scalars<C> scalars_;
  Lists lists_;
  Compensated<C> sums_[kGateSums];
  uint32_t groups_;
  bool gated_, partial_, at_once_;
};

template <class Rule, class P, class G, class S, bool kWalk>
FASTWRS_KERNEL void __launch_bounds__(kMostThreads, kResidentBlocks)
    gate_kernel(FASTWRS_PARAMETER(Params<2 + Rule::kMaxSlots>) params) {
  if (is_skipped(params.header)) return;
  if (block_index() >= params.header.blocks) return;
  const uint32_t tensor = tensor_of(params, block_index());
  Advancer<Rule, P, G, S, kWalk>(params, tensor).run(params, tensor);
}

}  // namespace fastwrs::cuda
