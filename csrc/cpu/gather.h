// Elements of a tensor that do not lie in a straight line, to and from a buffer where they do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../norms/geometry.h"

namespace fastwrs::cpu {

// Calls copy(memory, buffer, count, stride) for runs along the innermost dimension: n elements of array k from `begin`,
// in the order of the geometry's walk. Strides count elements of `size` bytes.
template <class Copy>
void for_strided_runs(const TensorView& view, const Geometry& geometry, int k, int64_t size, int64_t begin, int64_t n,
                      char* buffer, const Copy& copy) {
  const WalkDim& inner = geometry.walk.back();
  while (n > 0) {
    int64_t index = begin, offset = 0;
    for (auto dim = geometry.walk.rbegin(); dim != geometry.walk.rend(); ++dim) {
      offset += index % dim->size * dim->stride[k];
      index /= dim->size;
    }
    const int64_t run = std::min(n, inner.size - begin % inner.size);
    copy(static_cast<char*>(view.array[k].data) + offset * size, buffer, run, inner.stride[k]);
    begin += run;
    n -= run;
    buffer += run * size;
  }
}

inline void gather(const TensorView& view, const Geometry& geometry, int k, int64_t size, int64_t begin, int64_t n,
                   char* buffer) {
  for_strided_runs(view, geometry, k, size, begin, n, buffer,
                   [size](const char* memory, char* to, int64_t count, int64_t stride) {
                     if (stride == 1) {
                       std::memcpy(to, memory, count * size);
                       return;
                     }
                     for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * size, memory + i * stride * size, size);
                   });
}

inline void scatter(const TensorView& view, const Geometry& geometry, int k, int64_t size, int64_t begin, int64_t n,
                    char* buffer) {
  for_strided_runs(view, geometry, k, size, begin, n, buffer,
                   [size](char* memory, const char* from, int64_t count, int64_t stride) {
                     if (stride == 1) {
                       std::memcpy(memory, from, count * size);
                       return;
                     }
                     for (int64_t i = 0; i < count; ++i) std::memcpy(memory + i * stride * size, from + i * size, size);
                   });
}

}  // namespace fastwrs::cpu
