// Scalar arithmetic that the rules need. Overloads instead of std:: names, so that device code and vectorised host
// loops see plain operations.
#pragma once

#include <cmath>

#include "host_device.h"

FASTWRS_BEGIN

// Correctly rounded; the host is compiled with -fno-math-errno, so these are single instructions.
FASTWRS_HD float square_root(float x) { return sqrtf(x); }
FASTWRS_HD double square_root(double x) { return sqrt(x); }

// The larger of the two, NaN if either is (as torch.maximum).
template <class T>
FASTWRS_HD T maximum(T a, T b) {
  return (b > a || b != b) ? b : a;
}

template <class T>
FASTWRS_HD bool is_finite(T x) {
  return x - x == T(0);
}

FASTWRS_END
