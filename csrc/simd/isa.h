// Instruction sets that the CPU kernels are built for, and the one that this process uses.
#pragma once

namespace codir_fast {

enum class Isa { kBaseline, kAvx2, kAvx512 };  // narrow to wide

struct CpuFeatures {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512dq, avx512vl;
};

CpuFeatures cpu_features();

// The widest instruction set that this CPU has and the kernels were built for.
Isa widest_isa();

// The one in use: widest_isa(), or a narrower one that the environment variable CODIR_FAST_CPU_ISA
// names. Loading the Python module refuses a value that names none or one that the CPU lacks, so
// that nothing is ignored in silence.
Isa active_isa();

// "baseline", "avx2" or "avx512".
const char* isa_name(Isa isa);

// False, and *isa untouched, if name is none of them.
bool parse_isa(const char* name, Isa* isa);

}  // namespace codir_fast
