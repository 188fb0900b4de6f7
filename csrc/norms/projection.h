// Rescale (WRS) and shrink (AWS) as functions of a norm group's norm, and the schedule that decides between them.
#pragma once

#include <cmath>

#include "../core/host_device.h"
#include "../core/numeric.h"

FASTWRS_BEGIN

// What one step does to the norm groups of one tensor.
struct Projection {
  bool rescale = false;
  bool shrink = false;
  double target = 1, lr_rate = 0, power = 1;

  // t: this step, from 1. With lr == 0 nothing is projected; a step that rescales skips the shrink, which it would
  // erase.
  static FASTWRS_HD Projection at(double t, double lr, double every, double start, double stop, double target,
                                  double rate, double power) {
    Projection p;
    p.rescale = lr != 0 && every > 0 && start <= t && t < stop && fmod(t, every) == 0;
    p.shrink = lr != 0 && rate != 0 && !p.rescale;
    p.target = target;
    p.lr_rate = lr * rate;
    p.power = power;
    return p;
  }
};

// target / norm; 1 where the norm is 0 or not finite, so that such a group stays as it is.
template <class T>
FASTWRS_HD T rescale_factor(T norm, double target) {
  return norm > 0 && is_finite(norm) ? T(target) / norm : T(1);
}

// max(0, 1 - lr * rate * norm^power), norm being that before the step. A group whose norm is not finite, or 0 (with any
// power but 0, which does not look at the norm), stays as it is.
template <class T>
FASTWRS_HD T shrink_factor(T norm, double lr_rate, double power) {
  if (!is_finite(norm) || (norm == 0 && power != 0)) return T(1);
  const double factor = 1 - lr_rate * (power == 1 ? double(norm) : power == 0 ? 1 : pow(double(norm), power));
  return factor > 0 ? T(factor) : T(0);
}

FASTWRS_END
