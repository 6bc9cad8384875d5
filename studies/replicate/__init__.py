"""The claim on a small scale: what LaTRO does to models of a million parameters, beside SFT."""
