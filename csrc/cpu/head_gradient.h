// From dz, the gradient with respect to the products of a head, to the gradients of its inputs:
//
//     dx = dz . W        dw = dzᵀ . hidden        db = sum of dz over the rows
//
// An op says what dz is, a chunk of rows and a slice of columns at a time. The chunk's dx is added
// to while dz is in cache, and dz is packed for the slice of dw, which follows when a block of rows
// is through.
#ifndef LATRO_CPU_HEAD_GRADIENT_H_
#define LATRO_CPU_HEAD_GRADIENT_H_

#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "sweep.h"

namespace latro {

struct Gradients {
  float* dx;  // [N, H]; each may be null
  void* dw;   // [V, H], the dtype of the weight
  float* db;  // [V]
};

// A chunk of a block of rows, and a slice of columns.
struct Place {
  int64_t block, first, count;  // rows block + first .. + count, among the rows that count
  int64_t begin, cols;
};

template <typename Gemm, typename T>
class HeadGradient {
  using Element = typename Gemm::Element;
  using Word = typename Gemm::Word;
  using Product = typename Gemm::Product;
  static constexpr int64_t kRows = Gemm::kRows, kCols = Gemm::kCols;
  static constexpr int64_t kFilterRows = Gemm::kFilterRows, kChunkRows = latro::kChunkRows<Gemm>;
  // A stretch from .. to of columns, or of rows, whose blocks are not left out.
  struct Run {
    int64_t from, to;
  };

  Sweep<Gemm, T>& sweep_;
  const Matrix<T> hidden_;  // the M rows that count
  const Gradients out_;
  const int64_t M_, H_, width_, block_rows_, chunk_rows_, depth_;
  Room<uint8_t> active_;       // [block_rows / kFilterRows, width / kFilterCols]
  Room<Word> dz_columns_;      // a block of dz, packed for dw
  Room<Word> hidden_columns_;  // the block's hidden, packed for dw
  Room<float> dw_sum_;         // [width, H], where a slice of dw takes several blocks
  Room<Product> db_parts_;     // [chunks of a block, width]

 public:
  // `rows` names the M rows of hidden that count; null: the first M.
  HeadGradient(Sweep<Gemm, T>& sweep, const int64_t* rows, int64_t M, const Gradients& out)
      : sweep_(sweep),
        hidden_{sweep.head.hidden.data, sweep.head.hidden.row_step, sweep.head.hidden.col_step,
                rows},
        out_(out),
        M_(M),
        H_(sweep.head.H),
        width_(sweep.width),
        block_rows_(ceil_div(ceil_div(M, ceil_div(M, kMaxBlockRows<Gemm>)), kChunkRows) *
                    kChunkRows),
        chunk_rows_(chunk_rows<Gemm>(M)),
        depth_(words_of<Gemm>(block_rows_)),
        active_(room<uint8_t>(block_rows_ / kFilterRows * (width_ / kFilterCols))),
        dz_columns_(room<Word>(out.dw != nullptr ? ceil_div(width_, kRows) * kRows * depth_ : 0)),
        hidden_columns_(room<Word>(out.dw != nullptr ? ceil_div(H_, kCols) * kCols * depth_ : 0)),
        dw_sum_(room<float>(sums_apart() ? width_ * H_ : 0)),
        db_parts_(room<Product>(out.db != nullptr ? block_rows_ / chunk_rows_ * width_ : 0)) {
    if (active_) std::fill_n(active_.get(), block_rows_ / kFilterRows * (width_ / kFilterCols), 1);
  }

  bool ok() const { return active_ && dz_columns_ && hidden_columns_ && dw_sum_ && db_parts_; }
  const Matrix<T>& hidden() const { return hidden_; }

  // The number, in the whole of hidden, of row i of a place.
  int64_t row(const Place& place, int64_t i) const {
    const int64_t at = place.block + place.first + i;
    return hidden_.index != nullptr ? hidden_.index[at] : at;
  }

  // Whether the block with row i of a place and this column of the slice takes part; all do unless
  // somebody says otherwise.
  uint8_t& is_active(const Place& place, int64_t i, int64_t column) {
    return is_active(place.first + i, column);
  }

  // Takes n entries of dz of row i of a place, from this column of the slice on.
  void put(const Place& place, int64_t i, int64_t column, const Product* dz, int64_t n,
           Scratch<Gemm>& own) {
    store_all(dz, n, own.dz.get() + i * width_ + column);
    if (out_.db != nullptr) accumulate(dz, n, true, db_part(place.first) + column);
  }

  // pack(begin, cols) packs what the logits of a slice need, by all threads; fill(place, thread)
  // puts all active dz of a place.
  template <typename Pack, typename Fill>
  void run(int64_t V, Pack pack, Fill fill) {
#pragma omp parallel num_threads(static_cast<int>(sweep_.threads.size()))
    {
      const typename Gemm::Session session;
      for (int64_t begin = 0; begin < V; begin += width_) {
        const int64_t cols = std::min(width_, V - begin);
        pack(begin, cols);
        if (out_.dx != nullptr) sweep_.pack_weight_columns(begin, cols);
        for (int64_t block = 0; block < M_; block += block_rows_) {
          const int64_t rows = std::min(block_rows_, M_ - block);
#pragma omp for schedule(dynamic)
          for (int64_t first = 0; first < rows; first += chunk_rows_) {
            const Place place{block, first, std::min(chunk_rows_, rows - first), begin, cols};
            if (out_.db != nullptr) std::fill_n(db_part(first), cols, Product{});
            fill(place, omp_get_thread_num());
            Scratch<Gemm>& own = sweep_.threads[omp_get_thread_num()];
            if (out_.dx != nullptr) add_to_dx(place, own);
            if (out_.dw != nullptr) pack_for_dw(place, own);
          }
          if (out_.dw != nullptr) dw_slice(block, rows, begin, cols);
          if (out_.db != nullptr) db_slice(block, rows, begin, cols);
        }
      }
    }
  }

 private:
  bool one_block() const { return M_ <= block_rows_; }
  // A sum over blocks is carried in fp32.
  bool sums_apart() const {
    return out_.dw != nullptr && !std::is_same_v<T, float> && !one_block();
  }
  uint8_t& is_active(int64_t row_of_block, int64_t column) {
    return active_[row_of_block / kFilterRows * (width_ / kFilterCols) + column / kFilterCols];
  }
  Product* db_part(int64_t first) { return db_parts_.get() + first / chunk_rows_ * width_; }

  // The stretches of begin .. end, in steps of `grain`, that `is` holds for.
  template <typename Is>
  static std::vector<Run> runs(int64_t begin, int64_t end, int64_t grain, Is is) {
    std::vector<Run> found;
    for (int64_t at = begin; at < end; at += grain) {
      if (!is(at)) continue;
      const int64_t to = std::min(at + grain, end);
      if (!found.empty() && found.back().to == at) {
        found.back().to = to;
      } else {
        found.push_back({at, to});
      }
    }
    return found;
  }
  std::vector<Run> rows_with(int64_t column, int64_t begin, int64_t end) {
    return runs(begin, end, kFilterRows, [&](int64_t i) { return is_active(i, column); });
  }
  std::vector<Run> columns_with(int64_t row_of_block, int64_t cols) {
    return runs(0, cols, kFilterCols, [&](int64_t j) { return is_active(row_of_block, j); });
  }

  void add_to_dx(const Place& place, Scratch<Gemm>& own) {
    std::vector<std::vector<Run>> active;
    for (int64_t i = 0; i < place.count; i += kRows) {
      active.push_back(columns_with(place.first + i, place.cols));
      for (const Run& run : active.back()) {
        sweep_.pack_dz_rows(own, i, place.count, run.from, run.to);
      }
    }
    alignas(kAlign) Product sum[kRows * kCols];
    for (int64_t h = 0; h < H_; h += kCols) {
      const int64_t n = std::min(kCols, H_ - h);
      for (int64_t i = 0; i < place.count; i += kRows) {
        const std::vector<Run>& of_panel = active[i / kRows];
        if (of_panel.empty() && place.begin > 0) continue;
        std::fill_n(sum, kRows * kCols, Product{});
        for (const Run& run : of_panel) {
          sweep_.multiply_dz(own, i, h, run.from, run.to, true, sum);
        }
        for (int64_t r = 0; r < std::min(kRows, place.count - i); ++r) {
          accumulate(sum + r * kCols, n, place.begin > 0, out_.dx + row(place, i + r) * H_ + h);
        }
      }
    }
  }

  void pack_for_dw(const Place& place, Scratch<Gemm>& own) {
    const Matrix<Element> dz{own.dz.get(), width_, 1};
    const int64_t first = place.first;
    for (int64_t j = 0; j < place.cols; j += kRows) {
      Word* panel = dz_columns_.get() + j * depth_;
      for (const Run& run : rows_with(j, first, first + place.count)) {
        pack_columns<Gemm, Side::kA>(dz, run.from - first, run.to - run.from, j,
                                     std::min(kRows, place.cols - j),
                                     panel + run.from / Gemm::kPerWord * kRows);
      }
    }
    if (place.begin > 0 && one_block()) return;  // packed with the first slice
    for (int64_t h = 0; h < H_; h += kCols) {
      pack_columns<Gemm, Side::kB>(
          hidden_, place.block + first, place.count, h, std::min(kCols, H_ - h),
          hidden_columns_.get() + h * depth_ + first / Gemm::kPerWord * kCols);
    }
  }

  // The slice of dw from a block of rows; called by all threads.
  void dw_slice(int64_t block, int64_t rows, int64_t begin, int64_t cols) {
    constexpr int64_t kTall = 4 * kRows, kWide = 8 * kCols;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t top = 0; top < cols; top += kTall) {
      for (int64_t left = 0; left < H_; left += kWide) {
        for (int64_t j = top; j < std::min(top + kTall, cols); j += kRows) {
          const std::vector<Run> active = rows_with(j, 0, rows);
          for (int64_t h = left; h < std::min(left + kWide, H_); h += kCols) {
            alignas(kAlign) Product sum[kRows * kCols] = {};
            for (const Run& run : active) {
              const int64_t from = run.from / Gemm::kPerWord;
              multiply<Gemm>(dz_columns_.get() + j * depth_ + from * kRows,
                             hidden_columns_.get() + h * depth_ + from * kCols,
                             words_of<Gemm>(run.to - run.from), sum, kCols, true);
            }
            for (int64_t r = 0; r < std::min(kRows, cols - j); ++r) {
              add_to_dw(sum + r * kCols, begin, j + r, h, block, block + rows == M_);
            }
          }
        }
      }
    }
  }

  // Adds a few entries of row j of a slice of dw, from column h on.
  void add_to_dw(const Product* sum, int64_t begin, int64_t j, int64_t h, int64_t block,
                 bool last) {
    const int64_t n = std::min(kCols, H_ - h);
    T* to = static_cast<T*>(out_.dw) + (begin + j) * H_ + h;
    if constexpr (std::is_same_v<T, float>) {
      accumulate(sum, n, block > 0, to);
    } else if (one_block()) {
      store_all(sum, n, to);
    } else {
      float* apart = dw_sum_.get() + j * H_ + h;
      accumulate(sum, n, block > 0, apart);
      if (last) store_all(apart, n, to);
    }
  }

  // The slice of db, from the parts of a block's chunks in their order; called by all threads.
  void db_slice(int64_t block, int64_t rows, int64_t begin, int64_t cols) {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < cols; ++j) {
      Product sum = block > 0 ? out_.db[begin + j] : 0.0f;
      for (int64_t i = 0; i < ceil_div(rows, chunk_rows_); ++i) sum += db_parts_[i * width_ + j];
      out_.db[begin + j] = static_cast<float>(sum);
    }
  }
};

}  // namespace latro

#endif  // LATRO_CPU_HEAD_GRADIENT_H_
