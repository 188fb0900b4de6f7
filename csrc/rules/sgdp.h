// SGDP: SGD with momentum whose step loses its part along the weights where a gate opens. Heo et al., AdamP, ICLR 2021,
// in the form of the authors' package. The gate is in norms/gate.h, the two passes are explained in adamp.h.
//   buffer <- momentum * buffer + (1 - dampening) * g;   p = buffer, or with nesterov g + momentum * buffer
//   where the gate opens: p <- p - along * w (with project_momentum and without nesterov the buffer too), and ratio =
//   wd_ratio, else 1
//   w <- w * (1 - lr * weight_decay * ratio / (1 - momentum)) - lr * p
#pragma once

#include "../core/host_device.h"
#include "../core/look.h"

FASTWRS_BEGIN

struct Sgdp {
  static constexpr const char* kName = "sgdp";
  static constexpr const char* kHypers[] = {"momentum", "dampening", "eps",      "weight_decay",
                                            "delta",    "wd_ratio",  "nesterov", "project_momentum"};
  static constexpr const char* kSlots[] = {"momentum_buffer"};
  static constexpr int kMinSlots = 1, kMaxSlots = 1;
  static constexpr Look kLook = Look::kGate;
  static constexpr bool kChangesStateAgain = true;  // where the gate is open
  enum { kMomentum, kDampening, kEps, kWeightDecay, kDelta, kRatio, kNesterov, kProjectMomentum };

  template <class T>
  struct Constants {
    T momentum, one_minus_dampening, eps, decay, open_decay, delta, nesterov, project_momentum;
  };
  static Constants<double> constants(const double* h) {
    const double decay = h[kWeightDecay] / (1 - h[kMomentum]);
    return {h[kMomentum],      1 - h[kDampening], h[kEps],      decay,
            decay * h[kRatio], h[kDelta],         h[kNesterov], h[kNesterov] != 0 ? 0 : h[kProjectMomentum]};
  }

  template <class T>
  struct Scalars {
    T lr, momentum, one_minus_dampening, eps, keep, open_keep, delta, nesterov, project_momentum;
  };
  template <class T>
  static FASTWRS_HD Scalars<T> prepare(const Constants<T>& c, T lr, T /*t*/, bool /*first*/) {
    return {lr,      c.momentum, c.one_minus_dampening, c.eps, T(1) - lr * c.decay, T(1) - lr * c.open_decay,
            c.delta, c.nesterov, c.project_momentum};
  }

  template <class T>
  static FASTWRS_HD void advance(T g, T* state, const Scalars<T>& s) {
    state[0] = s.momentum * state[0] + s.one_minus_dampening * g;
  }
  template <class T>
  static FASTWRS_HD T direction(T g, const T* state, const Scalars<T>& s) {
    return s.nesterov != 0 ? g + s.momentum * state[0] : state[0];
  }
  template <int kSlotCount, class T>
  static FASTWRS_HD T update(T& w, T g, T* state, const GateAnswer<T>& gate, const Scalars<T>& s) {
    const T before = direction(g, state, s), step = gate.along != 0 ? before - gate.along * w : before;
    state[0] = s.project_momentum != 0 ? step : state[0];
    w = w * (gate.open ? s.open_keep : s.keep) - s.lr * step;
    return step;
  }
};

FASTWRS_END
