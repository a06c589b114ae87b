// The GPU architectures that csrc/cuda was compiled for.
#pragma once

#include <initializer_list>

namespace moelora {

// Returns ten times the compute capability of every architecture: 900 for sm_90 and sm_90a.
std::initializer_list<int> architectures();

}  // namespace moelora
