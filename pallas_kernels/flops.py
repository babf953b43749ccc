"""Forward matmul FLOPs per token of the operators (a multiply-add counts 2), all heads together.

Two kinds. `implementation=None` gives the idealised chunk form, the convention for comparing models: no causal
skipping inside a chunk, chunk of 64 unless said. An implementation's name gives the matrix products that it executes,
padding and skipping included; a test compares those with the dot_general operations of the traced computation.
"""
from pallas_kernels.xla.linear_attention import default_chunk

IDEAL_CHUNK = 64


def linear_attention_flops(T, H, K, V, decay="none", chunk_size=None, implementation=None, groups=None):
    """FLOPs per token of `api.linear_attention`: no initial state, final state not asked for.

    Args:
      T: tokens. H: value heads. K, V: channels of one head. groups: query and key heads (default H).
      decay: 'none', 'head', 'token' or 'channel'.
      implementation: None = idealised, H (4KV + 2C(K + V)); 'xla' or 'reference' = executed.
    """
    if decay not in ("none", "head", "token", "channel"):
        raise ValueError(f"decay = {decay!r}: allowed are 'none', 'head', 'token', 'channel'")
    if implementation is None:
        chunk = min(chunk_size or IDEAL_CHUNK, T)
        return float(H * (4 * K * V + 2 * chunk * (K + V)))
    if implementation == "reference":
        return float(H * 2 * K * V)  # k v^T is element-wise
    if implementation != "xla":
        raise ValueError(f"implementation = {implementation!r}: allowed are None, 'xla', 'reference'")
    chunk = chunk_size or default_chunk(decay)
    chunk = min(chunk, 1 << (T - 1).bit_length() if decay == "channel" else T)
    n = -(-T // chunk)
    padded = n * chunk
    states = (2 * (n - 1) + 2 * n) * chunk * K * V * H if n > 1 else 0  # the last update serves no output
    if decay == "channel":
        cumulative = 2 * 2 * padded * chunk * K * H
        return float((_pair_flops(chunk, K) * n * H + cumulative + 2 * padded * chunk * V * H + states) / T)
    cumulative = 2 * 2 * padded * chunk * H if decay == "token" else 0  # of 'head': once for all sequences, not counted
    return float((2 * padded * chunk * (K * (groups or H) + V * H) + cumulative + states) / T)


def _pair_flops(chunk, K):
    """Products of `xla.pairs.scores` for one x and one chunk: every level does C h K multiply-adds, h = C/2 .. 1."""
    return sum(2 * (chunk // 2) * h * K for h in (1 << s for s in range(chunk.bit_length() - 1)))
