// linear_kl on the CPU, whole: the products of both heads and their folds in one pass, no tile of
// logits in memory.
//
// The sweep is that of linear_logprob.cpp, with two products where that has one: a slice of both
// weights (of the one, where they are the same) is packed once, and all rows pass over it in
// chunks, each one thread's. The formulas stand in latro_kernels/linear_kl.
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

// So short a sum costs no more in double than the exponential of it.
constexpr int64_t kFewProducts = 64;

// Logits of n products; all from here on is double, for a KL may be smaller than what roundings
// would add to it.
template <typename Product>
void logits(const Transform& transform, const Product* products, const float* bias, int64_t n,
            double* z) {
  const double scale = 1.0 / double{transform.temperature}, softcap = transform.softcap;
  const double inverse = softcap > 0.0 ? 1.0 / softcap : 0.0;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const double a = products[j] + (bias != nullptr ? double{bias[j]} : 0.0);
    z[j] = (softcap > 0.0 ? softcap * tanh_vec(a * inverse) : a) * scale;
  }
}

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
          double zp[kGroupCols], zq[kGroupCols];
          logits(p.head.transform, own_p.products.get() + r * kGroupCols, p.head.bias_at(column), n,
                 zp);
          logits(q.head.transform, own_q.products.get() + r * kGroupCols, q.head.bias_at(column), n,
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
                        [&](int64_t i, int64_t, int64_t n, const double* zp, const double* zq) {
                          states[first + i].add(zp, zq, n);
                        });
    }
  }
  return states;
}

// What the backward is given, by the number of the row in `hidden`.
struct RowGrads {
  const float* grad_kl;
  const double *anchor, *mean, *peak, *total;

  // The gradient with respect to n products of p.
  template <typename Product>
  void products(int64_t row, const Transform& transform, const double* zp, const double* zq,
                int64_t n, Product* dz) const {
    const double shift = peak[row], from = shift - anchor[row], center = mean[row];
    const double slope = 1.0 / double{transform.temperature};
    const double weight = grad_kl[row] / total[row] * slope;
    const double to_tanh =
        transform.softcap > 0.0f ? double{transform.temperature} / transform.softcap : 0.0;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const double e = exp_vec(zp[j] - shift), tanh = zp[j] * to_tanh;
      const double g = weight * e * (((zp[j] - zq[j]) - from) - center) * (1.0 - tanh * tanh);
      dz[j] = static_cast<Product>(e == 0.0 ? 0.0 : g);
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
                      [&](int64_t i, int64_t from, int64_t n, const double* zp, const double* zq) {
                        typename Gemm::Product dz[kGroupCols];
                        grads.products(gradient.row(place, i), pair.p.head.transform, zp, zq, n,
                                       dz);
                        gradient.put(place, i, from, dz, n, own);
                      });
  };
  gradient.run(
      pair.p.head.V, [&](int64_t begin, int64_t cols) { pair.pack_weights(begin, cols); }, fill);
}

// As `with_types`, with products in double where they are few.
template <typename Run>
int32_t with_products(int32_t dtype, int32_t bf16_products, int64_t H_p, int64_t H_q, Run run) {
  if (dtype == LATRO_F32 && std::max(H_p, H_q) <= kFewProducts) return run(Fp64Gemm{}, float{});
  return with_types(dtype, bf16_products, run);
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
                                    int32_t bf16_products, float* kl, double* anchor, double* mean,
                                    double* peak, double* total, int64_t N, int64_t V, float softcap,
                                    float temperature, int64_t threads) {
  return with_products(dtype, bf16_products, H_p, H_q, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Transform transform{softcap, temperature};
    const Head<T> p = head_of<T>(hidden_p, weight_p, bias_p, H_p, V, transform);
    const Head<T> q = head_of<T>(hidden_q, weight_q, bias_q, H_q, V, transform);
    Pair<decltype(gemm), T> pair(p, q, false, false, threads);
    if (!pair.ok()) return LATRO_OUT_OF_MEMORY;
    const std::vector<KlState> states = forward(pair, N, threads);
    for (int64_t i = 0; i < N; ++i) {
      const KlState& state = states[i];
      kl[i] = static_cast<float>(state.kl());
      anchor[i] = state.anchor;
      mean[i] = state.mean();
      peak[i] = state.peak_p;
      total[i] = state.total_p;
    }
    return LATRO_OK;
  });
}

int32_t latro_cpu_linear_kl_backward(const void* hidden_p, const void* weight_p,
                                     const float* bias_p, int64_t H_p, const void* hidden_q,
                                     const void* weight_q, const float* bias_q, int64_t H_q,
                                     int32_t dtype, int32_t bf16_products, const int64_t* rows,
                                     const float* grad_kl, const double* anchor, const double* mean,
                                     const double* peak, const double* total, float* dx, void* dw, float* db,
                                     int64_t M, int64_t V, float softcap, float temperature,
                                     int64_t threads) {
  return with_products(dtype, bf16_products, H_p, H_q, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Transform transform{softcap, temperature};
    const Head<T> p = head_of<T>(hidden_p, weight_p, bias_p, H_p, V, transform);
    const Head<T> q = head_of<T>(hidden_q, weight_q, bias_q, H_q, V, transform);
    Pair<decltype(gemm), T> pair(p, q, true, dx != nullptr, threads);
    HeadGradient<decltype(gemm), T> gradient(pair.p, rows, M, Gradients{dx, dw, db});
    if (!pair.ok() || !gradient.ok()) return LATRO_OUT_OF_MEMORY;
    backward(pair, gradient, rows, RowGrads{grad_kl, anchor, mean, peak, total});
    return LATRO_OK;
  });
}
