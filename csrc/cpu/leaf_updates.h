// The pass that changes weights: a rule's update of runs and of whole rows. A part of leaves.cpp, which is compiled
// once per instruction set.
#pragma once

#include <type_traits>

#include "../norms/looks.h"
#include "leaf_stores.h"
#include "leaf_sums.h"
#include "leaves.h"

namespace fastwrs::cpu {
inline namespace FASTWRS_ISA {

// kReads: the gradient is read; not where a first pass has done so for both, nor by a rule without an update, which has
// whole rows alone.
template <class Rule, int kSlots, class P, class G, class S, bool kReads>
struct Updates {
  using C = compute_t<P>;
  static constexpr bool kLooks = Rule::kLook != Look::kNone;

  // Updates the elements. kSets: how many sums are made of them on the way. One is that of the squared weights; four
  // are those of norms/measured.h. kScale: as many elements of another place are multiplied by a factor; memory is what
  // an update waits for, so that this costs nothing. kEach: what a first pass has found differs within the run.
  template <bool kExtras, int kSets, bool kScale, bool kEach>
  static inline void run(const UpdateArgs& a) {
    const auto s = *static_cast<const typename Rule::template Scalars<C>*>(a.scalars);
    const P* __restrict param = static_cast<const P*>(a.param);
    G* __restrict grad = static_cast<G*>(a.grad);
    S* __restrict state0 = static_cast<S*>(a.state[0]);
    S* __restrict state1 = static_cast<S*>(a.state[1]);
    S* __restrict state2 = static_cast<S*>(a.state[2]);
    C* __restrict updated = static_cast<C*>(a.updated);
    C* __restrict step = static_cast<C*>(a.step);
    C* __restrict behind = static_cast<C*>(a.behind);
    [[maybe_unused]] const C* __restrict told0_each = static_cast<const C*>(a.told_each[0]);
    [[maybe_unused]] const C* __restrict told1_each = static_cast<const C*>(a.told_each[1]);
    const C behind_factor = C(a.behind_factor);
    const bool unscale = a.grad_scale != 0, wants_step = a.step != nullptr;
    const C grad_scale = C(a.grad_scale);
    const C sign = a.maximize ? C(-1) : C(1);
    [[maybe_unused]] const C told0 = C(a.told[0]), told1 = C(a.told[1]);
    [[maybe_unused]] const C tells = C(a.tells);
    const auto at = [&](int64_t i, [[maybe_unused]] C* terms) {
      C w = std::is_same_v<P, C> ? updated[i] : C(widen(param[i]));
      C g = 0;
      if (kReads) g = C(widen(grad[i]));
      if (kExtras && kReads && unscale) {
        g = g / grad_scale;
        grad[i] = narrow(g, G());
      }
      if constexpr (kSets == kSums) {
        terms[kBefore] = w * w;
        terms[kGrad] = g * g;
      }
      C state[kMaxSlots] = {};
      if (kSlots > 0) state[0] = C(widen(state0[i]));
      if (kSlots > 1) state[1] = C(widen(state1[i]));
      if (kSlots > 2) state[2] = C(widen(state2[i]));
      C u;
      if constexpr (kLooks) {
        using L = LookOf<Rule::kLook>;
        C told[kMostEach] = {kEach ? told0_each[i] : told0, C(0)};
        if (L::kEach > 1) told[1] = kEach ? told1_each[i] : told1;
        u = Rule::template update<kSlots>(w, g * sign, state, L::answer(told, tells != 0), s);
        if constexpr (!L::kChangesStates) {
          if (kSlots > 0) state0[i] = narrow(state[0], S());
        } else if constexpr (Rule::kChangesStateAgain) {
          if (tells != 0) state0[i] = narrow(state[0], S());
        }
      } else {
        u = Rule::template update<kSlots>(w, g * sign, state, s);
        if (kSlots > 0) state0[i] = narrow(state[0], S());
        if (kSlots > 1) state1[i] = narrow(state[1], S());
        if (kSlots > 2) state2[i] = narrow(state[2], S());
      }
      if (kUpdates<Rule> || !std::is_same_v<P, C>) updated[i] = w;
      if constexpr (kSets == 1) terms[0] = w * w;
      if constexpr (kSets == kSums) {
        terms[kUpdated] = w * w;
        terms[kUpdate] = u * u;
      }
      if (kScale) behind[i] *= behind_factor;
      if (kExtras && wants_step) step[i] = u;
    };
    if constexpr (kSets == 0) {
#pragma GCC ivdep
      for (int64_t i = 0; i < a.n; ++i) at(i, nullptr);
    } else {
      sum_row<kSets>(
          a.n, a.levels, static_cast<C*>(a.sums),
          [&](int64_t ahead) FASTWRS_FETCHES {
            fetch(updated + ahead);
            if (!std::is_same_v<P, C>) fetch(param + ahead);
            if (kReads) fetch(grad + ahead);
            if (kSlots > 0) fetch(state0 + ahead);
            if (kSlots > 1) fetch(state1 + ahead);
            if (kSlots > 2) fetch(state2 + ahead);
          },
          at);
    }
  }

  // A whole row with its sums.
  template <int kSets, bool kScale>
  FASTWRS_FLATTENED static __attribute__((noinline)) void row(const UpdateArgs& a) {
    run<false, kSets, kScale, false>(a);
  }

  template <int kSets>
  static void rows(const UpdateArgs& a) {
    if constexpr (std::is_same_v<P, C>) {
      if (a.behind) return row<kSets, true>(a);
    }
    row<kSets, false>(a);
  }

  FASTWRS_FLATTENED static __attribute__((noinline)) void update(const UpdateArgs& a) {
    if (a.sums) {
      if constexpr (kReads) {
        if (a.measures) return rows<kSums>(a);
      }
      return rows<1>(a);
    }
    if constexpr (kLooks) {
      a.told_each[0] ? run<true, 0, false, true>(a) : run<true, 0, false, false>(a);
    } else if (a.grad_scale != 0 || a.step != nullptr) {
      run<true, 0, false, false>(a);
    } else {
      run<false, 0, false, false>(a);
    }
  }
};

template <class Rule, int kSlots, class P, class G, class S>
void update(const UpdateArgs& a) {
  if constexpr (!kUpdates<Rule>) {
    Updates<Rule, kSlots, P, G, S, false>::template rows<1>(a);
  } else if constexpr (LookOf<Rule::kLook>::kChangesStates) {
    // what is measured is read for that, whether the rule looks at it or not
    const bool reads = (a.sums && a.measures) ||
                       static_cast<const typename Rule::template Scalars<compute_t<P>>*>(a.scalars)->nesterov != 0;
    reads ? Updates<Rule, kSlots, P, G, S, true>::update(a) : Updates<Rule, kSlots, P, G, S, false>::update(a);
  } else {
    Updates<Rule, kSlots, P, G, S, true>::update(a);
  }
}

}  // namespace FASTWRS_ISA
}  // namespace fastwrs::cpu
