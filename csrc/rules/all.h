// The list of all rules. X(Rule): a rule with kMinSlots to kMaxSlots states.
#pragma once

#include "adam.h"
#include "sgd.h"

#define FASTWRS_RULES(X) \
  X(Sgd)                 \
  X(Adam)
