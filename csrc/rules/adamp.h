// AdamP: Adam whose step loses its part along the weights where a gate opens. Heo et al., AdamP, ICLR 2021, in the form
// of the authors' package. The gate is in norms/gate.h.
//   m, v as in Adam;   p = (m, or with nesterov beta1 * m + (1 - beta1) * g) / (sqrt(v / (1 - beta2^t)) + eps)
//   where the gate opens: p <- p - along * w, and ratio = wd_ratio, else 1
//   w <- w * (1 - lr * weight_decay * ratio) - lr / (1 - beta1^t) * p
#pragma once

#include <cmath>

#include "../core/host_device.h"
#include "../core/look.h"
#include "../core/numeric.h"
#include "moments.h"

FASTWRS_BEGIN

struct AdamP {
  static constexpr const char* kName = "adamp";
  static constexpr const char* kHypers[] = {"beta1", "beta2", "eps", "weight_decay", "delta", "wd_ratio", "nesterov"};
  static constexpr const char* kSlots[] = {"exp_avg", "exp_avg_sq"};
  static constexpr int kMinSlots = 2, kMaxSlots = 2;
  // Its step has two passes: `advance` changes the states; then the gate has seen every row, and `update` changes the
  // weights.
  static constexpr Look kLook = Look::kGate;
  static constexpr bool kChangesStateAgain = false;
  enum { kBeta1, kBeta2, kEps, kWeightDecay, kDelta, kRatio, kNesterov };

  template <class T>
  struct Constants {
    T beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, decay, open_decay, delta, nesterov;
  };
  static Constants<double> constants(const double* h) {
    return {h[kBeta1], 1 - h[kBeta1],   std::log(h[kBeta1]),         h[kBeta2], 1 - h[kBeta2], std::log(h[kBeta2]),
            h[kEps],   h[kWeightDecay], h[kWeightDecay] * h[kRatio], h[kDelta], h[kNesterov]};
  }

  template <class T>
  struct Scalars {
    T beta1, one_minus_beta1, beta2, one_minus_beta2, eps, keep, open_keep, delta, nesterov;
    T step_size, inverse_correction1, inverse_root_correction2;
  };
  template <class T>
  static FASTWRS_HD Scalars<T> prepare(const Constants<T>& c, T lr, T t, bool /*first*/) {
    const T correction1 = one_minus_power(c.beta1, c.log_beta1, t);
    const T correction2 = one_minus_power(c.beta2, c.log_beta2, t);
    return {c.beta1,
            c.one_minus_beta1,
            c.beta2,
            c.one_minus_beta2,
            c.eps,
            T(1) - lr * c.decay,
            T(1) - lr * c.open_decay,
            c.delta,
            c.nesterov,
            quotient(lr, correction1),
            quotient(T(1), correction1),
            quotient(T(1), square_root(correction2))};
  }

  // First pass.
  template <class T>
  static FASTWRS_HD void advance(T g, T* state, const Scalars<T>& s) {
    state[0] = first_moment(s.beta1, s.one_minus_beta1, state[0], g);
    state[1] = second_moment(s.beta2, s.one_minus_beta2, state[1], g);
  }
  // The step that the gate looks at, from states as they are stored; the gradient counts with nesterov only.
  template <class T>
  static FASTWRS_HD T direction(T g, const T* state, const Scalars<T>& s) {
    const T m = s.nesterov != 0 ? s.beta1 * state[0] + s.one_minus_beta1 * g : state[0];
    return adam_direction(m, state[1], s.inverse_root_correction2, s.eps);
  }
  // Second pass: one weight, and u.
  template <int kSlotCount, class T>
  static FASTWRS_HD T update(T& w, T g, T* state, const GateAnswer<T>& gate, const Scalars<T>& s) {
    const T before = direction(g, state, s), step = gate.along != 0 ? before - gate.along * w : before;
    w = w * (gate.open ? s.open_keep : s.keep) - s.step_size * step;
    return step * s.inverse_correction1;
  }
};

FASTWRS_END
