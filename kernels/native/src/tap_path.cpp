// A whole scale of the tap path: normalisation, projections, attention and the sum of both
// branches.
//
// Positions go through in blocks of rows that hold everything of a position side by side,
//   [normalised feature | normalised gradient | fused],
// so that the last product takes skip and projection at once: out = [skip | proj] row + biases.
// With attention across positions the rows of a whole sample are kept until every key and value is
// there.
#include "attention.h"
#include "table.h"
#include "taps.h"

namespace fs::FS_ISA {
namespace {

// positions that go through the products at a time
constexpr int64_t kRows = 48;
// positions of which a product costs less than handing its weights to another processor
constexpr int64_t kFewPositions = 128;
// products worth a thread of their own: about 10 microseconds
constexpr int64_t kProductGrain = 1 << 19;

struct Matrix {
  const void *weight, *bias;
};

struct Scale {
  TapProblem taps;
  Matrix query, kv_feature, kv_gradient, skip, proj;
  int64_t width, heads;
  bool spatial;
};

// Every weight of a scale, packed, and the biases as floats.
struct Packed {
  Panels feature, gradient, out;  // [query | kv_feature], kv_gradient, [skip | proj]
  float *feature_weight, *gradient_weight, *out_weight;
  float *feature_bias, *gradient_bias, *out_bias;

  explicit Packed(const Scale& s)
      : feature(3 * s.width, s.taps.channels),
        gradient(2 * s.width, s.taps.channels),
        out(s.width, 2 * s.taps.channels + s.width) {}

  size_t bytes() const {
    return bytes(feature) + bytes(gradient) + bytes(out) +
           Carver::bytes<float>(out.padded_columns());
  }
  static size_t bytes(const Panels& p) {
    return Carver::bytes<float>(p.size()) + Carver::bytes<float>(p.padded_columns());
  }
  void take(Carver& carver) {
    feature_weight = carver.take<float>(feature.size());
    gradient_weight = carver.take<float>(gradient.size());
    out_weight = carver.take<float>(out.size());
    feature_bias = carver.take<float>(feature.padded_columns());
    gradient_bias = carver.take<float>(gradient.padded_columns());
    // and room for the second of its two terms
    out_bias = carver.take<float>(2 * out.padded_columns());
  }

  // the panels that a thread of a team packs and, with few positions, multiplies
  static Range share(const Panels& p, Team team) { return team.share(p.count); }

  // a thread's share of the weights; the biases are the first one's
  void fill(const Scale& s, Team team) const {
    const int64_t c = s.taps.channels, w = s.width;
    pack(s, team, s.query, w, c, feature, feature_weight, 0, 0);
    pack(s, team, s.kv_feature, 2 * w, c, feature, feature_weight, w, 0);
    pack(s, team, s.kv_gradient, 2 * w, c, gradient, gradient_weight, 0, 0);
    pack(s, team, s.skip, w, 2 * c, out, out_weight, 0, 0);
    pack(s, team, s.proj, w, w, out, out_weight, 0, 2 * c);
    if (team.id > 0) return;
    pack_padding(feature, feature_weight);
    pack_padding(gradient, gradient_weight);
    pack_padding(out, out_weight);
    const int dtype = s.taps.parameter_dtype;
    to_floats(s.query.bias, dtype, 0, w, feature_bias);
    to_floats(s.kv_feature.bias, dtype, 0, 2 * w, feature_bias + w);
    to_floats(s.kv_gradient.bias, dtype, 0, 2 * w, gradient_bias);
    float* second = out_bias + out.padded_columns();
    to_floats(s.skip.bias, dtype, 0, w, out_bias);
    to_floats(s.proj.bias, dtype, 0, w, second);
    for (int64_t i = 0; i < w; ++i) out_bias[i] += second[i];
  }

  // the rows of a matrix, columns from `first` on, that lie in a thread's panels
  static void pack(const Scale& s, Team team, const Matrix& matrix, int64_t rows, int64_t depth,
                   const Panels& panels, float* packed, int64_t first, int64_t start) {
    const Range mine = share(panels, team);
    if (mine.begin == mine.end) return;
    int64_t begin = panels.columns_of(mine.begin).begin - first;
    int64_t end = panels.columns_of(mine.end - 1).end - first;
    if (begin < 0) begin = 0;
    if (end > rows) end = rows;
    if (begin >= end) return;
    with_dtype(s.taps.parameter_dtype, [&](auto* type) {
      const auto* weight = static_cast<decltype(type)>(const_cast<void*>(matrix.weight));
      pack_rows(panels, packed, first + begin, end - begin, start, depth, weight + begin * depth,
                depth);
      return 0;
    });
  }
};

// Rows of positions: inputs and result of the last product, and what comes from the first two.
struct RowsMemory {
  float *row, *feature, *gradient;
  int64_t row_stride, feature_stride, gradient_stride;

  explicit RowsMemory(const Packed& p)
      : row_stride(apart(p.out.depth)),
        feature_stride(apart(p.feature.padded_columns())),
        gradient_stride(apart(p.gradient.padded_columns())) {}
  // rows a little apart from whole pages do not compete for the same sets of the cache
  static int64_t apart(int64_t columns) { return padded(columns) + 16; }

  size_t bytes(int64_t rows) const {
    return Carver::bytes<float>(rows * row_stride) + Carver::bytes<float>(rows * feature_stride) +
           Carver::bytes<float>(rows * gradient_stride);
  }
  void take(Carver& carver, int64_t rows) {
    row = carver.take<float>(rows * row_stride);
    feature = carver.take<float>(rows * feature_stride);
    gradient = carver.take<float>(rows * gradient_stride);
  }
  RowsMemory from(int64_t position) const {
    RowsMemory m = *this;
    m.row += position * row_stride;
    m.feature += position * feature_stride;
    m.gradient += position * gradient_stride;
    return m;
  }
};

template <class T>
struct Path {
  const Scale& scale;
  const Packed& packed;
  Taps<T> taps;
  Tensor<T> out;
  RowsMemory rows;  // of kRows positions, or of all that a sample has
  float *weights, *result;
  void* attention;

  int64_t channels() const { return scale.taps.channels; }

  TapTokens<float> tokens(const RowsMemory& m) const {
    return {m.feature,        {m.feature + scale.width, m.gradient},
            m.feature_stride, {m.feature_stride, m.gradient_stride},
            scale.width,      scale.taps.positions,
            scale.heads};
  }

  // both normalised taps of `count` positions from `begin` on
  void normalise(int64_t sample, int64_t begin, int64_t count, const RowsMemory& m) const {
    for (int64_t r = 0; r < count; ++r) {
      float* row = m.row + r * m.row_stride;
      taps.feature_map.row(taps.feature.at(sample, begin + r), row, channels());
      taps.gradient_map.row(taps.gradient.at(sample, begin + r), row + channels(), channels());
    }
  }

  // queries, keys and values of `count` positions, in the columns that a team's thread has
  void project(Team team, int64_t count, const RowsMemory& m) const {
    gemm_panels<Start::kRow>(packed.feature, Packed::share(packed.feature, team), count,
                             {m.row, m.row_stride, 1}, packed.feature_weight, packed.feature_bias,
                             m.feature, m.feature_stride);
    gemm_panels<Start::kRow>(packed.gradient, Packed::share(packed.gradient, team), count,
                             {m.row + channels(), m.row_stride, 1}, packed.gradient_weight,
                             packed.gradient_bias, m.gradient, m.gradient_stride);
  }

  void weigh(int64_t count, const RowsMemory& m) const {
    const Rows r{m.feature,        m.feature + scale.width, m.gradient,
                 m.feature_stride, m.feature_stride,        m.gradient_stride};
    weigh_rows(r, count, scale.width, scale.heads, m.row + 2 * channels(), m.row_stride, weights);
  }

  // the result of `count` positions from `begin` on, in the columns that a team's thread has
  void finish(Team team, int64_t sample, int64_t begin, int64_t count, const RowsMemory& m) const {
    T* to = out.data + sample * out.batch + begin * out.position;
    const Left left{m.row, m.row_stride, 1};
    const Range panels = Packed::share(packed.out, team);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (scale.width % kLanes == 0) {
        gemm_panels<Start::kRow>(packed.out, panels, count, left, packed.out_weight,
                                 packed.out_bias, to, out.position);
        return;
      }
    }
    if (panels.begin == panels.end) return;
    const int64_t stride = packed.out.padded_columns();
    gemm_panels<Start::kRow>(packed.out, panels, count, left, packed.out_weight, packed.out_bias,
                             result, stride);
    const int64_t first = packed.out.columns_of(panels.begin).begin;
    const int64_t last = packed.out.columns_of(panels.end - 1).end;
    const int64_t columns = (last < scale.width ? last : scale.width) - first;
    for (int64_t r = 0; r < count; ++r) {
      convert_row(result + r * stride + first, columns, to + r * out.position + first);
    }
  }

  template <class Body>
  void in_blocks(Range range, Body&& body) const {
    for (int64_t n = range.begin; n < range.end; n += kRows) {
      body(n, range.end - n < kRows ? range.end - n : kRows);
    }
  }

  // One sample by a team; `whole` are the rows of a sample that its threads share.
  void run(Team team, int64_t sample, int64_t slot, const RowsMemory& whole) const {
    const Range blocks = team.share(taps.blocks.count);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) taps.first(sample, slot, b);
    team.barrier();
    taps.finish(sample, slot, team.id == 0);
    const Range mine = team.share(scale.taps.positions);
    const Team one{0, 1};
    if (!scale.spatial) {
      in_blocks(mine, [&](int64_t n, int64_t count) {
        normalise(sample, n, count, rows);
        project(one, count, rows);
        weigh(count, rows);
        finish(one, sample, n, count, rows);
      });
      return;
    }
    // with few positions threads share columns: the weights would cost more to hand over than to
    // use
    const bool by_columns =
        scale.taps.positions <= kFewPositions && team.count > 1 && team.count <= packed.out.count;
    const Team columns = by_columns ? team : one;
    const Range range = by_columns ? Range{0, scale.taps.positions} : mine;
    in_blocks(mine, [&](int64_t n, int64_t count) { normalise(sample, n, count, whole.from(n)); });
    if (by_columns) team.barrier();
    in_blocks(range, [&](int64_t n, int64_t count) { project(columns, count, whole.from(n)); });
    team.barrier();
    attend_share(team, whole);
    team.barrier();
    in_blocks(range,
              [&](int64_t n, int64_t count) { finish(columns, sample, n, count, whole.from(n)); });
  }

  // a head's queries are shared out where heads do not come out even
  void attend_share(Team team, const RowsMemory& whole) const {
    const int64_t parts = scale.heads % team.count == 0 ? 1 : team.count;
    const Range mine = team.share(scale.heads * parts);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t n = scale.taps.positions, part = i % parts;
      attend(tokens(whole), i / parts, Range{n * part / parts, n * (part + 1) / parts},
             whole.row + 2 * channels(), whole.row_stride, attention);
    }
  }
};

// Memory of a call: what all threads share, then what each has of its own.
template <class T>
struct Memory {
  const Scale& scale;
  Packed packed;
  RowsMemory rows;
  Blocks blocks;
  int64_t step, partials, samples;  // samples: how many have their rows kept
  size_t shared_bytes, own_bytes, attention_bytes;
  float* moments;
  double* sums;
  char *whole, *own;

  Memory(const Scale& s, int threads)
      : scale(s),
        packed(s),
        rows(packed),
        blocks(blocks_of(s.taps.positions)),
        step(padded(s.taps.channels)),
        partials(slots_of(threads) * blocks.count * 2 * step),
        samples(!s.spatial               ? 0
                : s.taps.batch < threads ? 1
                                         : threads),
        attention_bytes(0) {
    if (s.spatial) attention_bytes = attend_memory(2 * s.taps.positions, s.width / s.heads);
    shared_bytes =
        packed.bytes() + Carver::bytes<float>(partials) + Carver::bytes<double>(partials);
    own_bytes = Carver::bytes<float>(8 * step) + Carver::bytes<double>(2 * step) +
                Carver::bytes<float>(padded(kRows * s.heads)) +
                Carver::bytes<float>(kRows * packed.out.padded_columns()) +
                (s.spatial ? attention_bytes : rows.bytes(kRows));
  }

  bool take(int threads) {
    const size_t whole_bytes = static_cast<size_t>(samples) * rows.bytes(scale.taps.positions);
    char* memory = static_cast<char*>(
        scratch(shared_bytes + whole_bytes + static_cast<size_t>(threads) * own_bytes));
    if (memory == nullptr) return false;
    Carver carver(memory);
    packed.take(carver);
    moments = carver.take<float>(partials);
    sums = carver.take<double>(partials);
    whole = memory + shared_bytes;
    own = whole + whole_bytes;
    return true;
  }
  RowsMemory sample_rows(int64_t index) const {
    RowsMemory m = rows;
    if (samples == 0) return m;
    Carver carver(whole + static_cast<size_t>(index) * rows.bytes(scale.taps.positions));
    m.take(carver, scale.taps.positions);
    return m;
  }
};

// an input that is read where it lies
template <class T>
Input<T> tap_input(Tensor<const T> x) {
  Input<T> input(x, Tensor<T>{nullptr, 0, 1, 0}, 2, 2);
  return input;
}

template <class T>
int run(const Scale& scale, Tensor<const T> feature, Tensor<const T> gradient, Tensor<T> out) {
  const int64_t c = scale.taps.channels, w = scale.width, batch = scale.taps.batch;
  const int64_t work = batch * scale.taps.positions * w * (7 * c + w);
  const int threads = threads_for(work, batch * scale.taps.positions, kProductGrain);
  Memory<T> memory(scale, threads);
  if (!memory.take(threads)) return FS_NO_MEMORY;
  parallel(threads, [&](Team team) {
    Carver carver(memory.own + static_cast<size_t>(team.id) * memory.own_bytes);
    float* map = carver.take<float>(8 * memory.step);
    double* sums = carver.take<double>(2 * memory.step);
    float* weights = carver.take<float>(padded(kRows * scale.heads));
    float* result = carver.take<float>(kRows * memory.packed.out.padded_columns());
    RowsMemory rows = memory.rows;
    void* attention = carver.take<char>(0);
    if (!scale.spatial) rows.take(carver, kRows);
    const Path<T> path{scale,
                       memory.packed,
                       {scale.taps, tap_input<T>(feature), tap_input<T>(gradient), memory.blocks,
                        memory.step, memory.moments, memory.sums, Map(map, memory.step),
                        Map(map + 4 * memory.step, memory.step), sums, sums + memory.step},
                       out,
                       rows,
                       weights,
                       result,
                       attention};
    memory.packed.fill(scale, team);
    // whole samples a thread, as long as there are enough for all; the others together
    const int64_t alone = batch / team.count;
    // without these there is another barrier before weights are used
    if (alone > 0) team.barrier();
    for (int64_t sample = alone * team.id; sample < alone * (team.id + 1); ++sample) {
      path.run(Team{0, 1}, sample, team.id, memory.sample_rows(team.id));
    }
    for (int64_t sample = alone * team.count; sample < batch; ++sample) {
      path.run(team, sample, team.count + sample - alone * team.count, memory.sample_rows(0));
    }
  });
  return FS_OK;
}

}  // namespace

int tap_path(const void* feature, int64_t f_batch, int64_t f_position, const void* gradient,
             int64_t g_batch, int64_t g_position, void* out, int64_t out_batch,
             int64_t out_position, int dtype, const void* feature_weight, const void* feature_bias,
             const void* gradient_weight, const void* gradient_bias, const void* query_weight,
             const void* query_bias, const void* kv_feature_weight, const void* kv_feature_bias,
             const void* kv_gradient_weight, const void* kv_gradient_bias, const void* skip_weight,
             const void* skip_bias, const void* proj_weight, const void* proj_bias,
             int parameter_dtype, float* log_rms, int64_t batch, int64_t channels, int64_t width,
             int64_t positions, int64_t groups, int64_t heads, int spatial, double eps) {
  const TapProblem taps{feature_weight,  feature_bias, gradient_weight, gradient_bias,
                        parameter_dtype, log_rms,      nullptr,         batch,
                        channels,        positions,    groups,          eps};
  const Scale scale{taps,
                    {query_weight, query_bias},
                    {kv_feature_weight, kv_feature_bias},
                    {kv_gradient_weight, kv_gradient_bias},
                    {skip_weight, skip_bias},
                    {proj_weight, proj_bias},
                    width,
                    heads,
                    spatial != 0};
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return run(scale, Tensor<const T>{static_cast<const T*>(feature), f_batch, 1, f_position},
               Tensor<const T>{static_cast<const T*>(gradient), g_batch, 1, g_position},
               Tensor<T>{static_cast<T*>(out), out_batch, 1, out_position});
  });
}

}  // namespace fs::FS_ISA
