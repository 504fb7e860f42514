// Launchers of the step family's CUDA kernels: what a decode step does before its first layer and after its
// last.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tgi {

// Makes the inputs of a step of one token a sequence from three numbers of each, and keeps its page table.
struct DecodeInputsParams {
  const int32_t* rows;      // [seqs]: the sequence's row of the tables below; negative: idle
  const int32_t* kv_lens;   // [seqs]: this step's token included
  const int32_t* added;     // [seqs]: the page that this step's token begins, or negative
  const int64_t* last_ids;  // [rows]
  int32_t* page_table;      // [rows, max_pages]; the added pages are put in
  int64_t* token_ids;       // [seqs] from here on
  int32_t* positions;
  int64_t* slots;        // page · 16 + row; −1: idle
  int32_t* page_tables;  // [seqs, max_pages]: copies of the rows, as far as they are in use
  int64_t seqs;
  int max_pages;
};

cudaError_t decode_inputs(const DecodeInputsParams& params, cudaStream_t stream);

// last_ids[rows[i]] = ids[i] where rows[i] is not negative.
struct KeepIdsParams {
  const int64_t* ids;   // [count]
  const int32_t* rows;  // [count]
  int64_t* last_ids;
  int64_t count;
};

cudaError_t keep_ids(const KeepIdsParams& params, cudaStream_t stream);

// out[i] = table[ids[i]], rows of whole words of 16, 4 or 2 bytes; NaN (all bits set) for an id out of range.
struct EmbedParams {
  const int64_t* ids;  // [tokens]
  const void* table;   // [vocab, row]
  void* out;           // [tokens, row]
  int64_t tokens, vocab;
  int row_words;
  int word_bytes;
};

cudaError_t embed(const EmbedParams& params, cudaStream_t stream);

}  // namespace tgi
