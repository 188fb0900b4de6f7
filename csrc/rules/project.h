// No update: weights are rescaled or shrunk as the record says, and that is all. For optimizers whose step is not ours.
//   w <- w * (target / |w|), or w * the factor of shrink; the learning rate and the step are those of the optimizer
// The gradient is not read. A step that rescales and shrinks nothing touches no weight.
#pragma once

#include <array>

#include "../core/host_device.h"
#include "../core/look.h"

FASTWRS_BEGIN

struct Project {
  static constexpr const char* kName = "project";
  static constexpr std::array<const char*, 0> kHypers{}, kSlots{};
  static constexpr int kMinSlots = 0, kMaxSlots = 0;
  static constexpr Look kLook = Look::kNone;

  template <class T>
  struct Constants {};
  static Constants<double> constants(const double*) { return {}; }

  template <class T>
  struct Scalars {};
  template <class T>
  static FASTWRS_HD Scalars<T> prepare(const Constants<T>&, T /*lr*/, T /*t*/, bool /*first*/) {
    return {};
  }

  template <int kSlotCount, class T>
  static FASTWRS_HD T update(T& /*w*/, T /*g*/, T* /*state*/, const Scalars<T>&) {
    return T(0);
  }
};

// Whether a rule changes weights by a gradient.
template <class Rule>
inline constexpr bool kUpdates = true;
template <>
inline constexpr bool kUpdates<Project> = false;

FASTWRS_END
