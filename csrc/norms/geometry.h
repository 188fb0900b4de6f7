// How a tensor falls into norm groups in memory.
//
// Every tensor is brought to the form [units, rows, cols]: a unit lies contiguously, the norm groups of a unit are its
// columns, and a norm is taken over rows. "out" in any dense layout is [C_out, everything else, 1]; "in" in contiguous
// layout is [C_out, C_in, kh * kw]; axis 0 of a matrix is [1, rows, cols]; "tensor" is [1, n, 1]. A tensor whose memory
// does not read in that order (gaps, arrays of different layouts, other axes) is walked by strides instead: one unit
// per norm group, elements gathered.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/table.h"

namespace fastwrs {

// One dimension of a tensor in the order in which it is walked.
struct WalkDim {
  int64_t size;
  int64_t stride[kMaxArrays];
};

struct Geometry {
  int64_t units = 0, rows = 0, cols = 1;
  // Where dimension 0 is: element e of the walk has the index e / channel_inner % channels there.
  int64_t channels = 1, channel_inner = 1;
  // Empty where all arrays are dense in the same order: element e of the walk is element e in memory.
  std::vector<WalkDim> walk;
  // Size and stride (in rows of the norm buffer) of the kept dimensions in the order of the walk; empty where that is
  // already the row-major order.
  std::vector<WalkDim> kept;

  int64_t unit_size() const { return rows * cols; }
  int64_t numel() const { return units * rows * cols; }
  int64_t groups() const { return units * cols; }
  bool strided() const { return !walk.empty(); }
  int64_t channel_of(int64_t element) const { return element / channel_inner % channels; }
  // Row of the norm buffer, relative to the tensor's first, for the group at place `index` of the walk.
  int64_t norm_row(int64_t index) const { return kept.empty() ? index : kept_row(index); }

 private:
  int64_t kept_row(int64_t index) const;
};

// For kernels that read a pool of numbers beside their table. Dimensions come in the order of the walk; both return
// where their part begins. The walk: the number of dimensions, then of each its size and the stride of every array.
// What is measured: the tensor's first row, its number of groups, the number of kept dimensions, then of each size and
// stride.
int64_t append_walk(const Geometry& geometry, int arrays, std::vector<int64_t>& pool);
int64_t append_measure(const Geometry& geometry, const TensorView& tensor, std::vector<int64_t>& pool);

// `with_norms` false: norm groups do not matter, the tensor is one run of elements.
Geometry geometry_of(const TensorView& tensor, bool with_norms);

// The first arrays of a tensor as a look sees it: a row for each index of dimension 0. One of less than two dimensions
// has no rows, and `reduced` is 0.
TensorView view_of_rows(const TensorView& tensor, int arrays);

}  // namespace fastwrs
