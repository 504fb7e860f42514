"""Oracles in float64: plain torch, obvious, slow. Signatures as the ops', but fresh tensors come back."""
