"""The operations of `kernels/` in Triton, one a file: contract, launcher, kernel. The CPU path imports none of it."""
