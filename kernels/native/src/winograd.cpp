// Convolution with a 3 x 3 kernel, stride 1 and padding 1 by Winograd's minimal filtering
// F(2 x 2, 3 x 3) (Lavin and Gray 2016): 16 products where a tile of 2 x 2 outputs takes 36.
//
// Some tiles at a time go through three stages: input tiles are transformed, each of the 16 places of
// a tile is a matrix product over channels, and the products are transformed back. Threads take
// tiles of their own; where there are few, they share the products of all, with a barrier after each
// stage. An output is the same chain of sums wherever its tile is worked on, so its bits depend
// neither on the batch nor on the threads.
#include "gemm.h"
#include "table.h"

namespace fs::FS_ISA {
namespace {

constexpr int64_t kPlaces = 16;
// what a packed weight starts with: the layout is that of one instruction set
constexpr int64_t kHeader = 16;
// products worth a thread of their own: about 10 microseconds
constexpr int64_t kProductGrain = 1 << 19;
// tiles between two stages: at most so many, and what a second-level cache holds of them
constexpr int64_t kTiles = 96;
constexpr int64_t kCached = 3 << 18;
// a thread with fewer tiles than this would read the weight for little
constexpr int64_t kAlone = 24;

struct Problem {
  const float* x;
  const float* weight;
  const float* bias;
  float* y;
  int64_t batch, height, width, in, out;

  int64_t tiles_down() const { return (height + 1) / 2; }
  int64_t tiles_across() const { return (width + 1) / 2; }
  int64_t tiles() const { return batch * tiles_down() * tiles_across(); }
};

// Where a tile lies: its sample, and the place of its first output.
struct Tile {
  int64_t sample, row, column;
};

FS_INLINE Tile tile_at(const Problem& p, int64_t index) {
  const int64_t across = p.tiles_across(), in_sample = index % (p.tiles_down() * across);
  return {index / (p.tiles_down() * across), in_sample / across * 2, in_sample % across * 2};
}

// B^T d of four vectors
FS_INLINE void input_line(Vf d0, Vf d1, Vf d2, Vf d3, Vf* out, int step) {
  out[0] = d0 - d2;
  out[step] = d1 + d2;
  out[2 * step] = d2 - d1;
  out[3 * step] = d1 - d3;
}

// values[place * rows * in + row * in + c] of the tile `index`, row its number among those at hand
static void transform_input(const Problem& p, int64_t index, int64_t row, int64_t rows,
                            const float* zeros, float* values) {
  const Tile tile = tile_at(p, index);
  const float* from[4][4];
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t r = tile.row - 1 + i, c = tile.column - 1 + j;
      const bool inside = r >= 0 && r < p.height && c >= 0 && c < p.width;
      from[i][j] = inside ? p.x + ((tile.sample * p.height + r) * p.width + c) * p.in : zeros;
    }
  }
  float* to = values + row * p.in;
  for (int64_t c = 0; c < p.in; c += kLanes) {
    const int lanes = lanes_left(p.in, c);
    Vf half[4][4], whole[4][4];
    for (int j = 0; j < 4; ++j) {
      input_line(load_lanes(from[0][j] + c, lanes), load_lanes(from[1][j] + c, lanes),
                 load_lanes(from[2][j] + c, lanes), load_lanes(from[3][j] + c, lanes), &half[0][j],
                 4);
    }
    for (int i = 0; i < 4; ++i) {
      input_line(half[i][0], half[i][1], half[i][2], half[i][3], whole[i], 1);
      for (int j = 0; j < 4; ++j) {
        store_lanes(to + (4 * i + j) * rows * p.in + c, whole[i][j], lanes);
      }
    }
  }
}

// A^T m A and the bias, to the outputs of the tile that are in the image
static void transform_output(const Problem& p, int64_t index, int64_t row, int64_t rows,
                             int64_t stride, const float* products) {
  const Tile tile = tile_at(p, index);
  const float* from = products + row * stride;
  const int64_t down = p.height - tile.row < 2 ? 1 : 2, across = p.width - tile.column < 2 ? 1 : 2;
  float* to = p.y + ((tile.sample * p.height + tile.row) * p.width + tile.column) * p.out;
  for (int64_t c = 0; c < p.out; c += kLanes) {
    const int lanes = lanes_left(p.out, c);
    Vf half[2][4];
    for (int j = 0; j < 4; ++j) {
      // rows are whole vectors
      const float* m = from + j * rows * stride + c;
      const Vf m0 = load(m), m1 = load(m + 4 * rows * stride), m2 = load(m + 8 * rows * stride),
               m3 = load(m + 12 * rows * stride);
      half[0][j] = (m0 + m1) + m2;
      half[1][j] = (m1 - m2) - m3;
    }
    const Vf bias = p.bias == nullptr ? zero() : load_lanes(p.bias + c, lanes);
    for (int64_t i = 0; i < down; ++i) {
      const Vf* h = half[i];
      float* line = to + i * p.width * p.out + c;
      store_lanes(line, ((h[0] + h[1]) + h[2]) + bias, lanes);
      if (across == 2) store_lanes(line + p.out, ((h[1] - h[2]) - h[3]) + bias, lanes);
    }
  }
}

struct Memory {
  float *zeros, *values, *products;

  static size_t bytes(const Problem& p, const Panels& panels, int64_t tiles) {
    return Carver::bytes<float>(padded(p.in)) + Carver::bytes<float>(kPlaces * tiles * p.in) +
           Carver::bytes<float>(kPlaces * tiles * panels.padded_columns());
  }
  Memory(void* memory, const Problem& p, const Panels& panels, int64_t tiles) {
    Carver carver(memory);
    zeros = carver.take<float>(padded(p.in));
    values = carver.take<float>(kPlaces * tiles * p.in);
    products = carver.take<float>(kPlaces * tiles * panels.padded_columns());
    for (int64_t c = 0; c < padded(p.in); ++c) zeros[c] = 0.0f;
  }
};

// `rows` tiles from `first` on
static void run_tiles(const Problem& p, const Panels& panels, Team team, int64_t first,
                      int64_t rows, const Memory& m) {
  const int64_t stride = panels.padded_columns();
  const Range mine = team.share(rows);
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    transform_input(p, first + row, row, rows, m.zeros, m.values);
  }
  team.barrier();
  const Range items = team.share(kPlaces * panels.count);
  for (int64_t item = items.begin; item < items.end;) {
    const int64_t place = item / panels.count, panel = item % panels.count;
    int64_t last = (place + 1) * panels.count;
    if (last > items.end) last = items.end;
    gemm_panels<Start::kZero>(panels, {panel, panel + last - item}, rows,
                              {m.values + place * rows * p.in, p.in, 1},
                              p.weight + kHeader + place * panels.size(), nullptr,
                              m.products + place * rows * stride, stride);
    item = last;
  }
  team.barrier();
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    transform_output(p, first + row, row, rows, stride, m.products);
  }
}

}  // namespace

int winograd_pack(const float* transformed, float* packed, int64_t in, int64_t out) {
  const Panels panels(out, in);
  for (int64_t i = 0; i < kHeader; ++i) packed[i] = 0.0f;
  packed[0] = kLanes;
  packed[1] = kTileVectors;
  for (int64_t place = 0; place < kPlaces; ++place) {
    float* to = packed + kHeader + place * panels.size();
    pack_rows(panels, to, 0, out, 0, in, transformed + place * in * out, in);
    pack_padding(panels, to);
  }
  return FS_OK;
}

int winograd(const float* x, const float* packed, const float* bias, float* y, int64_t batch,
             int64_t height, int64_t width, int64_t in, int64_t out) {
  if (packed[0] != kLanes || packed[1] != kTileVectors) return FS_UNSUPPORTED;
  const Problem p{x, packed, bias, y, batch, height, width, in, out};
  const Panels panels(out, in);
  const int64_t tiles = p.tiles();
  const int threads =
      threads_for(tiles * kPlaces * in * out, kPlaces * panels.count, kProductGrain);
  const bool alone = threads == 1 || tiles >= kAlone * threads;
  int64_t most = kCached / (kPlaces * 4 * (in + panels.padded_columns())) / kTileRows * kTileRows;
  if (!alone) most *= threads;
  if (most < kAlone) most = kAlone;
  if (most > kTiles) most = kTiles;
  const size_t bytes = Memory::bytes(p, panels, most);
  char* memory = static_cast<char*>(scratch(bytes * static_cast<size_t>(alone ? threads : 1)));
  if (memory == nullptr) return FS_NO_MEMORY;
  // rounds of nearly equal size
  const auto run = [&](Team team, Range mine, const Memory& m) {
    const int64_t count = mine.end - mine.begin, rounds = (count + most - 1) / most;
    for (int64_t i = 0; i < rounds; ++i) {
      const int64_t begin = mine.begin + count * i / rounds;
      // nobody overtakes: what another thread may still read is written two barriers later
      run_tiles(p, panels, team, begin, mine.begin + count * (i + 1) / rounds - begin, m);
    }
  };
  if (alone) {
    parallel(threads, [&](Team team) {
      const Memory m(memory + bytes * static_cast<size_t>(team.id), p, panels, most);
      run(Team{0, 1}, team.share(tiles), m);
    });
  } else {
    const Memory m(memory, p, panels, most);
    parallel(threads, [&](Team team) { run(team, {0, tiles}, m); });
  }
  return FS_OK;
}

}  // namespace fs::FS_ISA
