// Pages of large buffers.

#include "interface.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

// Asks for huge pages in fresh memory. Only advice: where the system has none to give, or the memory is
// smaller than a few of them, nothing changes.
CODISTILL_EXPORT void codistill_use_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLeast = 8 << 20;
  if (bytes < kLeast) return;
  const int64_t page = sysconf(_SC_PAGESIZE), begin = reinterpret_cast<int64_t>(data);
  const int64_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}
