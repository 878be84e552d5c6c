#include "table.h"

#define FS_TEXT_(x) #x
#define FS_TEXT(x) FS_TEXT_(x)

// an operation whose source is missing is absent from the table
#if __has_include("norm_act.cpp")
#define FS_HAS_NORM_ACT norm_act
#else
#define FS_HAS_NORM_ACT nullptr
#endif
#if __has_include("norm_act_backward.cpp")
#define FS_HAS_NORM_ACT_BACKWARD norm_act_backward
#else
#define FS_HAS_NORM_ACT_BACKWARD nullptr
#endif
#if __has_include("tap_norm.cpp")
#define FS_HAS_TAP_NORM tap_norm
#else
#define FS_HAS_TAP_NORM nullptr
#endif
#if __has_include("tap_fuse.cpp")
#define FS_HAS_TAP_FUSE tap_fuse
#else
#define FS_HAS_TAP_FUSE nullptr
#endif
#if __has_include("tap_fuse_backward.cpp")
#define FS_HAS_TAP_FUSE_BACKWARD tap_fuse_backward
#else
#define FS_HAS_TAP_FUSE_BACKWARD nullptr
#endif
#if __has_include("tap_path.cpp")
#define FS_HAS_TAP_PATH tap_path
#else
#define FS_HAS_TAP_PATH nullptr
#endif
#if __has_include("solver_step.cpp")
#define FS_HAS_SOLVER_STEP solver_step, normals
#else
#define FS_HAS_SOLVER_STEP nullptr, nullptr
#endif

namespace fs::FS_ISA {

extern const Table kTable = {
    FS_TEXT(FS_ISA),  FS_HAS_NORM_ACT,          FS_HAS_NORM_ACT_BACKWARD, FS_HAS_TAP_NORM,
    FS_HAS_TAP_FUSE, FS_HAS_TAP_FUSE_BACKWARD, FS_HAS_TAP_PATH,          FS_HAS_SOLVER_STEP};

}  // namespace fs::FS_ISA
