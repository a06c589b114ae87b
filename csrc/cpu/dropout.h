// Dropout whose mask is a pure function of (seed, stream, position), as in reference.py.
#pragma once

#include "check.h"

namespace moelora {

Tensor dropout(Tensor x, double p, Tensor seed, int64_t stream);

}  // namespace moelora
