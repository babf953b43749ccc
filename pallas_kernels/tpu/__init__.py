"""Pallas TPU kernels: one program walks the chunks of one head with the state in VMEM.

Off a TPU they run under the Pallas interpreter: right, slow, for tests.
"""

# Tokens per chunk when the caller gives none.
DEFAULT_CHUNK = 64
