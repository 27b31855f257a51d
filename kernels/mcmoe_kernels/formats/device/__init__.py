"""What formats do in kernels: the only modules of formats that need Triton."""
