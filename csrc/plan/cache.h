// The plans of the layer ops by key, for the module `_C`.
#pragma once

#include <cstdint>

#include "driver.h"

namespace moelora {

// Forgets all plans.
void clear_plans();

// Returns how many calls were replayed since the library was loaded.
int64_t count_replays();

}  // namespace moelora
