// The list of all rules. X(Rule): a rule with kMinSlots to kMaxSlots states.
#pragma once

#include "adam.h"
#include "adamp.h"
#include "sgd.h"
#include "sgdp.h"

#define FASTWRS_RULES(X) \
  X(Sgd)                 \
  X(Adam)                \
  X(AdamP)               \
  X(Sgdp)

FASTWRS_BEGIN

// Whether a rule, by its place in the list, has a gate, and hence takes a step in two passes.
inline bool has_gate(int rule) {
  static constexpr bool kGated[] = {
#define FASTWRS_RULE(Rule) Rule::kGated,
      FASTWRS_RULES(FASTWRS_RULE)
#undef FASTWRS_RULE
  };
  return kGated[rule];
}

FASTWRS_END
