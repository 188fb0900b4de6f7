// The kernels. A block takes one tile of one tensor: it updates the tile, and where norms are to be set and the tile
// holds whole norm groups it keeps the new weights in shared memory until their norms are known, so that every array is
// read and written once. Where a group does not fit a tile, step_kernel writes the weights and leaves sums of squares
// in the workspace, the tensor's last block (or for columns finish_kernel) finishes them, and project_kernel scales.
//
// Whether this step counts (found_inf), rescales or shrinks is decided here, from numbers on the device: a captured
// graph replays it rightly.
#pragma once

#include "../rules/all.h"
#include "arrays.cuh"
#include "finish.cuh"
#include "gate.cuh"
#include "shift.cuh"

namespace fastwrs::cuda {

// ---- the step ------------------------------------------------------------------------------------------------------

template <class Rule, int kSlots, class P, class G, class S, bool kWalk>
class Stepper : TileArrays<kSlots, P, G, S, kWalk> {
  using Base = TileArrays<kSlots, P, G, S, kWalk>;
  using Base::header_, Base::entry_, Base::tile_, Base::cut_, Base::pool_;
  using Base::kArrays, Base::kVector;
  using Base::read, Base::write, Base::param, Base::grad, Base::state, Base::find_vectors, Base::values_shift;
  using typename Base::C;
  using RuleRecord = Record<C, typename Rule::template Constants<C>>;
  static constexpr bool kStatesBefore = LookOf<Rule::kLook>::kChangesStates;  // by gate_kernel
  static constexpr bool kIdle = !kUpdates<Rule>;

 public:
  FASTWRS_DEVICE Stepper(const Params<kArrays>& params, uint32_t tensor)
      : Base(params, tensor), record_(record_of<RuleRecord>(params, params.entries[tensor].record)) {
    const Moment<C> moment = moment_of(record_.control, entry_.step);
    scalars_ = Rule::prepare(record_.constants, moment.lr, moment.t, moment.t == C(1) || (entry_.flags & kFresh));
    rescale_ = moment.rescale;
    shrink_ = moment.shrink;
    wants_ = entry_.kind == TileKind::kElements ? 0 : wanted_sums(rescale_, shrink_, is_measured());
    // One group and one sum: the threads collect it while they update. Otherwise sums are taken from lists on chip.
    sums_at_once_ = tile_.cols == 1 && tile_.unit_size == tile_.n && !is_measured();
    const bool whole_groups = entry_.kind == TileKind::kUnits || entry_.kind == TileKind::kStrip;
    holds_ = whole_groups && (rescale_ || shrink_);
    if constexpr (Rule::kLook != Look::kNone) look_.ask(header_, look_numbers_of(params, tensor), tile_);
  }

  FASTWRS_DEVICE void run(const Params<kArrays>& params, uint32_t tensor) {
    update_and_sum();
    // Groups that lie in rows: the last block of the tensor finishes their sums. Others get a launch of their own.
    const bool in_rows = entry_.kind == TileKind::kPartial && (kWalk || entry_.cols == 1);
    if (!in_rows || wants_ == 0 || !is_last_of_tensor(params, tensor)) return;
    const Finisher<C> finisher(params, tensor, record_.control, 1);
    const int64_t units = entry_.partial.per_sum / entry_.partial.row_tiles;
#pragma unroll 1
    for (int64_t unit = 0; unit < units; ++unit) {
      finisher.finish_one(unit, 0);
      barrier();  // the sums of this unit are taken
    }
  }

 private:
  FASTWRS_DEVICE void update_and_sum() {
    const uint32_t groups = tile_.n / tile_.unit_size * tile_.cols;
    if (kIdle && wants_ == 0) return;
    lay_out(groups);
    update_tile();
    if (wants_ == 0) return;
    C* partial = reinterpret_cast<C*>(shared_memory());
    if (sums_at_once_) {
      const C sum = sum_over_block(sum_.sum, partial);
      if (entry_.kind == TileKind::kPartial) {
        if (thread_index() == 0) leave_sum(rescale_ ? kUpdated : kBefore, 0, sum);
        return;
      }
      const C norm = square_root(sum), factor = projection_factor(projection(), norm, norm);
      write_weights([factor](uint32_t) { return Constant{factor}; });
      return;
    }
    barrier();  // the values are complete
    sum_groups<C, kSums>(tile_, wants_, partial, [this](int k, uint32_t place, uint32_t) {
      const C x = on_chip<C>(lists_.template of<C>(k, tile_))[place];
      return x * x;
    });
    barrier();  // the partial sums are complete
    const uint32_t lanes = lanes_for(groups, thread_count());
    C* factors = on_chip<C>(factors_place(groups));
#pragma unroll 1
    for (uint32_t group = thread_index(); group < groups; group += thread_count()) {
      C sums[kSums];
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        sums[k] = wants_ >> k & 1 ? sum_of_lanes(partial, k, lanes, groups, group) : C(0);
      }
      if (entry_.kind == TileKind::kPartial) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) {
          if (wants_ >> k & 1) leave_sum(k, group, sums[k]);
        }
      } else {
        factors[group] = conclude(sums, group);
      }
    }
    if (!holds_) return;
    barrier();  // the factors are complete
    const Tile tile = tile_;
    write_weights([factors, tile](uint32_t place) { return Factors<C, true>(factors, tile, place); });
  }

  struct Constant {
    C factor;
    FASTWRS_DEVICE C next() const { return factor; }
  };

  // A rule with a gate has changed its states before, and mostly is done with the gradient.
  FASTWRS_DEVICE bool unscales() const {
    if constexpr (kStatesBefore) return scalars_.nesterov != 0;
    return true;
  }
  FASTWRS_DEVICE bool reads_grad() const { return !kIdle && (unscales() || is_measured()); }
  FASTWRS_DEVICE bool writes_states() const {
    if constexpr (!kStatesBefore) {
      return true;
    } else if constexpr (Rule::kChangesStateAgain) {
      return look_.tells && scalars_.project_momentum != 0;
    } else {
      return false;
    }
  }
  FASTWRS_DEVICE bool is_measured() const { return entry_.measure != kNone; }
  FASTWRS_DEVICE Projection<C> projection() const { return projection_of(record_.control, rescale_, shrink_); }

  // Which lists of values this tile needs on chip: those of the sums that are wanted, or the weights alone.
  FASTWRS_DEVICE void lay_out(uint32_t groups) {
    find_vectors();
    lists_.there = (sums_at_once_ ? 0 : wants_) | (holds_ ? 1u << kUpdated : 0);
    lists_.first = factors_place(groups) + round_to_words(groups * uint32_t(sizeof(C))) + values_shift();
  }
  // Where the factors of the groups are, behind the sums of each kind up to the last that is wanted.
  FASTWRS_DEVICE uint32_t factors_place(uint32_t groups) const {
    uint32_t kinds = 0;
#pragma unroll
    for (int k = 0; k < kSums; ++k) kinds = wants_ >> k & 1 ? k + 1 : kinds;
    return round_to_words(kinds * sums_per_kind(groups) * uint32_t(sizeof(C)));
  }
  FASTWRS_DEVICE uint32_t sums_per_kind(uint32_t groups) const {
    return sums_at_once_ ? thread_count() / kWarp : groups * lanes_for(groups, thread_count());
  }

  FASTWRS_DEVICE void update_tile() {
    for_elements<kVector>(
        tile_, cut_, [this](int64_t element, uint32_t place) { update<kVector>(element, place); },
        [this](int64_t element, uint32_t place) { update<1>(element, place); });
  }

  template <int N>
  FASTWRS_DEVICE void update(int64_t element, uint32_t place) {
    P w[N];
    G g[N];
    S s[kSlots == 0 ? 1 : kSlots][N];
    read(param(), element, 0, w);
    if (reads_grad()) {
      read(grad(), element, 1, g);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = narrow(C(0), G());
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) read(state(k), element, 2 + k, s[k]);

    C weight[N], gradient[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      weight[j] = widen(w[j]);
      gradient[j] = widen(g[j]);
    }
    if (!kIdle && header_.grad_scale && unscales()) {
      const C scale = C(load_shared_by_all(header_.grad_scale));
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = narrow(gradient[j] = quotient(gradient[j], scale), G());
      write(grad(), element, 1, g);
    }
    collect<N>(kBefore, place, weight);
    collect<N>(kGrad, place, gradient);
    if (record_.control.maximize) {
#pragma unroll
      for (int j = 0; j < N; ++j) gradient[j] = -gradient[j];
    }
    [[maybe_unused]] typename LookAnswers<Rule::kLook, C>::Next answers(look_, element);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      C states[kSlots == 0 ? 1 : kSlots], u;
#pragma unroll
      for (int k = 0; k < kSlots; ++k) states[k] = widen(s[k][j]);
      if constexpr (Rule::kLook != Look::kNone) {
        u = Rule::template update<kSlots>(weight[j], gradient[j], states, answers.next(), scalars_);
      } else {
        u = Rule::template update<kSlots>(weight[j], gradient[j], states, scalars_);
      }
      if (lists_.there >> kUpdate & 1) on_chip<C>(lists_.of<C>(kUpdate, tile_))[place + j] = u;
#pragma unroll
      for (int k = 0; k < kSlots; ++k) s[k][j] = narrow(states[k], S());
    }
    if (writes_states()) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) write(state(k), element, 2 + k, s[k]);
    }
    if (!kIdle && !holds_) {
      const bool again = entry_.kind == TileKind::kPartial;  // it will be scaled by a later launch
#pragma unroll
      for (int j = 0; j < N; ++j) {
        w[j] = narrow(weight[j], P());
        if (again) weight[j] = widen(w[j]);  // the norm is then that of what is stored
      }
      write(param(), element, 0, w, again);
    }
    collect<N>(kUpdated, place, weight);
  }

  // Adds squares to the thread's sum, or leaves the values on chip.
  template <int N>
  FASTWRS_DEVICE void collect(int k, uint32_t place, const C (&x)[N]) {
    if (sums_at_once_ && (wants_ >> k & 1)) {
#pragma unroll
      for (int j = 0; j < N; ++j) sum_.add(x[j] * x[j]);
    }
    if (lists_.there >> k & 1) put_on_chip(on_chip<C>(lists_.of<C>(k, tile_)) + place, x);
  }

  // The factor of a group of this tile, from its sums of squares.
  FASTWRS_DEVICE C conclude(const C (&sums)[kSums], uint32_t group) const {
    C norm[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) norm[k] = square_root(sums[k]);
    const Projection<C> how = projection();
    const C factor = projection_factor(how, norm[kBefore], norm[kUpdated]);
    if (is_measured()) {
      const int64_t first = groups_of<kArrays, kWalk>(entry_).first;
      measure(measured_row(header_, pool_ + entry_.measure, first + group), norm, factor, how);
    }
    return factor;
  }

  // The tile's part of a sum, for finish_kernel.
  FASTWRS_DEVICE void leave_sum(int k, uint32_t group, C sum) const {
    C* workspace = static_cast<C*>(header_.workspace) + entry_.workspace;
    const int64_t first = groups_of<kArrays, kWalk>(entry_).partial;
    store(workspace + k * int64_t(entry_.partial.per_sum) + first + group, sum);
  }

  template <class FactorsAt>
  FASTWRS_DEVICE void write_weights(const FactorsAt& factors_at) const {
    for_elements<kVector>(
        tile_, cut_, [&](int64_t element, uint32_t place) { write_scaled<kVector>(element, place, factors_at(place)); },
        [&](int64_t element, uint32_t place) { write_scaled<1>(element, place, factors_at(place)); });
  }
  template <int N, class Next>
  FASTWRS_DEVICE void write_scaled(int64_t element, uint32_t place, Next factors) const {
    P w[N];
    C x[N];
    take_from_chip(on_chip<C>(lists_.of<C>(kUpdated, tile_)) + place, x);
#pragma unroll
    for (int j = 0; j < N; ++j) w[j] = narrow(x[j] * factors.next(), P());
    write(param(), element, 0, w);
  }

  const RuleRecord& record_;
  typename Rule::template Scalars<C> scalars_;
  LookAnswers<Rule::kLook, C> look_;
  Lists lists_;
  Compensated<C> sum_;
  uint32_t wants_;
  bool rescale_, shrink_, sums_at_once_, holds_;
};

template <class Rule, int kSlots, class P, class G, class S, bool kWalk>
FASTWRS_KERNEL void __launch_bounds__(kMostThreads, kResidentBlocks)
    step_kernel(FASTWRS_PARAMETER(Params<2 + kSlots>) params) {
  if (is_skipped(params.header)) return;
  if (block_index() < params.header.blocks) {
    const uint32_t tensor = tensor_of(params, block_index());
    Stepper<Rule, kSlots, P, G, S, kWalk>(params, tensor).run(params, tensor);
  }
  advance_steps(params);
}

// ---- what follows where a group does not fit a tile ----------------------------------------------------------------

template <class P, bool kWalk>
FASTWRS_KERNEL void __launch_bounds__(kMostThreads, kResidentBlocks)
    finish_kernel(FASTWRS_PARAMETER(Params<1>) params) {
  if (is_skipped(params.header)) return;
  const uint32_t tensor = tensor_of(params, block_index());
  const Entry<1>& entry = params.entries[tensor];
  const int64_t cols = kWalk ? 1 : entry.cols;
  const uint32_t strips = strips_of(uint32_t(cols), entry.tile), block = block_index() - entry.first_block;
  const int64_t first_col = int64_t(block % strips) * entry.tile;
  const uint32_t groups = uint32_t(cols - first_col < entry.tile ? cols - first_col : entry.tile);
  const auto& control = record_of<Control<compute_t<P>>>(params, entry.record);
  const Finisher<compute_t<P>> finisher(params, tensor, control, cols);
  if (finisher.wants == 0) return;
  if (groups == 1) {
    finisher.finish_one(block / strips, first_col);
  } else {
    finisher.finish_some(block / strips, first_col, groups);
  }
}

// Multiplies the weights of one tile by the factors of their groups.
template <class P, bool kWalk>
FASTWRS_DEVICE void project_tile(const Params<1>& params, uint32_t tensor) {
  using C = compute_t<P>;
  constexpr int kVector = VectorOf<P, P, P>::kElements;
  const Header& header = params.header;
  const Entry<1>& entry = params.entries[tensor];
  const Moment<C> moment = moment_of(record_of<Control<C>>(params, entry.record), entry.step);
  if (!moment.rescale && !moment.shrink) return;

  const Tile tile = tile_of<1, kWalk>(header, entry);
  const C* factors =
      static_cast<const C*>(header.workspace) + entry.workspace + header.sum_kinds * int64_t(entry.partial.per_sum);
  factors += groups_of<1, kWalk>(entry).first;
  P* param = static_cast<P*>(entry.data[0]);
  const int64_t* walk = kWalk ? pool_of(params) + entry.cols : nullptr;
  const Cut cut = kWalk ? Cut() : cut_of<kVector>(tile, param);
  for_elements<kVector>(
      tile, cut,
      [&](int64_t element, uint32_t place) {
        P w[kVector];
        load_vector(param + element, w);
        Factors<C, false> at(factors, tile, place);
#pragma unroll
        for (int j = 0; j < kVector; ++j) w[j] = narrow(widen(w[j]) * at.next(), P());
        store_vector(param + element, w, false);
      },
      [&](int64_t element, uint32_t place) {
        P* address = param + (kWalk ? walk_to<1>(walk, element, 0) : element);
        store(address, narrow(widen(load(address)) * Factors<C, false>(factors, tile, place).next(), P()));
      });
}

template <class P, bool kWalk>
FASTWRS_KERNEL void __launch_bounds__(kMostThreads, kResidentBlocks)
    project_kernel(FASTWRS_PARAMETER(Params<1>) params) {
  if (is_skipped(params.header)) return;
  project_tile<P, kWalk>(params, tensor_of(params, block_index()));
  advance_steps(params);
}

}  // namespace fastwrs::cuda
