// Names of instruction sets, what they require of the CPU, and the environment variable that
// narrows the choice. ctest runs this once without CODIR_FAST_CPU_ISA and once per value.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "check.h"
#include "simd/isa.h"

using namespace codir_fast;

namespace {

void test_names() {
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    Isa parsed = isa == Isa::kBaseline ? Isa::kAvx512 : Isa::kBaseline;
    CHECK(parse_isa(isa_name(isa), &parsed));
    CHECK(parsed == isa);
  }
  CHECK(std::strcmp(isa_name(Isa::kBaseline), "baseline") == 0);
  CHECK(std::strcmp(isa_name(Isa::kAvx2), "avx2") == 0);
  CHECK(std::strcmp(isa_name(Isa::kAvx512), "avx512") == 0);
  for (const char* name : {"", "AVX2", "avx", "avx512f", "unheard-of"}) {
    Isa untouched = Isa::kAvx2;
    CHECK(!parse_isa(name, &untouched));
    CHECK(untouched == Isa::kAvx2);
  }
}

void test_widest_has_its_features() {
  const CpuFeatures has = cpu_features();
  if (widest_isa() >= Isa::kAvx2) CHECK(has.avx2 && has.fma && has.f16c);
  if (widest_isa() == Isa::kAvx512)
    CHECK(has.avx512f && has.avx512bw && has.avx512dq && has.avx512vl);
#if !CODIR_FAST_X86_DISPATCH
  CHECK(widest_isa() == Isa::kBaseline);
#endif
}

void test_active() {
  const char* name = std::getenv("CODIR_FAST_CPU_ISA");
  Isa asked = Isa::kBaseline;
  const bool usable = name != nullptr && parse_isa(name, &asked) && asked <= widest_isa();
  CHECK(active_isa() == (usable ? asked : widest_isa()));
  CHECK(active_isa() == active_isa());
}

}  // namespace

int main() {
  test_names();
  test_widest_has_its_features();
  test_active();
  return check::exit_code();
}
