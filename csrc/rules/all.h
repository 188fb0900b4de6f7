// The list of all rules. X(Rule): a rule with kMinSlots to kMaxSlots states.
#pragma once

#include "../core/look.h"
#include "adam.h"
#include "adamp.h"
#include "project.h"
#include "sgd.h"
#include "sgd_shifted.h"
#include "sgdp.h"

#define FASTWRS_RULES(X) \
  X(Sgd)                 \
  X(Adam)                \
  X(AdamP)               \
  X(Sgdp)                \
  X(SgdShifted)          \
  X(Project)

FASTWRS_BEGIN

// What a rule, by its place in the list, looks at before the weights change.
inline Look look_of(int rule) {
  static constexpr Look kLooks[] = {
#define FASTWRS_RULE(Rule) Rule::kLook,
      FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
  };
  return kLooks[rule];
}

// Whether it does so with these hyperparameters of its own: a shift by nothing needs no look.
inline bool looks(int rule, const double* h) {
  return look_of(rule) == Look::kGate || (look_of(rule) == Look::kShift && h[SgdShifted::kLam] != 0);
}

// Whether a rule changes weights by a gradient.
inline bool updates(int rule) {
  static constexpr bool kUpdatesEach[] = {
#define FASTWRS_RULE(Rule) kUpdates<Rule>,
      FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
  };
  return kUpdatesEach[rule];
}

FASTWRS_END
