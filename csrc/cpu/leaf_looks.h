// The first pass of rules that look at whole tensors. A part of leaves.cpp, which is compiled once per instruction set.
#pragma once

#include "../norms/looks.h"
#include "leaf_sums.h"
#include "leaves.h"

namespace fastwrs::cpu {
inline namespace FASTWRS_ISA {

// Of a rule with a gate: states, and what the gate's sums are made of. kSum: these are made here, of a
// whole row; else their terms are left in scratch.
template <class Rule, class P, class G, class S, bool kSum>
inline void advance_run(const LookArgs& a) {
  using C = compute_t<P>;
  constexpr int kSlots = Rule::kMaxSlots;
  const auto s = *static_cast<const typename Rule::template Scalars<C>*>(a.scalars);
  const P* __restrict param = static_cast<const P*>(a.param);
  G* __restrict grad = static_cast<G*>(a.grad);
  S* __restrict state0 = static_cast<S*>(a.state[0]);
  S* __restrict state1 = static_cast<S*>(a.state[1]);
  C* __restrict weights = static_cast<C*>(a.weights);
  C* __restrict slope = static_cast<C*>(a.slope);
  C* __restrict step = static_cast<C*>(a.step);
  const bool unscale = a.grad_scale != 0, writes = unscale && a.unscales;
  const C grad_scale = C(a.grad_scale), sign = a.maximize ? C(-1) : C(1);
  const auto at = [&](int64_t i, [[maybe_unused]] C* terms) {
    C g = C(widen(grad[i]));
    if (!kSum && unscale) g = g / grad_scale;
    if (!kSum && writes) grad[i] = narrow(g, G());
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
    if constexpr (kSum) {
      for (int k = 0; k < kGateSums; ++k) terms[k] = gate_term(k, u, g, w);
    } else {
      weights[i] = w;
      slope[i] = g;
      step[i] = u;
    }
  };
  if constexpr (kSum) {
    sum_row<kGateSums>(
        a.n, a.levels, static_cast<C*>(a.sums),
        [&](int64_t ahead) FASTWRS_FETCHES {
          fetch(param + ahead);
          fetch(grad + ahead);
          fetch(state0 + ahead);
          if (kSlots > 1) fetch(state1 + ahead);
        },
        at);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < a.n; ++i) at(i, nullptr);
  }
}

template <class Rule, class P, class G, class S>
FASTWRS_FLATTENED void advance(const LookArgs& a) {
  a.sums ? advance_run<Rule, P, G, S, true>(a) : advance_run<Rule, P, G, S, false>(a);
}

// The same where only the weights are read: how far each is from the origin of its channel.
template <class P>
FASTWRS_FLATTENED void distances_from_origin(const LookArgs& a) {
  using C = compute_t<P>;
  const P* __restrict param = static_cast<const P*>(a.param);
  const C* __restrict origin_each = static_cast<const C*>(a.origin_each);
  C* __restrict distances = static_cast<C*>(a.distances);
  const C origin = C(a.origin);
  if (a.sums) {
    return sum_row<kShiftSums>(
        a.n, a.levels, static_cast<C*>(a.sums), [&](int64_t ahead) FASTWRS_FETCHES { fetch(param + ahead); },
        [&](int64_t i, C* terms) {
          const C distance = C(widen(param[i])) - origin;
          for (int k = 0; k < kShiftSums; ++k) terms[k] = shift_term(k, distance);
        });
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < a.n; ++i) distances[i] = C(widen(param[i])) - origin_each[i];
}

}  // namespace FASTWRS_ISA
}  // namespace fastwrs::cpu
