// linear_logprob on CUDA: the two folds over a tile of logits. The products around them are
// cuBLAS's, in fp32. One block a row; rows beyond the grid are reached by striding.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include <cstdint>

#include "latro.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 1 << 16;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVector = 4;  // floats in a load of 16 bytes

// What lies between a product and the logit z: z = softcap * tanh((product + bias) / softcap) / T.
struct Transform {
  float softcap;  // 0: none
  float temperature;

  __device__ float logit(float product, const float* bias, int64_t column) const {
    float z = bias != nullptr ? product + bias[column] : product;
    if (softcap > 0.0f) z = softcap * tanhf(z / softcap);
    return z / temperature;
  }

  // The derivative of the logit with respect to the product.
  __device__ float slope(float z) const {
    const float tanh = softcap > 0.0f ? z * temperature / softcap : 0.0f;
    return (1.0f - tanh * tanh) / temperature;
  }
};

// What a part of a row comes to. `weighted` is the sum of exp(z - peak) * (z - peak).
struct State {
  float peak, total, weighted;
};

// exp(z - peak) and the like, for peaks that may still be -inf.
__device__ float distance(float z, float peak) { return peak == -CUDART_INF_F ? z : z - peak; }

__device__ State merge(State a, State b) {
  const float peak = a.peak > b.peak ? a.peak : b.peak;
  const float drop_a = distance(a.peak, peak), drop_b = distance(b.peak, peak);
  const float shrink_a = expf(drop_a), shrink_b = expf(drop_b);
  State sum{peak, a.total * shrink_a + b.total * shrink_b, 0.0f};
  // 0 * -inf counts as 0.
  if (shrink_a != 0.0f) sum.weighted += shrink_a * (a.weighted + drop_a * a.total);
  if (shrink_b != 0.0f) sum.weighted += shrink_b * (b.weighted + drop_b * b.total);
  return sum;
}

__device__ State merge_warp(State state) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const State other{__shfl_xor_sync(kAllLanes, state.peak, offset),
                      __shfl_xor_sync(kAllLanes, state.total, offset),
                      __shfl_xor_sync(kAllLanes, state.weighted, offset)};
    state = merge(state, other);
  }
  return state;
}

// The state of the whole block's part of a row; right in the first warp.
__device__ State merge_block(State state) {
  __shared__ State partial[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  state = merge_warp(state);
  if (lane == 0) partial[warp] = state;
  __syncthreads();
  state = lane < kWarps ? partial[lane] : State{-CUDART_INF_F, 0.0f, 0.0f};
  __syncthreads();  // `partial` is free for the next row
  return merge_warp(state);
}

// Calls visit(j, row[j]) for every j in 0 .. cols, this thread's share of them: in loads of 16
// bytes between the first and the last aligned element, one by one before and after.
template <typename Visit>
__device__ void for_each(const float* row, int64_t cols, Visit visit) {
  const int64_t misaligned = (reinterpret_cast<uintptr_t>(row) / sizeof(float)) % kVector;
  int64_t head = misaligned == 0 ? 0 : kVector - misaligned;
  head = head < cols ? head : cols;
  const int64_t vectors = (cols - head) / kVector;
  const int64_t tail = head + vectors * kVector;
  if (threadIdx.x < head) visit(threadIdx.x, row[threadIdx.x]);
  const float4* body = reinterpret_cast<const float4*>(row + head);
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    const float4 four = body[i];
    const int64_t j = head + i * kVector;
    visit(j, four.x);
    visit(j + 1, four.y);
    visit(j + 2, four.z);
    visit(j + 3, four.w);
  }
  if (tail + threadIdx.x < cols) visit(tail + threadIdx.x, row[tail + threadIdx.x]);
}

template <bool kEntropy>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const float* tile, const float* bias, const int64_t* target, float* peak,
                float* total, float* picked, float* weighted, int64_t rows, int64_t cols,
                int64_t first_col, Transform transform) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const float* row = tile + i * cols;
    const int64_t hit = target[i] - first_col;
    State state{-CUDART_INF_F, 0.0f, 0.0f};
    for_each(row, cols, [&](int64_t j, float product) {
      const float z = transform.logit(product, bias, j);
      if (j == hit) picked[i] = z;
      if (z > state.peak) {
        const float drop = state.peak - z;
        const float shrink = expf(drop);
        if (kEntropy) {
          state.weighted = shrink == 0.0f ? 0.0f : shrink * (state.weighted + drop * state.total);
        }
        state.total *= shrink;
        state.peak = z;
      }
      const float below = distance(z, state.peak);
      const float e = expf(below);
      state.total += e;
      if (kEntropy && e != 0.0f) state.weighted += e * below;
    });
    state = merge_block(state);
    if (threadIdx.x == 0) {
      state = merge(State{peak[i], total[i], kEntropy ? weighted[i] : 0.0f}, state);
      peak[i] = state.peak;
      total[i] = state.total;
      if (kEntropy) weighted[i] = state.weighted;
    }
  }
}

struct RowGrad {
  const float *grad_logp, *grad_entropy, *logp, *entropy, *peak, *log_total;
};

template <bool kEntropy, typename T>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(const float* tile, T* dtile, const float* bias, const int64_t* target, RowGrad grad,
                int64_t rows, int64_t cols, int64_t first_col, Transform transform) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    T* drow = dtile + i * cols;
    const int64_t hit = target[i] - first_col;
    const float g = grad.grad_logp[i], peak = grad.peak[i], log_total = grad.log_total[i];
    const float h = kEntropy ? grad.grad_entropy[i] : 0.0f;
    const float entropy = kEntropy ? grad.entropy[i] : 0.0f;
    for_each(tile + i * cols, cols, [&](int64_t j, float product) {
      const float z = transform.logit(product, bias, j);
      const float log_p = j == hit ? grad.logp[i] : (z - peak) - log_total;
      const float p = expf(log_p);
      // 1 - p by expm1: exact where p is close to 1.
      float dz = j == hit ? -g * expm1f(log_p) : -g * p;
      if (kEntropy && p != 0.0f) dz -= h * p * (log_p + entropy);
      drow[j] = static_cast<T>(dz * transform.slope(z));
    });
  }
}

template <typename T>
void launch_grad(const float* tile, void* dtile, const float* bias, const int64_t* target,
                 const RowGrad& grad, int64_t rows, int64_t cols, int64_t first_col,
                 Transform transform, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(rows < kMaxBlocks ? rows : kMaxBlocks);
  auto* kernel = grad.grad_entropy != nullptr ? grad_kernel<true, T> : grad_kernel<false, T>;
  kernel<<<blocks, kThreads, 0, stream>>>(tile, static_cast<T*>(dtile), bias, target, grad, rows,
                                          cols, first_col, transform);
}

}  // namespace

int32_t latro_cuda_linear_logprob_fold(const float* tile, const float* bias, const int64_t* target,
                                       float* peak, float* total, float* picked, float* weighted,
                                       int64_t rows, int64_t cols, int64_t first_col, float softcap,
                                       float temperature, void* stream) {
  if (rows == 0 || cols == 0) return LATRO_OK;
  const unsigned blocks = static_cast<unsigned>(rows < kMaxBlocks ? rows : kMaxBlocks);
  auto* kernel = weighted != nullptr ? fold_kernel<true> : fold_kernel<false>;
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      tile, bias, target, peak, total, picked, weighted, rows, cols, first_col,
      Transform{softcap, temperature});
  return cudaGetLastError();
}

int32_t latro_cuda_linear_logprob_grad(const float* tile, void* dtile, int32_t dtype,
                                       const float* bias, const int64_t* target,
                                       const float* grad_logp, const float* grad_entropy,
                                       const float* logp, const float* entropy, const float* peak,
                                       const float* log_total, int64_t rows, int64_t cols,
                                       int64_t first_col, float softcap, float temperature,
                                       void* stream) {
  if (rows == 0 || cols == 0) return LATRO_OK;
  const RowGrad grad{grad_logp, grad_entropy, logp, entropy, peak, log_total};
  const Transform transform{softcap, temperature};
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == LATRO_F32) {
    launch_grad<float>(tile, dtile, bias, target, grad, rows, cols, first_col, transform, on);
  } else if (dtype == LATRO_BF16) {
    launch_grad<__nv_bfloat16>(tile, dtile, bias, target, grad, rows, cols, first_col, transform,
                               on);
  } else if (dtype == LATRO_F16) {
    launch_grad<__half>(tile, dtile, bias, target, grad, rows, cols, first_col, transform, on);
  } else {
    return LATRO_BAD_DTYPE;
  }
  return cudaGetLastError();
}
