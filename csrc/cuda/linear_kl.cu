// linear_kl on CUDA: the two folds over the tiles of both heads. The products around them are
// cuBLAS's, in fp32. One block a row; rows beyond the grid are reached by striding. The formulas
// stand in latro_kernels/linear_kl.
#include <cstdint>

#include "latro.h"
#include "softmax.cuh"

namespace {

using latro::blocks_for;
using latro::kAllLanes;
using latro::kInfinity;
using latro::kThreads;
using latro::kWarps;
using latro::LoadedPack;
using latro::Pack;
using latro::Transform;

// A row of both tiles.
struct Row {
  const float *p, *q, *bias_p, *bias_q;
  int64_t cols;
  Transform transform_p, transform_q;

  // Calls visit(j, logits of p at column j and the next, the same of q) for this thread's share:
  // four columns at once, 32 bytes a thread in flight, and one at a time past the last four.
  template <typename Visit>
  __device__ void for_each(Visit visit) const {
    constexpr int n = LoadedPack<float>::kSize;
    const int64_t packs = cols / n;
    if (LoadedPack<float>::fits(p) && LoadedPack<float>::fits(q)) {
      for (int64_t j = threadIdx.x * n; j < packs * n; j += kThreads * n) {
        visit_logits(j, *reinterpret_cast<const LoadedPack<float>*>(p + j),
                     *reinterpret_cast<const LoadedPack<float>*>(q + j), visit);
      }
    } else {
      for (int64_t j = threadIdx.x * n; j < packs * n; j += kThreads * n) {
        visit_logits(j, LoadedPack<float>{{p[j], p[j + 1], p[j + 2], p[j + 3]}},
                     LoadedPack<float>{{q[j], q[j + 1], q[j + 2], q[j + 3]}}, visit);
      }
    }
    const int64_t j = packs * n + threadIdx.x;
    if (j < cols) visit_logits(j, Pack<float, 1>{{p[j]}}, Pack<float, 1>{{q[j]}}, visit);
  }

  template <int n, typename Visit>
  __device__ void visit_logits(int64_t j, Pack<float, n> products_p, Pack<float, n> products_q,
                               Visit visit) const {
    Pack<float, n> zp = products_p, zq = products_q;
    for (int k = 0; k < n && bias_p != nullptr; ++k) zp.at[k] += bias_p[j + k];
    for (int k = 0; k < n && bias_q != nullptr; ++k) zq.at[k] += bias_q[j + k];
    transform_p.logits(zp.at);
    transform_q.logits(zq.at);
    visit(j, zp, zq);
  }
};

struct Tiles {
  const float *p, *q, *bias_p, *bias_q;
  int64_t rows, cols;
  Transform transform_p, transform_q;

  __device__ Row row(int64_t i) const {
    return {p + i * cols, q + i * cols, bias_p, bias_q, cols, transform_p, transform_q};
  }
};

// exp(-x) - 1 + x, by Taylor's series where the formula would cancel.
__device__ float second_order(float x) {
  float series = 1.0f - x * (1.0f / 8);
  series = 1.0f - x * (1.0f / 7) * series;
  series = 1.0f - x * (1.0f / 6) * series;
  series = 1.0f - x * (1.0f / 5) * series;
  series = 1.0f - x * (1.0f / 4) * series;
  series = 1.0f - x * (1.0f / 3) * series;
  return 0.5f * x * x * series;
}
constexpr float kClose = 0.5f;  // the next term of the series is under 2^-24 there

// What the columns of a row come to, measured from the maxima and from the anchor.
struct Sums {
  float sum_exp_p, sum_exp_q, moment, second;
};

__device__ Sums operator+(Sums a, Sums b) {
  return {a.sum_exp_p + b.sum_exp_p, a.sum_exp_q + b.sum_exp_q, a.moment + b.moment,
          a.second + b.second};
}

// The largest logits, and that of q in the column of p's; any of several such columns will do.
struct Maxima {
  float p, q, anchor;

  __device__ float distance() const { return p - anchor; }
};

__device__ Maxima highest(Maxima a, Maxima b) {
  const float anchor = a.p > b.p ? a.anchor : b.p > a.p ? b.anchor : fmaxf(a.anchor, b.anchor);
  return {fmaxf(a.p, b.p), fmaxf(a.q, b.q), anchor};
}

__device__ Maxima shuffle(Maxima x, int offset) {
  return {__shfl_xor_sync(kAllLanes, x.p, offset), __shfl_xor_sync(kAllLanes, x.q, offset),
          __shfl_xor_sync(kAllLanes, x.anchor, offset)};
}

__device__ Sums shuffle(Sums x, int offset) {
  return {__shfl_xor_sync(kAllLanes, x.sum_exp_p, offset),
          __shfl_xor_sync(kAllLanes, x.sum_exp_q, offset),
          __shfl_xor_sync(kAllLanes, x.moment, offset),
          __shfl_xor_sync(kAllLanes, x.second, offset)};
}

// `x` of all threads of the block together; every thread gets the result.
template <typename T, typename Merge>
__device__ T merge_block(T x, Merge merge) {
  __shared__ T partial[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int offset = 16; offset > 0; offset /= 2) x = merge(x, shuffle(x, offset));
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  x = partial[lane % kWarps];
  for (int offset = kWarps / 2; offset > 0; offset /= 2) x = merge(x, shuffle(x, offset));
  __syncthreads();  // `partial` is free for the next row
  return x;
}

// The running state of every row.
struct State {
  float *max_p, *sum_exp_p, *max_q, *sum_exp_q, *anchor, *moment, *second;
};

// What a row had summed before, seen from maxima that lie at or above those of before.
__device__ Sums rescale(Sums sums, Maxima before, Maxima after) {
  const float drop_p = before.p - after.p, drop_q = before.q - after.q;
  const float shrink_p = expf(drop_p), shrink_q = expf(drop_q);
  const float turn = drop_p - drop_q;
  const float first = sums.moment + (before.q - before.anchor) * sums.sum_exp_p;
  const float moved = shrink_p == 0.0f ? 0.0f : shrink_p * (first + turn * sums.sum_exp_p);
  Sums scaled{sums.sum_exp_p * shrink_p, sums.sum_exp_q * shrink_q, 0.0f, 0.0f};
  if (shrink_p != 0.0f) {
    const float move = before.distance() - after.distance();
    scaled.moment = shrink_p * (sums.moment + move * sums.sum_exp_p);
  }
  scaled.second =
      fabsf(turn) < kClose
          ? shrink_q * sums.second +
                shrink_p * (second_order(turn) * (sums.sum_exp_p - first) + turn * first)
          : (scaled.sum_exp_q - scaled.sum_exp_p) + moved;
  return scaled;
}

__global__ void __launch_bounds__(kThreads) fold_kernel(Tiles tiles, State state) {
  for (int64_t i = blockIdx.x; i < tiles.rows; i += gridDim.x) {
    const Row row = tiles.row(i);
    const Maxima before{state.max_p[i], state.max_q[i], state.anchor[i]};
    Maxima maxima{-kInfinity, -kInfinity, -kInfinity};
    row.for_each([&](int64_t, auto zp, auto zq) {
      for (int k = 0; k < zp.kSize; ++k) {
        maxima = highest({zp.at[k], zq.at[k], zq.at[k]}, maxima);
      }
    });
    maxima = merge_block(maxima, highest);
    // A finite number must stand there for differences from it to be numbers.
    if (maxima.anchor == -kInfinity) maxima.anchor = 0.0f;
    if (!(maxima.p > before.p)) maxima.anchor = before.anchor;
    maxima.p = fmaxf(maxima.p, before.p);
    maxima.q = fmaxf(maxima.q, before.q);
    // A row that is -inf so far has no maximum to subtract.
    const Maxima shift{maxima.p == -kInfinity ? 0.0f : maxima.p,
                       maxima.q == -kInfinity ? 0.0f : maxima.q, maxima.anchor};
    Sums sums{};
    row.for_each([&](int64_t, auto zp, auto zq) {
      for (int k = 0; k < zp.kSize; ++k) {
        const float ep = expf(zp.at[k] - shift.p), eq = expf(zq.at[k] - shift.q);
        const float distance = zp.at[k] - zq.at[k];
        const float delta = distance - (shift.p - shift.q);
        // 0 * inf counts as 0.
        const float moment = ep == 0.0f ? 0.0f : ep * (distance - shift.distance());
        const float far = (eq - ep) + (ep == 0.0f ? 0.0f : ep * delta);
        const float second = fabsf(delta) < kClose ? ep * second_order(delta) : far;
        sums = sums + Sums{ep, eq, moment, second};
      }
    });
    sums = merge_block(sums, [](Sums a, Sums b) { return a + b; });
    if (threadIdx.x == 0) {
      const Sums old{state.sum_exp_p[i], state.sum_exp_q[i], state.moment[i], state.second[i]};
      sums = rescale(old, before, shift) + sums;
      state.max_p[i] = maxima.p;
      state.max_q[i] = maxima.q;
      state.anchor[i] = maxima.anchor;
      state.sum_exp_p[i] = sums.sum_exp_p;
      state.sum_exp_q[i] = sums.sum_exp_q;
      state.moment[i] = sums.moment;
      state.second[i] = sums.second;
    }
  }
}

struct RowGrad {
  const float *grad_kl, *anchor, *mean, *max_p, *sum_exp_p, *max_q, *sum_exp_q;
};

template <bool kOfQ, typename T>
__global__ void __launch_bounds__(kThreads) grad_kernel(Tiles tiles, T* dtile, RowGrad grad) {
  for (int64_t i = blockIdx.x; i < tiles.rows; i += gridDim.x) {
    const Row row = tiles.row(i);
    T* drow = dtile + i * tiles.cols;
    const float g = grad.grad_kl[i], mean = grad.mean[i];
    const float max_p = grad.max_p[i], sum_exp_p = grad.sum_exp_p[i];
    const float max_q = grad.max_q[i], sum_exp_q = grad.sum_exp_q[i];
    const float at_anchor = max_p - grad.anchor[i];
    row.for_each([&](int64_t j, auto zp, auto zq) {
      constexpr int n = zp.kSize;
      float dz[n];
      for (int k = 0; k < n; ++k) {
        const float p = expf(zp.at[k] - max_p) / sum_exp_p;
        if constexpr (kOfQ) {
          dz[k] = g * (expf(zq.at[k] - max_q) / sum_exp_q - p);
        } else {
          dz[k] = p == 0.0f ? 0.0f : g * p * (((zp.at[k] - zq.at[k]) - at_anchor) - mean);
        }
      }
      (kOfQ ? row.transform_q : row.transform_p).gradients(kOfQ ? zq.at : zp.at, dz);
      Pack<T, n> gradient;
      for (int k = 0; k < n; ++k) gradient.at[k] = static_cast<T>(dz[k]);
      gradient.store(drow + j);
    });
  }
}

template <typename T>
void launch_grad(const Tiles& tiles, void* dtile, bool of_q, const RowGrad& grad, cudaStream_t on) {
  const auto kernel = of_q ? grad_kernel<true, T> : grad_kernel<false, T>;
  kernel<<<blocks_for(tiles.rows), kThreads, 0, on>>>(tiles, static_cast<T*>(dtile), grad);
}

}  // namespace

int32_t latro_cuda_linear_kl_fold(const float* tile_p, const float* tile_q, const float* bias_p,
                                  const float* bias_q, float* max_p, float* sum_exp_p, float* max_q,
                                  float* sum_exp_q, float* anchor, float* moment, float* second,
                                  int64_t rows, int64_t cols, float softcap_p, float temperature_p,
                                  float softcap_q, float temperature_q, void* stream) {
  if (rows == 0 || cols == 0) return LATRO_OK;
  const Transform p{softcap_p, temperature_p}, q{softcap_q, temperature_q};
  const Tiles tiles{tile_p, tile_q, bias_p, bias_q, rows, cols, p, q};
  fold_kernel<<<blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      tiles, State{max_p, sum_exp_p, max_q, sum_exp_q, anchor, moment, second});
  return cudaGetLastError();
}

int32_t latro_cuda_linear_kl_grad(const float* tile_p, const float* tile_q, const float* bias_p,
                                  const float* bias_q, void* dtile, int32_t dtype, int32_t of_q,
                                  const float* grad_kl, const float* anchor, const float* mean,
                                  const float* max_p, const float* sum_exp_p, const float* max_q,
                                  const float* sum_exp_q, int64_t rows, int64_t cols,
                                  float softcap_p, float temperature_p, float softcap_q,
                                  float temperature_q, void* stream) {
  if (rows == 0 || cols == 0) return LATRO_OK;
  const Transform p{softcap_p, temperature_p}, q{softcap_q, temperature_q};
  const Tiles tiles{tile_p, tile_q, bias_p, bias_q, rows, cols, p, q};
  const RowGrad grad{grad_kl, anchor, mean, max_p, sum_exp_p, max_q, sum_exp_q};
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == LATRO_F32) {
    launch_grad<float>(tiles, dtile, of_q, grad, on);
  } else if (dtype == LATRO_BF16) {
    launch_grad<__nv_bfloat16>(tiles, dtile, of_q, grad, on);
  } else if (dtype == LATRO_F16) {
    launch_grad<__half>(tiles, dtile, of_q, grad, on);
  } else {
    return LATRO_BAD_DTYPE;
  }
  return cudaGetLastError();
}
