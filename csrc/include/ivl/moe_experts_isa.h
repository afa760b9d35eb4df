// What moe_experts.cpp compiles for every instruction set.
#include "ivl/vec_kernels.h"
#include "ivl/moe_experts_kernels.h"
