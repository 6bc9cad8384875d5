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

#include "kl_state.h"
#include "latro.h"
#include "sweep.h"

namespace {

using latro::ceil_div;
using latro::Head;
using latro::kChunkRows;
using latro::kGroupCols;
using latro::KlState;
using latro::kMaxBlockRows;
using latro::Matrix;
using latro::Room;
using latro::room;
using latro::Scratch;
using latro::Sweep;
using latro::words_of;

template <typename T>
struct Problem {
  Head<T> p, q;  // without targets; q's weight is null where it is p's
};

// What the backward is given, by the number of the row in `hidden`.
struct RowGrads {
  const float *grad_kl, *center, *peak, *log_total;
};

struct Gradients {
  float* dx;  // [N, H]; each may be null
  void* dw;   // [V, H], the dtype of the weight
  float* db;  // [V]
};

// A thread's own room: that of either head's sweep.
template <typename Gemm>
struct Own {
  Scratch<Gemm>&p, &q;
};

// The sweeps of both heads, side by side.
template <typename Gemm, typename T>
struct Pair {
  static constexpr int64_t kRows = Gemm::kRows, kCols = Gemm::kCols;

  const bool shared;  // whether both heads have one weight
  Sweep<Gemm, T> p, q;
  const int64_t width;  // of a slice

  Pair(const Problem<T>& problem, bool with_dz, bool with_dx, int64_t threads)
      : shared(problem.q.weight.data == nullptr),
        p(problem.p, with_dz, with_dx, threads),
        q(problem.q, false, false, threads),
        width(std::min(p.width, q.width)) {}

  bool ok() const { return p.ok() && q.ok(); }
  int num_threads() const { return static_cast<int>(p.threads.size()); }
  Own<Gemm> own() {
    const int thread = omp_get_thread_num();
    return {p.threads[thread], q.threads[thread]};
  }

  // Packs the slice begin .. begin + cols; called by all threads.
  void pack_weights(int64_t begin, int64_t cols) {
    p.pack_weight_rows(begin, cols);
    if (!shared) q.pack_weight_rows(begin, cols);
  }

  // Products of the chunk's panel of rows at `i` with the slice's columns from .. to.
  void products(const Own<Gemm>& own, int64_t i, int64_t from, int64_t to) const {
    p.products(own.p, i, from, to, own.p.products.get());
    (shared ? p : q).products(own.q, i, from, to, own.q.products.get());
  }

  // The logits of row r of the panel whose products were made last, n of them from `column`.
  void logits(const Own<Gemm>& own, int64_t r, int64_t column, int64_t n, float* zp,
              float* zq) const {
    const float *of_p = own.p.products.get() + r * kGroupCols,
                *of_q = own.q.products.get() + r * kGroupCols;
    p.head.transform.logits(of_p, p.head.bias_at(column), n, zp);
    q.head.transform.logits(of_q, q.head.bias_at(column), n, zq);
  }
};

template <typename Gemm, typename T>
struct Forward : Pair<Gemm, T> {
  using Base = Pair<Gemm, T>;
  using Base::kRows, Base::p, Base::q, Base::width;
  std::vector<KlState> states;

  Forward(const Problem<T>& problem, int64_t N, int64_t threads)
      : Base(problem, false, false, threads), states(N) {}

  void run() {
    const auto N = static_cast<int64_t>(states.size());
#pragma omp parallel num_threads(this->num_threads())
    for (int64_t begin = 0; begin < p.head.V; begin += width) {
      const int64_t cols = std::min(width, p.head.V - begin);
      this->pack_weights(begin, cols);
#pragma omp for schedule(dynamic)
      for (int64_t first = 0; first < N; first += kChunkRows) {
        chunk(first, std::min(kChunkRows, N - first), begin, cols, this->own());
      }
    }
  }

  void chunk(int64_t first, int64_t count, int64_t begin, int64_t cols, const Own<Gemm>& own) {
    p.pack_chunk(p.head.hidden, first, count, own.p);
    q.pack_chunk(q.head.hidden, first, count, own.q);
    for (int64_t from = 0; from < cols; from += kGroupCols) {
      const int64_t n = std::min(kGroupCols, cols - from);
      for (int64_t i = 0; i < count; i += kRows) {
        this->products(own, i, from, from + n);
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          float zp[kGroupCols], zq[kGroupCols];
          this->logits(own, r, begin + from, n, zp, zq);
          states[first + i + r].add(zp, zq, n);
        }
      }
    }
  }
};

template <typename Gemm, typename T>
struct Backward : Pair<Gemm, T> {
  using Base = Pair<Gemm, T>;
  using Base::kCols, Base::kRows, Base::p, Base::q, Base::width;
  using Element = typename Gemm::Element;
  using Word = typename Gemm::Word;
  const Matrix<T> hidden_p, hidden_q;  // the rows that count
  const int64_t M, H, block_rows;
  const RowGrads grads;
  const Gradients out;
  Room<Word> dz_columns;      // a block of dz, packed for dw
  Room<Word> hidden_columns;  // the block's hidden, packed for dw
  Room<float> dw_sum;         // [width, H], where a slice of dw takes several blocks
  Room<float> db_parts;       // [chunks of a block, width]

  Backward(const Problem<T>& problem, const int64_t* rows, int64_t M, const RowGrads& grads,
           const Gradients& out, int64_t threads)
      : Base(problem, true, out.dx != nullptr, threads),
        hidden_p(some_rows(problem.p.hidden, rows)),
        hidden_q(some_rows(problem.q.hidden, rows)),
        M(M),
        H(problem.p.H),
        block_rows(ceil_div(ceil_div(M, ceil_div(M, kMaxBlockRows)), kChunkRows) * kChunkRows),
        grads(grads),
        out(out),
        dz_columns(room<Word>(out.dw != nullptr ? ceil_div(width, kRows) * kRows * depth() : 0)),
        hidden_columns(room<Word>(out.dw != nullptr ? ceil_div(H, kCols) * kCols * depth() : 0)),
        dw_sum(room<float>(out.dw != nullptr && !one_block() ? width * H : 0)),
        db_parts(room<float>(out.db != nullptr ? block_rows / kChunkRows * width : 0)) {}

  bool ok() const { return Base::ok() && dz_columns && hidden_columns && dw_sum && db_parts; }

  static Matrix<T> some_rows(const Matrix<T>& hidden, const int64_t* rows) {
    return {hidden.data, hidden.row_step, hidden.col_step, rows};
  }
  int64_t depth() const { return words_of<Gemm>(block_rows); }
  bool one_block() const { return M <= block_rows; }
  int64_t row_at(int64_t i) const { return hidden_p.index != nullptr ? hidden_p.index[i] : i; }

  void run() {
#pragma omp parallel num_threads(this->num_threads())
    for (int64_t begin = 0; begin < p.head.V; begin += width) {
      const int64_t cols = std::min(width, p.head.V - begin);
      this->pack_weights(begin, cols);
      if (out.dx != nullptr) p.pack_weight_columns(begin, cols);
      for (int64_t block = 0; block < M; block += block_rows) {
        const int64_t rows = std::min(block_rows, M - block);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < rows; first += kChunkRows) {
          chunk(block, first, std::min(kChunkRows, rows - first), begin, cols, this->own());
        }
        if (out.dw != nullptr) weight_slice(block, rows, begin, cols);
        if (out.db != nullptr) bias_slice(block, rows, begin, cols);
      }
    }
  }

  // Rows first .. first + count of the block.
  void chunk(int64_t block, int64_t first, int64_t count, int64_t begin, int64_t cols,
             const Own<Gemm>& own) {
    p.pack_chunk(hidden_p, block + first, count, own.p);
    q.pack_chunk(hidden_q, block + first, count, own.q);
    float* db = out.db != nullptr ? db_parts.get() + first / kChunkRows * width : nullptr;
    if (db != nullptr) std::fill_n(db, cols, 0.0f);
    for (int64_t from = 0; from < cols; from += kGroupCols) {
      const int64_t n = std::min(kGroupCols, cols - from);
      for (int64_t i = 0; i < count; i += kRows) {
        this->products(own, i, from, from + n);
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          float dz[kGroupCols];
          gradient(row_at(block + first + i + r), r, begin + from, n, own, dz);
          latro::store_all(dz, n, own.p.dz.get() + (i + r) * p.width + from);
          if (db != nullptr) latro::accumulate(dz, n, true, db + from);
        }
      }
    }
    if (out.dx != nullptr) hidden_rows(block + first, count, begin, cols, own.p);
    if (out.dw != nullptr) pack_for_weight(block, first, count, begin, cols, own.p);
  }

  // dz of n columns of a row, from row r of the products.
  void gradient(int64_t row, int64_t r, int64_t column, int64_t n, const Own<Gemm>& own,
                float* dz) const {
    float zp[kGroupCols], zq[kGroupCols];
    this->logits(own, r, column, n, zp, zq);
    const float g = grads.grad_kl[row], center = grads.center[row];
    const float peak = grads.peak[row], log_total = grads.log_total[row];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float prob = latro::exp_vec((zp[j] - peak) - log_total);
      dz[j] = prob == 0.0f ? 0.0f : g * prob * ((zp[j] - zq[j]) - center);
    }
    p.head.transform.chain(zp, n, dz);
  }

  // dx of the chunk += dz . W.
  void hidden_rows(int64_t first, int64_t count, int64_t begin, int64_t cols, Scratch<Gemm>& own) {
    for (int64_t i = 0; i < count; i += kRows) p.pack_dz_rows(own, i, count, 0, cols);
    alignas(latro::kAlign) float sum[kRows * kCols];
    for (int64_t h = 0; h < H; h += kCols) {
      for (int64_t i = 0; i < count; i += kRows) {
        p.multiply_dz(own, i, h, 0, cols, false, sum);
        for (int64_t r = 0; r < std::min(kRows, count - i); ++r) {
          latro::accumulate(sum + r * kCols, std::min(kCols, H - h), begin > 0,
                            out.dx + row_at(first + i + r) * H + h);
        }
      }
    }
  }

  void pack_for_weight(int64_t block, int64_t first, int64_t count, int64_t begin, int64_t cols,
                       Scratch<Gemm>& own) {
    const Matrix<Element> dz{own.dz.get(), p.width, 1};
    const int64_t word = first / Gemm::kPerWord;
    for (int64_t j = 0; j < cols; j += kRows) {
      latro::pack_columns<Gemm, kRows>(dz, 0, count, j, std::min(kRows, cols - j),
                                       dz_columns.get() + j * depth() + word * kRows);
    }
    if (begin > 0 && one_block()) return;  // packed with the first slice
    for (int64_t h = 0; h < H; h += kCols) {
      latro::pack_columns<Gemm, kCols>(hidden_p, block + first, count, h, std::min(kCols, H - h),
                                       hidden_columns.get() + h * depth() + word * kCols);
    }
  }

  // The slice of dw = dzᵀ . hidden over a block of rows; called by all threads.
  void weight_slice(int64_t block, int64_t rows, int64_t begin, int64_t cols) {
    constexpr int64_t kTall = 4 * kRows, kWide = 8 * kCols;
    T* dw = static_cast<T*>(out.dw) + begin * H;
    const bool last = block + rows == M;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t top = 0; top < cols; top += kTall) {
      for (int64_t left = 0; left < H; left += kWide) {
        for (int64_t j = top; j < std::min(top + kTall, cols); j += kRows) {
          for (int64_t h = left; h < std::min(left + kWide, H); h += kCols) {
            alignas(latro::kAlign) float sum[kRows * kCols];
            latro::multiply<Gemm>(dz_columns.get() + j * depth(),
                                  hidden_columns.get() + h * depth(), words_of<Gemm>(rows), sum,
                                  kCols, false);
            const int64_t n = std::min(kCols, H - h);
            for (int64_t r = 0; r < std::min(kRows, cols - j); ++r) {
              const float* total = sum + r * kCols;
              if (!one_block()) {
                float* apart = dw_sum.get() + (j + r) * H + h;
                latro::accumulate(total, n, block > 0, apart);
                total = apart;
              }
              if (last) latro::store_all(total, n, dw + (j + r) * H + h);
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

// From whole rows, one after the other; a null weight is that of the other head.
template <typename T>
Head<T> head_of(const void* hidden, const void* weight, const float* bias, int64_t H, int64_t V,
                latro::Transform transform) {
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
  return latro::with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const latro::Transform transform{softcap, temperature};
    const Problem<T> problem{head_of<T>(hidden_p, weight_p, bias_p, H_p, V, transform),
                             head_of<T>(hidden_q, weight_q, bias_q, H_q, V, transform)};
    Forward<decltype(gemm), T> forward(problem, N, threads);
    if (!forward.ok()) return LATRO_OUT_OF_MEMORY;
    forward.run();
    for (int64_t i = 0; i < N; ++i) {
      const KlState& state = forward.states[i];
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
  return latro::with_types(dtype, bf16_products, [&](auto gemm, auto element) -> int32_t {
    using T = decltype(element);
    const latro::Transform transform{softcap, temperature};
    const Problem<T> problem{head_of<T>(hidden_p, weight_p, bias_p, H_p, V, transform),
                             head_of<T>(hidden_q, weight_q, bias_q, H_q, V, transform)};
    Backward<decltype(gemm), T> backward(problem, rows, M,
                                         RowGrads{grad_kl, center, peak, log_total},
                                         Gradients{dx, dw, db}, threads);
    if (!backward.ok()) return LATRO_OUT_OF_MEMORY;
    backward.run();
    return LATRO_OK;
  });
}
