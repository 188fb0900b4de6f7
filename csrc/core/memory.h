// Where the elements of a tensor lie, and whether two of them are one: plain C++ without torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "dtypes.h"

namespace fastwrs {

// What a tensor is, as the backend sees it.
struct Facts {
  void* data = nullptr;  // null: it has no elements
  int64_t numel = 0, dims = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t element = 0;  // bytes of one
  int64_t bytes = 0;    // from the first element to behind the last one
  Dtype dtype = Dtype::kFloat32;

  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(data); }
};

// (stride, size) of the dimensions along which there is more than one element, the smallest stride first.
inline std::vector<std::pair<int64_t, int64_t>> dims_by_stride(const Facts& f) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = f.dims - 1; d >= 0; --d) {
    if (f.sizes[d] != 1) dims.emplace_back(f.strides[d], f.sizes[d]);
  }
  if (!std::is_sorted(dims.begin(), dims.end())) std::sort(dims.begin(), dims.end());
  return dims;
}

// Where every element lies, in elements from the first one, sorted. It takes time and memory: a last resort.
inline std::vector<int64_t> places_of(const Facts& f) {
  std::vector<int64_t> places{0};
  places.reserve(f.numel);
  for (const auto& [stride, size] : dims_by_stride(f)) {
    const size_t inner = places.size();
    for (int64_t i = 1; i < size; ++i) {
      for (size_t k = 0; k < inner; ++k) places.push_back(places[k] + i * stride);
    }
  }
  std::sort(places.begin(), places.end());
  return places;
}

// Whether elements follow each other in memory in the order of their indices.
inline bool in_order(const Facts& f) {
  int64_t expected = 1;
  for (int64_t d = f.dims - 1; d >= 0; --d) {
    if (f.sizes[d] != 1 && f.strides[d] != expected) return false;
    expected *= f.sizes[d];
  }
  return true;
}

// Whether two indices name one element.
inline bool overlaps(const Facts& f) {
  if (f.numel <= 1 || in_order(f)) return false;
  int64_t reach = 1;
  bool nested = true;  // each dimension steps over all that the smaller strides reach: no overlap
  for (const auto& [stride, size] : dims_by_stride(f)) {
    nested = nested && stride >= reach;
    reach += (size - 1) * stride;
  }
  if (nested) return false;
  if (f.numel > reach) return true;  // more elements than places for them
  // Interleaved strides are rare: look at every element.
  const std::vector<int64_t> places = places_of(f);
  return std::adjacent_find(places.begin(), places.end()) != places.end();
}

// Whether the strides alone show that two tensors whose ranges of memory overlap share nothing: of two columns or
// halves of one matrix, each keeps to a range of its own within every period of their largest stride. `behind`: bytes
// from the first element of `one` to that of `other`. False says nothing.
inline bool in_lanes(const Facts& one, const Facts& other, int64_t behind) {
  const auto first = dims_by_stride(one), second = dims_by_stride(other);
  if (first.empty() || second.empty()) return false;
  const int64_t period = first.back().first * one.element;
  if (period == 0 || period != second.back().first * other.element) return false;
  const auto lane = [period](const std::vector<std::pair<int64_t, int64_t>>& dims, int64_t element) {
    int64_t bytes = element;
    for (const auto& [stride, size] : dims) bytes += stride * element == period ? 0 : (size - 1) * stride * element;
    return bytes;
  };
  const int64_t place = behind % period;
  return lane(first, one.element) <= place && place <= period - lane(second, other.element);
}

// Whether two tensors have a byte in common; `one` begins first.
inline bool share_memory(const Facts& one, const Facts& other) {
  if (other.begin() >= one.begin() + one.bytes) return false;
  const int64_t size = one.element, other_size = other.element;
  if (one.numel * size == one.bytes && other.numel * other_size == other.bytes) return true;
  const int64_t behind = int64_t(other.begin() - one.begin());
  if (in_lanes(one, other, behind)) return false;
  const std::vector<int64_t> places = places_of(one), others = places_of(other);
  for (size_t i = 0, k = 0; i < places.size() && k < others.size();) {
    const int64_t at = places[i] * size, other_at = behind + others[k] * other_size;
    if (at < other_at + other_size && other_at < at + size) return true;
    at < other_at ? ++i : ++k;
  }
  return false;
}

}  // namespace fastwrs
