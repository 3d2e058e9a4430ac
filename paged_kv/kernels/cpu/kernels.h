// Everything, for one kind of CPU: included once by each build's source file.
#pragma once

#if !defined(__GNUC__)
#error "needs GCC or clang: vector extensions"
#endif

#include <math.h>

#define EXPORT __attribute__((visibility("default")))

#include "attend.h"
#include "entries.h"
#include "expect.h"
#include "observe.h"
#include "select.h"

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

// Reads all of some memory with all threads and does nothing else: what a kernel could reach at
// most. bytes: a multiple of 4096. Gives a sum that depends on every byte, so that all are read.
extern "C" EXPORT int64_t paged_kv_read(const uint8_t* data, int64_t bytes) {
  int64_t found = 0;
#pragma omp parallel for schedule(static) reduction(+ : found)
  for (int64_t page = 0; page < bytes / 4096; ++page) {
    vi sums[4] = {};
    for (int64_t i = 0; i < 4096; i += 4 * sizeof(vi))
      for (int n = 0; n < 4; ++n) sums[n] += load<vi>(data + page * 4096 + i + n * sizeof(vi));
    found += ((sums[0] ^ sums[1]) + (sums[2] ^ sums[3]))[0];
  }
  return found;
}
