// Products of bf16 with AMX, the matrix unit of Intel's server processors from Sapphire Rapids on.
// Its registers, called tiles, have 16 rows of 16 words; one instruction multiplies two of them and
// adds the products to a third, in fp32.
//
// A tile of A holds 16 words of each of 16 rows, a tile of B 16 words of each of 16 columns. What
// an entry sums, and in which order, is the same for a product and its transpose: few rows are
// multiplied the other way around (few_rows.h), with the same bits.
#ifndef LATRO_CPU_AMX_H_
#define LATRO_CPU_AMX_H_

#include "gemm.h"

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define LATRO_HAS_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace latro {

#ifdef LATRO_HAS_AMX
#define LATRO_AMX_TARGET __attribute__((target("amx-tile,amx-bf16")))

// Rows of a tile, and words in each of them.
constexpr int64_t kTile = 16;

// What LDTILECFG reads: all eight tiles whole.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = kTile * sizeof(uint32_t);
      rows[i] = kTile;
    }
  }
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

struct AmxGemm {
  using Element = bfloat16;
  using Word = uint32_t;
  using Product = float;
  static constexpr int64_t kRows = 2 * kTile, kCols = 2 * kTile;
  static constexpr int64_t kPerWord = 2, kStep = kTile, kFilterRows = kRows;
  // A sum continues in its tile, and each step adds to it what 32 products are by themselves: over
  // so many steps it loses no more than others over theirs.
  static constexpr int64_t kMaxDepth = 128 * kStep;
  static constexpr int64_t kFewColumns = kTile, kNarrowPanel = kTile, kWidePanel = kTile;

  static Word word(bfloat16 low, bfloat16 high) { return bf16_pair(low, high); }

  // Word (k, i) of a panel of A: tile after tile.
  static int64_t a_word(int64_t k, int64_t i) {
    return k / kTile * (kTile * kRows) + i * kTile + k % kTile;
  }

  // The tiles are this thread's as long as it lives; then they are again as they were.
  class Session {
    TileConfig before_;

   public:
    LATRO_AMX_TARGET Session() {
      const TileConfig ours;
      asm volatile("sttilecfg %0" : "=m"(before_));
      asm volatile("ldtilecfg %0" : : "m"(ours));
    }
    LATRO_AMX_TARGET ~Session() {
      if (before_.palette == 0) {
        asm volatile("tilerelease");
      } else {
        asm volatile("ldtilecfg %0" : : "m"(before_));
      }
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // As of the other Gemms; depth is a multiple of kStep.
  LATRO_AMX_TARGET static void multiply(const Word* a, const Word* b, int64_t depth, float* c,
                                        int64_t c_step, bool add) {
    float* const low = c + kTile * c_step;
    const int64_t c_bytes = c_step * static_cast<int64_t>(sizeof(float));
    constexpr int64_t a_bytes = kTile * sizeof(Word), b_bytes = kCols * sizeof(Word);
    asm volatile("" : : : "memory");  // the intrinsics do not say that they read and write
    if (add) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + kTile, c_bytes);
      _tile_loadd(2, low, c_bytes);
      _tile_loadd(3, low + kTile, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += kStep) {
      _tile_loadd(4, a + k * kRows, a_bytes);
      _tile_loadd(6, b + k * kCols, b_bytes);
      _tile_loadd(7, b + k * kCols + kTile, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + k * kRows + kTile * kTile, a_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + kTile, c_bytes);
    _tile_stored(2, low, c_bytes);
    _tile_stored(3, low + kTile, c_bytes);
    asm volatile("" : : : "memory");
  }

  // c[kTile][kTile] = row . x, or += with `add`: the rows of A lie `row_bytes` apart, x is a
  // panel of kTile columns.
  LATRO_AMX_TARGET static void multiply_tile(const void* row, int64_t row_bytes, const Word* x,
                                             int64_t words, float* c, int64_t c_step, bool add) {
    const int64_t c_bytes = c_step * static_cast<int64_t>(sizeof(float));
    const char* a = static_cast<const char*>(row);
    asm volatile("" : : : "memory");
    if (add) {
      _tile_loadd(0, c, c_bytes);
    } else {
      _tile_zero(0);
    }
    for (int64_t k = 0; k < words; k += kStep) {
      _tile_loadd(4, a + k * static_cast<int64_t>(sizeof(Word)), row_bytes);
      _tile_loadd(6, x + k * kTile, kTile * sizeof(Word));
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, c, c_bytes);
    asm volatile("" : : : "memory");
  }
};

// Whether there is AMX and Linux lets this process use it, for which it must be asked once.
inline bool amx_gemm_supported() {
  static const bool supported = [] {
    unsigned a, b, c, d;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & kBf16) == 0 || (d & kTiles) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl(2)
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return supported;
}
#else
inline bool amx_gemm_supported() { return false; }
#endif

}  // namespace latro

#endif  // LATRO_CPU_AMX_H_
