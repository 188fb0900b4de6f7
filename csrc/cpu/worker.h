// What one thread does with some items of a tensor: gather (only where memory does not read in a straight line),
// update, sum, scale, scatter. This is the tile loop.
#pragma once

#include <cstring>
#include <type_traits>

#include "../norms/looks.h"
#include "gather.h"
#include "origin.h"
#include "work.h"

namespace fastwrs::cpu {

template <class P>
class Worker {
  using C = compute_t<P>;
  static constexpr bool kInPlace = std::is_same_v<P, C>;

 public:
  // Scratch for the largest of the call's tensors; allocated before anything is written.
  void reserve(const Call<P>& call, const std::vector<Work<C>>& looks, const std::vector<Work<C>>& works) {
    int64_t tile = 0, sums = 0, storage = 0;
    bool strided = false;
    for (size_t i = 0; i < looks.size() + works.size(); ++i) {
      const TensorPlan& p = (i < looks.size() ? looks[i] : works[i - looks.size()]).plan;
      if (p.items == 0) continue;
      tile = std::max(tile, p.tile_size());
      strided = strided || p.geometry.strided();
      if (!p.sums()) continue;
      sums = std::max(sums, p.path == TensorPlan::kOnePass ? p.units_per_tile * p.geometry.cols : p.strip);
      storage = std::max(storage, Accumulator<C>::storage_for(p.sum_columns(), p.tile_size()));
      if (p.path == TensorPlan::kTwoPhases) {  // the finish sums the partial sums of a strip
        storage = std::max(storage, Accumulator<C>::storage_for(p.strip, p.row_items * p.strip));
      }
    }
    for (const Work<C>& w : looks) {
      if (w.look >= 0) storage = std::max(storage, Accumulator<C>::storage_for(1, w.plan.geometry.groups()));
    }
    staged_.resize(kInPlace ? 0 : tile);
    for (auto* run : {&updated_, &step_, &grad_, &told_[0], &told_[1]}) run->resize(kLongestRun);
    for (auto& s : sums_) s.resize(sums);
    origins_.resize(looks.empty() ? 0 : sums);
    for (int k = 0; k < kSums; ++k) {
      storage_[k].resize(storage);
      accumulators_[k].levels = nullptr;
    }
    factors_.resize(std::max<int64_t>(sums, 16 * 64));
    for (int k = 0; k < kMaxArrays; ++k) gathered_[k].resize(strided ? tile * call.element_size(k) : 0);
  }

  // The first pass of a rule that looks: the sums of every row (or parts of them), and states if it changes these.
  void look_at(const Call<P>& call, const Work<C>& w, int64_t first_item, int64_t end_item) {
    const TensorPlan& p = w.plan;
    const bool writes = call.look.changes_states;
    const auto run = [&](const Cursor& at, int64_t n) {
      for (int64_t i = 0; i < n; i += p.run) look_at_run(call, w, advance(call, w, at, i), std::min(p.run, n - i));
    };
    if (p.path == TensorPlan::kOnePass) {
      const auto [begin, end] = p.units_of(first_item, end_item);
      const int64_t size = p.geometry.unit_size(), cols = p.geometry.cols;
      if (looks_at_rows(call, w)) return look_at_rows(call, w, begin, end);
      for (int64_t unit = begin; unit < end; unit += p.units_per_tile) {
        const int64_t units = std::min(p.units_per_tile, end - unit);
        start_rows(call, w, unit * cols, units * cols, cols, size);
        with_run(call, w, unit * size, units * size, writes, [&](const Cursor& at) { run(at, units * size); });
        for (int k = 0; k < call.look.sums; ++k) {
          std::memcpy(rows_of_look(call, w, k) + unit * cols, sums_[k].data(), units * cols * sizeof(C));
        }
      }
      return;
    }
    for (int64_t item = first_item; item < end_item; ++item) {
      const Block b = p.block(item);
      start_rows(call, w, b.unit * p.geometry.cols + b.first_column, b.columns, b.columns, b.rows * b.columns);
      for_runs(call, w, b, writes, run);
      leave_partial_sums(call, p, b);
    }
  }

  // The sums of rows that came in parts.
  void finish_rows(const Call<P>& call, const Work<C>& w, int64_t first_item, int64_t end_item) {
    for (int64_t item = first_item; item < end_item; ++item) {
      const Block b = finish_partial_sums(call, w.plan, item);
      const int64_t row = b.unit * w.plan.geometry.cols + b.first_column;
      for (int k = 0; k < call.look.sums; ++k) {
        std::memcpy(rows_of_look(call, w, k) + row, sums_[k].data(), b.columns * sizeof(C));
      }
    }
  }

  // Makes of the sums of all rows of a tensor what the second pass is told.
  void settle(const Call<P>& call, const Work<C>& w, int64_t /*first_item*/, int64_t /*end_item*/) {
    call.look.kind == Look::kGate ? open_gate(call, w) : find_shift(call, w);
  }

  void first_phase(const Call<P>& call, const Work<C>& w, int64_t first_item, int64_t end_item) {
    const TensorPlan& p = w.plan;
    if (p.path == TensorPlan::kOnePass) {
      const auto [begin, end] = p.units_of(first_item, end_item);
      if (takes_rows(call, w)) return take_rows(call, w, begin, end);
      for (int64_t unit = begin; unit < end; unit += p.units_per_tile) {
        const int64_t units = std::min(p.units_per_tile, end - unit);
        with_run(call, w, unit * p.geometry.unit_size(), units * p.geometry.unit_size(), call.writes,
                 [&](const Cursor& at) { tile(call, w, at, unit, units); });
      }
      return;
    }
    for (int64_t item = first_item; item < end_item; ++item) {
      const Block b = p.block(item);
      start_sums(call, p, b.columns, b.rows * b.columns);
      for_runs(call, w, b, call.writes, [&](const Cursor& at, int64_t n) {
        for (int64_t i = 0; i < n; i += p.run) {
          const int64_t m = std::min(p.run, n - i);
          Cursor run = advance(call, w, at, i);
          C* updated = kInPlace ? reinterpret_cast<C*>(run.array[0]) : updated_.data();
          update(call, w, run, m, updated, [&] {
            if (kInPlace || !call.writes || !call.update) return;
            // Two phases take the norm of what is stored.
            call.store.narrow(updated, reinterpret_cast<P*>(run.array[0]), m);
            if (p.wants[kUpdated]) call.store.widen(reinterpret_cast<P*>(run.array[0]), updated, m);
          });
        }
      });
      leave_partial_sums(call, p, b);
    }
  }

  // Second phase: the sums of strips of units, one for each item, become factors.
  void finish(const Call<P>& call, const Work<C>& w, int64_t first_item, int64_t end_item) {
    for (int64_t item = first_item; item < end_item; ++item) {
      const Block b = finish_partial_sums(call, w.plan, item);
      const int64_t group = b.unit * w.plan.geometry.cols + b.first_column;
      conclude(call, w, group, b.columns, 0, factors(call, w.plan) + group);
    }
  }

  // Third: the factors are applied.
  void scale(const Call<P>& call, const Work<C>& w, int64_t first_item, int64_t end_item) {
    for (int64_t item = first_item; item < end_item; ++item) {
      const Block b = w.plan.block(item);
      const C* factor = factors(call, w.plan) + b.unit * w.plan.geometry.cols + b.first_column;
      for_runs(call, w, b, true, [&](const Cursor& at, int64_t n) {
        P* param = reinterpret_cast<P*>(at.array[0]);
        const int64_t whole_rows = kRun / b.columns * b.columns;
        for (int64_t i = 0; i < n; i += whole_rows) {
          const int64_t m = std::min(whole_rows, n - i);
          const C* x = reinterpret_cast<const C*>(param + i);
          if (!kInPlace) {
            call.store.widen(param + i, updated_.data(), m);
            x = updated_.data();
          }
          apply(call, x, param + i, m, factor, b.columns);
        }
      });
    }
  }

 private:
  static C* partial(const Call<P>& call, const TensorPlan& p, int sum, const Block& b) {
    return call.workspace + p.workspace + sum * p.sum_size() + (b.unit * p.row_items + b.row_item) * p.geometry.cols +
           b.first_column;
  }
  static C* factors(const Call<P>& call, const TensorPlan& p) {
    return call.workspace + p.workspace + kSums * p.sum_size();
  }

  static C* rows_of_look(const Call<P>& call, const Work<C>& w, int sum) {
    return call.workspace + w.look + call.look.head + sum * w.plan.geometry.groups();
  }

  // Opens a gate or not.
  void open_gate(const Call<P>& call, const Work<C>& w) {
    const int64_t rows = w.plan.geometry.groups(), numel = w.plan.geometry.numel();
    C* gate = call.workspace + w.look;
    C largest = 0, sums[kGateSums];
    for (int64_t row = 0; row < rows; ++row) {
      for (int k = 0; k < kGateSums; ++k) sums[k] = rows_of_look(call, w, k)[row];
      largest = maximum(largest, gate_cosine(sums, w.look_eps));
    }
    gate[kGateAlong] = 0;
    if (gate_opens(largest, w.look_other, numel / rows)) {
      gate[kGateDecision] = C(int(Gate::kByChannel));
      for (int64_t row = 0; row < rows; ++row) {
        for (int k = 0; k < kGateSums; ++k) sums[k] = rows_of_look(call, w, k)[row];
        rows_of_look(call, w, kStepWeight)[row] = gate_along(sums, w.look_eps);
      }
      return;
    }
    for (int k = 0; k < kGateSums; ++k) {
      start_sum(call, k, 1, rows);
      call.sum.add_values(accumulators_[k], rows_of_look(call, w, k), rows);
      call.sum.finish(accumulators_[k], &sums[k]);
    }
    const bool opens = gate_opens(gate_cosine(sums, w.look_eps), w.look_other, numel);
    gate[kGateDecision] = C(int(opens ? Gate::kWhole : Gate::kClosed));
    if (opens) gate[kGateAlong] = gate_along(sums, w.look_eps);
  }

  // Slope and mean of every channel, in the place of its sums.
  void find_shift(const Call<P>& call, const Work<C>& w) {
    const int64_t channels = w.plan.geometry.groups();
    const C length = C(w.plan.geometry.numel() / channels);
    C *slope = rows_of_look(call, w, kSlope), *mean = rows_of_look(call, w, kMean);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const C sums[] = {slope[channel], mean[channel]},
              origin = origin_of_channel<P>(*w.view, w.plan.geometry, channel);
      shift_of_channel(sums, origin, length, w.look_other, w.look_eps, slope + channel, mean + channel);
    }
  }

  // Begins with `count` rows of a look, from `first` on, of which `cols` lie side by side.
  void start_rows(const Call<P>& call, const Work<C>& w, int64_t first, int64_t count, int64_t cols, int64_t elements) {
    start_sums(call, w.plan, cols, elements);
    if (call.look.kind != Look::kShift || w.look < 0) return;
    first_row_ = first;
    for (int64_t i = 0; i < count; ++i) origins_[i] = origin_of_channel<P>(*w.view, w.plan.geometry, first + i);
  }

  void leave_partial_sums(const Call<P>& call, const TensorPlan& p, const Block& b) {
    for (int k = 0; k < kSums; ++k) {
      if (p.wants[k]) std::memcpy(partial(call, p, k, b), sums_[k].data(), b.columns * sizeof(C));
    }
  }
  // Of one strip of one unit, in a fixed order.
  Block finish_partial_sums(const Call<P>& call, const TensorPlan& p, int64_t item) {
    Block b = p.block(item / p.strips * p.row_items * p.strips + item % p.strips);
    for (int k = 0; k < kSums; ++k) {
      if (!p.wants[k]) continue;
      start_sum(call, k, b.columns, p.row_items * b.columns);
      for (b.row_item = 0; b.row_item < p.row_items; ++b.row_item) {
        call.sum.add_values(accumulators_[k], partial(call, p, k, b), b.columns);
      }
      call.sum.finish(accumulators_[k], sums_[k].data());
    }
    return b;
  }

  static Cursor cursor(const Call<P>& call, const Work<C>& w, int64_t begin) {
    Cursor at{};
    at.element = begin;
    for (int k = 0; k < w.view->arrays; ++k) {
      at.array[k] = static_cast<char*>(w.view->array[k].data) + begin * call.element_size(k);
    }
    return at;
  }
  static Cursor advance(const Call<P>& call, const Work<C>& w, const Cursor& at, int64_t elements) {
    Cursor to{};
    to.element = at.element + elements;
    for (int k = 0; k < w.view->arrays; ++k) to.array[k] = at.array[k] + elements * call.element_size(k);
    return to;
  }

  // Calls body(cursor) with n elements of the walk, from `begin`, in a straight line: in place, or gathered before and
  // scattered after where memory is strided.
  template <class Body>
  void with_run(const Call<P>& call, const Work<C>& w, int64_t begin, int64_t n, bool writes, const Body& body) {
    const TensorView& view = *w.view;
    if (!w.plan.geometry.strided()) return body(cursor(call, w, begin));
    Cursor at{};
    at.element = begin;
    for (int k = 0; k < call.arrays(view); ++k) {
      at.array[k] = gathered_[k].data();
      gather(view, w.plan.geometry, k, call.element_size(k), begin, n, gathered_[k].data());
    }
    body(at);
    for (int k = 0; writes && k < call.arrays(view); ++k) {
      if (k == 1 && call.grad_scale == 0) continue;
      scatter(view, w.plan.geometry, k, call.element_size(k), begin, n, gathered_[k].data());
    }
  }

  // The straight runs of a block: one, unless it is a strip that is narrower than its tensor.
  template <class Body>
  void for_runs(const Call<P>& call, const Work<C>& w, const Block& b, bool writes, const Body& body) {
    const Geometry& g = w.plan.geometry;
    const int64_t begin = b.unit * g.unit_size() + b.first_row * g.cols + b.first_column;
    if (b.columns == g.cols) {
      return with_run(call, w, begin, b.rows * b.columns, writes,
                      [&](const Cursor& at) { body(at, b.rows * b.columns); });
    }
    for (int64_t row = 0; row < b.rows; ++row) {
      with_run(call, w, begin + row * g.cols, b.columns, writes, [&](const Cursor& at) { body(at, b.columns); });
    }
  }

  // Sum k begins with a set of groups: `cols` columns, `elements` in all.
  void start_sum(const Call<P>& call, int k, int64_t cols, int64_t elements) {
    group_size_[k] = group_left_[k] = elements;
    next_sum_[k] = sums_[k].data();
    Accumulator<C>& a = accumulators_[k];
    if (a.cols == cols && a.levels == storage_[k].data()) return;  // as `finish` has left it
    a.cols = cols;
    a.width = Accumulator<C>::width_for(cols);
    a.levels = storage_[k].data();
    call.sum.start(a);
  }
  void start_sums(const Call<P>& call, const TensorPlan& p, int64_t cols, int64_t elements) {
    for (int k = 0; k < kSums; ++k) {
      if (p.wants[k]) start_sum(call, k, cols, elements);
    }
  }

  // Adds the products of two runs to sum k, or without y the values of one; where a set of groups ends inside it, its
  // sums are written and the next set begins.
  void feed(const Call<P>& call, int k, const C* x, const C* y, int64_t n) {
    while (n > 0) {
      const int64_t m = std::min(n, group_left_[k]);
      if (!y) {
        call.sum.add_values(accumulators_[k], x, m);
      } else if (x == y) {
        call.sum.add_squares(accumulators_[k], x, m);
      } else {
        call.sum.add_products(accumulators_[k], x, y, m);
      }
      x += m;
      y = y ? y + m : y;
      n -= m;
      group_left_[k] -= m;
      if (group_left_[k] > 0) return;
      finish_group(call, k);
    }
  }
  void finish_group(const Call<P>& call, int k) {
    call.sum.finish(accumulators_[k], next_sum_[k]);
    next_sum_[k] += accumulators_[k].cols;
    group_left_[k] = group_size_[k];
  }

  void feed(const Call<P>& call, int k, const C* x, int64_t n) { feed(call, k, x, x, n); }

  // Calls body(begin, count, channel) for the parts of a run that lie in one channel each.
  template <class Body>
  static void for_channels(const Geometry& g, int64_t element, int64_t n, const Body& body) {
    int64_t channel = g.channel_of(element), left = g.channel_inner - element % g.channel_inner;
    for (int64_t i = 0; i < n; i += left, left = g.channel_inner) {
      left = std::min(left, n - i);
      body(i, left, channel);
      if (++channel == g.channels) channel = 0;
    }
  }

  void look_at_run(const Call<P>& call, const Work<C>& w, const Cursor& at, int64_t n) {
    const Geometry& g = w.plan.geometry;
    LookArgs args = arguments_of_look(call, w, at, n);
    args.weights = args.distances = updated_.data();
    args.slope = grad_.data();
    args.step = step_.data();
    if (!call.look.changes_states) {
      args.origin_each = told_[0].data();
      for_channels(g, at.element, n, [&](int64_t begin, int64_t count, int64_t channel) {
        std::fill_n(told_[0].data() + begin, count, origins_[channel - first_row_]);
      });
    }
    call.look_at(args);
    if (w.look < 0) return;
    if (call.look.changes_states) {
      feed(call, kStepWeight, step_.data(), updated_.data(), n);
      feed(call, kGradWeight, grad_.data(), updated_.data(), n);
      feed(call, kGradGrad, grad_.data(), n);
      feed(call, kWeightWeight, updated_.data(), n);
    } else {
      feed(call, kDistance, updated_.data(), nullptr, n);
      feed(call, kSquaredDistance, updated_.data(), n);
    }
  }

  static LookArgs arguments_of_look(const Call<P>& call, const Work<C>& w, const Cursor& at, int64_t n) {
    LookArgs args{};
    args.param = at.array[0];
    args.n = n;
    args.grad = at.array[1];
    for (int k = 2; k < w.view->arrays; ++k) args.state[k - 2] = at.array[k];
    args.scalars = w.scalars;
    args.grad_scale = call.grad_scale;
    args.maximize = w.maximize;
    args.unscales = !w.unscales_late;
    return args;
  }

  static bool looks_at_rows(const Call<P>& call, const Work<C>& w) {
    const bool unscales = call.look.changes_states && call.grad_scale != 0;
    return w.look >= 0 && !unscales && w.plan.geometry.cols == 1 && !w.plan.geometry.strided();
  }

  // The usual look by itself: every row is summed in the loop that reads it. The same bits as by `look_at_run`.
  void look_at_rows(const Call<P>& call, const Work<C>& w, int64_t begin, int64_t end) {
    const int64_t size = w.plan.geometry.unit_size();
    C sums[kMostSums];
    LookArgs args = arguments_of_look(call, w, cursor(call, w, begin * size), size);
    args.sums = sums;
    for (int k = 0; k < call.look.sums; ++k) args.levels[k] = levels_[k];
    for (int64_t row = begin; row < end; ++row) {
      if (call.look.kind == Look::kShift) args.origin = origin_of_channel<P>(*w.view, w.plan.geometry, row);
      call.look_at(args);
      for (int k = 0; k < call.look.sums; ++k) rows_of_look(call, w, k)[row] = sums[k];
      step_over(call, w, size, args);
    }
  }

  // What a look at the tensor tells of a run.
  void ask(const Call<P>& call, const Work<C>& w, int64_t element, UpdateArgs& args) {
    if (w.look < 0) return;
    const C* found = call.workspace + w.look;
    args.tells = 1;
    if (call.look.kind == Look::kGate) {
      args.tells = found[kGateDecision] != C(int(Gate::kClosed));
      args.told[0] = found[kGateAlong];
      if (found[kGateDecision] != C(int(Gate::kByChannel))) return;
    }
    const Geometry& g = w.plan.geometry;
    const bool one_channel = g.channel_inner - element % g.channel_inner >= args.n;
    for (int k = 0; k < call.look.each; ++k) {
      const C* of_channel = found + call.look.head + k * g.channels;
      if (one_channel) {
        args.told[k] = of_channel[g.channel_of(element)];
        continue;
      }
      args.told_each[k] = told_[k].data();
      for_channels(g, element, args.n, [&](int64_t begin, int64_t count, int64_t channel) {
        std::fill_n(told_[k].data() + begin, count, of_channel[channel]);
      });
    }
  }

  // One run through the rule, with the sums that are wanted; `stored` runs between the update and the sum over its
  // result.
  template <class Stored>
  void update(const Call<P>& call, const Work<C>& w, const Cursor& at, int64_t n, C* updated, const Stored& stored) {
    const TensorPlan& p = w.plan;
    const P* param = reinterpret_cast<const P*>(at.array[0]);
    if (!kInPlace && (p.wants[kBefore] || !call.update)) call.store.widen(param, updated, n);
    if (p.wants[kBefore]) feed(call, kBefore, kInPlace ? reinterpret_cast<const C*>(param) : updated, n);
    if (call.update) {
      UpdateArgs args = arguments(call, w, at, n, updated);
      args.step = p.wants[kUpdate] ? step_.data() : nullptr;
      ask(call, w, at.element, args);
      call.update(args);
      if (p.wants[kUpdate]) feed(call, kUpdate, step_.data(), n);
      if (p.wants[kGrad]) feed(call, kGrad, widened(call, at.array[1], n), n);
    }
    stored();
    if (p.wants[kUpdated]) feed(call, kUpdated, updated, n);
  }

  // A run of the gradient in the compute type: where it lies if it has that type, else a copy.
  const C* widened(const Call<P>& call, const void* grad, int64_t n) {
    if (call.dtypes.grad == DtypeOf<C>::value) return static_cast<const C*>(grad);
    switch (call.dtypes.grad) {
      case Dtype::kFloat32:
        return widened_copy(static_cast<const float*>(grad), n);
      case Dtype::kFloat64:
        return widened_copy(static_cast<const double*>(grad), n);
      case Dtype::kBFloat16:
        return widened_copy(static_cast<const bfloat16*>(grad), n);
      case Dtype::kFloat16:
        break;
    }
    return widened_copy(static_cast<const float16*>(grad), n);
  }
  template <class G>
  const C* widened_copy(const G* grad, int64_t n) {
    for (int64_t i = 0; i < n; ++i) grad_[i] = C(widen(grad[i]));
    return grad_.data();
  }

  static UpdateArgs arguments(const Call<P>& call, const Work<C>& w, const Cursor& at, int64_t n, C* updated) {
    UpdateArgs args{};
    args.param = at.array[0];
    args.grad = at.array[1];
    for (int k = 2; k < w.view->arrays; ++k) args.state[k - 2] = at.array[k];
    args.updated = updated;
    args.scalars = w.scalars;
    args.grad_scale = call.look_at && !w.unscales_late ? 0 : call.grad_scale;
    args.maximize = w.maximize;
    args.n = n;
    return args;
  }

  // What a look tells is the same for a whole row where the row lies within a channel.
  static bool takes_rows(const Call<P>& call, const Work<C>& w) {
    const Geometry& g = w.plan.geometry;
    if (!call.rows || !w.plan.takes_rows() || call.grad_scale != 0) return false;
    return !call.look_at || g.channel_inner % g.unit_size() == 0;
  }

  // The usual work by itself: rows are updated and summed in one loop, in which an earlier row is scaled. A factor
  // takes a root and a division that nothing should wait for: in place, that of a row is made when the next one has
  // been summed, and used in the loop over the one after. The same bits as by `tile`.
  void take_rows(const Call<P>& call, const Work<C>& w, int64_t begin, int64_t end) {
    const TensorPlan& p = w.plan;
    const int64_t size = p.geometry.unit_size();
    UpdateArgs args = arguments(call, w, cursor(call, w, begin * size), size, staged_.data());
    args.measures = p.wants[kGrad];
    for (int k = 0; k < kSums; ++k) args.levels[k] = levels_[k];
    C sums[2][kSums], factor = 1, *last = nullptr, *behind = nullptr;  // of the last two rows; the factor of `behind`
    const auto find_factor = [&](int64_t row) {
      for (int k = 0; args.measures && k < kSums; ++k) sums_[k][0] = sums[row & 1][k];
      if (args.measures) return conclude(call, w, row, 1, 0, &factor);
      factor = projection_factor(p.projection, C(0), square_root(sums[row & 1][0]));  // all that is left to conclude
    };
    for (int64_t row = begin; row < end; ++row) {
      if (kInPlace) args.updated = args.param;
      args.sums = sums[row & 1];
      args.behind = behind;
      args.behind_factor = factor;
      if (call.look_at) ask(call, w, row * size, args);
      call.rows(args);
      if (kInPlace) {
        if (row > begin) find_factor(row - 1);
        behind = last;
        last = p.scales() ? static_cast<C*>(args.updated) : nullptr;
      } else {
        find_factor(row);
        P* out = static_cast<P*>(args.param);
        p.scales() ? call.store.scale(staged_.data(), out, size, factor) : call.store.narrow(staged_.data(), out, size);
      }
      step_over(call, w, size, args);
    }
    if (!kInPlace || begin == end) return;
    if (behind) call.store.scale(behind, reinterpret_cast<P*>(behind), size, factor);
    find_factor(end - 1);
    if (last) call.store.scale(last, reinterpret_cast<P*>(last), size, factor);
  }
  // From a row to the next one, in arguments of either pass.
  template <class Args>
  static void step_over(const Call<P>& call, const Work<C>& w, int64_t elements, Args& args) {
    const auto move = [elements](void*& pointer, int64_t size) {
      pointer = static_cast<char*>(pointer) + elements * size;
    };
    move(args.param, sizeof(P));
    if (w.view->arrays > 1) move(args.grad, size_of(call.dtypes.grad));
    for (int k = 2; k < w.view->arrays; ++k) move(args.state[k - 2], size_of(call.dtypes.state));
  }

  // Whole units that fit the cache together: updated, summed and scaled before the next ones are read.
  void tile(const Call<P>& call, const Work<C>& w, const Cursor& at, int64_t unit, int64_t units) {
    const TensorPlan& p = w.plan;
    const int64_t size = p.geometry.unit_size(), cols = p.geometry.cols, n = units * size;
    P* param = reinterpret_cast<P*>(at.array[0]);
    C* updated = kInPlace ? reinterpret_cast<C*>(param) : staged_.data();
    start_sums(call, p, cols, size);
    for (int64_t i = 0; i < n; i += p.run) {
      update(call, w, advance(call, w, at, i), std::min(p.run, n - i), updated + i, [] {});
    }
    for (int64_t u = 0; u < units; ++u) {
      conclude(call, w, (unit + u) * cols, cols, u * cols, factors_.data());
      if (!call.writes) continue;
      if (p.scales()) {
        apply(call, updated + u * size, param + u * size, size, factors_.data(), cols);
      } else if (!kInPlace && call.update) {
        call.store.narrow(updated + u * size, param + u * size, size);
      }
    }
  }

  // Turns the sums of `count` groups, from the place `group` of the walk, into factors, and records what is asked for.
  void conclude(const Call<P>& call, const Work<C>& w, int64_t group, int64_t count, int64_t first_sum, C* factor) {
    const TensorPlan& p = w.plan;
    for (int64_t j = 0; j < count; ++j) {
      C norm[kSums];
      for (int k = 0; k < kSums; ++k) norm[k] = p.wants[k] ? sums_[k][first_sum + j] : C(0);
      for (int k = 0; k < kSums; ++k) norm[k] = square_root(norm[k]);  // all at once
      factor[j] = projection_factor(p.projection, norm[kBefore], norm[kUpdated]);
      if (call.norms) call.norms[w.view->norm_row + p.geometry.norm_row(group + j)] = norm[kUpdated];
      if (call.measured && w.view->norm_row >= 0) {
        float* row = call.measured + kMeasured * (w.view->norm_row + p.geometry.norm_row(group + j));
        write_measured(row, norm, factor[j], p.projection);
      }
    }
  }

  // param = x * factor, one factor per column.
  void apply(const Call<P>& call, const C* x, P* param, int64_t n, const C* factor, int64_t cols) {
    if (cols == 1) return call.store.scale(x, param, n, factor[0]);
    if (cols > 64) return call.store.scale_columns(x, param, n, factor, cols);
    // A short pattern is repeated, so that whole vectors are multiplied.
    const int64_t period = std::min<int64_t>(16 * cols, n);
    std::memcpy(pattern_, factor, std::min(cols, period) * sizeof(C));
    for (int64_t filled = cols; filled < period; filled *= 2) {
      std::memcpy(pattern_ + filled, pattern_, std::min(filled, period - filled) * sizeof(C));
    }
    call.store.scale_columns(x, param, n, pattern_, period);
  }

  // staged_: a tile of updated weights that are not stored in the type they are computed in. updated_, step_, grad_,
  // told_: a run.
  std::vector<C> staged_, updated_, step_, grad_, told_[kMostEach], sums_[kSums], storage_[kSums], factors_;
  std::vector<C> origins_;  // of the rows that are looked at, the first of which is first_row_
  int64_t first_row_ = 0;
  std::vector<char> gathered_[kMaxArrays];
  C pattern_[16 * 64];
  C levels_[kSums][Accumulator<C>::storage_for(1, kUnitLimit)];  // of the row that is taken
  Accumulator<C> accumulators_[kSums];
  int64_t group_size_[kSums], group_left_[kSums];
  C* next_sum_[kSums];
};

}  // namespace fastwrs::cpu
