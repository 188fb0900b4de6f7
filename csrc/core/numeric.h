// Scalar arithmetic that the rules need. Overloads instead of std:: names, so that device code and vectorised host
// loops see plain operations.
#pragma once

#include <cmath>

#include "host_device.h"

FASTWRS_BEGIN

// Correctly rounded; the host is compiled with -fno-math-errno, so these are single instructions.
FASTWRS_HD float square_root(float x) { return sqrtf(x); }
FASTWRS_HD double square_root(double x) { return sqrt(x); }

FASTWRS_HD float whole(float x) { return floorf(x); }
FASTWRS_HD double whole(double x) { return floor(x); }

FASTWRS_HD float raise(float base, float exponent) { return powf(base, exponent); }
FASTWRS_HD double raise(double base, double exponent) { return pow(base, exponent); }

// 1 - base^n. In fp32 the difference would lose what base and 1 have in common, so it is formed from log(base), which
// comes from the host; in fp64 enough is left, and this is what torch computes.
FASTWRS_HD float one_minus_power(float /*base*/, float log_base, float n) { return -expm1f(n * log_base); }
FASTWRS_HD double one_minus_power(double base, double /*log_base*/, double n) { return 1 - pow(base, n); }

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
