#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if CODIR_FAST_X86_DISPATCH
#include <cpuid.h>
#endif

namespace codir_fast {

CpuFeatures cpu_features() {
#if CODIR_FAST_X86_DISPATCH
  __builtin_cpu_init();
  // Older compilers do not know "f16c" by name: leaf 1, ECX. The operating system's part is that of
  // AVX2.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return {__builtin_cpu_supports("avx2") != 0,
          __builtin_cpu_supports("fma") != 0,
          f16c,
          __builtin_cpu_supports("avx512f") != 0,
          __builtin_cpu_supports("avx512bw") != 0,
          __builtin_cpu_supports("avx512dq") != 0,
          __builtin_cpu_supports("avx512vl") != 0};
#else
  return {};
#endif
}

Isa widest_isa() {
  const CpuFeatures has = cpu_features();
  const bool avx2 = has.avx2 && has.fma && has.f16c;
  if (avx2 && has.avx512f && has.avx512bw && has.avx512dq && has.avx512vl) return Isa::kAvx512;
  return avx2 ? Isa::kAvx2 : Isa::kBaseline;
}

bool parse_isa(const char* name, Isa* isa) {
  for (const Isa candidate : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(name, isa_name(candidate)) == 0) {
      *isa = candidate;
      return true;
    }
  }
  return false;
}

Isa active_isa() {
  static const Isa isa = [] {
    const char* name = std::getenv("CODIR_FAST_CPU_ISA");
    Isa asked = Isa::kBaseline;
    const bool usable = name != nullptr && parse_isa(name, &asked) && asked <= widest_isa();
    return usable ? asked : widest_isa();
  }();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

}  // namespace codir_fast
