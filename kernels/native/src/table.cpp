#include "table.h"

#define FS_TEXT_(x) #x
#define FS_TEXT(x) FS_TEXT_(x)

// an operation whose source is missing is absent from the table
#if defined(FS_HAS_norm_act)
#define FS_ENTRY_norm_act norm_act
#else
#define FS_ENTRY_norm_act nullptr
#endif
#if defined(FS_HAS_norm_act_backward)
#define FS_ENTRY_norm_act_backward norm_act_backward
#else
#define FS_ENTRY_norm_act_backward nullptr
#endif
#if defined(FS_HAS_tap_norm)
#define FS_ENTRY_tap_norm tap_norm
#else
#define FS_ENTRY_tap_norm nullptr
#endif
#if defined(FS_HAS_tap_fuse)
#define FS_ENTRY_tap_fuse tap_fuse
#else
#define FS_ENTRY_tap_fuse nullptr
#endif
#if defined(FS_HAS_tap_fuse_backward)
#define FS_ENTRY_tap_fuse_backward tap_fuse_backward
#else
#define FS_ENTRY_tap_fuse_backward nullptr
#endif
#if defined(FS_HAS_tap_path)
#define FS_ENTRY_tap_path tap_path
#else
#define FS_ENTRY_tap_path nullptr
#endif
#if defined(FS_HAS_solver_step)
#define FS_ENTRY_solver_step solver_step, normals
#else
#define FS_ENTRY_solver_step nullptr, nullptr
#endif

namespace fs::FS_ISA {

extern const Table kTable = {
    FS_TEXT(FS_ISA),  FS_ENTRY_norm_act,          FS_ENTRY_norm_act_backward, FS_ENTRY_tap_norm,
    FS_ENTRY_tap_fuse, FS_ENTRY_tap_fuse_backward, FS_ENTRY_tap_path,          FS_ENTRY_solver_step};

}  // namespace fs::FS_ISA
