"""Triton kernels and their launchers, imported only when that backend runs."""
