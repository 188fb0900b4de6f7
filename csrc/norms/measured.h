// What is summed over a norm group, and the row of figures that is made of it (fastwrs.spec.MEASURED).
#pragma once

#include "../core/host_device.h"
#include "projection.h"

FASTWRS_BEGIN

// Sums of squares that a step may need of each group. The order is that of the partial sums in a workspace.
enum Sum { kBefore, kUpdated, kGrad, kUpdate, kSums };
constexpr int kMeasured = 8;

// The factor that projects a group with these norms.
template <class C, class S>
FASTWRS_HD C projection_factor(const Projection<S>& p, C before, C updated) {
  if (p.rescale) return rescale_factor(updated, p.target);
  if (p.shrink) return shrink_factor(before, p.lr_rate, p.power);
  return C(1);
}

template <class C, class S>
FASTWRS_HD void write_measured(float* row, const C* norm, C factor, const Projection<S>& p) {
  row[0] = float(norm[kBefore]);
  row[1] = float(norm[kUpdated]);
  row[2] = float(norm[kUpdated] * factor);
  row[3] = float(norm[kGrad]);
  row[4] = float(norm[kUpdate]);
  row[5] = float(quotient(norm[kUpdate], norm[kBefore]));
  row[6] = p.rescale ? float(factor) : 1.0f;
  row[7] = p.shrink ? float(factor) : 1.0f;
}

// A tensor without elements has groups all the same, of norm 0: column k of their rows.
FASTWRS_HD float measured_of_nothing(int k) { return k < 6 ? 0.0f : 1.0f; }

FASTWRS_END
