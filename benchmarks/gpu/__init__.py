"""The suite of all that needs a GPU: `python benchmarks/gpu/suite.py`."""
