// linear_logprob on the CPU, whole: products and folds in one pass, no tile of logits in memory.
//
// The vocabulary is the outer loop. A slice of the weight is packed once and all rows pass over it
// in chunks, each one thread's: a chunk's products with a group of columns go into a small buffer
// and are folded there. The backward makes the same products again (or reads those that were
// cached), turns them into dz, adds dz . W to the chunk's dx while dz is in cache, and packs dz for
// the slice of dw, which follows when a block of rows is through.
//
// No result depends on the number of threads, nor what concerns a row on the other rows; with a
// filter, gradients do, within its bound.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "few_rows.h"
#include "head_gradient.h"
#include "latro.h"
#include "sweep.h"

namespace {

using namespace latro;

// What the forward fills in; all [N] but dx_sum [N, H] and block_max [N, blocks]. From
// `weighted_sum` on each may be null; square_sum and logit_sum are so together, and are if
// weighted_sum is.
struct RowState {
  float *row_max, *sum_exp, *target_logit;
  float *weighted_sum, *square_sum, *logit_sum, *dx_sum, *block_max;

  void clear(int64_t N) const {
    std::fill_n(row_max, N, -kInfinity);
    std::fill_n(target_logit, N, -kInfinity);
    for (float* sum : {sum_exp, weighted_sum, square_sum, logit_sum}) {
      if (sum != nullptr) std::fill_n(sum, N, 0.0f);
    }
  }

  void add(int64_t row, const float* z, int64_t n) const {
    State folded;
    folded.row_max = row_max[row];
    folded.sum_exp = sum_exp[row];
    Sums sums = kSumExp;
    if (weighted_sum != nullptr) {
      folded.weighted_sum = weighted_sum[row];
      sums = kEntropy;
    }
    if (square_sum != nullptr) {
      folded.square_sum = square_sum[row];
      folded.logit_sum = logit_sum[row];
      sums = kAllSums;
    }
    folded.add(z, n, sums);
    row_max[row] = folded.row_max;
    sum_exp[row] = folded.sum_exp;
    if (weighted_sum != nullptr) weighted_sum[row] = folded.weighted_sum;
    if (square_sum != nullptr) {
      square_sum[row] = folded.square_sum;
      logit_sum[row] = folded.logit_sum;
    }
  }
};

// Asks for large pages behind memory that is about to be written for the first time: faults of 4
// KiB each would take longer than the products that they hold. Only a hint.
void expect_large_pages(float* data, int64_t count) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = reinterpret_cast<uintptr_t>(data + count) / kPage * kPage;
  if (data != nullptr && begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

// Products of the first `cols` columns, [N, cols], cached from forward to backward.
struct Cached {
  float* data;
  int64_t cols;

  // Whole groups are cached, or none of their columns.
  bool has(int64_t column) const { return column < cols; }
  float* at(int64_t row, int64_t column) const { return data + row * cols + column; }
};

struct Filter {
  const float* block_max;  // [N, blocks], or null: nothing is left out
  float threshold;
  int64_t blocks;

  // Whether no entry of a row's gradient can reach the threshold in a block that ends its z at
  // `largest`. NaN reaches it.
  bool is_below(const RowGrad& grad, float largest) const {
    const float log_p = (largest - grad.row_max) - grad.log_sum;
    const float p = std::exp(log_p);
    float weight = std::fabs(grad.grad_logp + grad.offset);
    if (grad.has_offset) {
      // exp(x) |x| grows up to x = -1 and is bounded by this beyond.
      weight += std::fabs(grad.grad_entropy) * std::max(-log_p, 1.0f);
      weight += std::fabs(grad.grad_square) * p;
    }
    return weight * p < threshold;
  }
};

// The forward's fold of products into the state of a row.
template <typename T>
struct RowFold {
  const Head<T>& head;
  const RowState state;
  const Cached cached;
  const int64_t filter_blocks;

  RowFold(const Head<T>& head, const RowState& state, const Cached& cached)
      : head(head), state(state), cached(cached), filter_blocks(ceil_div(head.V, kFilterCols)) {}

  // Adds n products to a row's state and writes their logits to z.
  void operator()(int64_t row, const float* products, int64_t column, int64_t n, float* z) const {
    if (cached.has(column)) std::copy_n(products, n, cached.at(row, column));
    head.transform.logits(products, head.bias_at(column), n, z);
    state.add(row, z, n);
    const int64_t hit = head.target[row] - column;
    if (hit >= 0 && hit < n) state.target_logit[row] = z[hit];
    if (state.block_max == nullptr) return;
    for (int64_t b = 0; b < n; b += kFilterCols) {
      state.block_max[row * filter_blocks + (column + b) / kFilterCols] =
          largest(z + b, std::min(kFilterCols, n - b), -kInfinity);
    }
  }
};

template <typename Gemm, typename T>
struct Forward : Sweep<Gemm, T> {
  using Base = Sweep<Gemm, T>;
  using Base::head, Base::kCols, Base::kRows, Base::width;
  const RowFold<T>& fold;
  const RowState& state;

  Forward(const Head<T>& head, const RowFold<T>& fold, int64_t threads)
      : Base(head, fold.state.dx_sum != nullptr, fold.state.dx_sum != nullptr, threads),
        fold(fold),
        state(fold.state) {}

  void run(int64_t N) {
    const int64_t rows = chunk_rows<Gemm>(N);
#pragma omp parallel num_threads(static_cast<int>(this->threads.size()))
    {
      const typename Gemm::Session session;
      for (int64_t begin = 0; begin < head.V; begin += width) {
        const int64_t cols = std::min(width, head.V - begin);
        this->pack_weight_rows(begin, cols);
        if (state.dx_sum != nullptr) this->pack_weight_columns(begin, cols);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < N; first += rows) {
          chunk(first, std::min(rows, N - first), begin, cols, this->threads[omp_get_thread_num()]);
        }
      }
    }
  }

  void chunk(int64_t first, int64_t count, int64_t begin, int64_t cols, Scratch<Gemm>& own) {
    this->pack_chunk(head.hidden, first, count, own);
    float row_max_before[kChunkRows<Gemm>], local[kGroupCols];
    std::copy_n(state.row_max + first, count, row_max_before);
    for (int64_t from = 0; from < cols; from += kGroupCols) {
      const int64_t to = std::min(from + kGroupCols, cols);
      for (int64_t i = 0; i < count; i += kRows) {
        this->products(own, i, from, to, own.products.get());
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          // dx_sum wants the logits of the whole slice.
          float* z = state.dx_sum != nullptr ? own.z.get() + (i + r) * width + from : local;
          fold(first + i + r, own.products.get() + r * kGroupCols, begin + from, to - from, z);
        }
      }
    }
    if (state.dx_sum != nullptr) add_to_dx_sum(first, count, begin, cols, row_max_before, own);
  }

  // dx_sum = sum over j other than the target of exp(z_j - row_max) dz_j/dproduct_j w_j, rescaled
  // wherever the maximum has moved.
  void add_to_dx_sum(int64_t first, int64_t count, int64_t begin, int64_t cols,
                     const float* row_max_before, Scratch<Gemm>& own) {
    float shrink[kChunkRows<Gemm>];
    for (int64_t i = 0; i < count; ++i) {
      const float row_max = state.row_max[first + i];
      shrink[i] = row_max == row_max_before[i] ? 1.0f : std::exp(row_max_before[i] - row_max);
      float* z = own.z.get() + i * width;
      const int64_t hit = head.target[first + i] - begin;
      for (int64_t from = 0; from < cols; from += kGroupCols) {
        const int64_t n = std::min(kGroupCols, cols - from);
        float e[kGroupCols];
        const float shift = row_max == -kInfinity ? 0.0f : row_max;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) e[j] = exp_vec(z[from + j] - shift);
        if (hit >= from && hit < from + n) e[hit - from] = 0.0f;
        head.transform.chain(z + from, n, e);
        store_all(e, n, own.dz.get() + i * width + from);
      }
    }
    for (int64_t i = 0; i < count; i += kRows) this->pack_dz_rows(own, i, count, 0, cols);
    alignas(kAlign) float block[kRows * kCols];
    for (int64_t h = 0; h < head.H; h += kCols) {
      const int64_t n = std::min(kCols, head.H - h);
      for (int64_t i = 0; i < count; i += kRows) {
        this->multiply_dz(own, i, h, 0, cols, false, block);
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          float* to = state.dx_sum + (first + i + r) * head.H + h;
          const float* part = block + r * kCols;
          if (begin == 0) {
            std::copy_n(part, n, to);
          } else {
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) to[c] = to[c] * shrink[i + r] + part[c];
          }
        }
      }
    }
  }
};

template <typename Gemm, typename T>
struct Backward {
  const Head<T>& head;
  const RowGradArrays grads;
  const Cached cached;
  const Filter filter;
  Sweep<Gemm, T> sweep;
  HeadGradient<Gemm, T> gradient;

  Backward(const Head<T>& head, const int64_t* rows, int64_t M, const RowGradArrays& grads,
           const Cached& cached, const Filter& filter, const Gradients& out, int64_t threads)
      : head(head),
        grads(grads),
        cached(cached),
        filter(filter),
        sweep(head, true, out.dx != nullptr, threads),
        gradient(sweep, rows, M, out) {}

  bool ok() const { return sweep.ok() && gradient.ok(); }

  void run() {
    gradient.run(
        head.V,
        [&](int64_t begin, int64_t cols) {
          if (!cached.has(begin + cols - 1)) sweep.pack_weight_rows(begin, cols);
        },
        [&](const Place& place, int thread) { fill(place, sweep.threads[thread]); });
  }

  void fill(const Place& place, Scratch<Gemm>& own) {
    constexpr int64_t kRows = Gemm::kRows;
    if (filter.block_max != nullptr) find_active(place);
    if (!cached.has(place.begin + place.cols - 1)) {
      sweep.pack_chunk(gradient.hidden(), place.block + place.first, place.count, own);
    }
    for (int64_t b = 0; b < place.cols; b += kFilterCols) {
      const int64_t n = std::min(kFilterCols, place.cols - b);
      for (int64_t i = 0; i < place.count; i += kRows) {
        if (!gradient.is_active(place, i, b)) continue;
        const bool is_cached = cached.has(place.begin + b);
        if (!is_cached) sweep.products(own, i, b, b + n, own.products.get());
        for (int64_t r = 0; r < std::min(kRows, place.count - i); ++r) {
          const int64_t row = gradient.row(place, i + r), column = place.begin + b;
          const float* products =
              is_cached ? cached.at(row, column) : own.products.get() + r * kGroupCols;
          float z[kFilterCols], dz[kFilterCols];
          head.transform.logits(products, head.bias_at(column), n, z);
          grads.row(row).logits(z, n, head.target[row] - column, dz);
          head.transform.chain(z, n, dz);
          gradient.put(place, i + r, b, dz, n, own);
        }
      }
    }
  }

  void find_active(const Place& place) {
    for (int64_t i = 0; i < place.count; i += Gemm::kFilterRows) {
      const int64_t end = std::min(i + Gemm::kFilterRows, place.count);
      for (int64_t b = 0; b < place.cols; b += kFilterCols) {
        bool below = true;
        for (int64_t r = i; below && r < end; ++r) {
          const int64_t row = gradient.row(place, r), column = place.begin + b;
          const int64_t hit = head.target[row] - column;
          const float largest = filter.block_max[row * filter.blocks + column / kFilterCols];
          below = !(hit >= 0 && hit < kFilterCols) && filter.is_below(grads.row(row), largest);
        }
        gradient.is_active(place, i, b) = !below;
      }
    }
  }
};

}  // namespace

int32_t latro_cpu_bf16_products(void) {
  if (amx_gemm_supported()) return LATRO_BF16_AMX;
  return bf16_gemm_supported() ? LATRO_BF16_AVX512 : LATRO_BF16_WIDENED;
}

int32_t latro_cpu_linear_logprob_forward(
    const void* hidden, int64_t hidden_row_step, int64_t hidden_col_step, const void* weight,
    int64_t weight_row_step, int64_t weight_col_step, int32_t dtype, int32_t bf16_products,
    const float* bias, const int64_t* target, float* row_max, float* sum_exp, float* target_logit,
    float* weighted_sum, float* square_sum, float* logit_sum, float* dx_sum, float* cached,
    int64_t cached_cols, float* block_max, int64_t N, int64_t H, int64_t V, float softcap,
    float temperature, int64_t threads) {
  return with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Head<T> head{{static_cast<const T*>(hidden), hidden_row_step, hidden_col_step},
                       {static_cast<const T*>(weight), weight_row_step, weight_col_step},
                       bias,
                       target,
                       H,
                       V,
                       Transform{softcap, temperature}};
    const RowState state{row_max,    sum_exp,   target_logit, weighted_sum,
                         square_sum, logit_sum, dx_sum,       block_max};
    state.clear(N);
    const RowFold<T> fold(head, state, Cached{cached, cached_cols});
    expect_large_pages(cached, N * cached_cols);
    if (N <= kFewRows && dx_sum == nullptr) {
      const bool ok = few_rows_sweep<decltype(gemm)>(
          head, N, threads, [&](int64_t row, const float* products, int64_t column, int64_t n) {
            float z[kGroupCols];
            fold(row, products, column, n, z);
          });
      return ok ? LATRO_OK : LATRO_OUT_OF_MEMORY;
    }
    Forward<decltype(gemm), T> forward(head, fold, threads);
    if (!forward.ok()) return LATRO_OUT_OF_MEMORY;
    forward.run(N);
    return LATRO_OK;
  });
}

int32_t latro_cpu_linear_logprob_backward(
    const void* hidden, int64_t hidden_row_step, int64_t hidden_col_step, const void* weight,
    int64_t weight_row_step, int64_t weight_col_step, int32_t dtype, int32_t bf16_products,
    const float* bias, const int64_t* target, const int64_t* rows, const float* grad_logp,
    const float* grad_entropy, const float* logp, const float* offset, const float* grad_square,
    const float* row_max, const float* log_sum, const float* cached, int64_t cached_cols,
    const float* block_max, float grad_filter, float* dx, void* dw, float* db, int64_t M, int64_t H,
    int64_t V, float softcap, float temperature, int64_t threads) {
  return with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Head<T> head{{static_cast<const T*>(hidden), hidden_row_step, hidden_col_step},
                       {static_cast<const T*>(weight), weight_row_step, weight_col_step},
                       bias,
                       target,
                       H,
                       V,
                       Transform{softcap, temperature}};
    Backward<decltype(gemm), T> backward(
        head, rows, M,
        RowGradArrays{grad_logp, grad_entropy, logp, offset, grad_square, row_max, log_sum},
        Cached{const_cast<float*>(cached), cached_cols},
        Filter{block_max, grad_filter, ceil_div(V, kFilterCols)}, Gradients{dx, dw, db}, threads);
    if (!backward.ok()) return LATRO_OUT_OF_MEMORY;
    backward.run();
    return LATRO_OK;
  });
}
