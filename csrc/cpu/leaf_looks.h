// The two passes of rules that look at whole tensors. A part of leaves.cpp, which is compiled once per instruction set.
#pragma once

#include <cstring>
#include <type_traits>

#include "../norms/looks.h"
#include "leaf_stores.h"
#include "leaf_sums.h"
#include "leaves.h"

namespace fastwrs::cpu {
inline namespace FASTWRS_ISA {

// The first pass of a rule with a gate: states, and what the gate's sums are made of. kSum: n is one block of the sums,
// which are made here, in lanes of their own for each; else their terms are left in scratch.
template <class Rule, class P, class G, class S, bool kSum>
inline void advance_run(const LookArgs& a, int64_t begin, int64_t n, compute_t<P>* __restrict lanes) {
  using C = compute_t<P>;
  constexpr int kSlots = Rule::kMaxSlots;
  const auto s = *static_cast<const typename Rule::template Scalars<C>*>(a.scalars);
  const P* __restrict param = static_cast<const P*>(a.param) + begin;
  G* __restrict grad = static_cast<G*>(a.grad) + begin;
  S* __restrict state0 = static_cast<S*>(a.state[0]) + begin;
  S* __restrict state1 = static_cast<S*>(a.state[1]) + begin;
  C* __restrict weights = static_cast<C*>(a.weights) + begin;
  C* __restrict slope = static_cast<C*>(a.slope) + begin;
  C* __restrict step = static_cast<C*>(a.step) + begin;
  const bool unscale = a.grad_scale != 0, writes = unscale && a.unscales;
  const C grad_scale = C(a.grad_scale), sign = a.maximize ? C(-1) : C(1);
  const int64_t turns = kSum ? Accumulator<C>::kTurns : 1, length = kSum ? Accumulator<C>::kLanes : n;
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC ivdep
    for (int64_t j = 0; j < length; ++j) {
      const int64_t i = turn * length + j;
      C g = C(widen(grad[i]));
      if (unscale) g = g / grad_scale;
      if (writes) grad[i] = narrow(g, G());
      g *= sign;
      C state[kSlots];
      state[0] = C(widen(state0[i]));
      if (kSlots > 1) state[1] = C(widen(state1[i]));
      Rule::advance(g, state, s);
      // The second pass reads what is stored: the gate judges the step that it will make of that.
      state0[i] = narrow(state[0], S());
      state[0] = C(widen(narrow(state[0], S())));
      if (kSlots > 1) {
        state1[i] = narrow(state[1], S());
        state[1] = C(widen(narrow(state[1], S())));
      }
      const C w = C(widen(param[i])), u = Rule::direction(g, state, s);
      if (kSum) {
        for (int k = 0; k < kGateSums; ++k) lanes[k * length + j] += gate_term(k, u, g, w);
      } else {
        weights[i] = w;
        slope[i] = g;
        step[i] = u;
      }
    }
  }
}

// The same where only the weights are read: how far each is from the origin of its channel.
template <class P, bool kSum, bool kEach>
inline void distances_run(const LookArgs& a, int64_t begin, int64_t n, compute_t<P>* __restrict lanes) {
  using C = compute_t<P>;
  const P* __restrict param = static_cast<const P*>(a.param) + begin;
  const C* __restrict origin_each = static_cast<const C*>(a.origin_each) + begin;
  C* __restrict distances = static_cast<C*>(a.distances) + begin;
  const C origin = C(a.origin);
  const int64_t turns = kSum ? Accumulator<C>::kTurns : 1, length = kSum ? Accumulator<C>::kLanes : n;
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC ivdep
    for (int64_t j = 0; j < length; ++j) {
      const int64_t i = turn * length + j;
      const C distance = C(widen(param[i])) - (kEach ? origin_each[i] : origin);
      if (kSum) {
        for (int k = 0; k < kShiftSums; ++k) lanes[k * length + j] += shift_term(k, distance);
      } else {
        distances[i] = distance;
      }
    }
  }
}

// Runs body(begin, n, lanes) over whole blocks, of which each sum gets one; the lanes of all sums lie one behind the
// other. Returns how many elements that were.
template <int kSums, class C, class Body>
inline int64_t sum_blocks(void* const* sums, int64_t n, const Body& body) {
  using Sum = Accumulator<C>;
  constexpr int64_t kBlock = Sum::kTurns * Sum::kLanes;
  int64_t done = 0;
  for (; at_a_block(static_cast<Sum*>(sums[0])) && n - done >= kBlock; done += kBlock) {
    C lanes[kSums * Sum::kLanes] = {};
    body(done, kBlock, lanes);
    for (int k = 0; k < kSums; ++k) {
      Sum& sum = *static_cast<Sum*>(sums[k]);
      std::memcpy(sum.levels, lanes + k * Sum::kLanes, Sum::kLanes * sizeof(C));
      close_block<typename Sixteen<C>::type>(sum);
    }
  }
  return done;
}

template <class Rule, class P, class G, class S>
void advance(const LookArgs& a) {
  using C = compute_t<P>;
  const int64_t done = sum_blocks<kGateSums, C>(
      a.sums, a.n, [&a](int64_t begin, int64_t n, C* lanes) { advance_run<Rule, P, G, S, true>(a, begin, n, lanes); });
  const int64_t n = a.n - done;
  if (n == 0) return;
  advance_run<Rule, P, G, S, false>(a, done, n, nullptr);
  if (!a.sums[0]) return;
  const auto sum = [&a](int k) -> Accumulator<C>& { return *static_cast<Accumulator<C>*>(a.sums[k]); };
  const C *weights = static_cast<C*>(a.weights) + done, *slope = static_cast<C*>(a.slope) + done;
  add_terms<C, Term::kProduct>(sum(kStepWeight), static_cast<C*>(a.step) + done, weights, n);
  add_terms<C, Term::kProduct>(sum(kGradWeight), slope, weights, n);
  add<C, true>(sum(kGradGrad), slope, n);
  add<C, true>(sum(kWeightWeight), weights, n);
}

template <class P>
void distances_from_origin(const LookArgs& a) {
  using C = compute_t<P>;
  const int64_t done = sum_blocks<kShiftSums, C>(
      a.sums, a.n, [&a](int64_t begin, int64_t n, C* lanes) { distances_run<P, true, false>(a, begin, n, lanes); });
  const int64_t n = a.n - done;
  if (n == 0) return;
  if (a.origin_each) return distances_run<P, false, true>(a, done, n, nullptr);
  distances_run<P, false, false>(a, done, n, nullptr);
  if (!a.sums[0]) return;
  const C* left = static_cast<C*>(a.distances) + done;
  add<C, false>(*static_cast<Accumulator<C>*>(a.sums[kDistance]), left, n);
  add<C, true>(*static_cast<Accumulator<C>*>(a.sums[kSquaredDistance]), left, n);
}

// The second pass. kReads: the rule looks at the gradient, where a first pass has done so once more. kEach: what is
// told differs within the run. kSum and kScale as in update_run.
template <class Rule, int kSlots, class P, class G, class S, bool kReads, bool kEach, bool kSum, bool kScale>
inline void update_told_run(const UpdateArgs& a, int64_t begin, int64_t n, compute_t<P>* __restrict lanes) {
  using C = compute_t<P>;
  using L = LookOf<Rule::kLook>;
  static_assert(kSlots <= 2, "of a rule that looks first");
  const auto s = *static_cast<const typename Rule::template Scalars<C>*>(a.scalars);
  const P* __restrict param = static_cast<const P*>(a.param) + begin;
  G* __restrict grad = static_cast<G*>(a.grad) + begin;
  S* __restrict state0 = static_cast<S*>(a.state[0]) + begin;
  const S* __restrict state1 = static_cast<const S*>(a.state[1]) + begin;
  C* __restrict updated = static_cast<C*>(a.updated) + begin;
  C* __restrict step = static_cast<C*>(a.step) + begin;
  C* __restrict behind = static_cast<C*>(a.behind) + begin;
  const C* __restrict told0_each = static_cast<const C*>(a.told_each[0]) + begin;
  const C* __restrict told1_each = static_cast<const C*>(a.told_each[1]) + begin;
  const bool unscale = a.grad_scale != 0, wants_step = !kSum && a.step != nullptr, tells = a.tells;
  const C grad_scale = C(a.grad_scale), sign = a.maximize ? C(-1) : C(1);
  const C told0 = C(a.told[0]), told1 = C(a.told[1]);
  const C behind_factor = C(a.behind_factor);
  const int64_t turns = kSum ? Accumulator<C>::kTurns : 1, length = kSum ? Accumulator<C>::kLanes : n;
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC ivdep
    for (int64_t j = 0; j < length; ++j) {
      const int64_t i = turn * length + j;
      C w = std::is_same_v<P, C> ? updated[i] : C(widen(param[i])), g = 0;
      if (kReads) {
        g = C(widen(grad[i]));
        if (unscale) {
          g = g / grad_scale;
          grad[i] = narrow(g, G());
        }
      }
      C state[2] = {};
      if (kSlots > 0) state[0] = C(widen(state0[i]));
      if (kSlots > 1) state[1] = C(widen(state1[i]));
      C told[kMostEach] = {kEach ? told0_each[i] : told0, C(0)};
      if (L::kEach > 1) told[1] = kEach ? told1_each[i] : told1;
      const C u = Rule::template update<kSlots>(w, g * sign, state, L::answer(told, tells), s);
      if constexpr (!L::kChangesStates) {
        if (kSlots > 0) state0[i] = narrow(state[0], S());
      } else if constexpr (Rule::kChangesStateAgain) {
        if (tells) state0[i] = narrow(state[0], S());
      }
      updated[i] = w;
      if (kSum) lanes[j] += w * w;
      if (kScale) behind[i] *= behind_factor;
      if (wants_step) step[i] = u;
    }
  }
}

// Whole blocks of a row that is summed, while the row before it is scaled. Returns how many elements that were.
template <class Rule, int kSlots, class P, class G, class S, bool kReads>
int64_t update_told_blocks(const UpdateArgs& a) {
  using C = compute_t<P>;
  using Sum = Accumulator<C>;
  constexpr int64_t kBlock = Sum::kTurns * Sum::kLanes;
  Sum* sum = static_cast<Sum*>(a.squares);
  int64_t done = 0;
  for (; a.n - done >= kBlock; done += kBlock) {
    C lanes[Sum::kLanes] = {};
    if (a.behind) {
      update_told_run<Rule, kSlots, P, G, S, kReads, false, true, true>(a, done, kBlock, lanes);
    } else {
      update_told_run<Rule, kSlots, P, G, S, kReads, false, true, false>(a, done, kBlock, lanes);
    }
    std::memcpy(sum->levels, lanes, Sum::kLanes * sizeof(C));
    close_block<typename Sixteen<C>::type>(*sum);
  }
  return done;
}

template <class Rule, int kSlots, class P, class G, class S, bool kReads>
void update_told(const UpdateArgs& a) {
  using C = compute_t<P>;
  auto* sum = static_cast<Accumulator<C>*>(a.squares);
  int64_t done = 0;
  if constexpr (std::is_same_v<P, C>) {
    if (at_a_block(sum)) done = update_told_blocks<Rule, kSlots, P, G, S, kReads>(a);
    if (a.behind && done < a.n) {
      C* behind = static_cast<C*>(a.behind) + done;
      scale_run<P>(behind, behind, a.n - done, C(a.behind_factor));
    }
  }
  if (done == a.n) return;
  if (a.told_each[0]) {
    update_told_run<Rule, kSlots, P, G, S, kReads, true, false, false>(a, done, a.n - done, nullptr);
  } else {
    update_told_run<Rule, kSlots, P, G, S, kReads, false, false, false>(a, done, a.n - done, nullptr);
  }
  if (sum) add<C, true>(*sum, static_cast<const C*>(a.updated) + done, a.n - done);
}

template <class Rule, int kSlots, class P, class G, class S>
void update_told(const UpdateArgs& a) {
  bool reads = true;
  if constexpr (LookOf<Rule::kLook>::kChangesStates) {
    reads = static_cast<const typename Rule::template Scalars<compute_t<P>>*>(a.scalars)->nesterov != 0;
  }
  reads ? update_told<Rule, kSlots, P, G, S, true>(a) : update_told<Rule, kSlots, P, G, S, false>(a);
}

}  // namespace FASTWRS_ISA
}  // namespace fastwrs::cpu
