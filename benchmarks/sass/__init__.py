"""What the compiler made of the CUDA kernels, and what that lets a GPU reach at most. Needs nvcc and no GPU."""
