// C = A · B, or C += A · B, of bf16 matrices with an fp32 result, which torch's CPU product would
// round to bf16. For processors with AVX-512 BF16, found at run time.
//
// Both operands are first packed into panels of pairs: a panel holds kRows rows of A (kCols columns
// of B) for two neighbouring k in each 32-bit lane, as vdpbf16ps takes them. The kernel keeps a
// kRows x kCols block of C in 24 registers and reads each panel from start to end. Around it a
// block of C stays in the second-level cache until all of k has passed, and belongs to one thread,
// so that the result does not depend on their number, nor a row of C on the other rows.
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "latro.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LATRO_HAS_AVX512_BF16 1
#include <immintrin.h>
#endif

namespace {

#ifdef LATRO_HAS_AVX512_BF16
#define LATRO_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

constexpr int64_t kRows = 12, kCols = 32;              // of C in registers: 12 x 2 of 16 floats
constexpr int64_t kBlockRows = 240, kBlockCols = 256;  // of C in the second-level cache
constexpr int64_t kPairs = 192;                        // a panel of B of this length: 16 KiB
constexpr int64_t kAlign = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A matrix of `count` vectors of length k; element (i, k) at data[i * step + k * k_step].
struct Vectors {
  const uint16_t* data;
  int64_t step, k_step, count, length;
};

// to[i * to_step + j] = from[j * from_step + 2 * i .. + 1], as words, for 4 x 4 of them.
LATRO_TARGET inline void transpose4(const uint16_t* from, int64_t from_step, uint32_t* to,
                                    int64_t to_step) {
  __m128i row[4];
  for (int j = 0; j < 4; ++j) {
    row[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j * from_step));
  }
  const __m128i low01 = _mm_unpacklo_epi32(row[0], row[1]);
  const __m128i high01 = _mm_unpackhi_epi32(row[0], row[1]);
  const __m128i low23 = _mm_unpacklo_epi32(row[2], row[3]);
  const __m128i high23 = _mm_unpackhi_epi32(row[2], row[3]);
  const __m128i column[4] = {_mm_unpacklo_epi64(low01, low23), _mm_unpackhi_epi64(low01, low23),
                             _mm_unpacklo_epi64(high01, high23),
                             _mm_unpackhi_epi64(high01, high23)};
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_step), column[i]);
  }
}

// Packs panel `panel` of `width` vectors into out[pairs][width]; zeros beyond the matrix.
template <int64_t width>
LATRO_TARGET void pack(const Vectors& v, int64_t panel, uint32_t* out) {
  const int64_t first = panel * width, pairs = ceil_div(v.length, 2);
  const int64_t here = v.count - first < width ? v.count - first : width;
  const uint16_t* base = v.data + first * v.step;
  if (v.step == 1 && here == width) {
    for (int64_t pair = 0; pair < v.length / 2; ++pair) {
      const uint16_t* low = base + 2 * pair * v.k_step;
      const uint16_t* high = low + v.k_step;
      for (int64_t i = 0; i < width; ++i) {
        out[pair * width + i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
      }
    }
  } else if (v.k_step == 1 && here == width) {
    // The two neighbours are one 32-bit word: transpose 4 x 4 of them at a time, and all vectors
    // over a stretch whose result fits the first-level cache before the next.
    constexpr int64_t kStretch = 64;
    const int64_t words = v.length / 2;
    for (int64_t begin = 0; begin < words; begin += kStretch) {
      const int64_t end = begin + kStretch < words ? begin + kStretch : words;
      for (int64_t i = 0; i < width; i += 4) {
        const uint16_t* rows = base + i * v.step;
        int64_t pair = begin;
        for (; pair + 4 <= end; pair += 4) {
          transpose4(rows + 2 * pair, v.step, out + pair * width + i, width);
        }
        for (; pair < end; ++pair) {
          for (int64_t j = 0; j < 4; ++j) {
            const uint16_t* low = rows + j * v.step + 2 * pair;
            out[pair * width + i + j] = low[0] | static_cast<uint32_t>(low[1]) << 16;
          }
        }
      }
    }
  } else {
    for (int64_t pair = 0; pair < v.length / 2; ++pair) {
      for (int64_t i = 0; i < width; ++i) {
        const uint16_t* low = base + i * v.step + 2 * pair * v.k_step;
        out[pair * width + i] = i < here ? low[0] | static_cast<uint32_t>(low[v.k_step]) << 16 : 0;
      }
    }
  }
  if (v.length % 2 != 0) {
    for (int64_t i = 0; i < width; ++i) {
      out[(pairs - 1) * width + i] = i < here ? base[i * v.step + (v.length - 1) * v.k_step] : 0;
    }
  }
}

// c[kRows][kCols] += a · b over `pairs` pairs of k. The stretch is summed on its own first: one
// long sum would lose more digits.
LATRO_TARGET inline void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c,
                                  int64_t c_step) {
  __m512 sum[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const auto b0 = reinterpret_cast<__m512bh>(_mm512_load_si512(b + pair * kCols));
    const auto b1 = reinterpret_cast<__m512bh>(_mm512_load_si512(b + pair * kCols + 16));
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const auto one =
          reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[pair * kRows + i])));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], one, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], one, b1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* to = c + i * c_step;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i][0]));
    _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), sum[i][1]));
  }
}

// `multiply` for a block of C that is cut by its edge.
LATRO_TARGET void multiply_edge(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c,
                                int64_t c_step, int64_t rows, int64_t cols) {
  alignas(kAlign) float block[kRows * kCols] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) block[i * kCols + j] = c[i * c_step + j];
  }
  multiply(a, b, pairs, block, kCols);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) c[i * c_step + j] = block[i * kCols + j];
  }
}

// One block of C from packed operands.
LATRO_TARGET void multiply_block(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c,
                                 int64_t rows, int64_t cols, int64_t row, int64_t col,
                                 bool accumulate) {
  const int64_t row_end = row + kBlockRows < rows ? row + kBlockRows : rows;
  const int64_t col_end = col + kBlockCols < cols ? col + kBlockCols : cols;
  if (!accumulate) {
    for (int64_t i = row; i < row_end; ++i) {
      for (int64_t j = col; j < col_end; ++j) c[i * cols + j] = 0.0f;
    }
  }
  for (int64_t pair = 0; pair < pairs; pair += kPairs) {
    const int64_t some = pair + kPairs < pairs ? kPairs : pairs - pair;
    for (int64_t j = col; j < col_end; j += kCols) {
      const uint32_t* b_panel = b + (j / kCols * pairs + pair) * kCols;
      for (int64_t i = row; i < row_end; i += kRows) {
        const uint32_t* a_panel = a + (i / kRows * pairs + pair) * kRows;
        float* corner = c + i * cols + j;
        if (i + kRows <= row_end && j + kCols <= col_end) {
          multiply(a_panel, b_panel, some, corner, cols);
        } else {
          multiply_edge(a_panel, b_panel, some, corner, cols,
                        row_end - i < kRows ? row_end - i : kRows,
                        col_end - j < kCols ? col_end - j : kCols);
        }
      }
    }
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<uint32_t, Free> room(int64_t words) {
  const int64_t bytes = ceil_div(words * 4, kAlign) * kAlign;
  return std::unique_ptr<uint32_t, Free>(static_cast<uint32_t*>(std::aligned_alloc(kAlign, bytes)));
}
#endif  // LATRO_HAS_AVX512_BF16

}  // namespace

int32_t latro_cpu_matmul_bf16_supported(void) {
#ifdef LATRO_HAS_AVX512_BF16
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
#else
  return 0;
#endif
}

int32_t latro_cpu_matmul_bf16(const void* a, int64_t a_row_step, int64_t a_k_step, const void* b,
                              int64_t b_k_step, int64_t b_col_step, float* c, int64_t rows,
                              int64_t cols, int64_t length, int32_t accumulate, int64_t threads) {
#ifdef LATRO_HAS_AVX512_BF16
  if (rows == 0 || cols == 0) return LATRO_OK;
  const Vectors av{static_cast<const uint16_t*>(a), a_row_step, a_k_step, rows, length};
  const Vectors bv{static_cast<const uint16_t*>(b), b_col_step, b_k_step, cols, length};
  const int64_t pairs = ceil_div(length, 2);
  const int64_t a_panels = ceil_div(rows, kRows), b_panels = ceil_div(cols, kCols);
  const auto a_room = room(a_panels * kRows * pairs), b_room = room(b_panels * kCols * pairs);
  if (!a_room || !b_room) return LATRO_OUT_OF_MEMORY;
  uint32_t *a_packed = a_room.get(), *b_packed = b_room.get();
  const int64_t blocks_down = ceil_div(rows, kBlockRows);
  const int64_t blocks = blocks_down * ceil_div(cols, kBlockCols);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < a_panels; ++i) pack<kRows>(av, i, a_packed + i * kRows * pairs);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < b_panels; ++j) pack<kCols>(bv, j, b_packed + j * kCols * pairs);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      multiply_block(a_packed, b_packed, pairs, c, rows, cols, block % blocks_down * kBlockRows,
                     block / blocks_down * kBlockCols, accumulate != 0);
    }
  }
  return LATRO_OK;
#else
  return LATRO_UNSUPPORTED;
#endif
}
