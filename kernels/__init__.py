"""One operation a file: its contract, its launcher, its kernels. Imports torch (and triton) only."""
