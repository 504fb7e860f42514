"""Kernels for text generation on CPUs and NVIDIA GPUs, a module per op family; they need torch alone."""
