// gather_logprob on CUDA: one pass over the logits forward, one pass over them and the gradient
// backward, one block a row. Every element is written by the thread that has read it, so that the
// gradient may take the logits' place. The formulas stand in latro_kernels/gather_logprob.
#include <cstdint>

#include "latro.h"
#include "softmax.cuh"

namespace {

using latro::for_each;
using latro::for_each_to_sum;
using latro::kThreads;
using latro::Pack;
using latro::RowGrad;
using latro::RowGrads;
using latro::State;
using latro::Transform;

// Blocks that a multiprocessor holds at a time: 1024 threads, which keep its memory busy. The
// compiler keeps to the registers that leaves.
constexpr int kResident = 4;

// What the forward writes of each row; entropy is null where none is asked for.
struct Outputs {
  float *logp, *entropy, *peak, *log_total, *picked;
};

template <bool kEntropy, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* logits, int64_t row_step, const int64_t* target, Outputs out,
                   int64_t rows, int64_t cols, Transform transform) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    if (target[i] < 0) {  // ignored
      if (threadIdx.x == 0) {
        out.logp[i] = out.peak[i] = out.log_total[i] = out.picked[i] = 0.0f;
        if (kEntropy) out.entropy[i] = 0.0f;
      }
      continue;
    }
    const T* row = logits + i * row_step;
    State state;
    for_each_to_sum(row, cols, [&](int64_t, auto pack) {
      constexpr int n = pack.kSize;
      float z[n];
      for (int k = 0; k < n; ++k) z[k] = static_cast<float>(pack.at[k]);
      transform.logits(z);
      state.add<kEntropy>(z);
    });
    state = merge_block(state);
    if (threadIdx.x == 0) {
      float picked[] = {static_cast<float>(row[target[i]])};
      transform.logits(picked);
      const float log_total = logf(state.total);
      out.peak[i] = state.peak;
      out.log_total[i] = log_total;
      out.picked[i] = picked[0];
      out.logp[i] = (picked[0] - state.peak) - log_total;
      if (kEntropy) out.entropy[i] = log_total - state.weighted / state.total;
    }
  }
}

template <bool kOffset, typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_kernel(const T* logits, T* dlogits, int64_t row_step, int64_t drow_step,
                    const int64_t* target, RowGrads grads, int64_t rows, int64_t cols,
                    Transform transform) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const T* row = logits + i * row_step;
    T* drow = dlogits + i * drow_step;
    const RowGrad grad = grads.row<kOffset>(i);
    if (grad.grad_logp == 0.0f && grad.grad_entropy == 0.0f && grad.offset == 0.0f) {
      for (int64_t j = threadIdx.x; j < cols; j += kThreads) drow[j] = static_cast<T>(0.0f);
      continue;
    }
    const int64_t hit = target[i];
    for_each(row, cols, [&](int64_t j, auto pack) {
      constexpr int n = pack.kSize;
      float z[n], dz[n];
      for (int k = 0; k < n; ++k) z[k] = static_cast<float>(pack.at[k]);
      transform.logits(z);
      grad.logits<kOffset>(z, hit - j, dz);
      transform.gradients(z, dz);
      Pack<T, n> gradient;
      for (int k = 0; k < n; ++k) gradient.at[k] = static_cast<T>(dz[k]);
      gradient.store(drow + j);
    });
  }
}

// Calls run(an element of the type that `dtype` stands for).
template <typename Run>
int32_t for_dtype(int32_t dtype, Run run) {
  if (dtype == LATRO_F32) {
    run(float{});
  } else if (dtype == LATRO_BF16) {
    run(__nv_bfloat16{});
  } else if (dtype == LATRO_F16) {
    run(__half{});
  } else {
    return LATRO_BAD_DTYPE;
  }
  return cudaGetLastError();
}

}  // namespace

int32_t latro_cuda_gather_logprob_forward(const void* logits, int32_t dtype, int64_t row_step,
                                          const int64_t* target, float* logp, float* entropy,
                                          float* peak, float* log_total, float* picked,
                                          int64_t rows, int64_t cols, float softcap,
                                          float temperature, void* stream) {
  if (rows == 0) return LATRO_OK;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    auto* kernel = entropy != nullptr ? forward_kernel<true, T> : forward_kernel<false, T>;
    kernel<<<latro::blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(logits), row_step, target,
        Outputs{logp, entropy, peak, log_total, picked}, rows, cols,
        Transform{softcap, temperature});
  });
}

int32_t latro_cuda_gather_logprob_backward(const void* logits, void* dlogits, int32_t dtype,
                                           int64_t row_step, int64_t drow_step,
                                           const int64_t* target, const float* grad_logp,
                                           const float* grad_entropy, const float* logp,
                                           const float* offset, const float* peak,
                                           const float* log_total, int64_t rows, int64_t cols,
                                           float softcap, float temperature, void* stream) {
  if (rows == 0) return LATRO_OK;
  const RowGrads grads{grad_logp, grad_entropy, logp, offset, peak, log_total};
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    auto* kernel = offset != nullptr ? backward_kernel<true, T> : backward_kernel<false, T>;
    kernel<<<latro::blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(logits), static_cast<T*>(dlogits), row_step, drow_step, target, grads,
        rows, cols, Transform{softcap, temperature});
  });
}
