// A row of logits and its gradient in the hands of one block: shared by every op that folds logits
// on CUDA.
#ifndef LATRO_CUDA_SOFTMAX_CUH_
#define LATRO_CUDA_SOFTMAX_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

namespace latro {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 1 << 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLoadBytes = 16;
constexpr int kLoads = 2;  // of a thread in flight together

// One block a row; rows beyond the grid are reached by striding.
inline unsigned blocks_for(int64_t rows) {
  return static_cast<unsigned>(rows < kMaxBlocks ? rows : kMaxBlocks);
}

// What lies between a product and the logit z: z = softcap * tanh((product + bias) / softcap) / T.
struct Transform {
  float softcap;  // 0: none
  float temperature;

  __device__ float logit(float product) const {
    const float scale = 1.0f / temperature;
    return scale * (softcap > 0.0f ? softcap * tanhf(product / softcap) : product);
  }

  // The derivative of the logit with respect to the product.
  __device__ float slope(float z) const {
    const float tanh = softcap > 0.0f ? z * (temperature / softcap) : 0.0f;
    return (1.0f - tanh * tanh) * (1.0f / temperature);
  }
};

// exp(z - peak) and the like, for peaks that may still be -inf.
__device__ inline float distance(float z, float peak) { return peak == -kInfinity ? z : z - peak; }

// What a part of a row comes to. `weighted` is the sum of exp(z - peak) * (z - peak).
struct State {
  float peak = -kInfinity, total = 0.0f, weighted = 0.0f;

  template <bool kEntropy, int n>
  __device__ void add(const float (&z)[n]) {
    float largest = peak;
    for (int k = 0; k < n; ++k) largest = z[k] > largest ? z[k] : largest;
    if (largest > peak) {
      const float drop = peak - largest;
      const float shrink = expf(drop);
      if (kEntropy) weighted = shrink == 0.0f ? 0.0f : shrink * (weighted + drop * total);
      total *= shrink;
      peak = largest;
    }
    for (int k = 0; k < n; ++k) {
      const float below = distance(z[k], peak);
      const float e = expf(below);
      total += e;
      if (kEntropy && e != 0.0f) weighted += e * below;  // 0 * -inf counts as 0
    }
  }
};

__device__ inline State merge(State a, State b) {
  State sum;
  sum.peak = a.peak > b.peak ? a.peak : b.peak;
  const float drop_a = distance(a.peak, sum.peak), drop_b = distance(b.peak, sum.peak);
  const float shrink_a = expf(drop_a), shrink_b = expf(drop_b);
  sum.total = a.total * shrink_a + b.total * shrink_b;
  // 0 * -inf counts as 0.
  if (shrink_a != 0.0f) sum.weighted += shrink_a * (a.weighted + drop_a * a.total);
  if (shrink_b != 0.0f) sum.weighted += shrink_b * (b.weighted + drop_b * b.total);
  return sum;
}

__device__ inline State merge_warp(State state) {
  for (int offset = 16; offset > 0; offset /= 2) {
    State other;
    other.peak = __shfl_xor_sync(kAllLanes, state.peak, offset);
    other.total = __shfl_xor_sync(kAllLanes, state.total, offset);
    other.weighted = __shfl_xor_sync(kAllLanes, state.weighted, offset);
    state = merge(state, other);
  }
  return state;
}

// The state of the whole block's part of a row; right in the first warp.
__device__ inline State merge_block(State state) {
  __shared__ float peak[kWarps], total[kWarps], weighted[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  state = merge_warp(state);
  if (lane == 0) {
    peak[warp] = state.peak;
    total[warp] = state.total;
    weighted[warp] = state.weighted;
  }
  __syncthreads();
  state = State{};
  if (lane < kWarps) {
    state.peak = peak[lane];
    state.total = total[lane];
    state.weighted = weighted[lane];
  }
  __syncthreads();  // the arrays are free for the next row
  return merge_warp(state);
}

// What the backward knows of one row; the formulas stand in latro_kernels/linear_logprob.py.
struct RowGrad {
  float grad_logp, grad_entropy, logp, entropy, peak, log_total;

  // The gradient with respect to the logit z, which may be the target's.
  template <bool kEntropy>
  __device__ float logit(float z, bool is_target) const {
    const float log_p = is_target ? logp : (z - peak) - log_total;
    const float p = expf(log_p);
    // 1 - p by expm1: exact where p is close to 1.
    float dz = is_target ? -grad_logp * expm1f(log_p) : -grad_logp * p;
    if (kEntropy && p != 0.0f) dz -= grad_entropy * p * (log_p + entropy);
    return dz;
  }
};

// The same of every row; grad_entropy and entropy are null where there is none.
struct RowGrads {
  const float *grad_logp, *grad_entropy, *logp, *entropy, *peak, *log_total;

  template <bool kEntropy>
  __device__ RowGrad row(int64_t i) const {
    return {grad_logp[i], kEntropy ? grad_entropy[i] : 0.0f,
            logp[i],      kEntropy ? entropy[i] : 0.0f,
            peak[i],      log_total[i]};
  }
};

// n neighbours, loaded and stored in one instruction.
template <typename T, int n>
struct alignas(n * sizeof(T)) Pack {
  static constexpr int kSize = n;
  T at[n];

  __device__ void store(T* to) const {
    if (reinterpret_cast<uintptr_t>(to) % sizeof(Pack) == 0) {
      *reinterpret_cast<Pack*>(to) = *this;
    } else {
      for (int k = 0; k < n; ++k) to[k] = at[k];
    }
  }
};

// Calls visit(j, pack of row[j] and the next) until 0 .. cols are done, this thread's share of
// them: packs of 16 bytes between the first and the last aligned element, of one before and after.
template <typename T, typename Visit>
__device__ void for_each(const T* row, int64_t cols, Visit visit) {
  constexpr int kSize = kLoadBytes / sizeof(T);
  const int64_t past_boundary = (reinterpret_cast<uintptr_t>(row) / sizeof(T)) % kSize;
  int64_t head = past_boundary == 0 ? 0 : kSize - past_boundary;
  head = head < cols ? head : cols;
  const int64_t packs = (cols - head) / kSize;
  const int64_t tail = head + packs * kSize;
  const int64_t lane = threadIdx.x;
  if (lane < head) visit(lane, Pack<T, 1>{{row[lane]}});
  const auto* body = reinterpret_cast<const Pack<T, kSize>*>(row + head);
  for (int64_t first = lane; first < packs; first += kLoads * kThreads) {
    Pack<T, kSize> loaded[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (first + k * kThreads < packs) loaded[k] = body[first + k * kThreads];
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t i = first + k * kThreads;
      if (i < packs) visit(head + i * kSize, loaded[k]);
    }
  }
  if (tail + lane < cols) visit(tail + lane, Pack<T, 1>{{row[tail + lane]}});
}

}  // namespace latro

#endif  // LATRO_CUDA_SOFTMAX_CUH_
