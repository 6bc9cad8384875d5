// linear_kl on the CPU, whole: the products of both heads and their folds in one pass, no tile of
// logits in memory.
//
// The sweep is that of linear_logprob.cpp, with two products where that has one: a slice of both
// weights (of the one, where they are the same) is packed once, and all rows pass over it in
// chunks, each one thread's. The formulas stand in latro_kernels/linear_kl.py.
//
// No result depends on the number of threads, nor what concerns a row on the other rows. Equal rows
// of both heads have logits of equal bits.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "head_gradient.h"
#include "kl_state.h"
#include "latro.h"
#include "sweep.h"

namespace {

using namespace latro;

// The sweeps of both heads, side by side; q's weight is null where it is p's.
template <typename Gemm, typename T>
struct Pair {
  const bool shared;
  const int64_t width;  // of a slice
  Sweep<Gemm, T> p, q;

  Pair(const Head<T>& p, const Head<T>& q, bool with_dz, bool with_dx, int64_t threads)
      : shared(q.weight.data == nullptr),
        width(slice_columns<Gemm>(std::max(p.H, q.H), p.V)),
        p(p, with_dz, with_dx, threads, width),
        q(q, false, false, threads, width) {}

  bool ok() const { return p.ok() && q.ok(); }

  // Packs a slice; called by all threads.
  void pack_weights(int64_t begin, int64_t cols) {
    p.pack_weight_rows(begin, cols);
    if (!shared) q.pack_weight_rows(begin, cols);
  }

  // Calls visit(i, from, n, zp, zq) with the logits of n columns, `from` of the slice that begins
  // at `begin` and the next, for row i of a chunk that `thread` has packed.
  template <typename Visit>
  void for_each_row(int thread, int64_t count, int64_t begin, int64_t cols, Visit visit) {
    constexpr int64_t kRows = Gemm::kRows;
    Scratch<Gemm>&own_p = p.threads[thread], &own_q = q.threads[thread];
    const Sweep<Gemm, T>& weight_q = shared ? p : q;
    for (int64_t from = 0; from < cols; from += kGroupCols) {
      const int64_t n = std::min(kGroupCols, cols - from), column = begin + from;
      for (int64_t i = 0; i < count; i += kRows) {
        p.products(own_p, i, from, from + n, own_p.products.get());
        weight_q.products(own_q, i, from, from + n, own_q.products.get());
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          float zp[kGroupCols], zq[kGroupCols];
          p.head.transform.logits(own_p.products.get() + r * kGroupCols, p.head.bias_at(column), n,
                                  zp);
          q.head.transform.logits(own_q.products.get() + r * kGroupCols, q.head.bias_at(column), n,
                                  zq);
          visit(i + r, from, n, zp, zq);
        }
      }
    }
  }
};

template <typename Gemm, typename T>
std::vector<KlState> forward(Pair<Gemm, T>& pair, int64_t N, int64_t threads) {
  std::vector<KlState> states(N);
  const int64_t V = pair.p.head.V, rows = chunk_rows(N);
#pragma omp parallel num_threads(static_cast<int>(threads))
  for (int64_t begin = 0; begin < V; begin += pair.width) {
    const int64_t cols = std::min(pair.width, V - begin);
    pair.pack_weights(begin, cols);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += rows) {
      const int64_t count = std::min(rows, N - first);
      const int thread = omp_get_thread_num();
      pair.p.pack_chunk(pair.p.head.hidden, first, count, pair.p.threads[thread]);
      pair.q.pack_chunk(pair.q.head.hidden, first, count, pair.q.threads[thread]);
      pair.for_each_row(thread, count, begin, cols,
                        [&](int64_t i, int64_t, int64_t n, const float* zp, const float* zq) {
                          states[first + i].add(zp, zq, n);
                        });
    }
  }
  return states;
}

// What the backward is given, by the number of the row in `hidden`.
struct RowGrads {
  const float *grad_kl, *center, *peak, *log_total;

  void logits(int64_t row, const float* zp, const float* zq, int64_t n, float* dz) const {
    const float g = grad_kl[row], mean = center[row], shift = peak[row], log_sum = log_total[row];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float p = exp_vec((zp[j] - shift) - log_sum);
      dz[j] = p == 0.0f ? 0.0f : g * p * ((zp[j] - zq[j]) - mean);
    }
  }
};

template <typename Gemm, typename T>
void backward(Pair<Gemm, T>& pair, HeadGradient<Gemm, T>& gradient, const int64_t* rows,
              const RowGrads& grads) {
  const Matrix<T>& q = pair.q.head.hidden;
  const Matrix<T> hidden_q{q.data, q.row_step, q.col_step, rows};
  const auto fill = [&](const Place& place, int thread) {
    const int64_t first = place.block + place.first;
    Scratch<Gemm>& own = pair.p.threads[thread];
    pair.p.pack_chunk(gradient.hidden(), first, place.count, own);
    pair.q.pack_chunk(hidden_q, first, place.count, pair.q.threads[thread]);
    pair.for_each_row(thread, place.count, place.begin, place.cols,
                      [&](int64_t i, int64_t from, int64_t n, const float* zp, const float* zq) {
                        float dz[kGroupCols];
                        grads.logits(gradient.row(place, i), zp, zq, n, dz);
                        pair.p.head.transform.chain(zp, n, dz);
                        gradient.put(place, i, from, dz, n, own);
                      });
  };
  gradient.run(
      pair.p.head.V, [&](int64_t begin, int64_t cols) { pair.pack_weights(begin, cols); }, fill);
}

// From whole rows, one after the other; a null weight is that of the other head.
template <typename T>
Head<T> head_of(const void* hidden, const void* weight, const float* bias, int64_t H, int64_t V,
                Transform transform) {
  return {{static_cast<const T*>(hidden), H, 1},
          {static_cast<const T*>(weight), H, 1},
          bias,
          nullptr,
          H,
          V,
          transform};
}

}  // namespace

int32_t latro_cpu_linear_kl_forward(const void* hidden_p, const void* weight_p, const float* bias_p,
                                    int64_t H_p, const void* hidden_q, const void* weight_q,
                                    const float* bias_q, int64_t H_q, int32_t dtype,
                                    int32_t bf16_products, float* kl, float* center, float* peak,
                                    float* log_total, int64_t N, int64_t V, float softcap,
                                    float temperature, int64_t threads) {
  return with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Transform transform{softcap, temperature};
    const Head<T> p = head_of<T>(hidden_p, weight_p, bias_p, H_p, V, transform);
    const Head<T> q = head_of<T>(hidden_q, weight_q, bias_q, H_q, V, transform);
    Pair<decltype(gemm), T> pair(p, q, false, false, threads);
    if (!pair.ok()) return LATRO_OUT_OF_MEMORY;
    const std::vector<KlState> states = forward(pair, N, threads);
    for (int64_t i = 0; i < N; ++i) {
      const KlState& state = states[i];
      kl[i] = state.kl();
      center[i] = state.center();
      peak[i] = state.peak_p;
      log_total[i] = std::log(state.total_p);
    }
    return LATRO_OK;
  });
}

int32_t latro_cpu_linear_kl_backward(const void* hidden_p, const void* weight_p,
                                     const float* bias_p, int64_t H_p, const void* hidden_q,
                                     const void* weight_q, const float* bias_q, int64_t H_q,
                                     int32_t dtype, int32_t bf16_products, const int64_t* rows,
                                     const float* grad_kl, const float* center, const float* peak,
                                     const float* log_total, float* dx, void* dw, float* db,
                                     int64_t M, int64_t V, float softcap, float temperature,
                                     int64_t threads) {
  return with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Transform transform{softcap, temperature};
    const Head<T> p = head_of<T>(hidden_p, weight_p, bias_p, H_p, V, transform);
    const Head<T> q = head_of<T>(hidden_q, weight_q, bias_q, H_q, V, transform);
    Pair<decltype(gemm), T> pair(p, q, true, dx != nullptr, threads);
    HeadGradient<decltype(gemm), T> gradient(pair.p, rows, M, Gradients{dx, dw, db});
    if (!pair.ok() || !gradient.ok()) return LATRO_OUT_OF_MEMORY;
    backward(pair, gradient, rows, RowGrads{grad_kl, center, peak, log_total});
    return LATRO_OK;
  });
}
