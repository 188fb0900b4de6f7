// What a kernel is launched with: the table of tensors and the hyperparameter records, by value, at most 32,764 bytes.
#pragma once

#include <cstdint>

#include "../core/host_device.h"
#include "../core/table.h"

namespace fastwrs::cuda {

constexpr int64_t kParamBytes = 32764;  // what a kernel's parameters may take since CUDA 12.1
constexpr uint32_t kNone = 0xffffffffu;

// How a tensor is cut into tiles, one per block. A tile's place follows from its number.
enum class TileKind : uint8_t {
  kElements,  // elements in the order of memory; no norm groups, or nothing to be done with them
  kUnits,     // whole units, held on chip until their norms are known
  kStrip,     // all rows of some columns of one unit, held on chip
  kPartial,   // rows and columns of one unit: the weights are written at once, their sums of squares to the workspace
};

enum Flags : uint8_t { kFresh = 1, kAdvances = 2 };

// One tensor in the form [units, rows, cols] of geometry.h, then its arrays: parameter, gradient, states.
struct TensorEntry {
  float* step;
  union {
    int64_t numel;  // kElements, kUnits
    struct {        // kPartial: tiles one below the other, and sums of one kind in the workspace
      uint32_t row_tiles, per_sum;
    } partial;
  };
  int64_t rows;
  uint32_t cols;         // where the tensor is walked by strides: where in the pool its dimensions are
  uint32_t first_block;  // of this launch
  uint32_t tile;         // kElements: elements; kUnits: units; else columns
  uint32_t measure;      // where in the pool it says where to write what is measured; kNone: not wanted
  uint32_t workspace;    // where its partial sums begin
  uint16_t record;
  TileKind kind;
  uint8_t flags;
};
template <int kArrays>
struct Entry : TensorEntry {
  void* data[kArrays];
};
static_assert(sizeof(TensorEntry) == 48 && sizeof(Entry<4>) == 80, "2,000 tensors in five launches");

// The part of a record that every rule has. C is the compute type.
template <class C>
struct Control {
  C lr;
  uint8_t lr_is_double, maximize;
  const void* lr_data;  // null: `lr`
  C every, start, stop, target, rate, power;
};

// What one launch has in common. Entries are followed by records, then by the pool: int64 numbers that entries point
// to.
struct Header {
  const float* grad_scale;  // null: none
  const float* found_inf;   // null: never
  float* measured;          // [rows, 8]
  void* workspace;          // of the compute type
  uint32_t* ticket;         // 0 before and after a launch; behind it one for each tensor
  uint32_t tensors, blocks;
  uint32_t records, pool;  // where they begin, in bytes from the first entry
  uint32_t tile_elements;  // of a kPartial tile, at most
  uint32_t sum_kinds;      // sums per group in the workspace
};

template <int kArrays>
struct Params {
  static constexpr int64_t kEntryBytes = kParamBytes - int64_t(sizeof(Header));
  static constexpr int64_t kEntries = kEntryBytes / int64_t(sizeof(Entry<kArrays>));

  Header header;
  Entry<kArrays> entries[kEntries];
};
static_assert(sizeof(Params<1>) <= kParamBytes && sizeof(Params<4>) <= kParamBytes && sizeof(Params<5>) <= kParamBytes,
              "parameters of a kernel");

// A record of a param group: what every rule has, then the rule's own.
template <class C, class Constants>
struct Record {
  Control<C> control;
  Constants constants;
};

// Rules that look first: what lies in front of the pool for each tensor. Where in the workspace is what was found out,
// in numbers of the compute type (-1: nothing), and which channel an element belongs to (Geometry::channel_of).
enum LookNumbers { kLookPlace, kChannelInner, kChannels, kLookNumbers };

// What the pool holds for a tensor is appended by geometry.h: from Entry::measure on where to write what is measured,
// from Entry::cols on how one is walked by strides.
enum MeasurePool { kFirstRow, kGroups, kKeptDims, kKept };

}  // namespace fastwrs::cuda
