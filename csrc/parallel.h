// Loops over the threads of OpenMP. One libgomp in the process is one pool of threads: torch's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#elif defined(__linux__)
#error "compile with -fopenmp: loops would run on one thread"
#endif

namespace codistill {

// The threads of loops that the calling thread starts. Not a num_threads clause: libgomp takes its pool down
// when that number changes from loop to loop.
inline void set_num_threads(int64_t threads) {
#ifdef _OPENMP
  omp_set_num_threads(static_cast<int>(threads));
#endif
}

inline int64_t num_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Call body(first, last) for parts of [begin, end), each at least `grain` long, in parallel.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
#ifdef _OPENMP
  if (end - begin > grain && num_threads() > 1) {
    const int64_t most = (end - begin + grain - 1) / grain;
    std::exception_ptr failure;  // none may leave the region
#pragma omp parallel
    {
      const int64_t parts = std::min<int64_t>(omp_get_num_threads(), most);
      const int64_t size = (end - begin + parts - 1) / parts;
      const int64_t first = begin + omp_get_thread_num() * size;
      try {
        if (first < end) body(first, std::min(end, first + size));
      } catch (...) {
#pragma omp critical
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  body(begin, end);
}

}  // namespace codistill
