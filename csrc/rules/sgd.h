// SGD with momentum. torch.optim.SGD; Sutskever et al., ICML 2013.
//   g <- g + weight_decay * w
//   buffer <- g at a first step, else momentum * buffer + (1 - dampening) * g
//   u = g + momentum * buffer (nesterov), buffer, or g without momentum;   w <- w - lr * u
#pragma once

#include "../core/host_device.h"

FASTWRS_BEGIN

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr const char* kHypers[] = {"momentum", "dampening", "nesterov", "weight_decay"};
  static constexpr const char* kSlots[] = {"momentum_buffer"};
  static constexpr int kMinSlots = 0, kMaxSlots = 1;
  enum { kMomentum, kDampening, kNesterov, kWeightDecay };

  template <class T>
  struct Scalars {
    T lr, momentum, one_minus_dampening, weight_decay, nesterov, first;
  };

  // h: the rule's own part of the record, t: this step, counted from 1.
  static Scalars<double> prepare(const double* h, double lr, double /*t*/, bool first) {
    return {lr, h[kMomentum], 1 - h[kDampening], h[kWeightDecay], h[kNesterov], first ? 1.0 : 0.0};
  }

  // Updates one weight and its states; returns u.
  template <int kSlotCount, class T>
  static FASTWRS_HD T update(T& w, T g, T* state, const Scalars<T>& s) {
    g = s.weight_decay != 0 ? g + s.weight_decay * w : g;
    T u = g;
    if (kSlotCount == 1) {
      const T buffer = s.first != 0 ? g : s.momentum * state[0] + s.one_minus_dampening * g;
      state[0] = buffer;
      u = s.nesterov != 0 ? g + s.momentum * buffer : buffer;
    }
    w -= s.lr * u;
    return u;
  }
};

FASTWRS_END
