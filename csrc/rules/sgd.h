// SGD with momentum. torch.optim.SGD; Sutskever et al., ICML 2013.
//   g <- g + weight_decay * w
//   buffer <- g at a first step, else momentum * buffer + (1 - dampening) * g
//   u = g + momentum * buffer (nesterov), buffer, or g without momentum;   w <- w - lr * u
#pragma once

#include "../core/host_device.h"
#include "../core/look.h"

FASTWRS_BEGIN

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr const char* kHypers[] = {"momentum", "dampening", "nesterov", "weight_decay"};
  static constexpr const char* kSlots[] = {"momentum_buffer"};
  static constexpr int kMinSlots = 0, kMaxSlots = 1;
  static constexpr Look kLook = Look::kNone;
  enum { kMomentum, kDampening, kNesterov, kWeightDecay };

  // What follows from the hyperparameters alone, formed on the host in double. h: the rule's own part of the record.
  template <class T>
  struct Constants {
    T momentum, one_minus_dampening, weight_decay, nesterov;
  };
  static Constants<double> constants(const double* h) {
    return {h[kMomentum], 1 - h[kDampening], h[kWeightDecay], h[kNesterov]};
  }

  // What one step of one tensor needs; on a GPU the kernel forms it, because lr and t may live there. t: this step,
  // counted from 1.
  template <class T>
  struct Scalars {
    T lr, momentum, one_minus_dampening, weight_decay, nesterov, first;
  };
  template <class T>
  static FASTWRS_HD Scalars<T> prepare(const Constants<T>& c, T lr, T /*t*/, bool first) {
    return {lr, c.momentum, c.one_minus_dampening, c.weight_decay, c.nesterov, first ? T(1) : T(0)};
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
