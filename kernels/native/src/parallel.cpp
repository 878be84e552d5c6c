#include "parallel.h"

#include <atomic>

// The entry points that compilers emit for OpenMP, called by name: GNU's runtime and LLVM's both
// have them, so a library built by either compiler uses whichever runtime torch has loaded, and its
// threads.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_max_threads(void);
int omp_get_num_threads(void);
int omp_get_thread_num(void);
int omp_in_parallel(void);
}

namespace fs {
namespace {

std::atomic<int> thread_limit{0};

struct Call {
  void (*body)(void*, Team);
  void* context;
};

void enter(void* argument) {
  const Call& call = *static_cast<const Call*>(argument);
  call.body(call.context, Team{omp_get_thread_num(), omp_get_num_threads()});
}

}  // namespace

void team_barrier() { GOMP_barrier(); }

int threads_for(int64_t work, int64_t items, int64_t grain) {
  int64_t threads = work / grain;
  if (threads > items) threads = items;
  if (threads <= 1 || omp_in_parallel()) return 1;
  const int limit = thread_limit.load(std::memory_order_relaxed);
  const int most = omp_get_max_threads();
  if (threads > most) threads = most;
  if (limit > 0 && threads > limit) threads = limit;
  return static_cast<int>(threads);
}

void run_team(int threads, void (*body)(void*, Team), void* context) {
  Call call{body, context};
  GOMP_parallel(enter, &call, static_cast<unsigned>(threads), 0);
}

}  // namespace fs

#pragma GCC visibility push(default)

extern "C" void fs_set_threads(int threads) {
  fs::thread_limit.store(threads > 0 ? threads : 0, std::memory_order_relaxed);
}

#pragma GCC visibility pop
