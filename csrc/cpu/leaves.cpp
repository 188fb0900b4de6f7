// Compiled once per instruction set, with -DFASTWRS_ISA=<name> and the flags that go with it. The loops are plain C++
// for the compiler to vectorise.
#include "leaves.h"

#include <cstring>
#include <type_traits>

#include "../rules/all.h"
#include "leaf_looks.h"
#include "leaf_stores.h"
#include "leaf_sums.h"

// One loop for each number of elements that is known when it is compiled. Where speed is not asked for, that is only
// slow to compile.
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__)
#define FASTWRS_INLINED __attribute__((always_inline))
#else
#define FASTWRS_INLINED
#endif

namespace fastwrs::cpu {
inline namespace FASTWRS_ISA {

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

using Update = void (*)(const UpdateArgs&);

template <class Rule, int kSlots>
Update find_triple(Dtype param, Dtype grad, Dtype state) {
#define FASTWRS_TRIPLE(P, G, S)                                                                \
  if (param == DtypeOf<P>::value && grad == DtypeOf<G>::value && state == DtypeOf<S>::value) { \
    if constexpr (Rule::kLook != Look::kNone) {                                                \
      return &update_told<Rule, kSlots, P, G, S>;                                              \
    } else {                                                                                   \
      return &update<Rule, kSlots, P, G, S>;                                                   \
    }                                                                                          \
  }
  FASTWRS_DTYPE_TRIPLES(FASTWRS_TRIPLE)
#undef FASTWRS_TRIPLE
  return nullptr;
}

template <class Rule, class P, class G, class S>
LookAt look_at_of() {
  if constexpr (Rule::kLook == Look::kGate) return &advance<Rule, P, G, S>;
  if constexpr (Rule::kLook == Look::kShift) return &distances_from_origin<P>;
  return nullptr;
}

template <class Rule>
LookAt find_look_at_of(Dtype param, Dtype grad, Dtype state) {
#define FASTWRS_TRIPLE(P, G, S)                                                              \
  if (param == DtypeOf<P>::value && grad == DtypeOf<G>::value && state == DtypeOf<S>::value) \
    return look_at_of<Rule, P, G, S>();
  FASTWRS_DTYPE_TRIPLES(FASTWRS_TRIPLE)
#undef FASTWRS_TRIPLE
  return nullptr;
}

LookAt find_look_at(int rule, Dtype param, Dtype grad, Dtype state) {
  int index = 0;
#define FASTWRS_RULE(Rule) \
  if (rule == index++) return find_look_at_of<Rule>(param, grad, state);
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
    FASTWRS_NAME(FASTWRS_ISA), &find_look_at,           &find_update,
    &reduce_measured,          &cast_scalars,           sum_leaves<float>(),
    sum_leaves<double>(),      store_leaves<float>(),   store_leaves<double>(),
    store_leaves<bfloat16>(),  store_leaves<float16>(),
};

}  // namespace FASTWRS_ISA
}  // namespace fastwrs::cpu
