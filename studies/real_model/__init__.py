"""A study of a real language model, SmolLM2-135M-Instruct, on real text."""
