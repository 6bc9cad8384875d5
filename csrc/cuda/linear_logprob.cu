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
    fold_kernel(const float* tile, const float* bias, const int64_t* target, float* peak,
                float* total, float* picked, float* weighted, float* square_total,
                float* logit_total, int64_t rows, int64_t cols, int64_t first_col,
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
          if (j + k == hit) picked[i] = z[k];
        }
      }
      state.add<kSums>(z);
    });
    state = latro::merge_block<kSums>(state);
    if (threadIdx.x == 0) {
      State before;
      before.peak = peak[i];
      before.total = total[i];
      if (kSums >= latro::kEntropy) before.weighted = weighted[i];
      if (kSums == latro::kAllSums) {
        before.square_total = square_total[i];
        before.logit_total = logit_total[i];
      }
      state = latro::merge<kSums>(before, state);
      peak[i] = state.peak;
      total[i] = state.total;
      if (kSums >= latro::kEntropy) weighted[i] = state.weighted;
      if (kSums == latro::kAllSums) {
        square_total[i] = state.square_total;
        logit_total[i] = state.logit_total;
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
                                       float* peak, float* total, float* picked, float* weighted,
                                       float* square_total, float* logit_total, int64_t rows,
                                       int64_t cols, int64_t first_col, float softcap,
                                       float temperature, void* stream) {
  if (rows == 0 || cols == 0) return LATRO_OK;
  auto* kernel = square_total != nullptr ? fold_kernel<latro::kAllSums>
                 : weighted != nullptr   ? fold_kernel<latro::kEntropy>
                                         : fold_kernel<latro::kTotal>;
  kernel<<<latro::blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      tile, bias, target, peak, total, picked, weighted, square_total, logit_total, rows, cols,
      first_col, Transform{softcap, temperature});
  return cudaGetLastError();
}

int32_t latro_cuda_linear_logprob_grad(
    const float* tile, void* dtile, int32_t dtype, const float* bias, const int64_t* target,
    const float* grad_logp, const float* grad_entropy, const float* logp, const float* offset,
    const float* grad_square, const float* peak, const float* log_total, int64_t rows, int64_t cols,
    int64_t first_col, float softcap, float temperature, void* stream) {
  if (rows == 0 || cols == 0) return LATRO_OK;
  const RowGrads grads{grad_logp, grad_entropy, logp, offset, grad_square, peak, log_total};
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
