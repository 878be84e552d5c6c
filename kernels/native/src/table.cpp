#include "table.h"

#define FS_TEXT_(x) #x
#define FS_TEXT(x) FS_TEXT_(x)

namespace fs::FS_ISA {

#define FS_MEMBER(operation) operation,
extern const Table kTable = {FS_TEXT(FS_ISA), FS_OPERATIONS(FS_MEMBER)};
#undef FS_MEMBER

}  // namespace fs::FS_ISA
