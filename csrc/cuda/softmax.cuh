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
// It works on several products at once, so that whether there is a softcap is asked once for all of
// them, and the usual case is a few instructions with no branch between: with 2-byte logits the
// passes over them run at the speed of memory only below some 15 instructions an element.
class Transform {
 public:
  Transform(float softcap, float temperature)  // softcap 0: none
      : scale_(1.0f / temperature),
        into_tanh_(softcap > 0.0f ? 1.0f / softcap : 0.0f),
        cap_(softcap / temperature),
        out_of_cap_(softcap > 0.0f ? temperature / softcap : 0.0f) {}

  // Products become logits.
  template <int n>
  __device__ void logits(float (&x)[n]) const {
    if (cap_ > 0.0f) {
      for (int k = 0; k < n; ++k) x[k] = cap_ * tanhf(x[k] * into_tanh_);
    } else {
      for (int k = 0; k < n; ++k) x[k] *= scale_;
    }
  }

  // Gradients with respect to the logits z become those with respect to the products.
  template <int n>
  __device__ void gradients(const float (&z)[n], float (&dz)[n]) const {
    if (cap_ > 0.0f) {
      for (int k = 0; k < n; ++k) {
        const float tanh = z[k] * out_of_cap_;
        dz[k] *= (1.0f - tanh * tanh) * scale_;
      }
    } else {
      for (int k = 0; k < n; ++k) dz[k] *= scale_;
    }
  }

 private:
  float scale_, into_tanh_, cap_, out_of_cap_;
};

// exp(z - row_max) and the like, for maxima that may still be -inf.
__device__ inline float distance(float z, float row_max) {
  return row_max == -kInfinity ? z : z - row_max;
}

// exp(x) in two instructions, where expf has eight: a relative error of 2^-22 near x = 0, growing
// by 2^-24 with every unit of x, and 0 for what is under 2^-126.
__device__ inline float fast_exp(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
}

// Which of a row's sums are made: sum_exp; weighted_sum too; square_sum and logit_sum too. The
// value is how many.
enum Sums { kSumExp = 1, kEntropy = 2, kAllSums = 4 };

// What a part of a row comes to. Of exp(z - row_max), `sum_exp` is the sum, `weighted_sum` the sum
// of its products with z - row_max, `square_sum` that of its squares; `logit_sum` is the sum of z.
struct State {
  float row_max = -kInfinity, sum_exp = 0.0f, weighted_sum = 0.0f, square_sum = 0.0f,
        logit_sum = 0.0f;

  template <Sums kSums, int n>
  __device__ void add(const float (&z)[n]) {
    float largest = row_max;
    for (int k = 0; k < n; ++k) largest = fmaxf(largest, z[k]);
    if (largest > row_max) {
      const float drop = row_max - largest;
      const float shrink = expf(drop);
      if (kSums >= kEntropy) {
        weighted_sum = shrink == 0.0f ? 0.0f : shrink * (weighted_sum + drop * sum_exp);
      }
      if (kSums == kAllSums) square_sum *= shrink * shrink;
      sum_exp *= shrink;
      row_max = largest;
    }
    const float shift = row_max == -kInfinity ? 0.0f : row_max;
    for (int k = 0; k < n; ++k) {
      const float below = z[k] - shift;
      const float e = fast_exp(below);
      sum_exp += e;
      if (kSums >= kEntropy && e != 0.0f) weighted_sum += e * below;  // 0 * -inf counts as 0
      if (kSums == kAllSums) {
        square_sum += e * e;
        logit_sum += z[k];
      }
    }
  }
};

template <Sums kSums>
__device__ State merge(State a, State b) {
  State sum;
  sum.row_max = a.row_max > b.row_max ? a.row_max : b.row_max;
  const float drop_a = distance(a.row_max, sum.row_max), drop_b = distance(b.row_max, sum.row_max);
  const float shrink_a = expf(drop_a), shrink_b = expf(drop_b);
  sum.sum_exp = a.sum_exp * shrink_a + b.sum_exp * shrink_b;
  // 0 * -inf counts as 0.
  if (shrink_a != 0.0f) sum.weighted_sum += shrink_a * (a.weighted_sum + drop_a * a.sum_exp);
  if (shrink_b != 0.0f) sum.weighted_sum += shrink_b * (b.weighted_sum + drop_b * b.sum_exp);
  if (kSums == kAllSums) {
    sum.square_sum = a.square_sum * (shrink_a * shrink_a) + b.square_sum * (shrink_b * shrink_b);
    sum.logit_sum = a.logit_sum + b.logit_sum;
  }
  return sum;
}

template <Sums kSums>
__device__ State merge_warp(State state) {
  for (int offset = 16; offset > 0; offset /= 2) {
    State other;
    other.row_max = __shfl_xor_sync(kAllLanes, state.row_max, offset);
    other.sum_exp = __shfl_xor_sync(kAllLanes, state.sum_exp, offset);
    other.weighted_sum = __shfl_xor_sync(kAllLanes, state.weighted_sum, offset);
    if (kSums == kAllSums) {
      other.square_sum = __shfl_xor_sync(kAllLanes, state.square_sum, offset);
      other.logit_sum = __shfl_xor_sync(kAllLanes, state.logit_sum, offset);
    }
    state = merge<kSums>(state, other);
  }
  return state;
}

// The state of the whole block's part of a row; right in the first warp.
template <Sums kSums>
__device__ State merge_block(State state) {
  __shared__ float row_max[kWarps], sum_exp[kWarps], weighted_sum[kWarps];
  __shared__ float square_sum[kWarps], logit_sum[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  state = merge_warp<kSums>(state);
  if (lane == 0) {
    row_max[warp] = state.row_max;
    sum_exp[warp] = state.sum_exp;
    weighted_sum[warp] = state.weighted_sum;
    if (kSums == kAllSums) {
      square_sum[warp] = state.square_sum;
      logit_sum[warp] = state.logit_sum;
    }
  }
  __syncthreads();
  state = State{};
  if (lane < kWarps) {
    state.row_max = row_max[lane];
    state.sum_exp = sum_exp[lane];
    state.weighted_sum = weighted_sum[lane];
    if (kSums == kAllSums) {
      state.square_sum = square_sum[lane];
      state.logit_sum = logit_sum[lane];
    }
  }
  __syncthreads();  // the arrays are free for the next row
  return merge_warp<kSums>(state);
}

// What has an upstream gradient: logp alone; entropy or log(sum of exp(z)) as well; and
// log(sum of p^2) as well.
enum Terms { kLogp, kOffset, kSquare };

// What the backward knows of one row; the formulas stand in latro_kernels/row_statistics.
struct RowGrad {
  float grad_logp, grad_entropy, logp, offset, grad_square, row_max, log_sum;

  __device__ bool is_zero() const {
    return grad_logp == 0.0f && grad_entropy == 0.0f && offset == 0.0f && grad_square == 0.0f;
  }

  // The gradient with respect to the logits z, `target` of which is the target's, if 0 <= target <
  // n.
  template <Terms kTerms, int n>
  __device__ void logits(const float (&z)[n], int64_t target, float (&dz)[n]) const {
    for (int k = 0; k < n; ++k) {
      const float log_p = (z[k] - row_max) - log_sum;
      const float p = fast_exp(log_p);
      dz[k] = with_offset<kTerms>(-grad_logp * p, p, log_p);
    }
    if (target < 0 || target >= n) return;
    // 1 - p by expm1: exact where p is close to 1.
    const float dtarget = with_offset<kTerms>(-grad_logp * expm1f(logp), expf(logp), logp);
    for (int k = 0; k < n; ++k) dz[k] = k == target ? dtarget : dz[k];
  }

  template <Terms kTerms>
  __device__ float with_offset(float dz, float p, float log_p) const {
    if (kTerms == kLogp || p == 0.0f) return dz;
    float factor = grad_entropy * log_p + offset;
    if (kTerms == kSquare) factor -= grad_square * p;
    return dz - p * factor;
  }
};

// The same of every row; grad_entropy, offset and grad_square are null where there is none.
struct RowGrads {
  const float *grad_logp, *grad_entropy, *logp, *offset, *grad_square, *row_max, *log_sum;

  template <Terms kTerms>
  __device__ RowGrad row(int64_t i) const {
    return {grad_logp[i],
            kTerms >= kOffset ? grad_entropy[i] : 0.0f,
            logp[i],
            kTerms >= kOffset ? offset[i] : 0.0f,
            kTerms == kSquare ? grad_square[i] : 0.0f,
            row_max[i],
            log_sum[i]};
  }

  // Returns one of a kernel's three forms: the one for these terms.
  template <typename Kernel>
  Kernel* choose(Kernel* of_logp, Kernel* with_offset, Kernel* with_square) const {
    return grad_square != nullptr ? with_square : offset != nullptr ? with_offset : of_logp;
  }
};

// n neighbours, loaded and stored in one instruction where their address allows it.
template <typename T, int n>
struct alignas(n * sizeof(T)) Pack {
  static constexpr int kSize = n;
  T at[n];

  __device__ static bool fits(const T* address) {
    return reinterpret_cast<uintptr_t>(address) % sizeof(Pack) == 0;
  }

  __device__ void store(T* to) const {
    if (fits(to)) {
      *reinterpret_cast<Pack*>(to) = *this;
    } else {
      for (int k = 0; k < n; ++k) to[k] = at[k];
    }
  }
};

template <typename T>
using LoadedPack = Pack<T, kLoadBytes / sizeof(T)>;

// Calls visit(j, pack of row[j] and the next) for this thread's share of `packs` packs from
// row[first] on. Whether they are aligned is no question for each load: the answer's merging would
// have the second wait for the first.
//
// A thread has 32 bytes in flight: 40 KB on a multiprocessor that holds five blocks, as it does at
// 48 registers a thread or less. That is what an H100 needs for 85 % of its copy bandwidth; a
// backward, half of whose traffic are stores, is content with half.
template <bool kAligned, typename T, typename Visit>
__device__ void for_each_pack(const T* row, int64_t first, int64_t packs, Visit visit) {
  constexpr int kSize = LoadedPack<T>::kSize;
  for (int64_t p = threadIdx.x; p < packs; p += kLoads * kThreads) {
    LoadedPack<T> loaded[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const T* from = row + first + (p + k * kThreads) * kSize;
      if (p + k * kThreads >= packs) continue;
      if constexpr (kAligned) {
        loaded[k] = *reinterpret_cast<const LoadedPack<T>*>(from);
      } else {
        for (int e = 0; e < kSize; ++e) loaded[k].at[e] = from[e];
      }
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (p + k * kThreads < packs) visit(first + (p + k * kThreads) * kSize, loaded[k]);
    }
  }
}

// The same for all of 0 .. cols, single elements being packs of one. Which thread gets which does
// not depend on the row's address, so neither do the bits of a sum; a row that is not aligned is
// loaded by the element.
template <typename T, typename Visit>
__device__ void for_each_to_sum(const T* row, int64_t cols, Visit visit) {
  const int64_t packs = cols / LoadedPack<T>::kSize;
  if (LoadedPack<T>::fits(row)) {
    for_each_pack<true>(row, 0, packs, visit);
  } else {
    for_each_pack<false>(row, 0, packs, visit);
  }
  const int64_t j = packs * LoadedPack<T>::kSize + threadIdx.x;
  if (j < cols) visit(j, Pack<T, 1>{{row[j]}});
}

// The same with all packs aligned: the elements before the first 16-byte boundary go singly.
template <typename T, typename Visit>
__device__ void for_each(const T* row, int64_t cols, Visit visit) {
  constexpr int kSize = LoadedPack<T>::kSize;
  const int64_t past_boundary = (reinterpret_cast<uintptr_t>(row) / sizeof(T)) % kSize;
  const int64_t until_boundary = past_boundary == 0 ? 0 : kSize - past_boundary;
  const int64_t head = until_boundary < cols ? until_boundary : cols;
  const int64_t packs = (cols - head) / kSize;
  const int64_t lane = threadIdx.x, tail = head + packs * kSize;
  if (lane < head) visit(lane, Pack<T, 1>{{row[lane]}});
  for_each_pack<true>(row, head, packs, visit);
  if (tail + lane < cols) visit(tail + lane, Pack<T, 1>{{row[tail + lane]}});
}

}  // namespace latro

#endif  // LATRO_CUDA_SOFTMAX_CUH_
