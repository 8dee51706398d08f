// Loops over elements: one source, compiled for AVX-512, AVX2 and the baseline; the loader picks.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__) || defined(__clang__)
#define CODISTILL_CLONES
#elif __GNUC__ >= 12
#define CODISTILL_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // that knows no levels of the architecture
#define CODISTILL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#define CODISTILL_INLINE inline __attribute__((always_inline))
