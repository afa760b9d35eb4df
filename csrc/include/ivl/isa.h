// Which instruction set the CPU kernels use: the best the processor has, or less when IVL_CPU_ISA says so.
#pragma once

namespace ivl {

// avx512_bf16 is avx512 with bfloat16 dot products, for the few kernels that have a path of their own for it.
enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

Isa best_isa();               // what the processor can run
Isa selected_isa();           // what is in use now
void set_isa(Isa);            // lower it (tests); asking for more than best_isa() throws std::invalid_argument
const char* isa_name(Isa);

Isa isa();        // the namespace of the kernels in use: at most avx512
bool dot_bf16();  // whether kernels may use bfloat16 dot products

}  // namespace ivl
