"""GPU code without a GPU: `gpu` runs kernels in a simulator of PTX (`ptxsim`), `aot` compiles them for any target."""
