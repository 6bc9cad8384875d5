"""The training updates that `step.py` compares, what they work on, and what is measured of them."""
