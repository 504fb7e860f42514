// Compiled once per instruction set: TGI_ISA names the namespace that every csrc/<family>/cpu.h fills.
#include "cpu_families.h"
