// What the kernels are made of: numbers that lie on the device, a block's tile and how threads walk it, shared memory,
// and the sums of a tile's norm groups.
#pragma once

#include "../norms/measured.h"
#include "device.cuh"
#include "layout.h"
#include "params.h"

namespace fastwrs::cuda {

// Threads of a block at most, and how many blocks of so many a multiprocessor should have registers for.
constexpr uint32_t kMostThreads = 256, kResidentBlocks = 2;

// Loops whose length is known at run time alone are not unrolled: nvcc would make four copies of each, with all that is
// inlined in them, which costs registers, instruction cache, and half of the time to compile.

// ---- numbers -------------------------------------------------------------------------------------------------------

// A sum that keeps what rounding loses. An infinite one stays infinite.
template <class C>
struct Compensated {
  C sum = 0, lost = 0;

  FASTWRS_DEVICE void add(C x) {
    const C y = x - lost, next = sum + y;
    lost = is_finite(next) ? (next - sum) - y : C(0);
    sum = next;
  }
};

// A double's value in fp32, by integers: a kernel for fp32 has no instruction for fp64. Below fp32's normal numbers: 0.
FASTWRS_DEVICE float float_of(uint64_t bits) {
  const uint32_t sign = uint32_t(bits >> 32) & 0x80000000u;
  const uint64_t magnitude = bits & 0x7fffffffffffffffull;
  const uint64_t rounded = (magnitude - (896ull << 52) + 0xfffffffull + ((magnitude >> 29) & 1)) >> 29;
  const uint32_t special = magnitude > (0x7ffull << 52) ? 0x7fc00000u : 0x7f800000u;
  const uint32_t value = magnitude < (897ull << 52) ? 0 : magnitude >= (1151ull << 52) ? special : uint32_t(rounded);
  return bits_float(sign | value);
}
FASTWRS_DEVICE float read_number(const void* data, bool is_double, float) {
  return is_double ? float_of(load_shared_by_all(static_cast<const uint64_t*>(data)))
                   : load_shared_by_all(static_cast<const float*>(data));
}
FASTWRS_DEVICE double read_number(const void* data, bool is_double, double) {
  return is_double ? load_shared_by_all(static_cast<const double*>(data))
                   : double(load_shared_by_all(static_cast<const float*>(data)));
}

// ---- what a launch and a block know --------------------------------------------------------------------------------

template <int kArrays>
FASTWRS_DEVICE const int64_t* pool_of(const Params<kArrays>& params) {
  return reinterpret_cast<const int64_t*>(reinterpret_cast<const char*>(params.entries) + params.header.pool);
}

template <class R, int kArrays>
FASTWRS_DEVICE const R& record_of(const Params<kArrays>& params, uint32_t index) {
  return reinterpret_cast<const R*>(reinterpret_cast<const char*>(params.entries) + params.header.records)[index];
}

// The tensor that a block works on: the last one that begins at or before it.
template <int kArrays>
FASTWRS_DEVICE uint32_t tensor_of(const Params<kArrays>& params, uint32_t block) {
  uint32_t low = 0, high = params.header.tensors;
#pragma unroll 1
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (params.entries[middle].first_block <= block ? low : high) = middle;
  }
  return low;
}

// Any non-zero found_inf, NaN too, skips everything.
FASTWRS_DEVICE bool is_skipped(const Header& header) {
  return header.found_inf && load_shared_by_all(header.found_inf) != 0;
}

template <class C>
struct Moment {
  C lr, t;
  bool rescale, shrink;
};

template <class C>
FASTWRS_DEVICE C lr_of(const Control<C>& c) {
  return c.lr_data ? read_number(c.lr_data, c.lr_is_double, C()) : c.lr;
}

// Made where it is needed, from constant memory: kernels are short of registers until then.
template <class C>
FASTWRS_DEVICE Projection<C> projection_of(const Control<C>& c, bool rescale, bool shrink) {
  Projection<C> p;
  p.rescale = rescale;
  p.shrink = shrink;
  p.target = c.target;
  p.lr_rate = shrink ? lr_of(c) * c.rate : C(0);
  p.power = c.power;
  return p;
}

template <class C>
FASTWRS_DEVICE Moment<C> moment_of(const Control<C>& c, const float* step) {
  Moment<C> m;
  m.lr = lr_of(c);
  m.t = C(load_shared_by_all(step)) + C(1);
  const auto p = Projection<C>::at(m.t, m.lr, c.every, c.start, c.stop, c.target, c.rate, c.power);
  m.rescale = p.rescale;
  m.shrink = p.shrink;
  return m;
}

// The sums of a group that this step needs, as bits.
FASTWRS_DEVICE uint32_t wanted_sums(bool rescale, bool shrink, bool measured) {
  if (measured) return (1u << kSums) - 1;
  return (shrink ? 1u << kBefore : 0) | (rescale ? 1u << kUpdated : 0);
}

// Row of the norm buffer for the group at place `index` of the walk.
FASTWRS_DEVICE float* measured_row(const Header& header, const int64_t* about, int64_t index) {
  int64_t row = about[kFirstRow];
  if (about[kKeptDims] == 0) row += index;
#pragma unroll 1
  for (int64_t d = about[kKeptDims] - 1; d >= 0; --d) {
    const int64_t size = about[kKept + 2 * d];
    row += index % size * about[kKept + 2 * d + 1];
    index /= size;
  }
  return header.measured + kMeasured * row;
}

template <class C>
FASTWRS_DEVICE void measure(float* row, const C* norm, C factor, const Projection<C>& projection) {
  float values[kMeasured];
  write_measured(values, norm, factor, projection);
#pragma unroll
  for (int k = 0; k < kMeasured; ++k) store(row + k, values[k]);
}

// The last block to come advances the steps of the launch: by then every other has read them.
template <int kArrays>
FASTWRS_DEVICE void advance_steps(const Params<kArrays>& params) {
  const Header& header = params.header;
  barrier();  // all threads of this block have read their step
  bool last = false;
  if (thread_index() == 0) last = take_ticket(header.ticket) == block_count() - 1;
  if (!barrier_any(last)) return;
  if (thread_index() == 0) store(header.ticket, 0u);
#pragma unroll 1
  for (uint32_t i = thread_index(); i < header.tensors; i += thread_count()) {
    const Entry<kArrays>& entry = params.entries[i];
    if (!(entry.flags & kAdvances)) continue;
    store(entry.step, load(entry.step) + 1.0f);
    if (entry.kind != TileKind::kElements || entry.numel != 0 || entry.measure == kNone) continue;
    const int64_t* about = pool_of(params) + entry.measure;
#pragma unroll 1
    for (int64_t group = 0; group < about[kGroups]; ++group) {
      float* row = measured_row(header, about, group);
#pragma unroll 1
      for (int k = 0; k < kMeasured; ++k) store(row + k, measured_of_nothing(k));
    }
  }
}

// Whether all other blocks of the tensor have left what they have to leave; asked once by each.
template <int kArrays>
FASTWRS_DEVICE bool is_last_of_tensor(const Params<kArrays>& params, uint32_t tensor) {
  const Header& header = params.header;
  const uint32_t end = tensor + 1 == header.tensors ? header.blocks : params.entries[tensor + 1].first_block;
  uint32_t* ticket = header.ticket + 1 + tensor;
  barrier();  // all threads of this block have left their sums
  bool last = false;
  if (thread_index() == 0) last = take_ticket(ticket) == end - params.entries[tensor].first_block - 1;
  if (!barrier_any(last)) return false;
  if (thread_index() == 0) store(ticket, 0u);
  return true;
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

// A tile: `n` elements of the tensor in its own order, in runs of `width` that lie `pitch` apart; element l of the tile
// is element base + l / width * pitch + l % width of the tensor. Its norm groups are the columns of its units.
struct Tile {
  int64_t base, pitch;
  uint32_t n, width;
  uint32_t unit_size, cols;
};

FASTWRS_DEVICE uint32_t strips_of(uint32_t cols, uint32_t width) { return cols / width + (cols % width != 0); }

template <int kArrays, bool kWalk>
FASTWRS_DEVICE Tile tile_of(const Header& header, const Entry<kArrays>& entry) {
  const uint32_t index = block_index() - entry.first_block;
  Tile tile;
  const int64_t rows = entry.rows, cols = kWalk ? 1 : entry.cols, unit = rows * cols;
  if (entry.kind == TileKind::kElements || entry.kind == TileKind::kUnits) {
    const int64_t size = entry.kind == TileKind::kElements ? entry.tile : entry.tile * unit;
    tile.base = index * size;
    tile.n = uint32_t(entry.numel - tile.base < size ? entry.numel - tile.base : size);
    tile.width = tile.n;
    tile.pitch = 0;
    tile.unit_size = entry.kind == TileKind::kElements ? tile.n : uint32_t(unit);
    tile.cols = uint32_t(cols);
    return tile;
  }
  // Columns of one unit: all rows of them, or some.
  const bool whole = entry.kind == TileKind::kStrip;
  const uint32_t strips = strips_of(uint32_t(cols), entry.tile), row_tiles = whole ? 1 : entry.partial.row_tiles;
  const uint32_t strip = index % strips, row_tile = index / strips % row_tiles, u = index / strips / row_tiles;
  const int64_t rows_per_tile = whole ? rows : header.tile_elements / entry.tile;
  const int64_t first_col = int64_t(strip) * entry.tile, first_row = row_tile * rows_per_tile;
  const int64_t width = cols - first_col < entry.tile ? cols - first_col : entry.tile;
  const int64_t height = rows - first_row < rows_per_tile ? rows - first_row : rows_per_tile;
  tile.base = u * unit + first_row * cols + first_col;
  tile.pitch = cols;
  tile.n = uint32_t(width * height);
  tile.width = width == cols ? tile.n : uint32_t(width);  // whole rows are one run
  tile.unit_size = tile.n;
  tile.cols = uint32_t(width);
  return tile;
}

// The first norm group of a tile, in the order of the walk; and the place of its sum among those of its kind.
struct Groups {
  int64_t first, partial;
};
template <int kArrays, bool kWalk>
FASTWRS_DEVICE Groups groups_of(const Entry<kArrays>& entry) {
  const uint32_t index = block_index() - entry.first_block;
  const int64_t cols = kWalk ? 1 : entry.cols;
  if (entry.kind == TileKind::kUnits) return {index * int64_t(entry.tile) * cols, 0};
  const uint32_t strips = strips_of(uint32_t(cols), entry.tile);
  const uint32_t row_tiles = entry.kind == TileKind::kStrip ? 1 : entry.partial.row_tiles;
  const int64_t first_col = int64_t(index % strips) * entry.tile, row = index / strips;  // row of tiles of all units
  return {row / row_tiles * cols + first_col, row * cols + first_col};
}

// Where element `index` of the walk lies in array k. `dims` points to the number of dimensions in the pool.
template <int kArrays>
FASTWRS_DEVICE int64_t walk_to(const int64_t* dims, int64_t index, int k) {
  int64_t offset = 0;
#pragma unroll 1
  for (int64_t d = dims[0] - 1; d >= 0; --d) {
    const int64_t* dim = dims + 1 + d * (1 + kArrays);
    offset += index % dim[0] * dim[1 + k];
    index /= dim[0];
  }
  return offset;
}

// How the runs of a tile fall into vectors: `head` elements of a single run come before the first one.
struct Cut {
  uint32_t head = 0;
  bool vectors = false;
};

// Elements before the first one at which the array is aligned for vectors.
template <class T>
FASTWRS_DEVICE uint32_t elements_before_alignment(const T* array) {
  const uint32_t beyond = uint32_t(reinterpret_cast<uintptr_t>(array) % kWordBytes) / uint32_t(sizeof(T));
  return beyond == 0 ? 0 : kWordBytes / uint32_t(sizeof(T)) - beyond;
}

template <int kVector, class P>
FASTWRS_DEVICE Cut cut_of(const Tile& tile, const P* param) {
  Cut cut;
  cut.head = elements_before_alignment(param + tile.base);
  if (tile.width == tile.n) {
    cut.vectors = tile.width >= cut.head + kVector;
  } else {
    cut.vectors = cut.head == 0 && tile.width % kVector == 0 && tile.pitch % kVector == 0;
  }
  if (!cut.vectors) cut.head = 0;
  return cut;
}

// Runs body(element of the tensor, place in the tile) for every element, vector_body for kVector of them at a time.
template <int kVector, class VectorBody, class Body>
FASTWRS_DEVICE void for_elements(const Tile& tile, const Cut& cut, const VectorBody& vector_body, const Body& body) {
  const bool one_run = tile.width == tile.n;
  const uint32_t head = cut.head, per_run = cut.vectors ? (tile.width - head) / kVector : 0;
  const uint32_t runs = one_run ? 1 : tile.n / tile.width;
#pragma unroll 1
  for (uint32_t v = thread_index(); v < per_run * runs; v += thread_count()) {
    const uint32_t run = one_run ? 0 : v / per_run;
    const uint32_t place = head + (v - run * per_run) * kVector;
    vector_body(tile.base + run * tile.pitch + place, run * tile.width + place);
  }
  // What no vector covers: with several runs that is everything or nothing.
  const uint32_t covered = per_run * kVector, rest = (tile.width - covered) * runs;
#pragma unroll 1
  for (uint32_t i = thread_index(); i < rest; i += thread_count()) {
    const uint32_t run = one_run ? 0 : i / tile.width, j = i - run * tile.width;
    const uint32_t place = j < head ? j : j + covered;
    body(tile.base + run * tile.pitch + place, run * tile.width + place);
  }
}

template <class T>
FASTWRS_DEVICE bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % kWordBytes == 0;
}

// How a tile's element-wise work is cut into vectors: enough elements that the shortest type fills 16 bytes.
template <class P, class G, class S>
struct VectorOf {
  static constexpr size_t kShortest = sizeof(P) < sizeof(G) ? (sizeof(P) < sizeof(S) ? sizeof(P) : sizeof(S))
                                                            : (sizeof(G) < sizeof(S) ? sizeof(G) : sizeof(S));
  static constexpr int kElements = int(kWordBytes / kShortest);
};

// ---- shared memory -------------------------------------------------------------------------------------------------

template <class C>
FASTWRS_DEVICE C* on_chip(uint32_t bytes) {
  return reinterpret_cast<C*>(shared_memory() + bytes);
}

// The lists of a tile's values on chip, one behind the other: for sum k, if bit k of `there` is set.
struct Lists {
  uint32_t first, there;

  template <class C>
  FASTWRS_DEVICE uint32_t of(int k, const Tile& tile) const {
    uint32_t before = 0;
#pragma unroll
    for (int j = 0; j < k; ++j) before += there >> j & 1;
    return first + before * values_bytes<C>(tile.n);
  }
};

// One value, or whole words of them.
template <int N, class C>
FASTWRS_DEVICE void put_on_chip(C* place, const C (&x)[N]) {
  if constexpr (N == 1) {
    *place = x[0];
  } else {
    Word words[N * sizeof(C) / kWordBytes];
    memcpy(words, x, sizeof x);
#pragma unroll
    for (int i = 0; i < int(N * sizeof(C) / kWordBytes); ++i) reinterpret_cast<Word*>(place)[i] = words[i];
  }
}
template <int N, class C>
FASTWRS_DEVICE void take_from_chip(const C* place, C (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = *place;
  } else {
    Word words[N * sizeof(C) / kWordBytes];
#pragma unroll
    for (int i = 0; i < int(N * sizeof(C) / kWordBytes); ++i) words[i] = reinterpret_cast<const Word*>(place)[i];
    memcpy(x, words, sizeof x);
  }
}

// ---- the sums of a tile's groups -----------------------------------------------------------------------------------

// One number of each thread, summed over the block: over a warp, then over warps.
template <class C>
FASTWRS_DEVICE C sum_over_block(C x, C* scratch) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = x;
  barrier();  // the sums of the warps are complete
  C sum = 0;
#pragma unroll 1
  for (uint32_t warp = 0; warp < thread_count() / kWarp; ++warp) sum += scratch[warp];
  return sum;
}

// The largest number of all threads, NaN if one is.
template <class C>
FASTWRS_DEVICE C largest_of_block(C x, C* scratch) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = maximum(x, shuffle_xor(x, lanes));
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = x;
  barrier();  // the largest of the warps are complete
#pragma unroll 1
  for (uint32_t warp = 0; warp < thread_count() / kWarp; ++warp) x = maximum(x, scratch[warp]);
  return x;
}

// Sums over the groups of a tile; term(k, place, group) is what an element adds to sum k. Lanes share a group;
// consecutive threads take consecutive elements. Leaves partial sums [sum][lane][group]; finish with sum_of_lanes after
// a barrier.
template <class C, int kCount, class Term>
FASTWRS_DEVICE void sum_groups(const Tile& tile, uint32_t wants, C* partial, const Term& term) {
  const uint32_t groups = tile.n / tile.unit_size * tile.cols, rows = tile.unit_size / tile.cols;
  const uint32_t lanes = lanes_for(groups, thread_count());
#pragma unroll 1
  for (uint32_t task = thread_index(); task < groups * lanes; task += thread_count()) {
    const uint32_t col = task % tile.cols, lane = task / tile.cols % lanes, unit = task / tile.cols / lanes;
    const uint32_t group = unit * tile.cols + col;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (!(wants >> k & 1)) continue;
      Compensated<C> sum;
      for (uint32_t row = lane; row < rows; row += lanes) {
        sum.add(term(k, unit * tile.unit_size + row * tile.cols + col, group));
      }
      partial[(k * lanes + lane) * groups + group] = sum.sum;
    }
  }
}
template <class C>
FASTWRS_DEVICE C sum_of_lanes(const C* partial, int k, uint32_t lanes, uint32_t groups, uint32_t group) {
  Compensated<C> sum;
#pragma unroll 1
  for (uint32_t lane = 0; lane < lanes; ++lane) sum.add(partial[(k * lanes + lane) * groups + group]);
  return sum.sum;
}

// The factor of the group that a place in the tile belongs to, and of the places after it.
template <class C, bool kOnChip>
struct Factors {
  const C* factors;
  uint32_t cols, unit_size, unit, rest, col;

  FASTWRS_DEVICE Factors(const C* factors_, const Tile& tile, uint32_t place)
      : factors(factors_), cols(tile.cols), unit_size(tile.unit_size) {
    unit = unit_size == tile.n ? 0 : place / unit_size;
    rest = place - unit * unit_size;
    col = cols == 1 ? 0 : rest % cols;
  }
  FASTWRS_DEVICE C next() {
    const C* at = factors + unit * cols + col;
    const C factor = kOnChip ? *at : load_shared_by_all(at);
    if (++col == cols) col = 0;
    if (++rest == unit_size) {
      rest = 0;
      ++unit;
    }
    return factor;
  }
};

}  // namespace fastwrs::cuda
