// group_advantage on CUDA: one cooperative launch, four phases, a barrier of the grid between them.
//
// Sequences are ragged, a hundred thousand rows or none, so work is cut by rows. A warp takes tiles
// of 256 rows:
//
//     1. every tile      sums of the parts of sequences that lie in it; those that lie in it whole
//                        are done
//     2. every tile      the sequence that begins in it and goes on: its parts together
//     3. every group     the baseline; rewards become advantages
//     4. every tile      the coefficients of its rows
//
// The order of each sum follows from the offsets alone, so the result depends on neither the chip
// nor the schedule. All arithmetic is double: rewards may be large and close together. The formulas
// stand in latro_kernels/group_advantage.
//
// What 1 M rows should cost an H100, estimated and not measured: 8 MB are read in phase 1, all of
// them in flight at once (8 rows a lane, 2 KB a warp, 64 KB a multiprocessor), 4 us; 4 MB are
// written in phase 4, 2 us, and k3 reads the 8 MB again out of the L2 cache, 2 us, with some twenty
// double instructions a row in either phase, 1.5 us; phases 2 and 3 are a few dependent reads, 3
// us; three barriers, 5 us. All in all 14 to 20 us.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "latro.h"

namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocks = 4;  // on a multiprocessor
constexpr int kTile = LATRO_GROUP_TILE_ROWS;
constexpr int kRowsPerLane = kTile / kLanes;
constexpr int kTeam = 8;    // lanes that share a sequence,
constexpr int kShort = 16;  // unless all at hand have so few rows that each lane takes its own
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Sums {
  double rationale, divergence, answer;
};

__device__ Sums operator+(Sums a, Sums b) {
  return {a.rationale + b.rationale, a.divergence + b.divergence, a.answer + b.answer};
}

// Scratch, one a tile.
struct Tile {
  int64_t first;  // the first sequence that begins in it or later
  Sums entering;  // its rows of the sequence that began before it
  Sums leaving;   // its rows of the sequence that begins in it and ends after it
};
static_assert(sizeof(Tile) == LATRO_GROUP_TILE_WORDS * sizeof(double), "as latro.h says");

struct Problem {
  const float* logp;
  const float* ref_logp;
  const float* row_kl;
  const int64_t* offsets;
  const uint8_t* finished;
  float* reward;
  float* answer_logp;
  float* rationale_logp;
  float* kl;
  float* advantage;
  float* coefficient;
  double* rewards;  // one per sequence; from phase 3 on its advantage
  Tile* tiles;
  int64_t N, G, K, num_tiles;
  double scale;
  double beta;
  double answer_weight;
  bool k3;
  bool exclude_unfinished;
};

// A sequence's rows in a tile, counted from the tile's first: begin .. middle are of the rationale,
// middle .. end of the answer. `sequence` is -1 where there is none.
struct Piece {
  int64_t sequence;
  int begin, middle, end;
  bool enters, leaves;
};

// A tile's rows in shared memory: log-probabilities, and a number that phases 1 and 4 each make of
// them with all lanes at work, however few share a sequence later.
struct Rows {
  double made[kTile];
  float logp[kTile];
};

__device__ double add_lanes(double x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ Sums add_lanes(Sums x, int width) {
  return {add_lanes(x.rationale, width), add_lanes(x.divergence, width),
          add_lanes(x.answer, width)};
}

// NaN if either is: fmin would drop it, and with it the sign that a log-probability went wrong.
__device__ double lower(double a, double b) { return a < b || isnan(a) ? a : b; }

__device__ double lowest_of_lanes(double x, int width) {
  for (int step = width / 2; step > 0; step /= 2) {
    x = lower(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}

__device__ bool is_unfinished(const Problem& p, int64_t s) {
  return p.finished != nullptr && !p.finished[s];
}

__device__ bool is_excluded(const Problem& p, int64_t s) {
  return p.exclude_unfinished && is_unfinished(p, s);
}

// The first sequence that begins at `row` or later, by a search that a warp's lanes split.
__device__ int64_t first_from(const Problem& p, int64_t row, int lane) {
  int64_t low = 0, high = p.G * p.K;  // it is among low .. high
  while (low < high) {
    const int64_t share = (high - low + kLanes - 1) / kLanes;
    const int64_t last = low + (lane + 1) * share - 1;
    const bool before = last < high && p.offsets[2 * last] < row;
    low += __popc(__ballot_sync(kAllLanes, before)) * share;
    high = low + share - 1 < high ? low + share - 1 : high;
  }
  return low;
}

__device__ int clamp_to_tile(int64_t row) {
  return static_cast<int>(row < 0 ? 0 : row < kTile ? row : kTile);
}

__device__ Piece piece_of(const Problem& p, int64_t s, int64_t start) {
  if (s >= p.G * p.K) return {-1, 0, 0, 0, false, false};
  const int64_t begin = p.offsets[2 * s] - start;
  if (begin >= kTile) return {-1, 0, 0, 0, false, false};
  const int64_t middle = p.offsets[2 * s + 1] - start, end = p.offsets[2 * s + 2] - start;
  return {s, clamp_to_tile(begin), clamp_to_tile(middle), clamp_to_tile(end), begin<0, end> kTile};
}

__device__ Piece from_lane(Piece x, int lane) {
  return {__shfl_sync(kAllLanes, x.sequence, lane),    __shfl_sync(kAllLanes, x.begin, lane),
          __shfl_sync(kAllLanes, x.middle, lane),      __shfl_sync(kAllLanes, x.end, lane),
          __shfl_sync(kAllLanes, x.enters, lane) != 0, __shfl_sync(kAllLanes, x.leaves, lane) != 0};
}

// Calls visit(piece, width) for every piece of the tile, with `width` neighbouring lanes on each;
// all lanes of the warp make the call together, some perhaps without a piece.
template <typename Visit>
__device__ void for_each_piece(const Problem& p, int64_t tile, int64_t first, int lane,
                               Visit visit) {
  // The sequence before the first one begins in an earlier tile and may reach this one.
  for (int64_t s = first > 0 ? first - 1 : 0;; s += kLanes) {
    const Piece own = piece_of(p, s + lane, tile * kTile);
    const int pieces = __popc(__ballot_sync(kAllLanes, own.sequence >= 0));
    const int width = __any_sync(kAllLanes, own.end - own.begin > kShort) ? kTeam : 1;
    for (int done = 0; done < pieces; done += kLanes / width) {
      visit(from_lane(own, done + lane / width), width);
    }
    if (pieces < kLanes) return;
  }
}

// Calls visit(row of the tile, its logp, the same of `second`, 0 where that is null), each lane
// for every 32nd row; between the loads, which are all in flight together, and the visits comes
// meanwhile().
template <typename Meanwhile, typename Visit>
__device__ void for_each_row(const Problem& p, const float* second, int64_t tile, int lane,
                             Meanwhile meanwhile, Visit visit) {
  float x[kRowsPerLane], y[kRowsPerLane];
#pragma unroll
  for (int k = 0; k < kRowsPerLane; ++k) {
    const int64_t i = tile * kTile + k * kLanes + lane;
    x[k] = i < p.N ? p.logp[i] : 0.0f;
    y[k] = i < p.N && second != nullptr ? second[i] : 0.0f;
  }
  meanwhile();
#pragma unroll
  for (int k = 0; k < kRowsPerLane; ++k) visit(k * kLanes + lane, x[k], y[k]);
}

__device__ void finish_sequence(const Problem& p, int64_t s, Sums sums) {
  p.rationale_logp[s] = static_cast<float>(sums.rationale);
  p.kl[s] = static_cast<float>(sums.divergence);
  p.answer_logp[s] = static_cast<float>(sums.answer);
  // Without weight an infinite KL counts for nothing, and is no NaN.
  p.rewards[s] = p.k3 || p.beta == 0.0 ? sums.answer : sums.answer - p.beta * sums.divergence;
}

__device__ void sum_tile(const Problem& p, int64_t tile, Rows& rows, int lane) {
  int64_t first;
  for_each_row(
      p, p.ref_logp != nullptr ? p.ref_logp : p.row_kl, tile, lane,
      [&] { first = first_from(p, tile * kTile, lane); },
      [&](int row, float logp, float second) {
        const double d = static_cast<double>(second) - logp;
        rows.logp[row] = logp;
        rows.made[row] = p.ref_logp == nullptr ? second : p.k3 ? expm1(d) - d : -d;
      });
  __syncwarp();
  for_each_piece(p, tile, first, lane, [&](Piece piece, int width) {
    const int member = lane % width;
    Sums sums{};
    for (int row = piece.begin + member; row < piece.middle; row += width) {
      sums.rationale += rows.logp[row];
      sums.divergence += rows.made[row];
    }
    for (int row = piece.middle + member; row < piece.end; row += width) {
      sums.answer += rows.logp[row];
    }
    sums = add_lanes(sums, width);
    if (member != 0 || piece.sequence < 0) return;
    if (piece.enters) {
      p.tiles[tile].entering = sums;
    } else if (piece.leaves) {
      p.tiles[tile].leaving = sums;
    } else {
      finish_sequence(p, piece.sequence, sums);
    }
  });
  if (lane == 0) p.tiles[tile].first = first;
  __syncwarp();  // `rows` is free for the next tile
}

__device__ void join_tiles(const Problem& p, int64_t tile, int lane) {
  if (tile + 1 == p.num_tiles) return;
  const int64_t s = p.tiles[tile + 1].first - 1;  // the last that begins here, if any does
  if (s < p.tiles[tile].first) return;
  const int64_t end = p.offsets[2 * s + 2];
  if (end <= (tile + 1) * kTile) return;
  Sums sums{};
#pragma unroll 4
  for (int64_t t = tile + 1 + lane; t <= (end - 1) / kTile; t += kLanes) {
    sums = sums + p.tiles[t].entering;
  }
  sums = add_lanes(sums, kLanes);
  if (lane == 0) finish_sequence(p, s, p.tiles[tile].leaving + sums);
}

// Groups share a warp where K is small: `width`, a power of two, is the lanes of each.
__device__ void finish_group(const Problem& p, int64_t group, int width, int lane) {
  const int64_t first = group * p.K;
  const int64_t K = group < p.G ? p.K : 0;
  const int member = lane % width;
  double lowest = kInfinity, members = 0.0;
#pragma unroll 8
  for (int64_t k = member; k < K; k += width) {
    if (is_excluded(p, first + k)) continue;
    lowest = lower(p.rewards[first + k], lowest);
    members += 1.0;
  }
  lowest = lowest_of_lanes(lowest, width);
  members = add_lanes(members, width);
  // Rewards are centred on the lowest one, so that equal rewards give exactly 0. An unfinished
  // sequence adds nothing: it is left out, or it has the lowest reward.
  double excess = 0.0;
  for (int64_t k = member; k < K; k += width) {
    if (!is_unfinished(p, first + k)) excess += p.rewards[first + k] - lowest;
  }
  excess = add_lanes(excess, width);
  for (int64_t k = member; k < K; k += width) {
    const int64_t s = first + k;
    const bool excluded = is_excluded(p, s);
    const double reward = is_unfinished(p, s) && !excluded ? lowest : p.rewards[s];
    const double advantage =
        excluded || members < 2.0 ? 0.0 : (members * (reward - lowest) - excess) / (members - 1.0);
    p.reward[s] = static_cast<float>(reward);
    p.advantage[s] = static_cast<float>(advantage);
    p.rewards[s] = advantage;
  }
}

__device__ void write_tile(const Problem& p, int64_t tile, Rows& rows, int lane) {
  const bool pulled = p.k3 && p.beta != 0.0 && p.ref_logp != nullptr;
  if (pulled) {
    for_each_row(
        p, p.ref_logp, tile, lane, [] {},
        [&](int row, float logp, float ref_logp) {
          rows.made[row] = p.beta * expm1(static_cast<double>(ref_logp) - logp);
        });
    __syncwarp();
  }
  float* coefficient = p.coefficient + tile * kTile;
  for_each_piece(p, tile, p.tiles[tile].first, lane, [&](Piece piece, int width) {
    if (piece.sequence < 0) return;
    const bool excluded = is_excluded(p, piece.sequence);
    const double advantage = p.rewards[piece.sequence];
    const auto answer = static_cast<float>(-p.scale * p.answer_weight);
    const int member = lane % width;
    for (int row = piece.begin + member; row < piece.middle; row += width) {
      const double weight = pulled ? advantage + rows.made[row] : advantage;
      coefficient[row] = excluded ? 0.0f : static_cast<float>(-p.scale * weight);
    }
    for (int row = piece.middle + member; row < piece.end; row += width) {
      coefficient[row] = excluded ? 0.0f : answer;
    }
  });
  __syncwarp();
}

__global__ void __launch_bounds__(kThreads, kBlocks) group_advantage_kernel(Problem p) {
  __shared__ Rows shared[kWarps];
  const auto grid = cooperative_groups::this_grid();
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t t = first; t < p.num_tiles; t += step) sum_tile(p, t, shared[warp], lane);
  grid.sync();
  for (int64_t t = first; t < p.num_tiles; t += step) join_tiles(p, t, lane);
  grid.sync();
  int width = 1;
  while (width < p.K && width < kLanes) width *= 2;
  const int64_t groups = kLanes / width;
  for (int64_t g = first * groups; g < p.G; g += step * groups) {
    finish_group(p, g + lane / width, width, lane);
  }
  grid.sync();
  for (int64_t t = first; t < p.num_tiles; t += step) write_tile(p, t, shared[warp], lane);
}

}  // namespace

int32_t latro_cuda_group_advantage_forward(const float* logp, const float* ref_logp,
                                           const float* row_kl, const int64_t* offsets,
                                           const uint8_t* finished, float* reward,
                                           float* answer_logp, float* rationale_logp, float* kl,
                                           float* advantage, float* coefficient, double* scratch,
                                           int64_t N, int64_t G, int64_t K, double scale,
                                           double beta, double answer_weight, int32_t k3,
                                           int32_t exclude_unfinished, void* stream) {
  if (G == 0) return LATRO_OK;
  const int64_t num_tiles = N / kTile + 1;  // an empty sequence may begin at row N
  Problem problem{logp,
                  ref_logp,
                  row_kl,
                  offsets,
                  finished,
                  reward,
                  answer_logp,
                  rationale_logp,
                  kl,
                  advantage,
                  coefficient,
                  scratch,
                  reinterpret_cast<Tile*>(scratch + G * K),
                  N,
                  G,
                  K,
                  num_tiles,
                  scale,
                  beta,
                  answer_weight,
                  k3 != 0,
                  exclude_unfinished != 0};
  int device, processors, blocks;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, group_advantage_kernel, kThreads, 0) ==
          cudaSuccess) {
    // The barriers need every block to be resident; tiles beyond them are reached by striding.
    const int64_t resident = static_cast<int64_t>(processors) * blocks;
    const int64_t wanted = (num_tiles + kWarps - 1) / kWarps;
    void* arguments[] = {&problem};
    cudaLaunchCooperativeKernel(group_advantage_kernel,
                                static_cast<unsigned>(wanted < resident ? wanted : resident),
                                kThreads, arguments, 0, static_cast<cudaStream_t>(stream));
  }
  return cudaGetLastError();
}
