// The gate of AdamP and SGDP: whether a step loses its part along the weights. Scale-invariant weights are orthogonal
// to their gradient, so a tensor's gate opens where every row of dimension 0 (a channel) nearly is, or else the tensor
// as one row. Heo et al., AdamP, ICLR 2021, in the form of the authors' package.
#pragma once

#include <cstdint>

#include "../core/host_device.h"
#include "../core/look.h"
#include "../core/numeric.h"

FASTWRS_BEGIN

// What is summed over a row: step * w, g * w, g^2, w^2. The order is that of the sums in a workspace.
enum GateSum { kStepWeight, kGradWeight, kGradGrad, kWeightWeight, kGateSums };

// What an element adds to such a sum.
template <class T>
FASTWRS_HD T gate_term(int sum, T step, T grad, T weight) {
  return (sum == kStepWeight ? step : sum == kWeightWeight ? weight : grad) * (sum == kGradGrad ? grad : weight);
}

// The values that such terms are made of.
enum GateList { kStepList, kGradList, kWeightList, kGateLists };

enum class Gate { kClosed, kByChannel, kWhole };
// In a workspace, before the sums of rows: what it has decided, and what is taken out of all rows alike. What is taken
// out of each row is in the place of its first sum.
enum GateHead { kGateDecision, kGateAlong, kGateHead };

template <>
struct LookOf<Look::kGate> {
  static constexpr int kSums = kGateSums, kLists = kGateLists, kHead = kGateHead, kEach = 1;
  static constexpr bool kChangesStates = true;
  template <class T>
  using Answer = GateAnswer<T>;
  template <class T>
  static FASTWRS_HD Answer<T> answer(const T* each, bool open) {
    return {each[0], open};
  }
};

template <class T>
FASTWRS_HD T at_least(T x, T least) {
  return x < least ? least : x;
}

// |cos| of the angle between gradient and weights. NaN, which opens no gate, if a sum is, and for 0 / 0.
template <class T>
FASTWRS_HD T gate_cosine(const T* sums, T eps) {
  const T grad = at_least(square_root(sums[kGradGrad]), eps), weight = at_least(square_root(sums[kWeightWeight]), eps);
  const T cosine = quotient(quotient(sums[kGradWeight], weight), grad);
  return cosine < 0 ? -cosine : cosine;
}

// `cosine`: the largest of all rows of so many elements.
template <class T>
FASTWRS_HD bool gate_opens(T cosine, T delta, int64_t length) {
  const T root = square_root(T(length));
  return cosine < quotient(delta, root);
}

// What is taken out of a step is this times the weights.
template <class T>
FASTWRS_HD T gate_along(const T* sums, T eps) {
  const T norm = square_root(sums[kWeightWeight]) + eps;
  return quotient(quotient(sums[kStepWeight], norm), norm);
}

FASTWRS_END
