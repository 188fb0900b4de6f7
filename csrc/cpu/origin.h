// What a look at the weights alone begins with.
#pragma once

#include "../core/dtypes.h"
#include "../norms/shift.h"
#include "gather.h"

namespace fastwrs::cpu {

// What the weights of a channel are measured from (norms/shift.h). The same for all parts of the channel: they do not
// change before the second pass.
template <class P>
compute_t<P> origin_of_channel(const TensorView& view, const Geometry& g, int64_t channel) {
  using C = compute_t<P>;
  const int64_t begin = channel / g.cols * g.unit_size() + channel % g.cols;
  const int64_t count = std::min<int64_t>(kOriginWeights, g.rows);
  P weights[kOriginWeights] = {};
  if (g.strided()) {
    gather(view, g, 0, sizeof(P), begin, count, reinterpret_cast<char*>(weights));
  } else {
    for (int64_t i = 0; i < count; ++i) weights[i] = static_cast<const P*>(view.array[0].data)[begin + i * g.cols];
  }
  ShiftOrigin<C> origin(C(widen(weights[0])));
  for (int64_t i = 0; i < count; ++i) origin.add(C(widen(weights[i])));
  return origin.value();
}

}  // namespace fastwrs::cpu
