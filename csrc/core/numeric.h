// Scalar arithmetic that the rules need. Overloads instead of std:: names, so that device code and vectorised host
// loops see plain operations.
#pragma once

#include <cmath>

#include "host_device.h"

FASTWRS_BEGIN

// Roots and quotients. Correctly rounded on the host, which is compiled with -fno-math-errno, so that these are single
// instructions. On a GPU correct rounding is a subroutine that all registers wait for; there, one Newton step on the
// approximations leaves an error of less than an ulp, and zeros, infinities and NaN are what they have to be. Divisors
// are taken for 0 below the normal numbers, and for infinity above 2^126.
#ifdef __CUDA_ARCH__
FASTWRS_HD float square_root(float x) {
  const bool small = x < 0x1p-96f;  // the approximation takes subnormal numbers for 0
  const float y = small ? x * 0x1p64f : x;
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
  const float s = y * r;
  const float root = __fmaf_rn(__fmaf_rn(-s, s, y), 0.5f * r, s);
  if (y == 0 || y - y != 0) return y < 0 ? root : y;  // 0, infinity, NaN; the root of -infinity is NaN
  return small ? root * 0x1p-32f : root;
}
FASTWRS_HD float quotient(float a, float b) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  const float q = a * r;
  const float better = __fmaf_rn(__fmaf_rn(-b, q, a), r, q);
  return better != better ? q : better;
}
#else
FASTWRS_HD float square_root(float x) { return sqrtf(x); }
FASTWRS_HD float quotient(float a, float b) { return a / b; }
#endif
FASTWRS_HD double square_root(double x) { return sqrt(x); }
FASTWRS_HD double quotient(double a, double b) { return a / b; }

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
