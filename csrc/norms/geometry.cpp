#include "geometry.h"

#include <algorithm>

namespace fastwrs {
namespace {

struct Dim {
  int64_t size;
  bool reduced, channel;
  int64_t stride[kMaxArrays];
  int64_t norm_stride;  // rows of the norm buffer; kept dimensions only
};

// Dimensions without an allocation: this runs for every tensor of every step.
struct Dims {
  Dim dim[64];
  int count = 0;
  Dim* begin() { return dim; }
  Dim* end() { return dim + count; }
};

// The dimensions of size > 1 from the outermost in memory to the innermost, as the parameter is stored.
void dims_in_memory_order(const TensorView& t, bool with_norms, Dims& dims) {
  int64_t norm_stride = 1;
  for (int d = t.dims - 1; d >= 0; --d) {
    const bool reduced = !with_norms || ((t.reduced >> d) & 1);
    if (t.sizes[d] != 1) {
      Dim& dim = dims.dim[dims.count++];
      dim.size = t.sizes[d];
      dim.reduced = reduced;
      dim.channel = d == 0;
      dim.norm_stride = reduced ? 0 : norm_stride;
      for (int k = 0; k < t.arrays; ++k) dim.stride[k] = t.array[k].strides[d];
    }
    if (!reduced) norm_stride *= t.sizes[d];
  }
  std::reverse(dims.begin(), dims.end());
  const auto outer_first = [](const Dim& a, const Dim& b) { return a.stride[0] > b.stride[0]; };
  if (!std::is_sorted(dims.begin(), dims.end(), outer_first)) std::stable_sort(dims.begin(), dims.end(), outer_first);
}

bool dense_in_this_order(const Dims& dims, int arrays) {
  int64_t expected = 1;
  for (int d = dims.count - 1; d >= 0; --d) {
    for (int k = 0; k < arrays; ++k) {
      if (dims.dim[d].stride[k] != expected) return false;
    }
    expected *= dims.dim[d].size;
  }
  return true;
}

// Fills units, rows and cols if the dimensions read kept*, reduced*, kept* from the outermost to the innermost.
bool reads_in_straight_line(const Dims& dims, Geometry& g) {
  g.units = g.rows = g.cols = 1;
  int i = 0;
  for (; i < dims.count && !dims.dim[i].reduced; ++i) g.units *= dims.dim[i].size;
  for (; i < dims.count && dims.dim[i].reduced; ++i) g.rows *= dims.dim[i].size;
  for (; i < dims.count && !dims.dim[i].reduced; ++i) g.cols *= dims.dim[i].size;
  if (i < dims.count) return false;
  if (g.rows == 1 && g.cols == 1) std::swap(g.units, g.cols);  // every element is a group
  return true;
}

}  // namespace

int64_t Geometry::kept_row(int64_t index) const {
  int64_t row = 0;
  for (auto dim = kept.rbegin(); dim != kept.rend(); ++dim) {
    row += index % dim->size * dim->stride[0];
    index /= dim->size;
  }
  return row;
}

int64_t append_walk(const Geometry& geometry, int arrays, std::vector<int64_t>& pool) {
  const int64_t place = int64_t(pool.size());
  pool.push_back(int64_t(geometry.walk.size()));
  for (const WalkDim& dim : geometry.walk) {
    pool.push_back(dim.size);
    pool.insert(pool.end(), dim.stride, dim.stride + arrays);
  }
  return place;
}

int64_t append_measure(const Geometry& geometry, const TensorView& tensor, std::vector<int64_t>& pool) {
  const int64_t place = int64_t(pool.size());
  pool.insert(pool.end(), {tensor.norm_row, group_count(tensor), int64_t(geometry.kept.size())});
  for (const WalkDim& dim : geometry.kept) pool.insert(pool.end(), {dim.size, dim.stride[0]});
  return place;
}

Geometry geometry_of(const TensorView& t, bool with_norms) {
  Geometry g;
  Dims dims;
  dims_in_memory_order(t, with_norms, dims);
  for (const Dim& dim : dims) {
    if (dim.size == 0) return g;
  }
  if (!(dense_in_this_order(dims, t.arrays) && reads_in_straight_line(dims, g))) {
    std::stable_partition(dims.begin(), dims.end(), [](const Dim& dim) { return !dim.reduced; });
    g.units = g.rows = g.cols = 1;
    for (const Dim& dim : dims) {
      (dim.reduced ? g.rows : g.units) *= dim.size;
      WalkDim walk{dim.size, {}};
      std::copy(dim.stride, dim.stride + t.arrays, walk.stride);
      g.walk.push_back(walk);
    }
  }
  int64_t inner = 1;
  for (int d = dims.count - 1; d >= 0; --d) {
    if (dims.dim[d].channel) {
      g.channels = dims.dim[d].size;
      g.channel_inner = inner;
    }
    inner *= dims.dim[d].size;
  }
  int64_t expected = 1;
  bool row_major = true;
  for (int d = dims.count - 1; with_norms && d >= 0; --d) {
    if (dims.dim[d].reduced) continue;
    row_major = row_major && dims.dim[d].norm_stride == expected;
    expected *= dims.dim[d].size;
  }
  for (const Dim& dim : dims) {
    if (!row_major && !dim.reduced) g.kept.push_back({dim.size, {dim.norm_stride}});
  }
  return g;
}

TensorView view_of_rows(const TensorView& tensor, int arrays) {
  TensorView rows = tensor;
  rows.arrays = arrays;
  rows.reduced = int64_t((uint64_t(1) << tensor.dims) - 1) & ~int64_t(1);  // nothing of less than two dimensions
  rows.norm_row = -1;
  return rows;
}

}  // namespace fastwrs
