// Loops over elements: one source, compiled for AVX-512, AVX2 and the baseline; the loader picks.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CODISTILL_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CODISTILL_CLONES
#endif
#define CODISTILL_INLINE inline __attribute__((always_inline))
