"""Benchmarks of the kernels and of a training step, and what they share."""
