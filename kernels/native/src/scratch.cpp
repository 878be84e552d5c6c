#include <stdlib.h>

#include "parallel.h"

namespace fs {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { free(data); }
};

thread_local Buffer buffer;

}  // namespace

void* scratch(size_t bytes) {
  if (bytes > buffer.size) {
    free(buffer.data);
    // some more than asked for: shapes of one model differ little
    buffer.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    if (buffer.size < bytes || posix_memalign(&buffer.data, 64, buffer.size) != 0) {
      buffer.data = nullptr;
      buffer.size = 0;
    }
  }
  return buffer.data;
}

}  // namespace fs
