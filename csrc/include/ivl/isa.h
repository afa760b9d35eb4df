// Which instruction set the CPU kernels use: the best the processor has, or less when IVL_CPU_ISA says so.
#pragma once

namespace ivl {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

Isa best_isa();               // what the processor can run
Isa isa();                    // what the kernels use now
void set_isa(Isa);            // lower it (tests); asking for more than best_isa() throws std::invalid_argument
const char* isa_name(Isa);

}  // namespace ivl
