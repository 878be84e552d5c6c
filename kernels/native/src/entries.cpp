// The C interface: arguments are checked here, the work is done by the table in use.
#include "check.h"
#include "table.h"

using fs::channels_last;
using fs::contiguous;
using fs::known_dtype;
using fs::sizes_fit;
using fs::table;

#define FS_REQUIRE(condition) \
  if (!(condition)) return FS_BAD_ARGUMENT

namespace {

// the layouts of two or three tensors agree
template <class... Flags>
bool all(Flags... flags) {
  return (flags && ...);
}

bool film_fits(const void* film, int64_t stride, int dtype, int64_t batch, int64_t channels) {
  return film == nullptr ||
         (known_dtype(dtype) && (batch == 1 || stride >= 0) && sizes_fit(2, channels));
}

bool heads_fit(int64_t channels, int64_t heads) { return heads > 0 && channels % heads == 0; }

bool token_layout(int64_t batch_stride, int64_t position_stride, int64_t batch, int64_t channels,
                  int64_t positions, bool written) {
  return channels_last({batch_stride, 1, position_stride}, batch, channels, positions, written);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int fs_norm_act(const void* x, int64_t x_batch, int64_t x_channel, int64_t x_position, void* y,
                int64_t y_batch, int64_t y_channel, int64_t y_position, int dtype,
                const void* weight, const void* bias, int parameter_dtype, const void* film,
                int64_t film_stride, int film_dtype, float* mean, float* rstd, int64_t batch,
                int64_t channels, int64_t positions, int64_t groups, int act, double eps) {
  FS_REQUIRE(x && y && weight && bias && known_dtype(dtype) && known_dtype(parameter_dtype));
  FS_REQUIRE(sizes_fit(batch, channels, positions) && groups > 0 && channels % groups == 0 &&
             eps >= 0);
  FS_REQUIRE(film_fits(film, film_stride, film_dtype, batch, channels));
  const fs::Strides xs{x_batch, x_channel, x_position}, ys{y_batch, y_channel, y_position};
  FS_REQUIRE(all(channels_last(xs, batch, channels, positions, false),
                 channels_last(ys, batch, channels, positions, true)) ||
             all(contiguous(xs, batch, channels, positions, false),
                 contiguous(ys, batch, channels, positions, true)));
  return table().norm_act(x, x_batch, x_channel, x_position, y, y_batch, y_channel, y_position,
                          dtype, weight, bias, parameter_dtype, film, film_stride, film_dtype, mean,
                          rstd, batch, channels, positions, groups, act, eps);
}

int fs_norm_act_backward(const void* grad, int64_t g_batch, int64_t g_channel, int64_t g_position,
                         const void* x, int64_t x_batch, int64_t x_channel, int64_t x_position,
                         void* grad_x, int64_t o_batch, int64_t o_channel, int64_t o_position,
                         int dtype, const void* weight, const void* bias, int parameter_dtype,
                         const void* film, int64_t film_stride, int film_dtype, const float* mean,
                         const float* rstd, float* sums, int64_t batch, int64_t copies,
                         int64_t channels, int64_t positions, int64_t groups, int act) {
  FS_REQUIRE(grad && x && weight && bias && mean && rstd && known_dtype(dtype) &&
             known_dtype(parameter_dtype));
  FS_REQUIRE(sizes_fit(batch, copies, channels, positions) && groups > 0 && channels % groups == 0);
  FS_REQUIRE(film_fits(film, film_stride, film_dtype, batch, channels));
  const int64_t rows = batch * copies;
  const fs::Strides gs{g_batch, g_channel, g_position}, xs{x_batch, x_channel, x_position};
  const fs::Strides os = grad_x ? fs::Strides{o_batch, o_channel, o_position} : gs;
  const bool written = grad_x != nullptr;
  FS_REQUIRE(all(channels_last(gs, rows, channels, positions, false),
                 channels_last(xs, batch, channels, positions, false),
                 channels_last(os, rows, channels, positions, written)) ||
             all(contiguous(gs, rows, channels, positions, false),
                 contiguous(xs, batch, channels, positions, false),
                 contiguous(os, rows, channels, positions, written)));
  return table().norm_act_backward(
      grad, g_batch, g_channel, g_position, x, x_batch, x_channel, x_position, grad_x, o_batch,
      o_channel, o_position, dtype, weight, bias, parameter_dtype, film, film_stride, film_dtype,
      mean, rstd, sums, batch, copies, channels, positions, groups, act);
}

int fs_tap_norm(const void* feature, int64_t f_batch, int64_t f_channel, int64_t f_position,
                const void* gradient, int64_t g_batch, int64_t g_channel, int64_t g_position,
                void* taps, int64_t taps_batch, int64_t taps_position, int dtype,
                const void* feature_weight, const void* feature_bias, const void* gradient_weight,
                const void* gradient_bias, int parameter_dtype, float* log_rms, float* stats,
                int64_t batch, int64_t channels, int64_t positions, int64_t groups, double eps) {
  FS_REQUIRE(feature && gradient && taps && feature_weight && feature_bias && gradient_weight &&
             gradient_bias);
  FS_REQUIRE(log_rms && known_dtype(dtype) && known_dtype(parameter_dtype));
  FS_REQUIRE(sizes_fit(batch, channels, positions, 2) && groups > 0 && channels % groups == 0 &&
             eps >= 0);
  const fs::Strides f{f_batch, f_channel, f_position}, g{g_batch, g_channel, g_position};
  FS_REQUIRE(channels_last(f, batch, channels, positions, false) ||
             contiguous(f, batch, channels, positions, false));
  FS_REQUIRE(channels_last(g, batch, channels, positions, false) ||
             contiguous(g, batch, channels, positions, false));
  FS_REQUIRE(token_layout(taps_batch, taps_position, batch, 2 * channels, positions, true));
  return table().tap_norm(feature, f_batch, f_channel, f_position, gradient, g_batch, g_channel,
                          g_position, taps, taps_batch, taps_position, dtype, feature_weight,
                          feature_bias, gradient_weight, gradient_bias, parameter_dtype, log_rms,
                          stats, batch, channels, positions, groups, eps);
}

int fs_tap_fuse(const void* query, int64_t q_batch, int64_t q_position, const void* first,
                int64_t first_batch, int64_t first_position, const void* second,
                int64_t second_batch, int64_t second_position, void* out, int64_t out_batch,
                int64_t out_position, int dtype, int64_t batch, int64_t channels, int64_t positions,
                int64_t heads, int spatial) {
  FS_REQUIRE(query && first && out && known_dtype(dtype));
  FS_REQUIRE(sizes_fit(batch, channels, positions, 2) && heads_fit(channels, heads));
  FS_REQUIRE(token_layout(q_batch, q_position, batch, channels, positions, false));
  FS_REQUIRE(token_layout(first_batch, first_position, batch, 2 * channels, positions, false));
  FS_REQUIRE(!second ||
             token_layout(second_batch, second_position, batch, 2 * channels, positions, false));
  FS_REQUIRE(token_layout(out_batch, out_position, batch, channels, positions, true));
  return table().tap_fuse(query, q_batch, q_position, first, first_batch, first_position, second,
                          second_batch, second_position, out, out_batch, out_position, dtype, batch,
                          channels, positions, heads, spatial);
}

int fs_tap_fuse_backward(const void* grad, int64_t grad_batch, int64_t grad_position,
                         const void* query, int64_t q_batch, int64_t q_position, const void* first,
                         int64_t first_batch, int64_t first_position, const void* second,
                         int64_t second_batch, int64_t second_position, void* grad_query,
                         int64_t gq_batch, int64_t gq_position, void* grad_first,
                         int64_t gfirst_batch, int64_t gfirst_position, void* grad_second,
                         int64_t gsecond_batch, int64_t gsecond_position, int dtype, int64_t batch,
                         int64_t channels, int64_t positions, int64_t heads, int spatial) {
  FS_REQUIRE(grad && query && first && grad_query && grad_first && known_dtype(dtype));
  FS_REQUIRE((second == nullptr) == (grad_second == nullptr));
  FS_REQUIRE(sizes_fit(batch, channels, positions, 2) && heads_fit(channels, heads));
  FS_REQUIRE(token_layout(grad_batch, grad_position, batch, channels, positions, false));
  FS_REQUIRE(token_layout(q_batch, q_position, batch, channels, positions, false));
  FS_REQUIRE(token_layout(first_batch, first_position, batch, 2 * channels, positions, false));
  FS_REQUIRE(!second ||
             token_layout(second_batch, second_position, batch, 2 * channels, positions, false));
  FS_REQUIRE(token_layout(gq_batch, gq_position, batch, channels, positions, true));
  FS_REQUIRE(token_layout(gfirst_batch, gfirst_position, batch, 2 * channels, positions, true));
  FS_REQUIRE(!second ||
             token_layout(gsecond_batch, gsecond_position, batch, 2 * channels, positions, true));
  return table().tap_fuse_backward(
      grad, grad_batch, grad_position, query, q_batch, q_position, first, first_batch,
      first_position, second, second_batch, second_position, grad_query, gq_batch, gq_position,
      grad_first, gfirst_batch, gfirst_position, grad_second, gsecond_batch, gsecond_position,
      dtype, batch, channels, positions, heads, spatial);
}

int fs_tap_path(const void* feature, int64_t f_batch, int64_t f_position, const void* gradient,
                int64_t g_batch, int64_t g_position, void* out, int64_t out_batch,
                int64_t out_position, int dtype, const void* feature_weight,
                const void* feature_bias, const void* gradient_weight, const void* gradient_bias,
                const void* query_weight, const void* query_bias, const void* kv_feature_weight,
                const void* kv_feature_bias, const void* kv_gradient_weight,
                const void* kv_gradient_bias, const void* skip_weight, const void* skip_bias,
                const void* proj_weight, const void* proj_bias, int parameter_dtype, float* log_rms,
                int64_t batch, int64_t channels, int64_t width, int64_t positions, int64_t groups,
                int64_t heads, int spatial, double eps) {
  FS_REQUIRE(feature && gradient && out && log_rms && known_dtype(dtype) &&
             known_dtype(parameter_dtype));
  FS_REQUIRE(feature_weight && feature_bias && gradient_weight && gradient_bias && query_weight &&
             query_bias);
  FS_REQUIRE(kv_feature_weight && kv_feature_bias && kv_gradient_weight && kv_gradient_bias);
  FS_REQUIRE(skip_weight && skip_bias && proj_weight && proj_bias);
  FS_REQUIRE(sizes_fit(batch, channels, positions, 2) && sizes_fit(batch, width, positions, 2));
  FS_REQUIRE(groups > 0 && channels % groups == 0 && heads_fit(width, heads) && eps >= 0);
  FS_REQUIRE(token_layout(f_batch, f_position, batch, channels, positions, false));
  FS_REQUIRE(token_layout(g_batch, g_position, batch, channels, positions, false));
  FS_REQUIRE(token_layout(out_batch, out_position, batch, width, positions, true));
  return table().tap_path(feature, f_batch, f_position, gradient, g_batch, g_position, out,
                          out_batch, out_position, dtype, feature_weight, feature_bias,
                          gradient_weight, gradient_bias, query_weight, query_bias,
                          kv_feature_weight, kv_feature_bias, kv_gradient_weight, kv_gradient_bias,
                          skip_weight, skip_bias, proj_weight, proj_bias, parameter_dtype, log_rms,
                          batch, channels, width, positions, groups, heads, spatial, eps);
}

int fs_solver_step(const float* x, const void* raw, const void* guidance, int raw_dtype,
                   const float* denoised, const float* old, const float* coefficients,
                   const int64_t* counters, int64_t draw, float* x_next, float* x0, int64_t batch,
                   int64_t size) {
  FS_REQUIRE(x && coefficients && (x_next || x0) && sizes_fit(batch, size));
  // x0 is either computed or given
  FS_REQUIRE((raw == nullptr) == (denoised != nullptr) && (raw || !guidance) &&
             (!raw || known_dtype(raw_dtype)));
  return table().solver_step(x, raw, guidance, raw_dtype, denoised, old, coefficients, counters,
                             draw, x_next, x0, batch, size);
}

int fs_normals(const int64_t* seeds, const int64_t* samples, const int64_t* steps, int64_t draw,
               float* out, int64_t step_count, int64_t batch, int64_t size) {
  FS_REQUIRE(seeds && samples && steps && out && sizes_fit(step_count, batch, size));
  return table().normals(seeds, samples, steps, draw, out, step_count, batch, size);
}

int fs_winograd_pack(const float* transformed, float* packed, int64_t in, int64_t out) {
  FS_REQUIRE(transformed && packed && sizes_fit(16, in, 16) && sizes_fit(16, in, out, 16));
  return table().winograd_pack(transformed, packed, in, out);
}

int fs_winograd(const float* x, const float* packed, const float* bias, float* y, int64_t batch,
                int64_t height, int64_t width, int64_t in, int64_t out) {
  FS_REQUIRE(x && packed && y && sizes_fit(batch, height, width, in, 16));
  FS_REQUIRE(sizes_fit(batch, height, width, out, 16) && sizes_fit(16, in, out, 16));
  return table().winograd(x, packed, bias, y, batch, height, width, in, out);
}

int fs_linear_pack(const float* weight, int64_t out_stride, int64_t in_stride, const float* bias,
                   float* packed, int64_t in, int64_t out) {
  FS_REQUIRE(weight && packed && sizes_fit(in, 16) && sizes_fit(in, out, 16));
  FS_REQUIRE(out_stride >= 0 && in_stride >= 0 && sizes_fit(out, out_stride + 1) &&
             sizes_fit(in, in_stride + 1));
  return table().linear_pack(weight, out_stride, in_stride, bias, packed, in, out);
}

int fs_linear(const float* x, const float* packed, float* y, int64_t rows, int64_t in,
              int64_t out) {
  FS_REQUIRE(x && packed && y && sizes_fit(rows, in) && sizes_fit(rows, out, 16) &&
             sizes_fit(in, out, 16));
  return table().linear(x, packed, y, rows, in, out);
}

}  // extern "C"
#pragma GCC visibility pop
