// Compiled once per instruction set, with -DFASTWRS_ISA=<name> and the flags that go with it. The loops are plain C++
// for the compiler to vectorise.
#include "leaves.h"

#include "../rules/all.h"
#include "leaf_looks.h"
#include "leaf_stores.h"
#include "leaf_sums.h"
#include "leaf_updates.h"

namespace fastwrs::cpu {
inline namespace FASTWRS_ISA {

using Update = void (*)(const UpdateArgs&);

#ifdef FASTWRS_EMULATED
// Emulated CUDA kernels take all steps; the loops of the rules are slow to compile under a sanitizer.
LookAt find_look_at(int, Dtype, Dtype, Dtype) { return nullptr; }
Update find_update(int, int, Dtype, Dtype, Dtype) { return nullptr; }
#else
template <class Rule, int kSlots>
Update find_triple(Dtype param, Dtype grad, Dtype state) {
  // without an update there is no gradient, and no state, to have another type
#define FASTWRS_TRIPLE(P, G, S)                                                                  \
  if constexpr (kUpdates<Rule> || (std::is_same_v<P, G> && std::is_same_v<S, compute_t<P>>)) {   \
    if (param == DtypeOf<P>::value && grad == DtypeOf<G>::value && state == DtypeOf<S>::value) { \
      return &update<Rule, kSlots, P, G, S>;                                                     \
    }                                                                                            \
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
#endif

void reduce_measured(const float* rows, int64_t count, float* statistics) {
  // All figures of a row at a time: the compiler would take them one by one, with branches.
  typedef float Row __attribute__((vector_size(kMeasured * sizeof(float)), aligned(alignof(float)), may_alias));
  typedef double Sum __attribute__((vector_size(kMeasured * sizeof(double))));
  const Row* __restrict row = reinterpret_cast<const Row*>(rows);
  Row least = row[0], most = row[0];
  Sum sum{}, squares{};
  for (int64_t i = 0; i < count; ++i) {
    const Row x = row[i];
    least = x < least ? x : least;
    most = x > most ? x : most;
    const Sum wide = __builtin_convertvector(x, Sum);
    sum += wide;
    squares += wide * wide;
  }
  for (int k = 0; k < kMeasured; ++k) {
    const bool has_nan = squares[k] != squares[k];
    statistics[k] = has_nan ? float(squares[k]) : least[k];
    statistics[kMeasured + k] = float(sum[k] / double(count));
    statistics[2 * kMeasured + k] = has_nan ? float(squares[k]) : most[k];
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
