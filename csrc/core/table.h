// What a launch knows about its tensors: plain data without torch or CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "dtypes.h"

namespace fastwrs {

constexpr int kMaxSlots = 3;
constexpr int kMaxArrays = 2 + kMaxSlots;  // parameter, gradient, states

// One array of a tensor, as it was handed over. Strides count elements.
struct ArrayView {
  void* data = nullptr;
  const int64_t* strides = nullptr;
};

// One tensor of the list: the parameter first, then the gradient, then the states.
struct TensorView {
  int arrays = 0;
  ArrayView array[kMaxArrays];
  int dims = 0;
  const int64_t* sizes = nullptr;
  int64_t reduced = 0;    // bitmask of the dimensions that a norm group spans; -1: all; 0: no norm groups
  int64_t norm_row = -1;  // first row of this tensor in the buffer that norms are written to, -1: none
};

// How many norm groups the tensor has: one per index of the dimensions that are not reduced. A tensor without elements
// may have absurdly many; then the count stops above kMaxGroups.
constexpr int64_t kMaxGroups = int64_t(1) << 48;
inline int64_t group_count(const TensorView& view) {
  int64_t groups = 1;
  for (int d = 0; d < view.dims; ++d) {
    if ((view.reduced >> d) & 1) continue;
    if (view.sizes[d] == 0) return 0;
    groups = view.sizes[d] > kMaxGroups / groups ? kMaxGroups + 1 : groups * view.sizes[d];
    if (groups > kMaxGroups) return groups;
  }
  return groups;
}

// Consecutive work items of many tensors: item i belongs to the tensor t with first[t] <= i < first[t + 1].
struct BlockMap {
  std::vector<int64_t> first{0};

  void add(int64_t items) { first.push_back(first.back() + items); }
  int64_t items() const { return first.back(); }
  int64_t tensor_of(int64_t item) const {
    int64_t low = 0, high = int64_t(first.size()) - 1;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= item ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace fastwrs
