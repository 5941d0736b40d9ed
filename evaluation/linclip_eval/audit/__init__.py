"""A modality audit: which of two inputs a model's decisions take their information from."""
