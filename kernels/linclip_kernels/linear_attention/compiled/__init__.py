"""What the compiler makes of the Triton kernels, and the time that this predicts; without a GPU."""
