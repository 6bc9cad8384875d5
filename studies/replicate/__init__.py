"""Test the paper's claim on a small scale: LaTRO and SFT on models of a million parameters."""
