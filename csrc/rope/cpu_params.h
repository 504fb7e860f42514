// What the CPU kernels of this family are given.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace tgi {

struct RotaryParams {
  float* q;                  // [tokens, heads, head_dim], tokens q_stride apart; rotated in place
  const float* k;            // [tokens, kv_heads, head_dim], tokens k_stride apart
  const float* v;            // the same, tokens v_stride apart
  float* kv_pages;           // [pages, 2, kv_heads, 16, head_dim]
  const float* cos_sin;      // [positions, rot_dim]: rot_dim / 2 cosines, then as many sines
  const int32_t* positions;  // [tokens]
  const int64_t* slots;      // [tokens]: page · 16 + row, or −1: nothing is written
  const float* q_norm;       // [head_dim] or nullptr: RMS norm of each head before the rotation
  const float* k_norm;       // [head_dim] or nullptr
  float eps;
  int64_t tokens, heads, kv_heads, head_dim, rot_dim;
  int64_t q_stride, k_stride, v_stride;
  int64_t table_positions;  // rows of cos_sin
  int64_t table_slots;      // pages · 16
  bool interleaved;         // pairs are neighbours (2i, 2i+1) and not halves (i, i + rot_dim / 2)
};

TGI_CPU_KERNEL(rotary_kv_write, RotaryParams)

}  // namespace tgi
