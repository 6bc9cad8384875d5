// What a launcher's status means.
#include <cuda_runtime.h>

#include "latro.h"

const char* latro_cuda_error_string(int32_t status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
