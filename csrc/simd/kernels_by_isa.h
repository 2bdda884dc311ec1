// Tables of kernels that exist once per instruction set, under one name in the namespaces baseline,
// avx2 and avx512, whichever are built.
#pragma once

#include "simd/isa.h"

#if CODIR_FAST_X86_DISPATCH
#define CODIR_FAST_ON_X86(...) __VA_ARGS__
#else
#define CODIR_FAST_ON_X86(...)
#endif

// In namespace codir_fast: the tables that files compiled once per instruction set define.
#define CODIR_FAST_DECLARE_KERNELS(Table, name) \
  namespace baseline {                          \
  extern const Table name;                      \
  }                                             \
  CODIR_FAST_ON_X86(                            \
      namespace avx2 { extern const Table name; } namespace avx512 { extern const Table name; })

// The table for an instruction set.
#define CODIR_FAST_KERNELS(name, isa)                                   \
  (static_cast<void>(isa),                                              \
   CODIR_FAST_ON_X86((isa) == ::codir_fast::Isa::kAvx512 ? avx512::name \
                     : (isa) == ::codir_fast::Isa::kAvx2 ? avx2::name   \
                                                         :) baseline::name)
