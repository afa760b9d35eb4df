"""What the ops share: device functions in Triton, and tensors made ready for kernels."""
