// What norm.cpp compiles for every instruction set.
#include "ivl/vec_kernels.h"
#include "ivl/norm_kernels.h"
