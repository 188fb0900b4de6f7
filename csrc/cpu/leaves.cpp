// Compiled once per instruction set, with -DFASTWRS_ISA=<name> and the flags that go with it. The loops are plain C++
// for the compiler to vectorise.
#include "leaves.h"
#include "sums.h"

#include <cstring>
#include <type_traits>

#include "../rules/all.h"

// One loop for each number of elements that is known when it is compiled. Where speed is not asked for, that is only
// slow to compile.
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__)
#define FASTWRS_INLINED __attribute__((always_inline))
#else
#define FASTWRS_INLINED
#endif

namespace fastwrs::cpu {
inline namespace FASTWRS_ISA {

template <class P>
void widen_run(const P* __restrict x, compute_t<P>* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

template <class P>
void narrow_run(const compute_t<P>* __restrict x, P* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow(x[i], P());
}

template <class P>
void scale_run(const compute_t<P>* x, P* out, int64_t n, compute_t<P> factor) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = narrow(x[i] * factor, P());
}

template <class P>
void scale_columns(const compute_t<P>* x, P* out, int64_t n, const compute_t<P>* factors, int64_t cols) {
  for (int64_t begin = 0; begin < n; begin += cols) {
    const int64_t m = n - begin < cols ? n - begin : cols;
#pragma GCC ivdep
    for (int64_t j = 0; j < m; ++j) out[begin + j] = narrow(x[begin + j] * factors[j], P());
  }
}

// Memory so many elements ahead is asked for while a row is updated and summed: what comes next in that row or is the
// next row. The processor does not look that far by itself while it has this much to compute.
constexpr int64_t kAhead = Accumulator<float>::kTurns * kLanes;
template <class T>
inline void fetch(const T* x) {
  for (int64_t j = 0; j < kLanes; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + j);
}

// Updates n elements. kSets: how many sums are made of them on the way. Element i goes to lane i % 64 of each; the
// lanes are one block at most, and begin here. One sum is that of the squared weights; four are those of
// norms/measured.h. kScale: as many elements of another place are multiplied by a factor; memory is what an update
// waits for, so that this costs nothing.
template <class Rule, int kSlots, class P, class G, class S, bool kExtras, int kSets, bool kScale>
FASTWRS_INLINED inline void update_run(const UpdateArgs& a, int64_t begin, int64_t n,
                                       [[maybe_unused]] compute_t<P>* __restrict lanes) {
  using C = compute_t<P>;
  const auto s = *static_cast<const typename Rule::template Scalars<C>*>(a.scalars);
  const P* __restrict param = static_cast<const P*>(a.param) + begin;
  G* __restrict grad = static_cast<G*>(a.grad) + begin;
  S* __restrict state0 = static_cast<S*>(a.state[0]) + begin;
  S* __restrict state1 = static_cast<S*>(a.state[1]) + begin;
  S* __restrict state2 = static_cast<S*>(a.state[2]) + begin;
  C* __restrict updated = static_cast<C*>(a.updated) + begin;
  C* __restrict step = static_cast<C*>(a.step) + begin;
  C* __restrict behind = static_cast<C*>(a.behind) + begin;
  const C behind_factor = C(a.behind_factor);
  const bool unscale = a.grad_scale != 0, wants_step = a.step != nullptr;
  const C grad_scale = C(a.grad_scale);
  const C sign = a.maximize ? C(-1) : C(1);
  const auto at = [&](int64_t i, [[maybe_unused]] int64_t lane) FASTWRS_INLINED {
    C w = std::is_same_v<P, C> ? updated[i] : C(widen(param[i]));
    C g = C(widen(grad[i]));
    if (kExtras && unscale) {
      g = g / grad_scale;
      grad[i] = narrow(g, G());
    }
    if constexpr (kSets == kSums) {
      lanes[kBefore * kLanes + lane] += w * w;
      lanes[kGrad * kLanes + lane] += g * g;
    }
    C state[kMaxSlots] = {};
    if (kSlots > 0) state[0] = C(widen(state0[i]));
    if (kSlots > 1) state[1] = C(widen(state1[i]));
    if (kSlots > 2) state[2] = C(widen(state2[i]));
    const C u = Rule::template update<kSlots>(w, g * sign, state, s);
    if (kSlots > 0) state0[i] = narrow(state[0], S());
    if (kSlots > 1) state1[i] = narrow(state[1], S());
    if (kSlots > 2) state2[i] = narrow(state[2], S());
    updated[i] = w;
    if constexpr (kSets == 1) lanes[lane] += w * w;
    if constexpr (kSets == kSums) {
      lanes[kUpdated * kLanes + lane] += w * w;
      lanes[kUpdate * kLanes + lane] += u * u;
    }
    if (kScale) behind[i] *= behind_factor;
    if (kExtras && wants_step) step[i] = u;
  };
  if constexpr (kSets == 0) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) at(i, 0);
  } else {
    using Wide = typename Sixteen<C>::type;  // a loop over elements would become a call
    for (int64_t j = 0; j < kSets * kLanes / 16; ++j) reinterpret_cast<Wide*>(lanes)[j] = Wide{};
    for (int64_t turn = 0; turn < n / kLanes; ++turn) {
      const int64_t ahead = turn * kLanes + kAhead;
      fetch(updated + ahead);
      if (!std::is_same_v<P, C>) fetch(param + ahead);
      fetch(grad + ahead);
      if (kSlots > 0) fetch(state0 + ahead);
      if (kSlots > 1) fetch(state1 + ahead);
      if (kSlots > 2) fetch(state2 + ahead);
#pragma GCC ivdep
      for (int64_t j = 0; j < kLanes; ++j) at(turn * kLanes + j, j);
    }
    const int64_t whole = n / kLanes * kLanes;
#pragma GCC ivdep
    for (int64_t j = 0; j < n - whole; ++j) at(whole + j, j);
  }
}

// A whole row with its sums.
template <class Rule, int kSlots, class P, class G, class S, int kSets, bool kScale>
void update_row(const UpdateArgs& a) {
  using C = compute_t<P>;
  constexpr int64_t kBlock = Accumulator<C>::kTurns * kLanes;
  RowSums<C, kSets> sums(a.levels);
  alignas(64) C lanes[kSets * kLanes];
  int64_t done = 0;
  for (; a.n - done >= kBlock; done += kBlock) {
    update_run<Rule, kSlots, P, G, S, false, kSets, kScale>(a, done, kBlock, lanes);
    sums.close_block(lanes);
  }
  if (kScale) {
    C* behind = static_cast<C*>(a.behind) + done;
    scale_run<C>(behind, behind, a.n - done, C(a.behind_factor));
  }
  update_run<Rule, kSlots, P, G, S, false, kSets, false>(a, done, a.n - done, lanes);
  sums.finish(lanes, static_cast<C*>(a.sums));
}

template <class Rule, int kSlots, class P, class G, class S>
void update(const UpdateArgs& a) {
  if (a.sums) {
    if constexpr (std::is_same_v<P, compute_t<P>>) {
      if (a.behind) {
        return a.measures ? update_row<Rule, kSlots, P, G, S, kSums, true>(a)
                          : update_row<Rule, kSlots, P, G, S, 1, true>(a);
      }
    }
    return a.measures ? update_row<Rule, kSlots, P, G, S, kSums, false>(a)
                      : update_row<Rule, kSlots, P, G, S, 1, false>(a);
  }
  if (a.grad_scale != 0 || a.step != nullptr) {
    update_run<Rule, kSlots, P, G, S, true, 0, false>(a, 0, a.n, nullptr);
  } else {
    update_run<Rule, kSlots, P, G, S, false, 0, false>(a, 0, a.n, nullptr);
  }
}

// Whether a run of a single group's elements may be summed by whole blocks from here on.
template <class C>
bool at_a_block(const Accumulator<C>* a) {
  return a && a->width == Accumulator<C>::kLanes && a->position == 0 && a->turns == 0;
}

// The first pass of a rule with a gate: states, and what the gate's sums are made of. kSum: n is one block of the sums,
// which are made here, in lanes of their own for each; else their terms are left in scratch.
template <class Rule, class P, class G, class S, bool kSum>
inline void advance_run(const AdvanceArgs& a, int64_t begin, int64_t n, compute_t<P>* __restrict lanes) {
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

template <class Rule, class P, class G, class S>
void advance(const AdvanceArgs& a) {
  using C = compute_t<P>;
  using Sum = Accumulator<C>;
  constexpr int64_t kBlock = Sum::kTurns * Sum::kLanes;
  Sum* sums[kGateSums];
  for (int k = 0; k < kGateSums; ++k) sums[k] = static_cast<Sum*>(a.sums[k]);
  int64_t done = 0;
  for (; at_a_block(sums[0]) && a.n - done >= kBlock; done += kBlock) {
    C lanes[kGateSums * Sum::kLanes] = {};
    advance_run<Rule, P, G, S, true>(a, done, kBlock, lanes);
    for (int k = 0; k < kGateSums; ++k) {
      std::memcpy(sums[k]->levels, lanes + k * Sum::kLanes, Sum::kLanes * sizeof(C));
      close_block<typename Sixteen<C>::type>(*sums[k]);
    }
  }
  const int64_t n = a.n - done;
  if (n == 0) return;
  advance_run<Rule, P, G, S, false>(a, done, n, nullptr);
  if (!sums[0]) return;
  const C *weights = static_cast<C*>(a.weights) + done, *slope = static_cast<C*>(a.slope) + done;
  add_terms<C, Term::kProduct>(*sums[kStepWeight], static_cast<C*>(a.step) + done, weights, n);
  add_terms<C, Term::kProduct>(*sums[kGradWeight], slope, weights, n);
  add<C, true>(*sums[kGradGrad], slope, n);
  add<C, true>(*sums[kWeightWeight], weights, n);
}

// The second pass. kReads: the rule looks at the gradient once more. kEach: what is taken out differs within the run.
// kSum and kScale as in update_run.
template <class Rule, class P, class G, class S, bool kReads, bool kEach, bool kSum, bool kScale>
inline void update_gated_run(const UpdateArgs& a, int64_t begin, int64_t n, compute_t<P>* __restrict lanes) {
  using C = compute_t<P>;
  const auto s = *static_cast<const typename Rule::template Scalars<C>*>(a.scalars);
  const P* __restrict param = static_cast<const P*>(a.param) + begin;
  G* __restrict grad = static_cast<G*>(a.grad) + begin;
  S* __restrict state0 = static_cast<S*>(a.state[0]) + begin;
  const S* __restrict state1 = static_cast<const S*>(a.state[1]) + begin;
  C* __restrict updated = static_cast<C*>(a.updated) + begin;
  C* __restrict step = static_cast<C*>(a.step) + begin;
  C* __restrict behind = static_cast<C*>(a.behind) + begin;
  const C* __restrict along_each = static_cast<const C*>(a.along_each) + begin;
  const bool unscale = a.grad_scale != 0, wants_step = !kSum && a.step != nullptr, open = a.open;
  const C grad_scale = C(a.grad_scale), sign = a.maximize ? C(-1) : C(1), along = C(a.along);
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
      C state[2] = {C(widen(state0[i])), C(0)};
      if (Rule::kMaxSlots > 1) state[1] = C(widen(state1[i]));
      const C u = Rule::update(w, g * sign, state, kEach ? along_each[i] : along, open, s);
      if (Rule::kChangesStateAgain && open) state0[i] = narrow(state[0], S());
      updated[i] = w;
      if (kSum) lanes[j] += w * w;
      if (kScale) behind[i] *= behind_factor;
      if (wants_step) step[i] = u;
    }
  }
}

// Whole blocks of a row that is summed, while the row before it is scaled. Returns how many elements that were.
template <class Rule, class P, class G, class S, bool kReads>
int64_t update_gated_blocks(const UpdateArgs& a) {
  using C = compute_t<P>;
  using Sum = Accumulator<C>;
  constexpr int64_t kBlock = Sum::kTurns * Sum::kLanes;
  Sum* sum = static_cast<Sum*>(a.squares);
  int64_t done = 0;
  for (; a.n - done >= kBlock; done += kBlock) {
    C lanes[Sum::kLanes] = {};
    if (a.behind) {
      update_gated_run<Rule, P, G, S, kReads, false, true, true>(a, done, kBlock, lanes);
    } else {
      update_gated_run<Rule, P, G, S, kReads, false, true, false>(a, done, kBlock, lanes);
    }
    std::memcpy(sum->levels, lanes, Sum::kLanes * sizeof(C));
    close_block<typename Sixteen<C>::type>(*sum);
  }
  return done;
}

template <class Rule, class P, class G, class S, bool kReads>
void update_gated(const UpdateArgs& a) {
  using C = compute_t<P>;
  auto* sum = static_cast<Accumulator<C>*>(a.squares);
  int64_t done = 0;
  if constexpr (std::is_same_v<P, C>) {
    if (at_a_block(sum)) done = update_gated_blocks<Rule, P, G, S, kReads>(a);
    if (a.behind && done < a.n) {
      C* behind = static_cast<C*>(a.behind) + done;
      scale_run<P>(behind, behind, a.n - done, C(a.behind_factor));
    }
  }
  if (done == a.n) return;
  if (a.along_each) {
    update_gated_run<Rule, P, G, S, kReads, true, false, false>(a, done, a.n - done, nullptr);
  } else {
    update_gated_run<Rule, P, G, S, kReads, false, false, false>(a, done, a.n - done, nullptr);
  }
  if (sum) add<C, true>(*sum, static_cast<const C*>(a.updated) + done, a.n - done);
}

template <class Rule, class P, class G, class S>
void update_gated(const UpdateArgs& a) {
  const bool reads = static_cast<const typename Rule::template Scalars<compute_t<P>>*>(a.scalars)->nesterov != 0;
  reads ? update_gated<Rule, P, G, S, true>(a) : update_gated<Rule, P, G, S, false>(a);
}

using Update = void (*)(const UpdateArgs&);

template <class Rule, int kSlots>
Update find_triple(Dtype param, Dtype grad, Dtype state) {
#define FASTWRS_TRIPLE(P, G, S)                                                                \
  if (param == DtypeOf<P>::value && grad == DtypeOf<G>::value && state == DtypeOf<S>::value) { \
    if constexpr (Rule::kGated) {                                                              \
      return &update_gated<Rule, P, G, S>;                                                     \
    } else {                                                                                   \
      return &update<Rule, kSlots, P, G, S>;                                                   \
    }                                                                                          \
  }
  FASTWRS_DTYPE_TRIPLES(FASTWRS_TRIPLE)
#undef FASTWRS_TRIPLE
  return nullptr;
}

template <class Rule>
Advance find_advance_of([[maybe_unused]] Dtype param, [[maybe_unused]] Dtype grad, [[maybe_unused]] Dtype state) {
  if constexpr (Rule::kGated) {
#define FASTWRS_TRIPLE(P, G, S)                                                              \
  if (param == DtypeOf<P>::value && grad == DtypeOf<G>::value && state == DtypeOf<S>::value) \
    return &advance<Rule, P, G, S>;
    FASTWRS_DTYPE_TRIPLES(FASTWRS_TRIPLE)
#undef FASTWRS_TRIPLE
  }
  return nullptr;
}

Advance find_advance(int rule, Dtype param, Dtype grad, Dtype state) {
  int index = 0;
#define FASTWRS_RULE(Rule) \
  if (rule == index++) return find_advance_of<Rule>(param, grad, state);
  FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
  return nullptr;
}

template <class Rule, int kSlots = Rule::kMinSlots>
Update find_slots(int slots, Dtype param, Dtype grad, Dtype state) {
  if (slots == kSlots) return find_triple<Rule, kSlots>(param, grad, state);
  if constexpr (kSlots < Rule::kMaxSlots) return find_slots<Rule, kSlots + 1>(slots, param, grad, state);
  return nullptr;
}

Update find_update(int rule, int slots, Dtype param, Dtype grad, Dtype state) {
  int index = 0;
#define FASTWRS_RULE(Rule) \
  if (rule == index++) return find_slots<Rule>(slots, param, grad, state);
  FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
  return nullptr;
}

void reduce_measured(const float* __restrict rows, int64_t count, float* __restrict statistics) {
  float least[kMeasured], most[kMeasured];
  double sum[kMeasured] = {}, squares[kMeasured] = {};
  for (int k = 0; k < kMeasured; ++k) least[k] = most[k] = rows[k];
  for (int64_t row = 0; row < count; ++row) {
    for (int k = 0; k < kMeasured; ++k) {
      const float x = rows[row * kMeasured + k];
      least[k] = (x < least[k] || x != x) ? x : least[k];
      most[k] = maximum(most[k], x);
      sum[k] += double(x);
      squares[k] += double(x) * double(x);
    }
  }
  for (int k = 0; k < kMeasured; ++k) {
    statistics[k] = least[k];
    statistics[kMeasured + k] = float(sum[k] / double(count));
    statistics[2 * kMeasured + k] = most[k];
    statistics[3 * kMeasured + k] = float(square_root(squares[k]));
  }
}

void cast_scalars(const double* from, void* to, int count, Dtype param) {
  for (int i = 0; i < count; ++i) {
    if (param == Dtype::kFloat64) {
      static_cast<double*>(to)[i] = from[i];
    } else {
      static_cast<float*>(to)[i] = float(from[i]);
    }
  }
}

template <class C>
SumLeaves<C> sum_leaves() {
  return {&start<C>, &add<C, true>, &add_terms<C, Term::kProduct>, &add<C, false>, &finish<C>};
}

template <class P>
StoreLeaves<P> store_leaves() {
  return {&widen_run<P>, &narrow_run<P>, &scale_run<P>, &scale_columns<P>};
}

#define FASTWRS_STRING(x) #x
#define FASTWRS_NAME(x) FASTWRS_STRING(x)
extern const Leaves kLeaves;
const Leaves kLeaves = {
    FASTWRS_NAME(FASTWRS_ISA), &find_advance,           &find_update,
    &reduce_measured,          &cast_scalars,           sum_leaves<float>(),
    sum_leaves<double>(),      store_leaves<float>(),   store_leaves<double>(),
    store_leaves<bfloat16>(),  store_leaves<float16>(),
};

}  // namespace FASTWRS_ISA
}  // namespace fastwrs::cpu
