// Ops about the CPU kernels themselves: which instruction set, how many threads.
#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "common/torch_cpu.h"

namespace tgi {
namespace {

int64_t cpu_isa() { return static_cast<int64_t>(active_cpu_isa().load()); }

int64_t cpu_isa_best() { return static_cast<int64_t>(best_cpu_isa()); }

void set_cpu_isa(int64_t isa) {
  check(isa >= 0 && isa <= cpu_isa_best(), "instruction set ", isa, " is not on this CPU; it has 0 to ",
        cpu_isa_best());
  active_cpu_isa().store(static_cast<CpuIsa>(isa));
}

bool cpu_vnni() { return active_vnni().load(); }

bool cpu_has_vnni() { return has_vnni(); }

void set_cpu_vnni(bool on) {
  check(!on || has_vnni(), "this CPU has no AVX512-VNNI");
  active_vnni().store(on);
}

int64_t get_num_threads() { return num_threads(); }

void put_num_threads(int64_t threads) {
  check(threads >= 1 && threads <= 4096, "the number of threads is ", threads, "; give 1 to 4096");
  set_num_threads(static_cast<int>(threads));
}

}  // namespace
}  // namespace tgi

STABLE_TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("cpu_isa() -> int");
  m.def("cpu_isa_best() -> int");
  m.def("set_cpu_isa(int isa) -> ()");
  m.def("cpu_vnni() -> bool");
  m.def("cpu_has_vnni() -> bool");
  m.def("set_cpu_vnni(bool on) -> ()");
  m.def("num_threads() -> int");
  m.def("set_num_threads(int threads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tgi, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&tgi::cpu_isa));
  m.impl("cpu_isa_best", TORCH_BOX(&tgi::cpu_isa_best));
  m.impl("set_cpu_isa", TORCH_BOX(&tgi::set_cpu_isa));
  m.impl("cpu_vnni", TORCH_BOX(&tgi::cpu_vnni));
  m.impl("cpu_has_vnni", TORCH_BOX(&tgi::cpu_has_vnni));
  m.impl("set_cpu_vnni", TORCH_BOX(&tgi::set_cpu_vnni));
  m.impl("num_threads", TORCH_BOX(&tgi::get_num_threads));
  m.impl("set_num_threads", TORCH_BOX(&tgi::put_num_threads));
}
