// For which GPUs csrc/cuda was compiled: the compiler knows best.
#include "architectures.h"

namespace moelora {

std::initializer_list<int> architectures() {
  static constexpr std::initializer_list<int> LIST{__CUDA_ARCH_LIST__};
  return LIST;
}

}  // namespace moelora
