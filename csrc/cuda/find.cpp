// The list of all kernels, over the objects that kernels.cu is compiled to.
#include "plan.h"

namespace fastwrs::cuda {

// FASTWRS_TRIPLES(X) is X(0) X(1) ..., the triples that are built.
#define FASTWRS_DECLARE(k) bool find_kernel_##k(const KernelKey&, Kernel&);
FASTWRS_TRIPLES(FASTWRS_DECLARE)
#undef FASTWRS_DECLARE

Kernel find_kernel(const KernelKey& key) {
  Kernel kernel{};
#define FASTWRS_FIND(k) \
  if (find_kernel_##k(key, kernel)) return kernel;
  FASTWRS_TRIPLES(FASTWRS_FIND)
#undef FASTWRS_FIND
  return kernel;
}

}  // namespace fastwrs::cuda
