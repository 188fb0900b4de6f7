// All kinds of looks at a whole tensor.
#pragma once

#include "../core/look.h"
#include "gate.h"
#include "shift.h"

namespace fastwrs {

inline LookFacts look_facts(Look kind) {
  static_assert(LookOf<Look::kGate>::kSums <= kMostSums && LookOf<Look::kShift>::kSums <= kMostSums &&
                    LookOf<Look::kGate>::kEach <= kMostEach && LookOf<Look::kShift>::kEach <= kMostEach,
                "raise them");
  switch (kind) {
    case Look::kGate:
      return LookFacts::of<Look::kGate>();
    case Look::kShift:
      return LookFacts::of<Look::kShift>();
    case Look::kNone:
      break;
  }
  return {};
}

}  // namespace fastwrs
