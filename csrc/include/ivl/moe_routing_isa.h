// What moe_routing.cpp compiles for every instruction set.
#include "ivl/vec_kernels.h"
#include "ivl/moe_routing_kernels.h"
