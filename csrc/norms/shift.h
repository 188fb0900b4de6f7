// What the epsilon-shifted L2 term (arXiv 1911.05920) needs to know of a channel: the mean mu of its weights and their
// unbiased standard deviation s, for lam * (1 - eps / s) * (w - mu) + lam * mu.
#pragma once

#include "../core/host_device.h"
#include "../core/look.h"
#include "../core/numeric.h"

FASTWRS_BEGIN

// What is summed over a channel: how far each weight is from the channel's origin, and the square of that. Differences
// of weights that are close together are exact, so that s keeps its digits however large mu is: with sums that are off
// by parts of e, s is off by some e * (1 + ((origin - mu) / s)^2).
enum ShiftSum { kDistance, kSquaredDistance, kShiftSums };
// In a workspace they are replaced by the channel's slope and mean.
enum ShiftEach { kSlope, kMean, kShiftEach };

template <>
struct LookOf<Look::kShift> {
  static constexpr int kSums = kShiftSums, kLists = 1, kHead = 0, kEach = kShiftEach;
  static constexpr bool kChangesStates = false;
  template <class T>
  using Answer = ShiftAnswer<T>;
  template <class T>
  static FASTWRS_HD Answer<T> answer(const T* each, bool there) {
    return {each[kSlope], each[kMean], there};
  }
};

// What an element adds to such a sum.
template <class T>
FASTWRS_HD T shift_term(int sum, T distance) {
  return sum == kDistance ? distance : distance * distance;
}

// A number near the weights of a channel: the average of its first ones, a quarter of s from mu in the mean. Exactly
// the first one where all are equal.
constexpr int kOriginWeights = 16;
template <class T>
struct ShiftOrigin {
  T first, sum = 0, count = 0;

  FASTWRS_HD explicit ShiftOrigin(T first_) : first(first_) {}
  FASTWRS_HD void add(T weight) {
    sum += weight - first;
    count += 1;
  }
  FASTWRS_HD T value() const { return first + quotient(sum, count); }
};

// lam * (1 - eps / s) and mu of a channel of so many weights. Where s is 0 or there is only one weight the slope is 0.
// If a weight is not finite, neither is.
template <class T>
FASTWRS_HD void shift_of_channel(const T* sums, T origin, T length, T lam, T eps, T* slope, T* mean) {
  const T average = quotient(sums[kDistance], length);
  const T squares = sums[kSquaredDistance] - average * sums[kDistance];
  const T deviation = square_root(quotient(squares, length - 1));
  *slope = squares <= 0 ? T(0) : lam * (1 - quotient(eps, deviation));
  *mean = origin + average;
}

FASTWRS_END
