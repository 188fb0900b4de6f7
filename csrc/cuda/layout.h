// How a tile lies in shared memory: computed by the host, which reserves it, and by the kernels.
#pragma once

#include <cstdint>

#include "../core/host_device.h"

namespace fastwrs::cuda {

constexpr uint32_t kWordBytes = 16;  // what one thread reads or writes at a time
constexpr uint32_t kWarp = 32;
constexpr uint32_t kMostLanes = 32;  // threads that sum one group of several in a tile

// [sums of each of kSums][factors][values of the tile, one list per sum that is wanted]. The host reserves it with the
// same functions.
FASTWRS_HD uint32_t lanes_for(uint32_t groups, uint32_t threads) {
  const uint32_t lanes = groups >= threads ? 1 : threads / groups;
  return lanes < kMostLanes ? lanes : kMostLanes;
}
FASTWRS_HD uint32_t round_to_words(uint32_t bytes) { return (bytes + kWordBytes - 1) / kWordBytes * kWordBytes; }
// Bytes before the values.
template <class C>
FASTWRS_HD uint32_t sums_bytes(uint32_t groups, uint32_t wanted, uint32_t threads) {
  // A tile at the end of a tensor has fewer groups, and more lanes for each.
  const uint32_t sums = groups == 1 ? kMostLanes : groups > threads ? groups : threads;
  return round_to_words(wanted * sums * uint32_t(sizeof(C))) + round_to_words(groups * uint32_t(sizeof(C)));
}
// Bytes that the last block of a tensor that is looked at works in: sums of rows by all threads, then numbers of each
// warp.
template <class C>
FASTWRS_HD uint32_t look_bytes(uint32_t sums, uint32_t threads) {
  return (sums * threads + (1 + sums) * kWarp) * uint32_t(sizeof(C));
}
// Bytes of one list of values; its start is shifted so that vectors of the tile are vectors on chip.
template <class C>
FASTWRS_HD uint32_t values_bytes(uint32_t elements) {
  return round_to_words((elements + kWordBytes / 2) * uint32_t(sizeof(C)));
}

}  // namespace fastwrs::cuda
