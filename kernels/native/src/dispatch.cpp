// Which instruction set runs. Only this file asks the processor; what it returns may run there.
#include <string.h>

#include <atomic>
#include <initializer_list>

#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fs {
namespace {

// best first
const Table* const kTables[] = {
#if defined(__x86_64__)
    &avx512::kTable, &avx2::kTable,
#elif defined(__aarch64__)
    &neon::kTable,
#endif
    &portable::kTable};

#if defined(__x86_64__)
bool has_f16c() {
  // compilers older than GCC 11 do not know its name
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}
#endif

bool runs_here(const Table* table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (table == &avx2::kTable) return avx2;
  if (table == &avx512::kTable) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return table != nullptr;
}

std::atomic<const Table*> chosen{nullptr};

const Table* best() {
  for (const Table* candidate : kTables) {
    if (runs_here(candidate)) return candidate;
  }
  return &portable::kTable;
}

}  // namespace

const Table& table() {
  const Table* current = chosen.load(std::memory_order_acquire);
  if (current == nullptr) {
    // two threads that get here find the same; a choice made meanwhile by fs_set_isa stays
    const Table* found = best();
    if (chosen.compare_exchange_strong(current, found)) current = found;
  }
  return *current;
}

}  // namespace fs

#pragma GCC visibility push(default)
extern "C" {

int fs_abi(void) { return FS_ABI; }

const char* fs_isa(void) { return fs::table().name; }

int fs_set_isa(const char* name) {
  if (name == nullptr) return FS_BAD_ARGUMENT;
  if (strcmp(name, "auto") == 0) {
    fs::chosen.store(fs::best());
    return FS_OK;
  }
  for (const fs::Table* candidate : fs::kTables) {
    if (strcmp(candidate->name, name) != 0) continue;
    if (!fs::runs_here(candidate)) return FS_UNSUPPORTED;
    fs::chosen.store(candidate);
    return FS_OK;
  }
  for (const char* known : {"avx512", "avx2", "neon", "portable"}) {
    if (strcmp(known, name) == 0) return FS_UNSUPPORTED;
  }
  return FS_BAD_ARGUMENT;
}

}  // extern "C"
#pragma GCC visibility pop
