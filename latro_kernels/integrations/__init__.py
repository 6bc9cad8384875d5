"""TRL, Transformers and verl, one call each. Each module imports its library, and patches nothing.

`latro_kernels` imports none of them: name the one that you want.
"""
