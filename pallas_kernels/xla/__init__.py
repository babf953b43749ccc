"""Chunked operators in plain JAX: matrix products inside chunks, a short scan over chunk states."""
