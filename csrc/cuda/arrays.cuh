// The arrays of a tensor as the tile of a block sees them: where they lie, and how they are read and written.
#pragma once

#include "tiles.cuh"

namespace fastwrs::cuda {

// kSlots -1: the parameter is the only one.
template <int kSlots, class P, class G, class S, bool kWalk>
class TileArrays {
 protected:
  using C = compute_t<P>;
  static constexpr int kArrays = 2 + kSlots, kVector = VectorOf<P, G, S>::kElements;

  FASTWRS_DEVICE TileArrays(const Params<kArrays>& params, uint32_t tensor)
      : header_(params.header), entry_(params.entries[tensor]) {
    pool_ = pool_of(params);
    walk_ = kWalk ? pool_of(params) + entry_.cols : nullptr;
    tile_ = tile_of<kArrays, kWalk>(header_, entry_);
  }

  FASTWRS_DEVICE P* param() const { return static_cast<P*>(entry_.data[0]); }
  FASTWRS_DEVICE G* grad() const { return static_cast<G*>(entry_.data[1]); }
  FASTWRS_DEVICE S* state(int s) const { return static_cast<S*>(entry_.data[2 + s]); }

  // Where the tile falls into vectors, and which arrays are aligned for them there.
  FASTWRS_DEVICE void find_vectors() {
    if (kWalk) return;
    cut_ = cut_of<kVector>(tile_, param());
    const int64_t first = tile_.base + cut_.head;
    if constexpr (kArrays > 1) aligned_ = is_aligned(grad() + first) ? 1 : 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) aligned_ |= is_aligned(state(s) + first) ? 2u << s : 0;
  }
  // How far lists of values on chip are shifted, in bytes, so that vectors of the tile are vectors there.
  FASTWRS_DEVICE uint32_t values_shift() const {
    return (kVector - cut_.head % kVector) % kVector * uint32_t(sizeof(C));
  }

  // Elements of an array from `element` on.
  template <int N, class T>
  FASTWRS_DEVICE void read(const T* array, int64_t element, int k, T (&x)[N]) const {
    if constexpr (N == 1) {
      x[0] = load(array + (kWalk ? walk_to<kArrays>(walk_, element, k) : element));
    } else if (k == 0 || (aligned_ >> (k - 1) & 1)) {
      load_vector(array + element, x);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = load(array + element + j);
    }
  }
  template <int N, class T>
  FASTWRS_DEVICE void write(T* array, int64_t element, int k, const T (&x)[N], bool keep = false) const {
    if constexpr (N == 1) {
      store(array + (kWalk ? walk_to<kArrays>(walk_, element, k) : element), x[0]);
    } else if (k == 0 || (aligned_ >> (k - 1) & 1)) {
      store_vector(array + element, x, keep);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) store(array + element + j, x[j]);
    }
  }

  const Header& header_;
  const Entry<kArrays>& entry_;
  const int64_t *pool_, *walk_;
  Tile tile_;
  Cut cut_;
  uint32_t aligned_ = 0;
};

}  // namespace fastwrs::cuda
