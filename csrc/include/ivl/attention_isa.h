// What attention.cpp compiles for every instruction set.
#include "ivl/vec_kernels.h"
#include "ivl/attention_kernels.h"
