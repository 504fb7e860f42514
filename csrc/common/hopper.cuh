// Hopper's asynchronous copies: mbarriers and the bulk tensor copy engine. PTX ISA 8.7, sections 9.7.9
// and 9.7.13.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/copy.cuh"

namespace tgi {

// ---- mbarrier: 8 bytes of shared memory, named by their address ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  pause_at_random();
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for that many bytes more.
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  pause_at_random();
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
  pause_at_random();
}

// ---- clusters: CTAs that run together and reach each other's shared memory ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all CTAs of the cluster.
__device__ __forceinline__ void sync_cluster() {
  pause_at_random();
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  pause_at_random();
}

// The same where threads owe each other nothing but to have begun, and their initialised barriers.
__device__ __forceinline__ void meet_cluster() {
  pause_at_random();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  pause_at_random();
}

// Arrives at the barrier that another CTA of the cluster, or this one, has at the same address.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  pause_at_random();
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Leaves four numbers at an address of the cluster's first CTA, and tells a barrier of that of 16 bytes.
__device__ __forceinline__ void send_first_rank(uint32_t address, const float (&value)[4], uint32_t barrier) {
  pause_at_random();
  asm volatile(
      "{\n"
      ".reg .b32 there, told;\n"
      "mapa.shared::cluster.u32 there, %0, 0;\n"
      "mapa.shared::cluster.u32 told, %5, 0;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1, %2, %3, %4}, [told];\n"
      "}\n" ::"r"(address),
      "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3]), "r"(barrier)
      : "memory");
}

// ---- bulk copy ----

// Copies bytes that lie together; both ends and the count are multiples of 16.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier,
                                           uint64_t policy) {
  pause_at_random();
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// The same, for what others read too.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  pause_at_random();
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- bulk tensor copy ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Reads that nobody repeats: they leave L2 first.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies the box at (column, row, chunk) of a map; what lies outside the tensor arrives as zeros.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, int chunk,
                                         uint32_t barrier) {
  pause_at_random();
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(chunk), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, int chunk,
                                         uint32_t barrier, uint64_t policy) {
  pause_at_random();
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(chunk), "r"(barrier), "l"(policy)
      : "memory");
}

// The same into every CTA of the cluster whose bit is set, each at this address and telling its own barrier.
__device__ __forceinline__ void copy_box_to(uint16_t ranks, uint32_t to, const CUtensorMap* map, int column,
                                            int row, int chunk, uint32_t barrier) {
  pause_at_random();
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(chunk), "r"(barrier), "h"(ranks)
      : "memory");
}

// ---- bulk copy to global memory ----

// What this thread wrote to shared memory is there for the copy engine.
__device__ __forceinline__ void show_copy_engine() {
  pause_at_random();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Whole 16 bytes, at 16-byte addresses.
__device__ __forceinline__ void copy_out(void* to, uint32_t from, int bytes) {
  pause_at_random();
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies_out() {
  pause_at_random();
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until this thread's copies out have read shared memory, so that it may be written again.
__device__ __forceinline__ void wait_copies_out_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  pause_at_random();
}

// Until this thread's copies out are done.
__device__ __forceinline__ void wait_copies_out() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  pause_at_random();
}

}  // namespace tgi
