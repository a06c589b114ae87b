// The plans of the layer ops by key, for the module `_C`.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "driver.h"

namespace moelora {

// Forgets all plans.
void clear_plans();

// Returns how many calls were replayed since the library was loaded.
int64_t count_replays();

// Returns how many replays failed since the library was loaded, and why the last of them failed. A
// failed allocation does not count.
std::pair<int64_t, std::string> replay_failures();

}  // namespace moelora
