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

// The sweeps of both heads, side by side; the second's weight is null where it is the first's. The
// first is the one whose gradient is made: p in the forward, p or q in the backward.
template <typename Gemm, typename T>
struct Pair {
  const bool shared;
  const int64_t width;  // of a slice
  Sweep<Gemm, T> own, other;

  Pair(const Head<T>& own, const Head<T>& other, bool with_dz, bool with_dx, int64_t threads)
      : shared(other.weight.data == nullptr),
        width(slice_columns<Gemm>(std::max(own.H, other.H), own.V)),
        own(own, with_dz, with_dx, threads, width),
        other(other, false, false, threads, width) {}

  bool ok() const { return own.ok() && other.ok(); }

  // Packs a slice; called by all threads.
  void pack_weights(int64_t begin, int64_t cols) {
    own.pack_weight_rows(begin, cols);
    if (!shared) other.pack_weight_rows(begin, cols);
  }

  // Calls visit(i, from, n, z, z_other) with the logits of n columns, `from` of the slice that
  // begins at `begin` and the next, for row i of a chunk that `thread` has packed.
  template <typename Visit>
  void for_each_row(int thread, int64_t count, int64_t begin, int64_t cols, Visit visit) {
    constexpr int64_t kRows = Gemm::kRows;
    Scratch<Gemm>&scratch = own.threads[thread], &scratch_other = other.threads[thread];
    const Sweep<Gemm, T>& weight_other = shared ? own : other;
    for (int64_t from = 0; from < cols; from += kGroupCols) {
      const int64_t n = std::min(kGroupCols, cols - from), column = begin + from;
      for (int64_t i = 0; i < count; i += kRows) {
        own.products(scratch, i, from, from + n, scratch.products.get());
        weight_other.products(scratch_other, i, from, from + n, scratch_other.products.get());
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          double z[kGroupCols], z_other[kGroupCols];
          logits(own.head.transform, scratch.products.get() + r * kGroupCols,
                 own.head.bias_at(column), n, z);
          logits(other.head.transform, scratch_other.products.get() + r * kGroupCols,
                 other.head.bias_at(column), n, z_other);
          visit(i + r, from, n, z, z_other);
        }
      }
    }
  }
};

template <typename Gemm, typename T>
std::vector<KlState> forward(Pair<Gemm, T>& pair, int64_t N, int64_t threads) {
  std::vector<KlState> states(N);
  const int64_t V = pair.own.head.V, rows = chunk_rows<Gemm>(N);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const typename Gemm::Session session;
    for (int64_t begin = 0; begin < V; begin += pair.width) {
      const int64_t cols = std::min(pair.width, V - begin);
      pair.pack_weights(begin, cols);
#pragma omp for schedule(dynamic)
      for (int64_t first = 0; first < N; first += rows) {
        const int64_t count = std::min(rows, N - first);
        const int thread = omp_get_thread_num();
        pair.own.pack_chunk(pair.own.head.hidden, first, count, pair.own.threads[thread]);
        pair.other.pack_chunk(pair.other.head.hidden, first, count, pair.other.threads[thread]);
        pair.for_each_row(thread, count, begin, cols,
                          [&](int64_t i, int64_t, int64_t n, const double* zp, const double* zq) {
                            states[first + i].add(zp, zq, n);
                          });
      }
    }
  }
  return states;
}

// What the backward is given, by the number of the row in `hidden`.
struct RowGrads {
  bool of_q;
  const float* grad_kl;
  const double *anchor, *mean, *max_p, *sum_exp_p, *max_q, *sum_exp_q;

  // The gradient with respect to n products of one head, q where of_q; z are its logits, `other`
  // the other head's.
  template <typename Product>
  void products(int64_t row, const Transform& transform, const double* z, const double* other,
                int64_t n, Product* dz) const {
    const double slope = grad_kl[row] / double{transform.temperature};
    const double to_tanh =
        transform.softcap > 0.0f ? double{transform.temperature} / transform.softcap : 0.0;
    double dlogit[kGroupCols];
    if (of_q) {
      of_logits_q(row, z, other, n, dlogit);
    } else {
      of_logits_p(row, z, other, n, dlogit);
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const double tanh = to_tanh > 0.0 ? z[j] * to_tanh : 0.0;  // z may be -inf without softcap
      dz[j] = static_cast<Product>(slope * dlogit[j] * (1.0 - tanh * tanh));
    }
  }

 private:
  void of_logits_p(int64_t row, const double* zp, const double* zq, int64_t n, double* dz) const {
    const double shift = max_p[row], from = shift - anchor[row], center = mean[row];
    const double weight = 1.0 / sum_exp_p[row];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const double e = exp_vec(zp[j] - shift);
      dz[j] = e == 0.0 ? 0.0 : weight * e * (((zp[j] - zq[j]) - from) - center);
    }
  }

  void of_logits_q(int64_t row, const double* zq, const double* zp, int64_t n, double* dz) const {
    const double shift_p = max_p[row], shift_q = max_q[row], weight = 1.0 / sum_exp_p[row];
    // Exactly 1 where the heads are equal: then nothing is left, also of a fused multiply-add.
    const double ratio = sum_exp_p[row] / sum_exp_q[row];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      dz[j] = weight * (ratio * exp_vec(zq[j] - shift_q) - exp_vec(zp[j] - shift_p));
    }
  }
};

template <typename Gemm, typename T>
void backward(Pair<Gemm, T>& pair, HeadGradient<Gemm, T>& gradient, const int64_t* rows,
              const RowGrads& grads) {
  const Matrix<T>& other = pair.other.head.hidden;
  const Matrix<T> hidden_other{other.data, other.row_step, other.col_step, rows};
  const auto fill = [&](const Place& place, int thread) {
    const int64_t first = place.block + place.first;
    Scratch<Gemm>& own = pair.own.threads[thread];
    pair.own.pack_chunk(gradient.hidden(), first, place.count, own);
    pair.other.pack_chunk(hidden_other, first, place.count, pair.other.threads[thread]);
    pair.for_each_row(
        thread, place.count, place.begin, place.cols,
        [&](int64_t i, int64_t from, int64_t n, const double* z, const double* z_other) {
          typename Gemm::Product dz[kGroupCols];
          grads.products(gradient.row(place, i), pair.own.head.transform, z, z_other, n, dz);
          gradient.put(place, i, from, dz, n, own);
        });
  };
  gradient.run(
      pair.own.head.V, [&](int64_t begin, int64_t cols) { pair.pack_weights(begin, cols); }, fill);
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
                                    int64_t H_p, float softcap_p, float temperature_p,
                                    const void* hidden_q, const void* weight_q, const float* bias_q,
                                    int64_t H_q, float softcap_q, float temperature_q,
                                    int32_t dtype, int32_t bf16_products, float* kl, double* anchor,
                                    double* mean, double* max_p, double* sum_exp_p, double* max_q,
                                    double* sum_exp_q, int64_t N, int64_t V, int64_t threads) {
  return with_products(dtype, bf16_products, H_p, H_q, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Head<T> p = head_of<T>(hidden_p, weight_p, bias_p, H_p, V, {softcap_p, temperature_p});
    const Head<T> q = head_of<T>(hidden_q, weight_q, bias_q, H_q, V, {softcap_q, temperature_q});
    Pair<decltype(gemm), T> pair(p, q, false, false, threads);
    if (!pair.ok()) return LATRO_OUT_OF_MEMORY;
    const std::vector<KlState> states = forward(pair, N, threads);
    for (int64_t i = 0; i < N; ++i) {
      const KlState& state = states[i];
      kl[i] = static_cast<float>(state.kl());
      anchor[i] = state.anchor;
      mean[i] = state.mean();
      max_p[i] = state.max_p;
      sum_exp_p[i] = state.sum_exp_p;
      max_q[i] = state.max_q;
      sum_exp_q[i] = state.sum_exp_q;
    }
    return LATRO_OK;
  });
}

int32_t latro_cpu_linear_kl_backward(const void* hidden, const void* weight, const float* bias,
                                     int64_t H, float softcap, float temperature,
                                     const void* hidden_other, const void* weight_other,
                                     const float* bias_other, int64_t H_other, float softcap_other,
                                     float temperature_other, int32_t dtype, int32_t bf16_products,
                                     int32_t of_q, const int64_t* rows, const float* grad_kl,
                                     const double* anchor, const double* mean, const double* max_p,
                                     const double* sum_exp_p, const double* max_q,
                                     const double* sum_exp_q, float* dx, void* dw, float* db,
                                     int64_t M, int64_t V, int64_t threads) {
  return with_products(dtype, bf16_products, H, H_other, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Head<T> own = head_of<T>(hidden, weight, bias, H, V, {softcap, temperature});
    const Head<T> other = head_of<T>(hidden_other, weight_other, bias_other, H_other, V,
                                     {softcap_other, temperature_other});
    Pair<decltype(gemm), T> pair(own, other, true, dx != nullptr, threads);
    HeadGradient<decltype(gemm), T> gradient(pair.own, rows, M, Gradients{dx, dw, db});
    if (!pair.ok() || !gradient.ok()) return LATRO_OUT_OF_MEMORY;
    backward(pair, gradient, rows,
             RowGrads{of_q != 0, grad_kl, anchor, mean, max_p, sum_exp_p, max_q, sum_exp_q});
    return LATRO_OK;
  });
}
