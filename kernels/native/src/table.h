// The operations of one instruction set. Arguments were checked by the C entries.
#ifndef FASTSCORE_TABLE_H
#define FASTSCORE_TABLE_H

#include "common.h"

// name of the operation here and, with fs_ before it, in the C interface
#define FS_OPERATIONS(X)                                                                       \
  X(norm_act)                                                                                  \
  X(norm_act_backward) X(tap_norm) X(tap_fuse) X(tap_fuse_backward) X(tap_path) X(solver_step) \
      X(normals) X(winograd_pack) X(winograd) X(linear_pack) X(linear)

namespace fs {

struct Table {
  const char* name;
#define FS_MEMBER(operation) decltype(&fs_##operation) operation;
  FS_OPERATIONS(FS_MEMBER)
#undef FS_MEMBER
};

// the table in use
const Table& table();

#define FS_DECLARE(operation) decltype(fs_##operation) operation;
#define FS_INSTRUCTION_SET(isa) \
  namespace isa {               \
  extern const Table kTable;    \
  FS_OPERATIONS(FS_DECLARE)     \
  }
FS_INSTRUCTION_SET(portable)
FS_INSTRUCTION_SET(avx2)
FS_INSTRUCTION_SET(avx512)
FS_INSTRUCTION_SET(neon)
#undef FS_INSTRUCTION_SET
#undef FS_DECLARE

}  // namespace fs

#endif  // FASTSCORE_TABLE_H
