// The kernels. A block takes one tile of one tensor: it updates the tile, and where norms are to be set and the tile
// holds whole norm groups it keeps the new weights in shared memory until their norms are known, so that every array is
// read and written once. Where a group does not fit a tile, step_kernel writes the weights and leaves sums of squares
// in the workspace, and project_kernel finishes them and scales.
//
// Whether this step counts (found_inf), rescales or shrinks is decided here, from numbers on the device: a captured
// graph replays it rightly.
#pragma once

#include "../rules/all.h"
#include "tiles.cuh"

namespace fastwrs::cuda {

// Threads of a block at most, and how many blocks of so many a multiprocessor should have registers for.
constexpr uint32_t kMostThreads = 256, kResidentBlocks = 2;

// ---- the step ------------------------------------------------------------------------------------------------------

template <class Rule, int kSlots, class P, class G, class S, bool kWalk>
class Stepper {
  using C = compute_t<P>;
  static constexpr int kArrays = 2 + kSlots, kVector = VectorOf<P, G, S>::kElements;
  using RuleRecord = Record<C, typename Rule::template Constants<C>>;

 public:
  FASTWRS_DEVICE Stepper(const Params<kArrays>& params, uint32_t tensor)
      : header_(params.header),
        entry_(params.entries[tensor]),
        record_(record_of<RuleRecord>(params, params.entries[tensor].record)) {
    const Moment<C> moment = moment_of(record_.control, entry_.step);
    scalars_ = Rule::prepare(record_.constants, moment.lr, moment.t, moment.t == C(1) || (entry_.flags & kFresh));
    rescale_ = moment.rescale;
    shrink_ = moment.shrink;
    pool_ = pool_of(params);
    walk_ = kWalk ? pool_of(params) + entry_.cols : nullptr;
    tile_ = tile_of<kArrays, kWalk>(header_, entry_);
    wants_ = entry_.kind == TileKind::kElements ? 0 : wanted_sums(rescale_, shrink_, is_measured());
    // One group and one sum: the threads collect it while they update. Otherwise sums are taken from lists on chip.
    sums_at_once_ = tile_.cols == 1 && tile_.unit_size == tile_.n && !is_measured();
    const bool whole_groups = entry_.kind == TileKind::kUnits || entry_.kind == TileKind::kStrip;
    holds_ = whole_groups && (rescale_ || shrink_);
  }

  FASTWRS_DEVICE void run() {
    const uint32_t groups = tile_.n / tile_.unit_size * tile_.cols;
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
    sum_groups<C>(tile_, lists_, wants_, partial);
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

 private:
  struct Constant {
    C factor;
    FASTWRS_DEVICE C next() const { return factor; }
  };

  FASTWRS_DEVICE bool is_measured() const { return entry_.measure != kNone; }
  FASTWRS_DEVICE Projection<C> projection() const { return projection_of(record_.control, rescale_, shrink_); }
  FASTWRS_DEVICE P* param() const { return static_cast<P*>(entry_.data[0]); }
  FASTWRS_DEVICE G* grad() const { return static_cast<G*>(entry_.data[1]); }
  FASTWRS_DEVICE S* state(int s) const { return static_cast<S*>(entry_.data[2 + s]); }

  // Which lists of values this tile needs on chip: those of the sums that are wanted, or the weights alone.
  FASTWRS_DEVICE void lay_out(uint32_t groups) {
    if (!kWalk) {
      cut_ = cut_of<kVector>(tile_, param());
      const int64_t first = tile_.base + cut_.head;
      aligned_ = is_aligned(grad() + first) ? 1 : 0;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) aligned_ |= is_aligned(state(s) + first) ? 2u << s : 0;
    }
    lists_.there = (sums_at_once_ ? 0 : wants_) | (holds_ ? 1u << kUpdated : 0);
    const uint32_t shift = (kVector - cut_.head % kVector) % kVector;
    lists_.first = factors_place(groups) + round_to_words(groups * uint32_t(sizeof(C))) + shift * uint32_t(sizeof(C));
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

  // Elements of an array from `element` on.
  template <int N, class T>
  FASTWRS_DEVICE void read(const T* array, int64_t element, int k, T (&x)[N]) const {
    if constexpr (N == 1) {
      x[0] = load(array + (kWalk ? walk_to<kArrays>(walk_, element, k) : element));
    } else if (k == 0 || (aligned_ >> (k - 1) & 1)) {
      load_vector(array + element, x);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = load(array + element + j);
    }
  }
  template <int N, class T>
  FASTWRS_DEVICE void write(T* array, int64_t element, int k, const T (&x)[N], bool keep = false) const {
    if constexpr (N == 1) {
      store(array + (kWalk ? walk_to<kArrays>(walk_, element, k) : element), x[0]);
    } else if (k == 0 || (aligned_ >> (k - 1) & 1)) {
      store_vector(array + element, x, keep);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) store(array + element + j, x[j]);
    }
  }

  template <int N>
  FASTWRS_DEVICE void update(int64_t element, uint32_t place) {
    P w[N];
    G g[N];
    S s[kSlots == 0 ? 1 : kSlots][N];
    read(param(), element, 0, w);
    read(grad(), element, 1, g);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) read(state(k), element, 2 + k, s[k]);

    C weight[N], gradient[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      weight[j] = widen(w[j]);
      gradient[j] = widen(g[j]);
    }
    if (header_.grad_scale) {
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
#pragma unroll
    for (int j = 0; j < N; ++j) {
      C states[kSlots == 0 ? 1 : kSlots];
#pragma unroll
      for (int k = 0; k < kSlots; ++k) states[k] = widen(s[k][j]);
      const C u = Rule::template update<kSlots>(weight[j], gradient[j], states, scalars_);
      if (lists_.there >> kUpdate & 1) on_chip<C>(lists_.of<C>(kUpdate, tile_))[place + j] = u;
#pragma unroll
      for (int k = 0; k < kSlots; ++k) s[k][j] = narrow(states[k], S());
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) write(state(k), element, 2 + k, s[k]);
    if (!holds_) {
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

  const Header& header_;
  const Entry<kArrays>& entry_;
  const RuleRecord& record_;
  typename Rule::template Scalars<C> scalars_;
  Tile tile_;
  const int64_t *pool_, *walk_;
  Lists lists_;
  Compensated<C> sum_;
  Cut cut_;
  uint32_t aligned_ = 0, wants_;
  bool rescale_, shrink_, sums_at_once_, holds_;
};

// Any non-zero found_inf, NaN too, skips everything.
FASTWRS_DEVICE bool is_skipped(const Header& header) {
  return header.found_inf && load_shared_by_all(header.found_inf) != 0;
}

template <class Rule, int kSlots, class P, class G, class S, bool kWalk>
FASTWRS_KERNEL void __launch_bounds__(kMostThreads, kResidentBlocks)
    step_kernel(FASTWRS_PARAMETER(Params<2 + kSlots>) params) {
  if (is_skipped(params.header)) return;
  if (block_index() < params.header.blocks) {
    const uint32_t tensor = tensor_of(params, block_index());
    Stepper<Rule, kSlots, P, G, S, kWalk>(params, tensor).run();
  }
  advance_steps(params);
}

// ---- what follows where a group does not fit a tile ----------------------------------------------------------------

// Finishes the sums of some groups of one unit, entry.tile of them, in a fixed order; they become factors.
template <class C, bool kWalk>
FASTWRS_DEVICE void finish_sums(const Params<1>& params, uint32_t tensor) {
  const Header& header = params.header;
  const Entry<1>& entry = params.entries[tensor];
  const Control<C>& control = record_of<Control<C>>(params, entry.record);
  const Moment<C> moment = moment_of(control, entry.step);
  const Projection<C> projection = projection_of(control, moment.rescale, moment.shrink);
  const int64_t* about = entry.measure == kNone ? nullptr : pool_of(params) + entry.measure;
  const uint32_t wants = wanted_sums(moment.rescale, moment.shrink, about != nullptr);
  if (wants == 0) return;

  // Partial sums lie [sum][unit][row of tiles][column]; behind them is a factor for each group.
  const int64_t cols = kWalk ? 1 : entry.cols, row_tiles = entry.partial.row_tiles, per_sum = entry.partial.per_sum;
  const uint32_t strips = strips_of(uint32_t(cols), entry.tile), block = block_index() - entry.first_block;
  const int64_t unit = block / strips, first_col = int64_t(block % strips) * entry.tile;
  const uint32_t groups = uint32_t(cols - first_col < entry.tile ? cols - first_col : entry.tile);
  C* workspace = static_cast<C*>(header.workspace) + entry.workspace;
  const C* sums_of = workspace + unit * row_tiles * cols + first_col;
  C* factors = workspace + header.sum_kinds * per_sum;

  const int64_t first_group = unit * cols + first_col;
  const auto conclude = [&](const C(&sums)[kSums], uint32_t group) {
    C norm[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) norm[k] = square_root(sums[k]);
    const C factor = projection_factor(projection, norm[kBefore], norm[kUpdated]);
    store(factors + first_group + group, factor);
    if (about) measure(measured_row(header, about, first_group + group), norm, factor, projection);
  };
  C* partial = reinterpret_cast<C*>(shared_memory());
  if (groups == 1) {
    C sums[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      sums[k] = 0;
      if (!(wants >> k & 1)) continue;
      Compensated<C> mine;
      for (int64_t row = thread_index(); row < row_tiles; row += thread_count())
        mine.add(load(sums_of + k * per_sum + row));
      sums[k] = sum_over_block(mine.sum, partial + k * (thread_count() / kWarp));
    }
    if (thread_index() == 0) conclude(sums, 0);
    return;
  }
  const uint32_t lanes = lanes_for(groups, thread_count());
#pragma unroll 1
  for (uint32_t task = thread_index(); task < groups * lanes; task += thread_count()) {
    const uint32_t group = task % groups, lane = task / groups;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      if (!(wants >> k & 1)) continue;
      Compensated<C> sum;
      for (int64_t row = lane; row < row_tiles; row += lanes) sum.add(load(sums_of + k * per_sum + row * cols + group));
      partial[(k * lanes + lane) * groups + group] = sum.sum;
    }
  }
  barrier();  // the sums of the lanes are complete
#pragma unroll 1
  for (uint32_t group = thread_index(); group < groups; group += thread_count()) {
    C sums[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = wants >> k & 1 ? sum_of_lanes(partial, k, lanes, groups, group) : C(0);
    conclude(sums, group);
  }
}

template <class P, bool kWalk>
FASTWRS_KERNEL void __launch_bounds__(kMostThreads, kResidentBlocks)
    finish_kernel(FASTWRS_PARAMETER(Params<1>) params) {
  if (is_skipped(params.header)) return;
  finish_sums<compute_t<P>, kWalk>(params, tensor_of(params, block_index()));
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
