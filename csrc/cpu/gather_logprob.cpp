// gather_logprob on the CPU: one pass over the logits forward, one pass over them and the gradient
// backward. A row is one thread's and is walked in blocks of a fixed width, so that the result does
// not depend on the number of threads; a block is read before its gradient is written, so that the
// two may share their memory. The formulas stand in latro_kernels/gather_logprob.
#include <algorithm>
#include <cmath>

#include "latro.h"
#include "softmax.h"

namespace {

using latro::bfloat16;
using latro::float16;
using latro::kBlock;
using latro::RowGrad;
using latro::RowGradArrays;
using latro::State;
using latro::Transform;

// [rows, cols] in memory: rows that are `row_step` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t row_step;

  T* row(int64_t i) const { return data + i * row_step; }
};

// What the forward writes of each row. entropy, log_sum_p_squared and mean_logit may be null, the
// last two together, and are if entropy is.
struct Outputs {
  float *logp, *entropy, *log_sum_p_squared, *mean_logit, *row_max, *log_sum, *target_logit;

  void clear(int64_t i) const {
    for (float* rows :
         {logp, entropy, log_sum_p_squared, mean_logit, row_max, log_sum, target_logit}) {
      if (rows != nullptr) rows[i] = 0.0f;
    }
  }
};

template <typename T>
void forward_rows(Rows<const T> logits, const int64_t* target, const Outputs& out, int64_t rows,
                  int64_t cols, Transform transform, int64_t threads) {
  const latro::Sums sums = out.mean_logit != nullptr ? latro::kAllSums
                           : out.entropy != nullptr  ? latro::kEntropy
                                                     : latro::kSumExp;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] < 0) {  // ignored
      out.clear(i);
      continue;
    }
    const T* row = logits.row(i);
    float z[kBlock];
    State state;
    for (int64_t begin = 0; begin < cols; begin += kBlock) {
      const int64_t n = std::min(cols - begin, kBlock);
      transform.logits(row + begin, nullptr, n, z);
      state.add(z, n, sums);
      // The very number that was added: made once more, it might be rounded otherwise.
      const int64_t hit = target[i] - begin;
      if (hit >= 0 && hit < n) out.target_logit[i] = z[hit];
    }
    const float log_sum = std::log(state.sum_exp);
    out.row_max[i] = state.row_max;
    out.log_sum[i] = log_sum;
    out.logp[i] = (out.target_logit[i] - state.row_max) - log_sum;
    if (out.entropy != nullptr) out.entropy[i] = log_sum - state.weighted_sum / state.sum_exp;
    if (out.mean_logit != nullptr) {
      out.log_sum_p_squared[i] = std::log(state.square_sum) - 2.0f * log_sum;
      out.mean_logit[i] = state.logit_sum / static_cast<float>(cols);
    }
  }
}

template <typename T>
void backward_rows(Rows<const T> logits, Rows<T> dlogits, const int64_t* target,
                   const RowGradArrays& grads, int64_t rows, int64_t cols, Transform transform,
                   int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = logits.row(i);
    T* drow = dlogits.row(i);
    const RowGrad grad = grads.row(i);
    if (grad.is_zero()) {
      std::fill(drow, drow + cols, T{});
      continue;
    }
    float z[kBlock], dz[kBlock];
    for (int64_t begin = 0; begin < cols; begin += kBlock) {
      const int64_t n = std::min(cols - begin, kBlock);
      transform.logits(row + begin, nullptr, n, z);
      grad.logits(z, n, target[i] - begin, dz);
      transform.chain(z, n, dz);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) latro::store(dz[j], drow + begin + j);
    }
  }
}

}  // namespace

int32_t latro_cpu_gather_logprob_forward(const void* logits, int32_t dtype, int64_t row_step,
                                         const int64_t* target, float* logp, float* entropy,
                                         float* log_sum_p_squared, float* mean_logit,
                                         float* row_max, float* log_sum, float* target_logit,
                                         int64_t rows, int64_t cols, float softcap,
                                         float temperature, int64_t threads) {
  const Outputs out{logp, entropy, log_sum_p_squared, mean_logit, row_max, log_sum, target_logit};
  const auto run = [&](auto element) {
    const Rows<const decltype(element)> x{static_cast<const decltype(element)*>(logits), row_step};
    forward_rows(x, target, out, rows, cols, Transform{softcap, temperature}, threads);
    return LATRO_OK;
  };
  if (dtype == LATRO_F32) return run(float{});
  if (dtype == LATRO_BF16) return run(bfloat16{});
  if (dtype == LATRO_F16) return run(float16{});
  return LATRO_BAD_DTYPE;
}

int32_t latro_cpu_gather_logprob_backward(
    const void* logits, void* dlogits, int32_t dtype, int64_t row_step, int64_t drow_step,
    const int64_t* target, const float* grad_logp, const float* grad_entropy, const float* logp,
    const float* offset, const float* grad_square, const float* row_max, const float* log_sum,
    int64_t rows, int64_t cols, float softcap, float temperature, int64_t threads) {
  const RowGradArrays grads{grad_logp, grad_entropy, logp, offset, grad_square, row_max, log_sum};
  const auto run = [&](auto element) {
    using T = decltype(element);
    backward_rows(Rows<const T>{static_cast<const T*>(logits), row_step},
                  Rows<T>{static_cast<T*>(dlogits), drow_step}, target, grads, rows, cols,
                  Transform{softcap, temperature}, threads);
    return LATRO_OK;
  };
  if (dtype == LATRO_F32) return run(float{});
  if (dtype == LATRO_BF16) return run(bfloat16{});
  if (dtype == LATRO_F16) return run(float16{});
  return LATRO_BAD_DTYPE;
}
