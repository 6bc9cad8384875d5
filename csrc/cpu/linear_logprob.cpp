// linear_logprob on the CPU, whole: products and folds in one pass, no tile of logits in memory.
//
// The vocabulary is the outer loop. A slice of the weight is packed once and all rows pass over it
// in chunks, each one thread's: a chunk's products with a group of columns go into a small buffer
// and are folded there. The backward makes the same products again (or reads those that were kept),
// turns them into dz, adds dz . W to the chunk's dx while dz is in cache, and packs dz for the
// slice of dw, which follows when a block of rows is through.
//
// No result depends on the number of threads, nor what concerns a row on the other rows; with a
// filter, gradients do, within its bound.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "latro.h"
#include "sweep.h"

namespace {

using namespace latro;

// What the forward fills in; all [N] but pull [N, H] and block_peak [N, blocks].
struct RowState {
  float *peak, *total, *picked;
  float *weighted, *pull, *block_peak;  // each may be null
};

// Products of the first `cols` columns, [N, cols], kept from forward to backward.
struct Kept {
  float* data;
  int64_t cols;

  // Whole groups are kept, or none of their columns.
  bool has(int64_t column) const { return column < cols; }
  float* at(int64_t row, int64_t column) const { return data + row * cols + column; }
};

// What the backward is given; all [N], by the number of the row in `hidden`.
struct RowGrads {
  const float *grad_logp, *grad_entropy, *logp, *entropy, *peak, *log_total;

  RowGrad row(int64_t i) const {
    const bool with_entropy = grad_entropy != nullptr;
    return {grad_logp[i], with_entropy ? grad_entropy[i] : 0.0f,
            logp[i],      with_entropy ? entropy[i] : 0.0f,
            peak[i],      log_total[i],
            with_entropy};
  }
};

struct Filter {
  const float* block_peak;  // [N, blocks], or null: nothing is left out
  float threshold;
  int64_t blocks;

  // Whether no entry of a row's gradient can reach the threshold in a block that ends its z at
  // `largest`. NaN reaches it.
  bool is_below(const RowGrad& grad, float largest) const {
    const float log_p = (largest - grad.peak) - grad.log_total;
    float weight = std::fabs(grad.grad_logp);
    if (grad.has_entropy) {
      // exp(x) (|x| + H) grows up to x = -1 and is bounded by this beyond.
      weight += std::fabs(grad.grad_entropy) * (std::max(-log_p, 1.0f) + grad.entropy);
    }
    return weight * std::exp(log_p) < threshold;
  }
};

struct Gradients {
  float* dx;  // [N, H]; each may be null
  void* dw;   // [V, H], the dtype of the weight
  float* db;  // [V]
};

template <typename Gemm, typename T>
struct Forward : Sweep<Gemm, T> {
  using Base = Sweep<Gemm, T>;
  using Base::head, Base::kCols, Base::kRows, Base::width;
  const RowState state;
  const Kept kept;
  const int64_t filter_blocks;

  Forward(const Head<T>& head, const RowState& state, const Kept& kept, int64_t threads)
      : Base(head, state.pull != nullptr, state.pull != nullptr, threads),
        state(state),
        kept(kept),
        filter_blocks(ceil_div(head.V, kFilterCols)) {}

  void run(int64_t N) {
#pragma omp parallel num_threads(static_cast<int>(this->threads.size()))
    for (int64_t begin = 0; begin < head.V; begin += width) {
      const int64_t cols = std::min(width, head.V - begin);
      this->pack_weight_rows(begin, cols);
      if (state.pull != nullptr) this->pack_weight_columns(begin, cols);
#pragma omp for schedule(dynamic)
      for (int64_t first = 0; first < N; first += kChunkRows) {
        chunk(first, std::min(kChunkRows, N - first), begin, cols,
              this->threads[omp_get_thread_num()]);
      }
    }
  }

  void chunk(int64_t first, int64_t count, int64_t begin, int64_t cols, Scratch<Gemm>& own) {
    this->pack_chunk(head.hidden, first, count, own);
    float peak_before[kChunkRows];
    std::copy_n(state.peak + first, count, peak_before);
    for (int64_t from = 0; from < cols; from += kGroupCols) {
      const int64_t to = std::min(from + kGroupCols, cols);
      for (int64_t i = 0; i < count; i += kRows) {
        this->products(own, i, from, to, own.products.get());
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          fold(first + i + r, own.products.get() + r * kGroupCols, begin + from, to - from,
               own.z.get() + (i + r) * width + from);
        }
      }
    }
    if (state.pull != nullptr) pull(first, count, begin, cols, peak_before, own);
  }

  // Adds n products to a row's state; `kept_z` receives the logits where the pull wants them.
  void fold(int64_t row, const float* products, int64_t column, int64_t n, float* kept_z) {
    float local[kGroupCols];
    float* z = state.pull != nullptr ? kept_z : local;
    if (kept.has(column)) std::copy_n(products, n, kept.at(row, column));
    head.transform.logits(products, head.bias_at(column), n, z);
    State folded{state.peak[row], state.total[row],
                 state.weighted != nullptr ? state.weighted[row] : 0.0f};
    folded.add(z, n, state.weighted != nullptr);
    state.peak[row] = folded.peak;
    state.total[row] = folded.total;
    if (state.weighted != nullptr) state.weighted[row] = folded.weighted;
    const int64_t hit = head.target[row] - column;
    if (hit >= 0 && hit < n) state.picked[row] = z[hit];
    if (state.block_peak == nullptr) return;
    for (int64_t b = 0; b < n; b += kFilterCols) {
      state.block_peak[row * filter_blocks + (column + b) / kFilterCols] =
          largest(z + b, std::min(kFilterCols, n - b), -kInfinity);
    }
  }

  // pull = sum over j other than the target of exp(z_j - peak) dz_j/dproduct_j w_j, rescaled
  // wherever the peak has moved.
  void pull(int64_t first, int64_t count, int64_t begin, int64_t cols, const float* peak_before,
            Scratch<Gemm>& own) {
    float shrink[kChunkRows];
    for (int64_t i = 0; i < count; ++i) {
      const float peak = state.peak[first + i];
      shrink[i] = peak == peak_before[i] ? 1.0f : std::exp(peak_before[i] - peak);
      float* z = own.z.get() + i * width;
      const int64_t hit = head.target[first + i] - begin;
      for (int64_t from = 0; from < cols; from += kGroupCols) {
        const int64_t n = std::min(kGroupCols, cols - from);
        float e[kGroupCols];
        const float shift = peak == -kInfinity ? 0.0f : peak;
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
          float* to = state.pull + (first + i + r) * head.H + h;
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

// A stretch from .. to of columns, or of rows, whose blocks are not left out.
struct Run {
  int64_t from, to;
};

template <typename Gemm, typename T>
struct Backward : Sweep<Gemm, T> {
  using Base = Sweep<Gemm, T>;
  using Base::head, Base::kCols, Base::kRows, Base::width;
  using typename Base::Element, typename Base::Word;
  const Matrix<T> hidden;  // the rows that count
  const int64_t M, block_rows;
  const RowGrads grads;
  const Kept kept;
  const Filter filter;
  const Gradients out;
  Room<uint8_t> active;       // [block_rows / kFilterRows, width / kFilterCols]
  Room<Word> dz_columns;      // a block of dz, packed for dw
  Room<Word> hidden_columns;  // the block's hidden, packed for dw
  Room<float> dw_sum;         // [width, H], where a slice of dw takes several blocks
  Room<float> db_parts;       // [chunks of a block, width]

  Backward(const Head<T>& head, const int64_t* rows, int64_t M, const RowGrads& grads,
           const Kept& kept, const Filter& filter, const Gradients& out, int64_t threads)
      : Base(head, true, out.dx != nullptr, threads),
        hidden{head.hidden.data, head.hidden.row_step, head.hidden.col_step, rows},
        M(M),
        block_rows(ceil_div(ceil_div(M, ceil_div(M, kMaxBlockRows)), kChunkRows) * kChunkRows),
        grads(grads),
        kept(kept),
        filter(filter),
        out(out),
        active(room<uint8_t>(block_rows / kFilterRows * (width / kFilterCols))),
        dz_columns(room<Word>(out.dw != nullptr ? ceil_div(width, kRows) * kRows * depth() : 0)),
        hidden_columns(
            room<Word>(out.dw != nullptr ? ceil_div(head.H, kCols) * kCols * depth() : 0)),
        dw_sum(room<float>(sums_apart() ? width * head.H : 0)),
        db_parts(room<float>(out.db != nullptr ? block_rows / kChunkRows * width : 0)) {}

  bool ok() const {
    return Base::ok() && active && dz_columns && hidden_columns && dw_sum && db_parts;
  }

  int64_t depth() const { return words_of<Gemm>(block_rows); }
  bool one_block() const { return M <= block_rows; }
  bool sums_apart() const { return out.dw != nullptr && !std::is_same_v<T, float> && !one_block(); }
  uint8_t& is_active(int64_t row_in_block, int64_t column) {
    return active[row_in_block / kFilterRows * (width / kFilterCols) + column / kFilterCols];
  }

  void run() {
#pragma omp parallel num_threads(static_cast<int>(this->threads.size()))
    for (int64_t begin = 0; begin < head.V; begin += width) {
      const int64_t cols = std::min(width, head.V - begin);
      if (!kept.has(begin + cols - 1)) this->pack_weight_rows(begin, cols);
      if (out.dx != nullptr) this->pack_weight_columns(begin, cols);
      for (int64_t block = 0; block < M; block += block_rows) {
        const int64_t rows = std::min(block_rows, M - block);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < rows; first += kChunkRows) {
          chunk(block, first, std::min(kChunkRows, rows - first), begin, cols,
                this->threads[omp_get_thread_num()]);
        }
        if (out.dw != nullptr) weight_slice(block, rows, begin, cols);
        if (out.db != nullptr) bias_slice(block, rows, begin, cols);
      }
    }
  }

  // Rows first .. first + count of the block; numbers of columns are within the slice.
  void chunk(int64_t block, int64_t first, int64_t count, int64_t begin, int64_t cols,
             Scratch<Gemm>& own) {
    find_active(block, first, count, begin, cols);
    if (!kept.has(begin + cols - 1)) this->pack_chunk(hidden, block + first, count, own);
    float* db = out.db != nullptr ? db_parts.get() + first / kChunkRows * width : nullptr;
    if (db != nullptr) std::fill_n(db, cols, 0.0f);
    for (int64_t from = 0; from < cols; from += kGroupCols) {
      const int64_t end = std::min(from + kGroupCols, cols);
      for (int64_t i = 0; i < count; i += kRows) {
        for (int64_t b = from; b < end; b += kFilterCols) {
          if (!is_active(first + i, b)) continue;
          const int64_t to = std::min(b + kFilterCols, end);
          float* products = own.products.get() + (b - from);
          const bool is_kept = kept.has(begin + b);
          if (!is_kept) this->products(own, i, b, to, products);
          for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
            const int64_t row = row_at(block + first + i + r);
            gradient(row, is_kept ? kept.at(row, begin + b) : products + r * kGroupCols, begin + b,
                     to - b, own.dz.get() + (i + r) * width + b, db != nullptr ? db + b : nullptr);
          }
        }
      }
    }
    if (out.dx != nullptr) hidden_rows(block, first, count, begin, cols, own);
    if (out.dw != nullptr) pack_for_weight(block, first, count, begin, cols, own);
  }

  int64_t row_at(int64_t i) const { return hidden.index != nullptr ? hidden.index[i] : i; }

  void find_active(int64_t block, int64_t first, int64_t count, int64_t begin, int64_t cols) {
    for (int64_t i = 0; i < count; i += kFilterRows) {
      for (int64_t b = 0; b < cols; b += kFilterCols) {
        bool below = filter.block_peak != nullptr;
        for (int64_t r = i; below && r < std::min(i + kFilterRows, count); ++r) {
          const int64_t row = row_at(block + first + r);
          const int64_t hit = head.target[row] - (begin + b);
          below =
              !(hit >= 0 && hit < kFilterCols) &&
              filter.is_below(grads.row(row),
                              filter.block_peak[row * filter.blocks + (begin + b) / kFilterCols]);
        }
        is_active(first + i, b) = !below;
      }
    }
  }

  // dz of n columns of a row, and their part of db.
  void gradient(int64_t row, const float* products, int64_t column, int64_t n, Element* to,
                float* db) {
    float z[kFilterCols], dz[kFilterCols];
    head.transform.logits(products, head.bias_at(column), n, z);
    grads.row(row).logits(z, n, head.target[row] - column, dz);
    head.transform.chain(z, n, dz);
    store_all(dz, n, to);
    if (db == nullptr) return;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) db[j] += dz[j];
  }

  // The stretches of columns that are active in the panel of rows at `i`.
  std::vector<Run> column_runs(int64_t i, int64_t cols) {
    std::vector<Run> runs;
    for (int64_t b = 0; b < cols; b += kFilterCols) {
      if (!is_active(i, b)) continue;
      const int64_t to = std::min(b + kFilterCols, cols);
      if (!runs.empty() && runs.back().to == b) {
        runs.back().to = to;
      } else {
        runs.push_back({b, to});
      }
    }
    return runs;
  }

  // The stretches of the block's rows that are active in the panel of columns at `j`.
  std::vector<Run> row_runs(int64_t j, int64_t first, int64_t end) {
    std::vector<Run> runs;
    for (int64_t i = first; i < end; i += kFilterRows) {
      if (!is_active(i, j)) continue;
      const int64_t to = std::min(i + kFilterRows, end);
      if (!runs.empty() && runs.back().to == i) {
        runs.back().to = to;
      } else {
        runs.push_back({i, to});
      }
    }
    return runs;
  }

  // dx of the chunk += dz . W.
  void hidden_rows(int64_t block, int64_t first, int64_t count, int64_t begin, int64_t cols,
                   Scratch<Gemm>& own) {
    std::vector<std::vector<Run>> runs;
    for (int64_t i = 0; i < count; i += kRows) {
      runs.push_back(column_runs(first + i, cols));
      for (const Run& run : runs.back()) this->pack_dz_rows(own, i, count, run.from, run.to);
    }
    alignas(kAlign) float sum[kRows * kCols];
    for (int64_t h = 0; h < head.H; h += kCols) {
      const int64_t n = std::min(kCols, head.H - h);
      for (int64_t i = 0; i < count; i += kRows) {
        const auto& of_panel = runs[i / kRows];
        if (of_panel.empty() && begin > 0) continue;
        std::fill_n(sum, kRows * kCols, 0.0f);
        for (const Run& run : of_panel) {
          this->multiply_dz(own, i, h, run.from, run.to, true, sum);
        }
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          float* to = out.dx + row_at(block + first + i + r) * head.H + h;
          accumulate(sum + r * kCols, n, begin > 0, to);
        }
      }
    }
  }

  void pack_for_weight(int64_t block, int64_t first, int64_t count, int64_t begin, int64_t cols,
                       Scratch<Gemm>& own) {
    const Matrix<Element> dz{own.dz.get(), width, 1};
    for (int64_t j = 0; j < cols; j += kRows) {
      Word* panel = dz_columns.get() + j * depth();
      for (const Run& run : row_runs(j, first, first + count)) {
        pack_columns<Gemm, kRows>(dz, run.from - first, run.to - run.from, j,
                                  std::min(kRows, cols - j),
                                  panel + run.from / Gemm::kPerWord * kRows);
      }
    }
    if (begin > 0 && one_block()) return;  // packed with the first slice
    for (int64_t h = 0; h < head.H; h += kCols) {
      pack_columns<Gemm, kCols>(
          hidden, block + first, count, h, std::min(kCols, head.H - h),
          hidden_columns.get() + h * depth() + first / Gemm::kPerWord * kCols);
    }
  }

  // The slice of dw = dzᵀ . hidden over a block of rows; called by all threads.
  void weight_slice(int64_t block, int64_t rows, int64_t begin, int64_t cols) {
    constexpr int64_t kTall = 4 * kRows, kWide = 8 * kCols;
    T* dw = static_cast<T*>(out.dw) + begin * head.H;
    const bool last = block + rows == M;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t top = 0; top < cols; top += kTall) {
      for (int64_t left = 0; left < head.H; left += kWide) {
        for (int64_t j = top; j < std::min(top + kTall, cols); j += kRows) {
          const std::vector<Run> runs = row_runs(j, 0, rows);
          for (int64_t h = left; h < std::min(left + kWide, head.H); h += kCols) {
            alignas(kAlign) float sum[kRows * kCols] = {};
            for (const Run& run : runs) {
              const int64_t from = run.from / Gemm::kPerWord;
              multiply<Gemm>(dz_columns.get() + j * depth() + from * kRows,
                             hidden_columns.get() + h * depth() + from * kCols,
                             words_of<Gemm>(run.to - run.from), sum, kCols, true);
            }
            const int64_t n = std::min(kCols, head.H - h);
            for (int64_t r = 0; r < std::min(kRows, cols - j); ++r) {
              T* to = dw + (j + r) * head.H + h;
              if constexpr (std::is_same_v<T, float>) {
                accumulate(sum + r * kCols, n, block > 0, to);
              } else {
                float* total = sum + r * kCols;
                if (!one_block()) {
                  float* apart = dw_sum.get() + (j + r) * head.H + h;
                  accumulate(total, n, block > 0, apart);
                  total = apart;
                }
                if (last) store_all(total, n, to);
              }
            }
          }
        }
      }
    }
  }

  // The slice of db, from the parts of a block's chunks in their order; called by all threads.
  void bias_slice(int64_t block, int64_t rows, int64_t begin, int64_t cols) {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < cols; ++j) {
      float sum = block > 0 ? out.db[begin + j] : 0.0f;
      for (int64_t i = 0; i < ceil_div(rows, kChunkRows); ++i) sum += db_parts[i * width + j];
      out.db[begin + j] = sum;
    }
  }
};

}  // namespace

int32_t latro_cpu_bf16_products_supported(void) { return bf16_gemm_supported(); }

int32_t latro_cpu_linear_logprob_forward(
    const void* hidden, int64_t hidden_row_step, int64_t hidden_col_step, const void* weight,
    int64_t weight_row_step, int64_t weight_col_step, int32_t dtype, int32_t bf16_products,
    const float* bias, const int64_t* target, float* peak, float* total, float* picked,
    float* weighted, float* pull, float* kept, int64_t kept_cols, float* block_peak, int64_t N,
    int64_t H, int64_t V, float softcap, float temperature, int64_t threads) {
  return with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const Head<T> head{{static_cast<const T*>(hidden), hidden_row_step, hidden_col_step},
                       {static_cast<const T*>(weight), weight_row_step, weight_col_step},
                       bias,
                       target,
                       H,
                       V,
                       Transform{softcap, temperature}};
    std::fill_n(peak, N, -kInfinity);
    std::fill_n(total, N, 0.0f);
    std::fill_n(picked, N, -kInfinity);
    if (weighted != nullptr) std::fill_n(weighted, N, 0.0f);
    Forward<decltype(gemm), T> forward(head,
                                       RowState{peak, total, picked, weighted, pull, block_peak},
                                       Kept{kept, kept_cols}, threads);
    if (!forward.ok()) return LATRO_OUT_OF_MEMORY;
    forward.run(N);
    return LATRO_OK;
  });
}

int32_t latro_cpu_linear_logprob_backward(
    const void* hidden, int64_t hidden_row_step, int64_t hidden_col_step, const void* weight,
    int64_t weight_row_step, int64_t weight_col_step, int32_t dtype, int32_t bf16_products,
    const float* bias, const int64_t* target, const int64_t* rows, const float* grad_logp,
    const float* grad_entropy, const float* logp, const float* entropy, const float* peak,
    const float* log_total, const float* kept, int64_t kept_cols, const float* block_peak,
    float grad_filter, float* dx, void* dw, float* db, int64_t M, int64_t H, int64_t V,
    float softcap, float temperature, int64_t threads) {
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
        head, rows, M, RowGrads{grad_logp, grad_entropy, logp, entropy, peak, log_total},
        Kept{const_cast<float*>(kept), kept_cols},
        Filter{block_peak, grad_filter, ceil_div(V, kFilterCols)}, Gradients{dx, dw, db}, threads);
    if (!backward.ok()) return LATRO_OUT_OF_MEMORY;
    backward.run();
    return LATRO_OK;
  });
}
