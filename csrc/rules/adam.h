// Adam and AdamW, which differ in where weight decay enters. torch.optim.Adam, AdamW; Kingma and Ba, ICLR 2015;
// Loshchilov and Hutter, ICLR 2019; AMSGrad: Reddi et al., ICLR 2018.
//   g <- g + weight_decay * w                  (Adam)        w <- w * (1 - lr * weight_decay)     (AdamW)
//   m <- m + (1 - beta1) * (g - m)             v <- beta2 * v + (1 - beta2) * g^2
//   u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps);   w <- w - lr * u       (amsgrad: the largest v so far)
#pragma once

#include <cmath>

#include "../core/host_device.h"
#include "../core/look.h"
#include "../core/numeric.h"
#include "moments.h"

FASTWRS_BEGIN

struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr const char* kHypers[] = {"beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay"};
  static constexpr const char* kSlots[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr int kMinSlots = 2, kMaxSlots = 3;
  static constexpr Look kLook = Look::kNone;
  enum { kBeta1, kBeta2, kEps, kWeightDecay, kDecoupled };

  template <class T>
  struct Constants {
    T beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, coupled_decay, decoupled_decay;
  };
  static Constants<double> constants(const double* h) {
    const bool decoupled = h[kDecoupled] != 0;
    return {h[kBeta1],
            1 - h[kBeta1],
            std::log(h[kBeta1]),
            h[kBeta2],
            1 - h[kBeta2],
            std::log(h[kBeta2]),
            h[kEps],
            decoupled ? 0 : h[kWeightDecay],
            decoupled ? h[kWeightDecay] : 0};
  }

  template <class T>
  struct Scalars {
    T coupled_decay, keep, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
    T step_size, inverse_correction1, inverse_root_correction2;
  };
  template <class T>
  static FASTWRS_HD Scalars<T> prepare(const Constants<T>& c, T lr, T t, bool /*first*/) {
    const T correction1 = one_minus_power(c.beta1, c.log_beta1, t);
    const T correction2 = one_minus_power(c.beta2, c.log_beta2, t);
    return {c.coupled_decay,
            T(1) - lr * c.decoupled_decay,
            c.beta1,
            c.one_minus_beta1,
            c.beta2,
            c.one_minus_beta2,
            c.eps,
            quotient(lr, correction1),
            quotient(T(1), correction1),
            quotient(T(1), square_root(correction2))};
  }

  template <int kSlotCount, class T>
  static FASTWRS_HD T update(T& w, T g, T* state, const Scalars<T>& s) {
    g = s.coupled_decay != 0 ? g + s.coupled_decay * w : g;
    const T m = first_moment(s.beta1, s.one_minus_beta1, state[0], g);
    const T v = second_moment(s.beta2, s.one_minus_beta2, state[1], g);
    state[0] = m;
    state[1] = v;
    T largest = v;
    if (kSlotCount == 3) state[2] = largest = maximum(state[2], v);
    const T direction = adam_direction(m, largest, s.inverse_root_correction2, s.eps);
    w = w * s.keep - s.step_size * direction;
    return direction * s.inverse_correction1;
  }
};

FASTWRS_END
