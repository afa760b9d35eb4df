"""What the compiled GPU kernels cost, without a GPU: `python -m bench.inspect`."""
