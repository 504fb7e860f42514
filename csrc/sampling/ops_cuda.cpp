#include "common/torch_cuda.h"
#include "sampling/cuda.h"

namespace tgi {
namespace {

// Whether the kernels built for Hopper can run on the current device.
bool has_clusters() {
#if defined(TGI_HAVE_SM90)
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
#else
  return false;
#endif
}

template <typename T>
const T* data_of(const Tensor& tensor, ScalarType dtype, const char* name) {
  check_cuda(tensor, dtype, name);
  check(tensor.is_contiguous(), name, " is not contiguous");
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* results_of(const Tensor& tensor, ScalarType dtype, const char* name) {
  data_of<T>(tensor, dtype, name);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void greedy_cuda(const Tensor& logits, const Tensor& ids, const Tensor& logprobs) {
  check_dims(logits, 2, "logits");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_rows(logits, logits, "logits");
  check(vocab > 0, "logits has no columns");
  check_shape(ids, {rows}, "ids");
  check_shape(logprobs, {rows}, "logprobs");
  const DType dtype = dtype_of(logits, "logits");
  const int bytes = bytes_of(dtype);
  const GreedyParams params{
      .logits = logits.const_data_ptr(),
      .ids = results_of<int64_t>(ids, ScalarType::Long, "ids"),
      .logprobs = results_of<float>(logprobs, ScalarType::Float, "logprobs"),
      .rows = rows,
      .vocab = static_cast<int>(vocab),
      .stride = logits.stride(0),
      .aligned = vocab * bytes % 16 == 0 && is_aligned(logits.const_data_ptr(), logits.stride(0) * bytes),
  };
#if defined(TGI_HAVE_SM90)
  if (has_clusters()) return check_launch(greedy_sm90(params, dtype, stream_of(logits)), "greedy");
#endif
  check_launch(greedy_sm80(params, dtype, stream_of(logits)), "greedy");
}

void sample_cuda(const Tensor& logits, const Tensor& rows, const Tensor& positions, const Tensor& numbers,
                 const Tensor& wholes, const Tensor& history, const Tensor& edit_ids,
                 const Tensor& edit_values, const Tensor& /* workspace */,
                 const std::optional<Tensor>& places, const Tensor& ids, const Tensor& logprobs) {
  check_dims(logits, 2, "logits");
  check_dims(numbers, 2, "numbers");
  check_dims(history, 2, "history");
  check_dims(edit_ids, 2, "edit_ids");
  const int64_t logit_rows = logits.size(0), vocab = logits.size(1);
  const int64_t draws = places.has_value() ? places->numel() : logit_rows;
  const int64_t table_rows = numbers.size(0), history_size = history.size(1), edits = edit_ids.size(1);
  check_rows(logits, logits, "logits");
  check(vocab > 0 && vocab <= kSampleMaxVocab, "logits has ", vocab, " columns; 1 to ", kSampleMaxVocab,
        " fit");
  check_shape(numbers, {table_rows, kNumbers}, "numbers");
  check_shape(wholes, {table_rows, kWholes}, "wholes");
  check_shape(history, {table_rows, history_size}, "history");
  check_shape(edit_ids, {table_rows, edits}, "edit_ids");
  check_shape(edit_values, {table_rows, edits}, "edit_values");
  for (const Tensor* tensor : {&rows, &positions}) check_shape(*tensor, {draws}, "a draw's");
  for (const Tensor* tensor : {&ids, &logprobs}) check_shape(*tensor, {logit_rows}, "a result");
  const DType dtype = dtype_of(logits, "logits");
  const SampleParams params{
      .logits = logits.const_data_ptr(),
      .stride = logits.stride(0),
      .draws = draws,
      .places = places.has_value() ? data_of<int64_t>(*places, ScalarType::Long, "places") : nullptr,
      .vocab = static_cast<int>(vocab),
      .aligned = vocab % 4 == 0 && is_aligned(logits.const_data_ptr(), logits.stride(0) * bytes_of(dtype)),
      .rows = data_of<int64_t>(rows, ScalarType::Long, "rows"),
      .positions = data_of<int64_t>(positions, ScalarType::Long, "positions"),
      .numbers = data_of<float>(numbers, ScalarType::Float, "numbers"),
      .wholes = data_of<int64_t>(wholes, ScalarType::Long, "wholes"),
      .history = data_of<int32_t>(history, ScalarType::Int, "history"),
      .history_size = history_size,
      .edit_ids = data_of<int32_t>(edit_ids, ScalarType::Int, "edit_ids"),
      .edit_values = data_of<float>(edit_values, ScalarType::Float, "edit_values"),
      .edits = edits,
      .ids = results_of<int64_t>(ids, ScalarType::Long, "ids"),
      .logprobs = results_of<float>(logprobs, ScalarType::Float, "logprobs"),
  };
#if defined(TGI_HAVE_SM90)
  if (has_clusters()) return check_launch(sample_sm90(params, dtype, stream_of(logits)), "sample");
#endif
  check(false,
        "sample: this GPU has no clusters of CTAs (Hopper has); tgi_kernels.sampling composes the op "
        "elsewhere");
}

void top_logprobs_cuda(const Tensor& logits, const Tensor& /* workspace */, const Tensor& ids,
                       const Tensor& logprobs) {
  check_dims(logits, 2, "logits");
  check_dims(ids, 2, "ids");
  const int64_t rows = logits.size(0), vocab = logits.size(1), count = ids.size(1);
  check_rows(logits, logits, "logits");
  check(vocab > 0 && vocab <= kSampleMaxVocab, "logits has ", vocab, " columns; 1 to ", kSampleMaxVocab,
        " fit");
  check(count > 0 && count <= vocab && count <= kTopMostTokens, "ids has ", count, " columns; 1 to ",
        kTopMostTokens, " and no more than ", vocab, " are possible");
  check_shape(ids, {rows, count}, "ids");
  check_shape(logprobs, {rows, count}, "logprobs");
  const DType dtype = dtype_of(logits, "logits");
  const TopLogprobsParams params{
      .logits = logits.const_data_ptr(),
      .stride = logits.stride(0),
      .rows = rows,
      .vocab = static_cast<int>(vocab),
      .count = static_cast<int>(count),
      .aligned = vocab % 4 == 0 && is_aligned(logits.const_data_ptr(), logits.stride(0) * bytes_of(dtype)),
      .ids = results_of<int64_t>(ids, ScalarType::Long, "ids"),
      .logprobs = results_of<float>(logprobs, ScalarType::Float, "logprobs"),
  };
#if defined(TGI_HAVE_SM90)
  if (has_clusters())
    return check_launch(top_logprobs_sm90(params, dtype, stream_of(logits)), "top_logprobs");
#endif
  check(false,
        "top_logprobs: this GPU has no clusters of CTAs (Hopper has); tgi_kernels.sampling composes the op "
        "elsewhere");
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_IMPL(tgi, CUDA, m) {
  m.impl("greedy", TORCH_BOX(&tgi::greedy_cuda));
  m.impl("sample", TORCH_BOX(&tgi::sample_cuda));
  m.impl("top_logprobs", TORCH_BOX(&tgi::top_logprobs_cuda));
}
