"""What the Triton kernels of several ops are made of, imported only when that backend runs."""
