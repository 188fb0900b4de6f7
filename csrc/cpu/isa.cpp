// Picks the instruction set at run time.
#include <cstdlib>
#include <cstring>

#include "leaves.h"

namespace fastwrs::cpu {

namespace plain {
extern const Leaves kLeaves;
}
#ifdef FASTWRS_WITH_X86
namespace avx2 {
extern const Leaves kLeaves;
}
namespace avx512 {
extern const Leaves kLeaves;
}
#endif

const IsaChoice* available_isas(int* count) {
  static IsaChoice choices[3];
  static const int found = [] {
    int n = 0;
    choices[n++] = {"plain", &plain::kLeaves};
#ifdef FASTWRS_WITH_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) choices[n++] = {"avx2", &avx2::kLeaves};
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      choices[n++] = {"avx512", &avx512::kLeaves};
    }
#endif
    return n;
  }();
  *count = found;
  return choices;
}

const Leaves& leaves() {
  static const Leaves& chosen = [&]() -> const Leaves& {
    int count = 0;
    const IsaChoice* choices = available_isas(&count);
    const char* wanted = std::getenv("FASTWRS_CPU_ISA");
    for (int i = 0; wanted && i < count; ++i) {
      if (std::strcmp(choices[i].name, wanted) == 0) return *choices[i].leaves;
    }
    return *choices[count - 1].leaves;
  }();
  return chosen;
}

}  // namespace fastwrs::cpu
