#include "common/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace tgi {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int cores_of_process() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// A layer calls some ten kernels with Python between them; workers stay awake that long.
constexpr auto kSpin = std::chrono::microseconds(50);

// state_: | generation of the job: 32 bits | open: 1 bit | workers inside: 31 bits |
// A worker enters only while the job is open, and the caller closes it once no task is left: a worker that
// wakes late is waited for by nobody.
constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kInside = kOpen - 1;

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    stopping_.store(true);
    announce(0);
    for (auto& worker : workers_) worker.join();
  }

  void run(int64_t tasks, void (*body)(void*, int64_t), void* context) {
    tasks_ = tasks;
    body_ = body;
    context_ = context;
    next_.store(0, std::memory_order_relaxed);
    announce(kOpen);
    drain();
    state_.fetch_and(~kOpen);
    for (int i = 0; state_.load(std::memory_order_acquire) & kInside; ++i) {
      if (i < 4096)
        relax();
      else
        std::this_thread::yield();  // more threads than cores: let the last worker finish
    }
  }

 private:
  void announce(uint64_t open) {
    // Sequentially consistent with sleepers_: either a worker sees the new job or we see that it sleeps.
    state_.store(((state_.load() >> 32) + 1) << 32 | open);
    if (sleepers_.load() > 0) {
      {
        std::lock_guard lock(mutex_);
      }
      wake_.notify_all();
    }
  }

  void drain() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;)
      body_(context_, task);
  }

  void work() {
    uint64_t seen = 0;
    while (!stopping_.load()) {
      uint64_t state = wait_for_job(seen);
      seen = state >> 32;
      bool entered = false;
      while (state >> 32 == seen && (state & kOpen) && !entered) {
        entered = state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel);
      }
      if (!entered) continue;
      drain();
      state_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint64_t wait_for_job(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        if (const uint64_t state = state_.load(std::memory_order_acquire); state >> 32 != seen) return state;
        relax();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return state_.load() >> 32 != seen; });
    sleepers_.fetch_sub(1);
    return state_.load(std::memory_order_acquire);
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> stopping_{false};
  int64_t tasks_ = 0;
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> sleepers_{0};
};

std::mutex pool_mutex;   // one job at a time: two would only share the same cores
Pool* pool = nullptr;    // made by the first job
int wanted_threads = 0;  // 0: not yet asked

void forget_pool() {  // threads do not survive fork; the child makes its own
  pool = nullptr;
  new (&pool_mutex) std::mutex;
}

}  // namespace

int num_threads() {
  std::lock_guard lock(pool_mutex);
  return wanted_threads > 0 ? wanted_threads : cores_of_process();
}

void set_num_threads(int threads) {
  std::lock_guard lock(pool_mutex);
  wanted_threads = std::max(1, threads);
  delete pool;
  pool = nullptr;
}

void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  if (tasks <= 1) {
    if (tasks == 1) body(context, 0);
    return;
  }
  std::lock_guard lock(pool_mutex);
  if (pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    static_cast<void>(registered);
    pool = new Pool(wanted_threads > 0 ? wanted_threads : cores_of_process());
  }
  pool->run(tasks, body, context);
}

}  // namespace tgi
