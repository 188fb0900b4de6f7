// The first pass of rules with a gate (AdamP, SGDP): gate_kernel changes the states and sums over every row of
// dimension 0; the last block of each tensor decides.
#pragma once

#include "../norms/gate.h"
#include "look.cuh"

namespace fastwrs::cuda {

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
      : Base(params, tensor),
        record_(record_of<RuleRecord>(params, params.entries[tensor].record)),
        rows_(params.header, params.entries[tensor]) {
    const Moment<C> moment = moment_of(record_.control, entry_.step);
    scalars_ = Rule::prepare(record_.constants, moment.lr, moment.t, moment.t == C(1) || (entry_.flags & kFresh));
    gated_ = entry_.kind != TileKind::kElements;
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

  FASTWRS_DEVICE void leave_sums() {
    C* scratch = reinterpret_cast<C*>(shared_memory());
    if (at_once_) {
#pragma unroll
      for (int k = 0; k < kGateSums; ++k) {
        const C sum = sum_over_block(sums_[k].sum, scratch + k * (thread_count() / kWarp));
        if (thread_index() == 0) rows_.leave(k, 0, sum);
      }
      return;
    }
    barrier();  // the gate's values are complete
    sum_groups<C, kGateSums>(tile_, kAllSums, scratch, [this](int k, uint32_t place, uint32_t) {
      return gate_term(k, list(kStepList)[place], list(kGradList)[place], list(kWeightList)[place]);
    });
    barrier();  // the gate's partial sums are complete
    const uint32_t lanes = lanes_for(groups_, thread_count());
#pragma unroll 1
    for (uint32_t group = thread_index(); group < groups_; group += thread_count()) {
#pragma unroll
      for (int k = 0; k < kGateSums; ++k) rows_.leave(k, group, sum_of_lanes(scratch, k, lanes, groups_, group));
    }
  }

  // ---- the decision
  FASTWRS_DEVICE void decide() {
    C* scratch = reinterpret_cast<C*>(shared_memory());
    const int64_t all = rows_.count();
    C largest = 0;
    Compensated<C> whole[kGateSums];
#pragma unroll 1
    for (int64_t first = 0; first < all; first += thread_count()) {
      const uint32_t count = uint32_t(all - first < thread_count() ? all - first : thread_count());
      if (rows_.in_parts()) rows_.finish(first, count, scratch);
      if (thread_index() >= count) continue;
      C sums[kGateSums];
#pragma unroll
      for (int k = 0; k < kGateSums; ++k) {
        sums[k] = load_others(rows_.sums(k) + first + thread_index());
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
      store(rows_.head() + kGateDecision, C(int(by_channel ? Gate::kByChannel : opens ? Gate::kWhole : Gate::kClosed)));
      store(rows_.head() + kGateAlong, opens && !by_channel ? gate_along(total, scalars_.eps) : C(0));
    }
    if (!by_channel) return;
#pragma unroll 1
    for (int64_t row = thread_index(); row < all; row += thread_count()) {
      C sums[kGateSums];
#pragma unroll
      for (int k = 0; k < kGateSums; ++k) sums[k] = load_others(rows_.sums(k) + row);
      store(rows_.sums(0) + row, gate_along(sums, scalars_.eps));
    }
  }

  const RuleRecord& record_;
  LookRows<Look::kGate, C, kArrays, kWalk> rows_;
  typename Rule::template Scalars<C> scalars_;
  Lists lists_;
  Compensated<C> sums_[kGateSums];
  uint32_t groups_;
  bool gated_, at_once_;
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
