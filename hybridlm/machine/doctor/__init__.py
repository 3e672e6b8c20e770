"""`hybridlm doctor`: what this machine has, which kernels work on it, and what to install for the others."""
