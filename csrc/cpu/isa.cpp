#include "ivl/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ivl {
namespace {

Isa probe() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

Isa from_environment() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("IVL_CPU_ISA");
  if (wanted == nullptr) return best;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
    if (std::strcmp(wanted, isa_name(isa)) == 0 && isa <= best) return isa;
  return best;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{from_environment()};
  return value;
}

}  // namespace

Isa best_isa() {
  static const Isa best = probe();
  return best;
}

Isa selected_isa() { return current().load(std::memory_order_relaxed); }

Isa isa() { return std::min(selected_isa(), Isa::avx512); }

bool dot_bf16() { return selected_isa() == Isa::avx512_bf16; }

void set_isa(Isa isa) {
  if (isa > best_isa())
    throw std::invalid_argument(std::string("this processor cannot run ") + isa_name(isa) + ", only up to " +
                                isa_name(best_isa()));
  current().store(isa);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace ivl
