"""What several benchmarks share: problems, who solves them, time, memory, and what is written."""
