// Everything, for one kind of CPU: included once by each build's source file.
#pragma once

#if !defined(__GNUC__)
#error "needs GCC or clang: vector extensions"
#endif

#include <math.h>

#define EXPORT __attribute__((visibility("default")))

#include "attend.h"
#include "entries.h"
#include "observe.h"

// The builds that this CPU can run, as bits: 1 AVX2, 2 AVX-512.
extern "C" EXPORT int paged_kv_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 | (avx2 && avx512) << 1;
#else
  return 0;
#endif
}

extern "C" EXPORT int64_t paged_kv_max_entry_bytes() { return kMaxEntryBytes; }
