// For which GPUs csrc/cuda was compiled.
#pragma once

#include <initializer_list>

namespace moelora {

// 900 for sm_90 and sm_90a.
std::initializer_list<int> architectures();

}  // namespace moelora
