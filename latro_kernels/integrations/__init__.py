"""One call each for TRL, Transformers and verl, and functions in the form of other libraries.

`latro_kernels` imports none of these modules: name the one that you want. None patches anything
when it is imported.
"""
