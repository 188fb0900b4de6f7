// How one tensor's work is cut into items that threads take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../norms/geometry.h"
#include "../norms/measured.h"
#include "leaves.h"

namespace fastwrs::cpu {

// Elements that are updated and summed in one go; they stay in the first-level cache.
constexpr int64_t kRun = 1024, kLongestRun = 4096;
// The longest norm unit that is held in the second-level cache between its update and its scaling. Longer ones take two
// phases. 32,768 elements are 128 KB of weights in fp32, while 256 to 512 KB of other arrays stream past them.
constexpr int64_t kUnitLimit = 32768;
// Elements of an item of work, if the tensor has as many.
constexpr int64_t kItem = 16384;
// Two phases over columns: an item is a strip of at most so many columns, at least so many rows.
constexpr int64_t kStrip = 1024, kStripRows = 64;

// An item of work that is not whole units: rows and columns of one unit.
struct Block {
  int64_t unit, row_item, first_row, rows, first_column, columns;
};

struct TensorPlan {
  enum Path { kElementwise, kOnePass, kTwoPhases };

  Geometry geometry;
  Projection<double> projection;
  bool wants[kSums] = {};
  Path path = kElementwise;
  int64_t items = 0;   // of the first phase
  int64_t run = kRun;  // elements that are updated, then summed: whole blocks of the sums where they are not too long
  int64_t units_per_item = 1;                                       // one pass
  int64_t units_per_tile = 1;                                       // one pass: short units share a tile
  int64_t strip = 1, strips = 1, rows_per_item = 1, row_items = 1;  // otherwise: an item is [rows, strip] of one unit
  int64_t workspace = 0;  // offset in elements: first the partial sums, then a factor for each group

  bool sums() const { return wants[kBefore] || wants[kUpdated] || wants[kGrad] || wants[kUpdate]; }
  bool scales() const { return projection.rescale || projection.shrink; }
  // Whether whole rows lie ready to be updated and summed in one loop, by one factor each: nothing of the step but the
  // weights after the update is wanted, or everything.
  bool takes_rows() const {
    const bool one = wants[kUpdated] && wants[kBefore] == wants[kGrad] && wants[kGrad] == wants[kUpdate];
    return one && path == kOnePass && geometry.cols == 1 && !geometry.strided();
  }
  int64_t sum_size() const { return geometry.units * row_items * geometry.cols; }
  int64_t workspace_size() const { return path == kTwoPhases ? kSums * sum_size() + geometry.groups() : 0; }

  // The most elements that one thread holds at a time.
  int64_t tile_size() const { return path == kOnePass ? units_per_tile * geometry.unit_size() : rows_per_item * strip; }
  // Columns that are summed side by side.
  int64_t sum_columns() const { return path == kOnePass ? geometry.cols : strip; }

  // One pass: the units of some items.
  std::pair<int64_t, int64_t> units_of(int64_t first_item, int64_t end_item) const {
    return {first_item * units_per_item, std::min(geometry.units, end_item * units_per_item)};
  }
  Block block(int64_t item) const {
    Block b;
    b.row_item = item / strips % row_items;
    b.unit = item / strips / row_items;
    b.first_row = b.row_item * rows_per_item;
    b.rows = std::min(rows_per_item, geometry.rows - b.first_row);
    b.first_column = item % strips * strip;
    b.columns = std::min(strip, geometry.cols - b.first_column);
    return b;
  }

  void cut() {
    const Geometry& g = geometry;
    if (g.numel() == 0) return;
    const int64_t block = Accumulator<float>::width_for(std::min(g.cols, kStrip)) * Accumulator<float>::kTurns;
    if (block <= kLongestRun) run = std::max(block, kRun / block * block);
    path = !sums() ? kElementwise : g.unit_size() <= kUnitLimit ? kOnePass : kTwoPhases;
    if (path == kOnePass) {
      units_per_tile = 2 * g.unit_size() >= kRun ? 1 : std::min(g.units, kRun / g.unit_size());
      const int64_t tiles_per_item = std::max<int64_t>(1, kItem / (units_per_tile * g.unit_size()));
      units_per_item = units_per_tile * tiles_per_item;
      items = (g.units + units_per_item - 1) / units_per_item;
      return;
    }
    // Few columns stay together, so that an item is one straight run of memory.
    strip = g.cols <= kStrip ? g.cols : kStrip;
    strips = (g.cols + strip - 1) / strip;
    rows_per_item = std::min(g.rows, std::max(g.cols > 64 ? kStripRows : 1, kItem / strip));
    row_items = (g.rows + rows_per_item - 1) / rows_per_item;
    items = g.units * row_items * strips;
  }
};

}  // namespace fastwrs::cpu
