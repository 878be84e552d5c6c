// Threads. Work is cut into items whose size depends on the shape alone and partial results are
// combined in the order of the items, so results do not depend on the number of threads.
#ifndef FASTSCORE_PARALLEL_H
#define FASTSCORE_PARALLEL_H

#include <type_traits>

#include "common.h"

namespace fs {

// Waits for every thread of the region.
void team_barrier();

// What a thread of a parallel region knows of it.
struct Team {
  int id, count;

  FS_ALWAYS_INLINE void barrier() const {
    if (count > 1) team_barrier();
  }
  // this thread's contiguous share of `items`
  FS_ALWAYS_INLINE Range share(int64_t items) const {
    return {items * id / count, items * (id + 1) / count};
  }
};

// Threads worth starting for `work` elements, each at least `grain`, cut into `items`: 1 inside a
// parallel region. A region costs some microseconds; the default grain is about three times that of
// normalisation.
int threads_for(int64_t work, int64_t items, int64_t grain = 8192);

// Calls body(context, team) on `threads` threads (fewer where the runtime grants fewer) and waits
// for all.
void run_team(int threads, void (*body)(void* context, Team team), void* context);

// body: void(Team). It must not throw.
template <class Body>
static inline void parallel(int threads, Body&& body) {
  if (threads <= 1) {
    body(Team{0, 1});
    return;
  }
  auto call = [](void* context, Team team) {
    (*static_cast<std::remove_reference_t<Body>*>(context))(team);
  };
  run_team(threads, call, &body);
}

// Calls body(begin, end) on contiguous shares of [0, items).
template <class Body>
static inline void parallel_for(int threads, int64_t items, Body&& body) {
  parallel(threads, [&](Team team) {
    Range mine = team.share(items);
    if (mine.begin < mine.end) body(mine.begin, mine.end);
  });
}

// At least `bytes` of memory, aligned to 64, that belong to the calling thread until its next call
// of scratch; null when there is none. Never shrinks: nothing is allocated once the largest shape
// was seen.
void* scratch(size_t bytes);

// Cuts scratch memory into arrays, each aligned to 64 bytes: first add up the sizes, then take
// them.
class Carver {
 public:
  template <class T>
  FS_ALWAYS_INLINE static size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }
  FS_ALWAYS_INLINE explicit Carver(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  FS_ALWAYS_INLINE T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return result;
  }

 private:
  char* next_;
};

}  // namespace fs

#endif  // FASTSCORE_PARALLEL_H
