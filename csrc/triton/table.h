// The table that the Triton kernels read: which tiles there are, what each tensor is and where its arrays lie. Plain
// C++ that fills 64-bit words; fastwrs/triton_kernels/table.py names the same words in the same order.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/job.h"

namespace fastwrs::triton {

// Elements of a tile; tiles of one unit that a program holds at most; rows and columns of a strip. They come from
// fastwrs/triton_kernels/launch.py.
struct Sizes {
  int64_t tile, held, height, width;
};
constexpr int kSizes = 4;
constexpr int64_t kLargestSize = int64_t(1) << 20;

// What one table needs beyond itself. A launch has one program per tile.
struct Needs {
  int64_t words = 0;
  int64_t changed = 0;  // words from the first to the last that differs from before
  int64_t workspace_bytes = 0;
  int64_t tiles = 0, project_tiles = 0, gate_tiles = 0;
  int64_t tensors = 0,
          others = 0;        // others: walked, where this table is for those that are not, or the other way round
  int64_t walked_gates = 0;  // tensors whose rows of dimension 0 have to be walked
};

// Brings `table`, of `room` words, up to date; if it is too small nothing is written. `records`: the numbers of each
// param group, `width` of them, those that every rule has first. `walk`: whether the table is for tensors that have to
// be walked by strides.
Needs fill_table(const StepJob& job, const std::vector<double>& records, int64_t width, const Sizes& sizes, bool walk,
                 int64_t* table, int64_t room);

// The names of the words, one line for each list of table.py.
std::string layout();

}  // namespace fastwrs::triton
