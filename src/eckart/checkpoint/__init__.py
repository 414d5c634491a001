"""Files on disk as lazy sources of tensors, and outputs that appear whole or not at all."""
