// linear_logprob on CUDA: the two folds over a tile of logits. The products around them are
// cuBLAS's, in fp32. One block a row.
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

// The logits of a pack of products, the first of them of column `first`; bias may be null.
template <int n>
__device__ void logits_of(const Pack<float, n>& products, const float* bias, int64_t first,
                          Transform transform, float (&z)[n]) {
  for (int k = 0; k < n; ++k) z[k] = products.at[k];
  if (bias != nullptr) {
    for (int k = 0; k < n; ++k) z[k] += bias[first + k];
  }
  transform.logits(z);
}

template <Sums kSums>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const float* tile, const float* bias, const int64_t* target, float* row_max,
                float* sum_exp, float* target_logit, float* weighted_sum, float* square_sum,
                float* logit_sum, int64_t rows, int64_t cols, int64_t first_col,
                Transform transform) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t hit = target[i] - first_col;
    State state;
    for_each_to_sum(tile + i * cols, cols, [&](int64_t j, auto products) {
      constexpr int n = products.kSize;
      float z[n];
      logits_of(products, bias, j, transform, z);
      if (j <= hit && hit < j + n) {
        for (int k = 0; k < n; ++k) {
          if (j + k == hit) target_logit[i] = z[k];
        }
      }
      state.add<kSums>(z);
    });
    state = latro::merge_block<kSums>(state);
    if (threadIdx.x == 0) {
      State before;
      before.row_max = row_max[i];
      before.sum_exp = sum_exp[i];
      if (kSums >= latro::kEntropy) before.weighted_sum = weighted_sum[i];
      if (kSums == latro::kAllSums) {
        before.square_sum = square_sum[i];
        before.logit_sum = logit_sum[i];
      }
      state = latro::merge<kSums>(before, state);
      row_max[i] = state.row_max;
      sum_exp[i] = state.sum_exp;
      if (kSums >= latro::kEntropy) weighted_sum[i] = state.weighted_sum;
      if (kSums == latro::kAllSums) {
        square_sum[i] = state.square_sum;
        logit_sum[i] = state.logit_sum;
      }
    }
  }
}

template <Terms kTerms, typename T>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(const float* tile, T* dtile, const float* bias, const int64_t* target,
                RowGrads grads, int64_t rows, int64_t cols, int64_t first_col,
                Transform transform) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const float* row = tile + i * cols;
    T* drow = dtile + i * cols;
    const int64_t hit = target[i] - first_col;
    const RowGrad grad = grads.row<kTerms>(i);
    for_each(row, cols, [&](int64_t j, auto products) {
      constexpr int n = products.kSize;
      float z[n], dz[n];
      logits_of(products, bias, j, transform, z);
      grad.logits<kTerms>(z, hit - j, dz);
      transform.gradients(z, dz);
      Pack<T, n> gradient;
      for (int k = 0; k < n; ++k) gradient.at[k] = static_cast<T>(dz[k]);
      gradient.store(drow + j);
    });
  }
}

template <typename T>
void launch_grad(const float* tile, void* dtile, const float* bias, const int64_t* target,
                 const RowGrads& grads, int64_t rows, int64_t cols, int64_t first_col,
                 Transform transform, cudaStream_t stream) {
  auto* kernel = grads.choose(grad_kernel<latro::kLogp, T>, grad_kernel<latro::kOffset, T>,
                              grad_kernel<latro::kSquare, T>);
  kernel<<<latro::blocks_for(rows), kThreads, 0, stream>>>(
      tile, static_cast<T*>(dtile), bias, target, grads, rows, cols, first_col, transform);
}

}  // namespace

int32_t latro_cuda_linear_logprob_fold(const float* tile, const float* bias, const int64_t* target,
                                       float* row_max, float* sum_exp, float* target_logit,
                                       float* weighted_sum, float* square_sum, float* logit_sum,
                                       int64_t rows, int64_t cols, int64_t first_col, float softcap,
                                       float temperature, void* stream) {
  if (rows == 0 || cols == 0) return LATRO_OK;
  auto* kernel = square_sum != nullptr     ? fold_kernel<latro::kAllSums>
                 : weighted_sum != nullptr ? fold_kernel<latro::kEntropy>
                                           : fold_kernel<latro::kSumExp>;
  kernel<<<latro::blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      tile, bias, target, row_max, sum_exp, target_logit, weighted_sum, square_sum, logit_sum, rows,
      cols, first_col, Transform{softcap, temperature});
  return cudaGetLastError();
}

int32_t latro_cuda_linear_logprob_grad(
    const float* tile, void* dtile, int32_t dtype, const float* bias, const int64_t* target,
    const float* grad_logp, const float* grad_entropy, const float* logp, const float* offset,
    const float* grad_square, const float* row_max, const float* log_sum, int64_t rows,
    int64_t cols, int64_t first_col, float softcap, float temperature, void* stream) {
  if (rows == 0 || cols == 0) return LATRO_OK;
  const RowGrads grads{grad_logp, grad_entropy, logp, offset, grad_square, row_max, log_sum};
  const Transform transform{softcap, temperature};
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == LATRO_F32) {
    launch_grad<float>(tile, dtile, bias, target, grads, rows, cols, first_col, transform, on);
  } else if (dtype == LATRO_BF16) {
    launch_grad<__nv_bfloat16>(tile, dtile, bias, target, grads, rows, cols, first_col, transform,
                               on);
  } else if (dtype == LATRO_F16) {
    launch_grad<__half>(tile, dtile, bias, target, grads, rows, cols, first_col, transform, on);
  } else {
    return LATRO_BAD_DTYPE;
  }
  return cudaGetLastError();
}
