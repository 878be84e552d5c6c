// Which instruction set runs, and what fs_set_isa refuses.
#include <cstring>
#include <initializer_list>

#include "check.h"
#include "fastscore_native.h"

int main() {
  CHECK(fs_abi() == FS_ABI, "got %d", fs_abi());
  const char* best = fs_isa();
  int found = 0;
  for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
    const char* before = fs_isa();
    const int code = fs_set_isa(name);
    CHECK(code == FS_OK || code == FS_UNSUPPORTED, "%s: %d", name, code);
    // what is refused changes nothing
    CHECK(std::strcmp(fs_isa(), code == FS_OK ? name : before) == 0, "%s: %s", name, fs_isa());
    found += code == FS_OK;
  }
  CHECK(found > 0 && fs_set_isa("portable") == FS_OK, "the portable set runs everywhere");
  CHECK(fs_set_isa("sse9") == FS_BAD_ARGUMENT && fs_set_isa("") == FS_BAD_ARGUMENT, "unknown name");
  CHECK(fs_set_isa(nullptr) == FS_BAD_ARGUMENT, "no name");
  CHECK(std::strcmp(fs_isa(), "portable") == 0, "%s", fs_isa());
  CHECK(fs_set_isa("auto") == FS_OK && std::strcmp(fs_isa(), best) == 0, "%s, not %s", fs_isa(),
        best);
  return check::result();
}
