#include "common/torch_cuda.h"
#include "quant/runs.h"

namespace tgi {
namespace {

constexpr int64_t kStripRows = 64, kBlockColumns = 128, kRunFields = 4;

int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Bits of a code, by kinds.cuh's Codes; 0: there is no such kind.
int64_t bits_of(int64_t codes) {
  if (codes == 16) return 4;  // of a table
  if (codes == 17) return 8;  // e4m3
  return (codes >= 2 && codes <= 6) || codes == 8 ? codes : 0;
}

// The weight that `runs` describes, int64 on the host: of each run its kind of codes, columns, group size and
// zero.
QuantRuns weight_of(const Tensor& words, const Tensor& scales, const Tensor& runs, int64_t scaling,
                    const std::optional<Tensor>& table, double table_scale, int64_t rows, int64_t columns) {
  check_cuda(words, ScalarType::Int, "words");
  check_cuda(scales, ScalarType::Int, "scales");
  check(words.is_contiguous() && scales.is_contiguous() && is_aligned(words.const_data_ptr()) &&
            is_aligned(scales.const_data_ptr()),
        "words and scales need to be contiguous and to start on 16 bytes");
  check_dims(runs, 2, "runs");
  check(scaling >= 0 && scaling <= static_cast<int64_t>(Scaling::zero), "scaling is ", scaling,
        "; 0 to 6 are known");
  const int64_t count = runs.size(0);
  check(count >= 1 && count <= kMaxRuns, count, " runs of columns; kernels take 1 to ", kMaxRuns);
  check_shape(runs, {count, kRunFields}, "runs");
  const int64_t* fields = read<int64_t>(runs, "runs");
  QuantRuns w{};
  w.count = static_cast<int>(count);
  w.scaling = static_cast<Scaling>(scaling);
  w.rows = static_cast<int>(rows);
  w.columns = static_cast<int>(columns);
  w.table_scale = static_cast<float>(table_scale);
  const int64_t strips = up(rows, kStripRows) / kStripRows;
  const auto* word = static_cast<const uint8_t*>(words.const_data_ptr());
  const auto* scale = static_cast<const uint32_t*>(scales.const_data_ptr());
  int64_t total_words = 0, total_scales = 0, total_columns = 0;
  for (int64_t i = 0; i < count; ++i, fields += kRunFields) {
    const int64_t bits = bits_of(fields[0]), width = fields[1], size = fields[2];
    check(bits > 0, "run ", i, " has codes of kind ", fields[0], ", which is unknown");
    check(bits != 4 || fields[0] == 4 || table.has_value(), "codes of a table, but no table");
    check(width > 0 && size > 0 && size % 16 == 0, "run ", i, ": ", width, " columns in groups of ", size,
          "; groups are multiples of 16");
    const int64_t blocks = up(width, kBlockColumns) / kBlockColumns;
    const int64_t groups = up(blocks * kBlockColumns, size) / size;
    check(i + 1 == count || width % 16 == 0, "run ", i, " of ", count, " has ", width,
          " columns; all but the last have multiples of 16");
    w.run[i] = {.words = word + total_words * 4,
                .scales = scale + total_scales,
                .codes = static_cast<int>(fields[0]),
                .columns = static_cast<int>(width),
                .groups = static_cast<int>(groups),
                .group_size = static_cast<int>(size),
                .zero = static_cast<int>(fields[3]),
                .first_block = w.blocks,
                .x_column = static_cast<int>(total_columns)};
    w.blocks += static_cast<int>(blocks);
    total_words += strips * blocks * 256 * bits;
    total_scales += strips * groups * (kStripRows / 2) * scale_words(w.scaling);
    total_columns += width;
  }
  check(total_columns == columns, "runs have ", total_columns, " columns in all, the matrix ", columns);
  check_shape(words, {total_words}, "words");
  check_shape(scales, {total_scales}, "scales");
  if (table.has_value()) {
    check_shape(*table, {16}, "table");
    const auto* numbers = read<float>(*table, "table");
    for (int i = 0; i < 16; ++i) w.table[i] = numbers[i];
  }
  return w;
}

void matmul_runs_cuda(const Tensor& x, const Tensor& words, const Tensor& scales, const Tensor& runs,
                      int64_t scaling, const std::optional<Tensor>& table, double table_scale,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                      const Tensor& out, int64_t ranges, int64_t least_ctas) {
#if defined(TGI_HAVE_SM90)
  check_dims(x, 2, "x");
  check_dims(out, 2, "out");
  const int64_t tokens = x.size(0), columns = x.size(1), rows = out.size(1);
  check_rows(x, x, "x");
  check_rows(out, x, "out");
  check_shape(out, {tokens, rows}, "out");
  check(is_aligned(x.const_data_ptr(), x.stride(0) * 2),
        "x needs to start on 16 bytes, with a stride of whole 16 bytes (8 elements)");
  if (bias.has_value()) {
    check_rows(*bias, x, "bias");
    check_shape(*bias, {rows}, "bias");
  }
  if (residual.has_value()) {
    check_rows(*residual, x, "residual");
    check_shape(*residual, {tokens, rows}, "residual");
  }
  if (tokens == 0 || rows == 0) return;
  const QuantRuns weight = weight_of(words, scales, runs, scaling, table, table_scale, rows, columns);
  check(ranges >= 0 && ranges <= 8 && ranges <= weight.blocks, ranges, " ranges of ", weight.blocks,
        " blocks of columns; there are 1 to 8, or 0 for as many as suit the shape");
  check(least_ctas >= 0 && least_ctas <= 8, "clusters of ", least_ctas,
        " CTAs; a cluster has 1 to 8, 0 for any");
  int sms = 0;
  check_launch(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, x.get_device_index()),
               "quant_matmul_runs");
  const DType dtype = dtype_of(x, "x");
  check(dtype != DType::f32, "x is float32; the product takes float16 and bfloat16");
  const auto matmul = dtype == DType::f16 ? runs_matmul_f16 : runs_matmul_bf16;
  check_launch(
      matmul(RunsMatmulParams{.out = out.mutable_data_ptr(),
                              .x = x.const_data_ptr(),
                              .bias = bias.has_value() ? bias->const_data_ptr() : nullptr,
                              .residual = residual.has_value() ? residual->const_data_ptr() : nullptr,
                              .tokens = static_cast<int>(tokens),
                              .out_stride = out.stride(0),
                              .x_stride = x.stride(0),
                              .residual_stride = residual.has_value() ? residual->stride(0) : 0,
                              .ranges = static_cast<int>(ranges),
                              .least_ctas = static_cast<int>(least_ctas)},
             weight, sms, stream_of(x)),
      "quant_matmul_runs");
#else
  check(false, "quant_matmul_runs was not built: this build has no code for Hopper (TGI_CUDA_ARCHS=90a)");
#endif
}

void dequantise_runs_cuda(const Tensor& words, const Tensor& scales, const Tensor& runs, int64_t scaling,
                          const std::optional<Tensor>& table, const Tensor& out) {
  check_dims(out, 2, "out");
  check(out.is_cuda() && out.is_contiguous() && is_aligned(out.const_data_ptr()),
        "out needs to be contiguous and to start on 16 bytes, on a CUDA device");
  const QuantRuns weight = weight_of(words, scales, runs, scaling, table, 1.0, out.size(0), out.size(1));
  check_launch(runs_dequantise(weight, out.mutable_data_ptr(), dtype_of(out, "out"), stream_of(out)),
               "quant_dequantise_runs");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) {
  m.impl("quant_matmul_runs", TORCH_BOX(&tgi::matmul_runs_cuda));
  m.impl("quant_dequantise_runs", TORCH_BOX(&tgi::dequantise_runs_cuda));
}
