// SGD whose gradient gets the epsilon-shifted L2 term of its weights. arXiv 1911.05920; sgd.h.
//   g <- g + lam * (1 - eps / s) * (w - mu) + lam * mu, with mean mu and standard deviation s of the weight's channel
//   then as SGD, coupled weight decay too
// What is made of mu and s is in norms/shift.h.
#pragma once

#include "../core/host_device.h"
#include "../core/look.h"
#include "sgd.h"

FASTWRS_BEGIN

struct SgdShifted {
  static constexpr const char* kName = "sgd_shifted";
  static constexpr const char* kHypers[] = {"momentum",     "dampening",      "nesterov",
                                            "weight_decay", "shifted_l2_lam", "shifted_l2_eps"};
  static constexpr const char* kSlots[] = {"momentum_buffer"};
  static constexpr int kMinSlots = 0, kMaxSlots = 1;
  static constexpr Look kLook = Look::kShift;  // the first pass reads the weights alone, the second one is the step
  enum { kLam = 4, kEps };

  template <class T>
  struct Constants {
    Sgd::Constants<T> sgd;
    T lam, eps;
  };
  static Constants<double> constants(const double* h) { return {Sgd::constants(h), h[kLam], h[kEps]}; }

  template <class T>
  struct Scalars {
    Sgd::Scalars<T> sgd;
    T lam, eps;
  };
  template <class T>
  static FASTWRS_HD Scalars<T> prepare(const Constants<T>& c, T lr, T t, bool first) {
    return {Sgd::prepare(c.sgd, lr, t, first), c.lam, c.eps};
  }

  template <int kSlotCount, class T>
  static FASTWRS_HD T update(T& w, T g, T* state, const ShiftAnswer<T>& shift, const Scalars<T>& s) {
    g = shift.there ? g + (shift.slope * (w - shift.mean) + s.lam * shift.mean) : g;
    return Sgd::update<kSlotCount>(w, g, state, s.sgd);
  }
};

FASTWRS_END
