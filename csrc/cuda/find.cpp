// The list of all kernels, over the objects that kernels.cu is compiled to.
#include "plan.h"

namespace fastwrs::cuda {

bool find_kernel_0(const KernelKey&, Kernel&);
bool find_kernel_1(const KernelKey&, Kernel&);
bool find_kernel_2(const KernelKey&, Kernel&);
bool find_kernel_3(const KernelKey&, Kernel&);
bool find_kernel_4(const KernelKey&, Kernel&);
bool find_kernel_5(const KernelKey&, Kernel&);

Kernel find_kernel(const KernelKey& key) {
  Kernel kernel{};
  for (const auto find : {find_kernel_0, find_kernel_1, find_kernel_2, find_kernel_3, find_kernel_4, find_kernel_5}) {
    if (find(key, kernel)) break;
  }
  return kernel;
}

}  // namespace fastwrs::cuda
