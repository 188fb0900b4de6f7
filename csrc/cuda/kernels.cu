// The kernels of one dtype triple; compiled once for each, with FASTWRS_TRIPLE_INDEX, so that builds run in parallel.
#include <string>
#include <type_traits>
#include <utility>

#include "kernels.cuh"
#include "plan.h"

namespace fastwrs::cuda {
namespace {

#ifndef __CUDACC__
template <class P, void (*kKernel)(const P&)>
void call(const void* params) {
  kKernel(*static_cast<const P*>(params));
}
#define FASTWRS_KERNEL_OF(ParamsType, name, ...) \
  Kernel { nullptr, &call<ParamsType, &__VA_ARGS__>, sizeof(ParamsType), name }
#else
#define FASTWRS_KERNEL_OF(ParamsType, name, ...) \
  Kernel { reinterpret_cast<const void*>(&__VA_ARGS__), nullptr, sizeof(ParamsType), name }
#endif

template <class P, class G, class S>
struct Triple {
  using Param = P;
  static constexpr Dtypes kDtypes{DtypeOf<P>::value, DtypeOf<G>::value, DtypeOf<S>::value};

  template <bool kWalk>
  static Kernel find(const KernelKey& key) {
    if (key.phase == Phase::kFinish) return FASTWRS_KERNEL_OF(Params<1>, "finish_kernel", finish_kernel<P, kWalk>);
    if (key.phase == Phase::kProject) return FASTWRS_KERNEL_OF(Params<1>, "project_kernel", project_kernel<P, kWalk>);
    int index = 0;
    Kernel found{};
#define FASTWRS_RULE(Rule) \
  if (key.rule == index++) found = of_rule<Rule, kWalk>(key, std::make_integer_sequence<int, Rule::kMaxSlots + 1>());
    FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
    return found;
  }

  template <class Rule, bool kWalk, int... kSlots>
  static Kernel of_rule(const KernelKey& key, std::integer_sequence<int, kSlots...>) {
    Kernel found{};
    (of_slots<Rule, kWalk, kSlots>(key, found), ...);
    return found;
  }
  template <class Rule, bool kWalk, int kSlots>
  static void of_slots(const KernelKey& key, Kernel& found) {
    // without an update there is no gradient, and no state, to have another type
    constexpr bool there = kUpdates<Rule> || (std::is_same_v<P, G> && std::is_same_v<S, compute_t<P>>);
    if constexpr (there && kSlots >= Rule::kMinSlots) {
      if (key.slots != kSlots) return;
      if constexpr (Rule::kLook == Look::kGate) {
        const std::string name = std::string("gate_kernel<") + Rule::kName + ">";
        found = FASTWRS_KERNEL_OF(Params<2 + kSlots>, name, gate_kernel<Rule, P, G, S, kWalk>);
      } else if constexpr (Rule::kLook == Look::kShift) {
        const std::string name = std::string("shift_kernel<") + Rule::kName + ">";
        found = FASTWRS_KERNEL_OF(Params<1>, name, shift_kernel<Rule, P, kWalk>);
      }
      if (key.phase == Phase::kLook) return;
      const std::string name = std::string("step_kernel<") + Rule::kName + ", " + std::to_string(kSlots) + " states>";
      found = FASTWRS_KERNEL_OF(Params<2 + kSlots>, name, step_kernel<Rule, kSlots, P, G, S, kWalk>);
    }
  }
};

// The triple with this index.
#define FASTWRS_TRIPLE(P, G, S) , Triple<P, G, S>
template <int kIndex, class First, class... Rest>
struct Pick : Pick<kIndex - 1, Rest...> {};
template <class First, class... Rest>
struct Pick<0, First, Rest...> {
  using type = First;
};
using Mine = Pick<FASTWRS_TRIPLE_INDEX + 1, void FASTWRS_DTYPE_TRIPLES(FASTWRS_TRIPLE)>::type;
#undef FASTWRS_TRIPLE

}  // namespace

#define FASTWRS_JOIN_(a, b) a##b
#define FASTWRS_JOIN(a, b) FASTWRS_JOIN_(a, b)
// Whether the triple is this one, and then its kernel.
bool FASTWRS_JOIN(find_kernel_, FASTWRS_TRIPLE_INDEX)(const KernelKey& key, Kernel& kernel) {
  if (!(key.dtypes == Mine::kDtypes)) return false;
  kernel = key.walk ? Mine::find<true>(key) : Mine::find<false>(key);
  return true;
}

}  // namespace fastwrs::cuda
