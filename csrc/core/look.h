// What a rule may want to know of a whole tensor before its weights change. Such a rule takes a step in two passes: a
// first one sums over every row of dimension 0 (a channel); of the sums a few numbers are made for each row, or for the
// tensor; the second one changes the weights, told what was found out.
#pragma once

#include "host_device.h"

FASTWRS_BEGIN

// kGate: what part of the weights a step loses, decided by step and gradient, so that the first pass changes the states
// (norms/gate.h). kShift: where the weights of each channel lie, so that it reads these alone (norms/shift.h).
enum class Look { kNone, kGate, kShift };

// How a look is taken: kSums over a row, of kLists values of each element. Afterwards the tensor has kHead numbers and
// each row kEach, in the place of its first sums.
template <Look kLook>
struct LookOf {
  static constexpr int kSums = 0, kLists = 0, kHead = 0, kEach = 0;
  static constexpr bool kChangesStates = false;
};
// The numbers of a look, for places in a workspace.
struct LookFacts {
  Look kind = Look::kNone;
  int sums = 0, lists = 0, head = 0, each = 0;
  bool changes_states = false;

  template <Look kLook>
  static LookFacts of() {
    using L = LookOf<kLook>;
    return {kLook, L::kSums, L::kLists, L::kHead, L::kEach, L::kChangesStates};
  }
};
constexpr int kMostSums = 4, kMostEach = 2;

// What the second pass is told of a weight. Nothing, if the tensor was not looked at: `open` and `there` are false.
template <class T>
struct GateAnswer {
  T along;  // so much of the weight leaves the step
  bool open;
};
template <class T>
struct ShiftAnswer {
  T slope, mean;  // of the weight's channel
  bool there;
};

FASTWRS_END
