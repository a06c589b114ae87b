// The plans of the layer ops by key, for the module `_C`.
#pragma once

#include <cstdint>
#include <vector>

#include "driver.h"

namespace moelora {

// Gives a plan to the call of this thread that found none. Does nothing if there is no such call.
void keep_plan(const std::vector<int64_t>& numbers);

// Forgets all plans.
void clear_plans();

// Returns how many calls were replayed since the library was loaded.
int64_t count_replays();

// Sets the function that says whether nothing observes the launches. Without one, no call is
// replayed.
void set_plain_check(bool (*is_plain)());

// Sets the function that throws the exception which a Python op raised, if there is one.
void set_rethrow(void (*function)());

// Registers the layer ops for tensors of the CPU, or ends that. Tests do this.
void register_plans_for_cpu(bool on);

}  // namespace moelora
