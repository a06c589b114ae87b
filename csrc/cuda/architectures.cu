// The GPU architectures of csrc/cuda: all files are compiled for those of this file.
#include "architectures.h"

namespace moelora {

std::initializer_list<int> architectures() {
  static constexpr std::initializer_list<int> LIST{__CUDA_ARCH_LIST__};
  return LIST;
}

}  // namespace moelora
