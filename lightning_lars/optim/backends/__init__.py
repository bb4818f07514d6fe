"""How a step is computed: by foreach operations, torch's fused kernels on the CPU, or Triton's on a GPU."""
