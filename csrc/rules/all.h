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
