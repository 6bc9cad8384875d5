// linear_logprob on the CPU: the two folds over a tile of logits. The products around them are
// torch's. A row is one thread's and is walked in blocks of a fixed width, so that the result does
// not depend on the number of threads.
#include "latro.h"
#include "softmax.h"

namespace {

using latro::bfloat16;
using latro::kBlock;
using latro::State;
using latro::Transform;

template <typename T>
void fold_rows(const T* tile, const float* bias, const int64_t* target, float* peak, float* total,
               float* picked, float* weighted, int64_t rows, int64_t cols, int64_t first_col,
               Transform transform, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
  for (int64_t i = 0; i < rows; ++i) {
    float z[kBlock];
    State state{peak[i], total[i], weighted != nullptr ? weighted[i] : 0.0f};
    for (int64_t begin = 0; begin < cols; begin += kBlock) {
      const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
      transform.logits(tile + i * cols + begin, bias != nullptr ? bias + begin : nullptr, n, z);
      state.add(z, n, weighted != nullptr);
      const int64_t hit = target[i] - first_col - begin;
      if (hit >= 0 && hit < n) picked[i] = z[hit];
    }
    peak[i] = state.peak;
    total[i] = state.total;
    if (weighted != nullptr) weighted[i] = state.weighted;
  }
}

template <typename T>
void grad_rows(T* tile, const float* bias, const int64_t* target, const float* grad_logp,
               const float* grad_entropy, const float* logp, const float* entropy,
               const float* peak, const float* log_total, int64_t rows, int64_t cols,
               int64_t first_col, Transform transform, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
  for (int64_t i = 0; i < rows; ++i) {
    float z[kBlock], dz[kBlock];
    const bool has_entropy = grad_entropy != nullptr;
    const latro::RowGrad grad{grad_logp[i], has_entropy ? grad_entropy[i] : 0.0f,
                              logp[i],      has_entropy ? entropy[i] : 0.0f,
                              peak[i],      log_total[i],
                              has_entropy};
    for (int64_t begin = 0; begin < cols; begin += kBlock) {
      const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
      T* block = tile + i * cols + begin;
      transform.logits(block, bias != nullptr ? bias + begin : nullptr, n, z);
      grad.logits(z, n, target[i] - first_col - begin, dz);
      transform.chain(z, n, dz);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) latro::store(dz[j], block + j);
    }
  }
}

}  // namespace

int32_t latro_cpu_linear_logprob_fold(const void* tile, int32_t dtype, const float* bias,
                                      const int64_t* target, float* peak, float* total,
                                      float* picked, float* weighted, int64_t rows, int64_t cols,
                                      int64_t first_col, float softcap, float temperature,
                                      int64_t threads) {
  const Transform transform{softcap, temperature};
  if (dtype == LATRO_F32) {
    fold_rows(static_cast<const float*>(tile), bias, target, peak, total, picked, weighted, rows,
              cols, first_col, transform, threads);
  } else if (dtype == LATRO_BF16) {
    fold_rows(static_cast<const bfloat16*>(tile), bias, target, peak, total, picked, weighted, rows,
              cols, first_col, transform, threads);
  } else {
    return LATRO_BAD_DTYPE;
  }
  return LATRO_OK;
}

int32_t latro_cpu_linear_logprob_grad(void* tile, int32_t dtype, const float* bias,
                                      const int64_t* target, const float* grad_logp,
                                      const float* grad_entropy, const float* logp,
                                      const float* entropy, const float* peak,
                                      const float* log_total, int64_t rows, int64_t cols,
                                      int64_t first_col, float softcap, float temperature,
                                      int64_t threads) {
  const Transform transform{softcap, temperature};
  if (dtype == LATRO_F32) {
    grad_rows(static_cast<float*>(tile), bias, target, grad_logp, grad_entropy, logp, entropy, peak,
              log_total, rows, cols, first_col, transform, threads);
  } else if (dtype == LATRO_BF16) {
    grad_rows(static_cast<bfloat16*>(tile), bias, target, grad_logp, grad_entropy, logp, entropy,
              peak, log_total, rows, cols, first_col, transform, threads);
  } else {
    return LATRO_BAD_DTYPE;
  }
  return LATRO_OK;
}
