// linear_logprob on the CPU: the two folds over a tile of logits. The products around them are
// torch's. A row is one thread's and is walked in blocks of a fixed width, so that the result does
// not depend on the number of threads.
#include <cmath>
#include <limits>

#include "latro.h"
#include "vector_math.h"

namespace {

using latro::bfloat16;

// Columns taken at a time: three passes over a block hit the first-level cache.
constexpr int64_t kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What lies between a product and the logit z: z = softcap * tanh((product + bias) / softcap) / T.
struct Transform {
  float softcap;  // 0: none
  float temperature;

  template <typename T>
  void logits(const T* products, const float* bias, int64_t n, float* z) const {
    if (bias != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = latro::load(products[j]) + bias[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = latro::load(products[j]);
    }
    if (softcap > 0.0f) {
      const float inverse = 1.0f / softcap;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = softcap * latro::tanh_vec(z[j] * inverse);
    }
    const float scale = 1.0f / temperature;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) z[j] *= scale;
  }

  // From the gradient with respect to z to the one with respect to the product, in place.
  void chain(const float* z, int64_t n, float* dz) const {
    const float scale = 1.0f / temperature;
    if (softcap > 0.0f) {
      const float to_tanh = temperature / softcap;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float tanh = z[j] * to_tanh;
        dz[j] *= scale * (1.0f - tanh * tanh);
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) dz[j] *= scale;
    }
  }
};

// The running state of one row. `weighted` is the sum of exp(z - peak) * (z - peak).
struct State {
  float peak, total, weighted;

  void add(const float* z, int64_t n, bool entropy) {
    float largest = peak;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; ++j) largest = z[j] > largest ? z[j] : largest;
    // A row that is -inf so far has no peak to subtract.
    const float shift = largest == -kInfinity ? 0.0f : largest;
    const float drop = peak - shift;
    const float shrink = std::exp(drop);
    float sum = 0.0f, moment = 0.0f;
    if (entropy) {
#pragma omp simd reduction(+ : sum, moment)
      for (int64_t j = 0; j < n; ++j) {
        const float distance = z[j] - shift;
        const float e = latro::exp_vec(distance);
        sum += e;
        moment += e == 0.0f ? 0.0f : e * distance;  // 0 * -inf counts as 0
      }
      weighted = shrink == 0.0f ? moment : shrink * (weighted + drop * total) + moment;
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) sum += latro::exp_vec(z[j] - shift);
    }
    total = total * shrink + sum;
    peak = largest;
  }
};

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
    const float g = grad_logp[i], shift = peak[i], log_sum = log_total[i];
    const float h = grad_entropy != nullptr ? grad_entropy[i] : 0.0f;
    const float mean = grad_entropy != nullptr ? entropy[i] : 0.0f;
    for (int64_t begin = 0; begin < cols; begin += kBlock) {
      const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
      T* block = tile + i * cols + begin;
      transform.logits(block, bias != nullptr ? bias + begin : nullptr, n, z);
      if (grad_entropy != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float log_p = (z[j] - shift) - log_sum;
          const float p = latro::exp_vec(log_p);
          dz[j] = p == 0.0f ? 0.0f : -p * (g + h * (log_p + mean));
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) dz[j] = -g * latro::exp_vec((z[j] - shift) - log_sum);
      }
      const int64_t hit = target[i] - first_col - begin;
      if (hit >= 0 && hit < n) {
        // 1 - p by expm1 of the log-prob that the forward kept: exact where p is close to 1.
        dz[hit] = -g * std::expm1(logp[i]);
        if (h != 0.0f) dz[hit] -= h * std::exp(logp[i]) * (logp[i] + mean);
      }
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
