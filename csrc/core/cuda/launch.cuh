// What launches of CUDA kernels have in common.
#pragma once

#include <cstdint>

#include "core/config.h"
#include "core/cuda/simt.h"

namespace fastkd {
inline namespace FASTKD_TARGET {

// An error of the launch itself, or null.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Before a launch with this much dynamic shared memory beside static arrays: above 48 KiB a kernel must ask.
template <class... P>
void allow_dynamic_shared(void (*kernel)(P...), int64_t bytes) {
  if (bytes > (40 << 10))
    // A refusal also fails the launch, which is where the error is read.
    (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

}  // namespace FASTKD_TARGET
}  // namespace fastkd
