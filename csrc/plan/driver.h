// The functions of CUDA and of torch's libraries that a plan calls. They are looked up when they
// are first needed. So the library loads without a GPU, and if torch lacks one of the functions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

namespace moelora {

// cuLaunchKernel of the driver API.
using LaunchKernel = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                             unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                             void* stream, void** parameters, void** extra);
using MatrixProduct = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle left,
                                         AtenTensorHandle right);
using MatrixSum = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle start,
                                     AtenTensorHandle left, AtenTensorHandle right, double beta,
                                     double alpha);

struct Driver {
  LaunchKernel launch = nullptr;
  MatrixProduct mm_out = nullptr;
  MatrixSum addmm_out = nullptr;
};

// Returns the functions for tensors of a CUDA device, or of the CPU. Raises an error if a library
// cannot be loaded, or lacks a function.
const Driver& driver(bool cuda);

// Sets the function that launches kernels for tensors of the CPU. Tests do this.
void set_cpu_launch(LaunchKernel launch);

// Returns the stream that torch queues work on, on a CUDA device. Makes the context of the device
// current if the thread has none.
void* current_stream(int32_t device);

}  // namespace moelora
