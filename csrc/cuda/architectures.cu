// The GPU architectures that this file, and with it csrc/cuda, was compiled for.
#include "architectures.h"

namespace moelora {

std::initializer_list<int> architectures() {
  static constexpr std::initializer_list<int> LIST{__CUDA_ARCH_LIST__};
  return LIST;
}

}  // namespace moelora
