// A thread pool for short kernels: the calling thread and persistent workers, which spin for a moment between
// jobs and then sleep. Tasks are handed out one by one, so who runs which is chance; a task must write what
// no other reads.
#pragma once

#include <cstdint>

namespace tgi {

// Threads that work on a job, the caller included. At first: the cores this process may use.
int num_threads();
void set_num_threads(int threads);

// Runs body(context, task) for every task in [0, tasks), on all threads; returns when the last is done.
void run_tasks(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

// Calls function(task) for every task in [0, tasks), in parallel.
template <typename Function>
inline void parallel_for(int64_t tasks, Function&& function) {
  run_tasks(tasks, [](void* context, int64_t task) { (*static_cast<Function*>(context))(task); }, &function);
}

// Calls function(i) for every i in [0, count), in parallel, neighbours by the same thread: a core that jumps
// over what another reads has asked memory ahead for what it does not use.
template <typename Function>
inline void parallel_for_neighbours(int64_t count, Function&& function) {
  const int64_t most = 4 * num_threads(), runs = most < count ? most : count;
  parallel_for(runs, [&](int64_t run) {
    for (int64_t i = count * run / runs; i < count * (run + 1) / runs; ++i) function(i);
  });
}

// Rows of `size` elements that one task of an elementwise kernel takes: enough that handing it out (about 0.1
// µs, and 1–5 µs for the first of a job) costs little beside the work.
inline int64_t rows_per_task(int64_t rows, int64_t size) {
  constexpr int64_t kElements = 16384;
  const int64_t wanted = size >= kElements ? 1 : kElements / (size < 1 ? 1 : size);
  return wanted < rows ? wanted : (rows < 1 ? 1 : rows);
}

}  // namespace tgi
