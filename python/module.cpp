// The Python module ivl_kernels._C: build facts and CPU features. The tensor operators register themselves with
// torch when the module is loaded (the other files of this folder).
#include <pybind11/pybind11.h>

#include <string>

#include "ivl/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    info["torch_stable_abi"] = std::to_string((TORCH_TARGET_VERSION >> 56) & 0xff) + "." +
                               std::to_string((TORCH_TARGET_VERSION >> 48) & 0xff);
    return info;
  });
  m.def("cpu_features", [] {
    py::dict features;
    features["best_isa"] = ivl::isa_name(ivl::best_isa());
    features["isa"] = ivl::isa_name(ivl::selected_isa());
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    features["avx2"] = bool(__builtin_cpu_supports("avx2"));
    features["fma"] = bool(__builtin_cpu_supports("fma"));
    features["f16c"] = bool(__builtin_cpu_supports("f16c"));
    features["avx512f"] = bool(__builtin_cpu_supports("avx512f"));
    features["avx512bf16"] = bool(__builtin_cpu_supports("avx512bf16"));
#endif
    return features;
  });
  m.def(
      "set_isa",
      [](const std::string& name) {
        for (ivl::Isa isa :
             {ivl::Isa::portable, ivl::Isa::avx2, ivl::Isa::avx512, ivl::Isa::avx512_bf16})
          if (name == ivl::isa_name(isa)) return ivl::set_isa(isa);
        throw py::value_error("isa: got '" + name + "', expected 'portable', 'avx2', 'avx512' or 'avx512_bf16'");
      },
      py::arg("name"));
}
