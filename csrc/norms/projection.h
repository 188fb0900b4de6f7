// Rescale (WRS) and shrink (AWS) as functions of a norm group's norm, and the schedule that decides between them.
#pragma once

#include <cmath>

#include "../core/host_device.h"
#include "../core/numeric.h"

FASTWRS_BEGIN

// What one step does to the norm groups of one tensor. S is the type of the numbers: double on the host, the compute
// type on a device.
template <class S>
struct Projection {
  bool rescale = false;
  bool shrink = false;
  S target = 1, lr_rate = 0, power = 1;

  // t: this step, from 1. With lr == 0 nothing is projected; a step that rescales skips the shrink, which it would
  // erase.
  static FASTWRS_HD Projection at(S t, S lr, S every, S start, S stop, S target, S rate, S power) {
    Projection p;
    // Whole numbers that the type holds exactly: a quotient that is rounded makes no multiple of what is none.
    p.rescale = lr != 0 && every > 0 && start <= t && t < stop && every * whole(t / every) == t;
    p.shrink = lr != 0 && rate != 0 && !p.rescale;
    p.target = target;
    p.lr_rate = lr * rate;
    p.power = power;
    return p;
  }
};

// target / norm; 1 where the norm is 0 or not finite, so that such a group stays as it is.
template <class T, class S>
FASTWRS_HD T rescale_factor(T norm, S target) {
  return norm > 0 && is_finite(norm) ? quotient(T(target), norm) : T(1);
}

// max(0, 1 - lr * rate * norm^power), norm being that before the step. A group whose norm is not finite, or 0 (with any
// power but 0, which does not look at the norm), stays as it is.
template <class T, class S>
FASTWRS_HD T shrink_factor(T norm, S lr_rate, S power) {
  if (!is_finite(norm) || (norm == 0 && power != 0)) return T(1);
  const S factor = 1 - lr_rate * (power == 1 ? S(norm) : power == 0 ? S(1) : raise(S(norm), power));
  return factor > 0 ? T(factor) : T(0);
}

FASTWRS_END
