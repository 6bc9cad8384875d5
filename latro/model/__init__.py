"""The model under training: scoring, packing, attention, adapters, distribution."""
