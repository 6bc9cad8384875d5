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
using latro::Sums;
using latro::Terms;
using latro::Transform;

// Blocks that a multiprocessor holds at a time: 1024 threads, which keep its memory busy. The
// compiler keeps to the registers that leaves.
constexpr int kResident = 4;

// What the forward writes of each row. entropy, log_sum_p_squared and mean_logit may be null, the
// last two together, and are if entropy is.
struct Outputs {
  float *logp, *entropy, *log_sum_p_squared, *mean_logit, *row_max, *log_sum, *target_logit;
};

template <Sums kSums, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* logits, int64_t row_step, const int64_t* target, Outputs out,
                   int64_t rows, int64_t cols, Transform transform) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    if (target[i] < 0) {  // ignored
      if (threadIdx.x == 0) {
        out.logp[i] = out.row_max[i] = out.log_sum[i] = out.target_logit[i] = 0.0f;
        if (kSums >= latro::kEntropy) out.entropy[i] = 0.0f;
        if (kSums == latro::kAllSums) out.log_sum_p_squared[i] = out.mean_logit[i] = 0.0f;
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
      state.add<kSums>(z);
    });
    state = latro::merge_block<kSums>(state);
    if (threadIdx.x == 0) {
      float target_logit[] = {static_cast<float>(row[target[i]])};
      transform.logits(target_logit);
      const float log_sum = logf(state.sum_exp);
      out.row_max[i] = state.row_max;
      out.log_sum[i] = log_sum;
      out.target_logit[i] = target_logit[0];
      out.logp[i] = (target_logit[0] - state.row_max) - log_sum;
      if (kSums >= latro::kEntropy) out.entropy[i] = log_sum - state.weighted_sum / state.sum_exp;
      if (kSums == latro::kAllSums) {
        out.log_sum_p_squared[i] = logf(state.square_sum) - 2.0f * log_sum;
        out.mean_logit[i] = state.logit_sum / static_cast<float>(cols);
      }
    }
  }
}

template <Terms kTerms, typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_kernel(const T* logits, T* dlogits, int64_t row_step, int64_t drow_step,
                    const int64_t* target, RowGrads grads, int64_t rows, int64_t cols,
                    Transform transform) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const T* row = logits + i * row_step;
    T* drow = dlogits + i * drow_step;
    const RowGrad grad = grads.row<kTerms>(i);
    if (grad.is_zero()) {
      for (int64_t j = threadIdx.x; j < cols; j += kThreads) drow[j] = static_cast<T>(0.0f);
      continue;
    }
    const int64_t hit = target[i];
    for_each(row, cols, [&](int64_t j, auto pack) {
      constexpr int n = pack.kSize;
      float z[n], dz[n];
      for (int k = 0; k < n; ++k) z[k] = static_cast<float>(pack.at[k]);
      transform.logits(z);
      grad.logits<kTerms>(z, hit - j, dz);
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
                                          float* log_sum_p_squared, float* mean_logit,
                                          float* row_max, float* log_sum, float* target_logit,
                                          int64_t rows, int64_t cols, float softcap,
                                          float temperature, void* stream) {
  if (rows == 0) return LATRO_OK;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    auto* kernel = mean_logit != nullptr ? forward_kernel<latro::kAllSums, T>
                   : entropy != nullptr  ? forward_kernel<latro::kEntropy, T>
                                         : forward_kernel<latro::kSumExp, T>;
    kernel<<<latro::blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(logits), row_step, target,
        Outputs{logp, entropy, log_sum_p_squared, mean_logit, row_max, log_sum, target_logit}, rows,
        cols, Transform{softcap, temperature});
  });
}

int32_t latro_cuda_gather_logprob_backward(
    const void* logits, void* dlogits, int32_t dtype, int64_t row_step, int64_t drow_step,
    const int64_t* target, const float* grad_logp, const float* grad_entropy, const float* logp,
    const float* offset, const float* grad_square, const float* row_max, const float* log_sum,
    int64_t rows, int64_t cols, float softcap, float temperature, void* stream) {
  if (rows == 0) return LATRO_OK;
  const RowGrads grads{grad_logp, grad_entropy, logp, offset, grad_square, row_max, log_sum};
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    auto* kernel =
        grads.choose(backward_kernel<latro::kLogp, T>, backward_kernel<latro::kOffset, T>,
                     backward_kernel<latro::kSquare, T>);
    kernel<<<latro::blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(logits), static_cast<T*>(dlogits), row_step, drow_step, target, grads,
        rows, cols, Transform{softcap, temperature});
  });
}
