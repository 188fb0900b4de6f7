// Adam's moments and direction, which several rules have in common.
#pragma once

#include "../core/host_device.h"
#include "../core/numeric.h"

FASTWRS_BEGIN

// beta * m + (1 - beta) * g. Near 1, beta and 1 - beta are rounded too differently to be used together.
template <class T>
FASTWRS_HD T first_moment(T beta, T one_minus_beta, T m, T g) {
  return beta > T(0.5) ? m + one_minus_beta * (g - m) : beta * m + one_minus_beta * g;
}

template <class T>
FASTWRS_HD T second_moment(T beta, T one_minus_beta, T v, T g) {
  return beta * v + one_minus_beta * g * g;
}

// m / (sqrt(v / (1 - beta2^t)) + eps)
template <class T>
FASTWRS_HD T adam_direction(T m, T v, T inverse_root_correction2, T eps) {
  return quotient(m, square_root(v) * inverse_root_correction2 + eps);
}

FASTWRS_END
