"""Splash attention, the block-sparse flash attention for TPUs that comes with JAX."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels.tpu.common import interpreted, unsupported
from pallas_kernels.xla.common import pad_time

LANES = 128  # T must be a multiple


def supports(*, q, v, log_forget, sigmoid_bias, **_):
    """None where the kernel serves the call, else why not."""
    given = dict(log_forget=log_forget, sigmoid_bias=sigmoid_bias)
    if options := [name for name, value in given.items() if value is not None]:
        return f"no {' or '.join(options)}"
    return unsupported(q, v, None)


def attention(
    q, k, v, *, scale, window, segment_ids, sinks, logit_cap, log_forget=None, sigmoid_bias=None, interpret=None
):
    """See `pallas_kernels.api.attention`."""
    length, heads = q.shape[1:3]
    padded = -(-length // LANES) * LANES
    q, k, v = (pad_time(x, padded).swapaxes(1, 2) for x in ((scale * q).astype(q.dtype), k, v))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - length)), mode="edge")
        segment_ids = splash.SegmentIds(segment_ids, segment_ids)
    shape = padded, padded
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(padded),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=logit_cap,
        interpret=interpreted(interpret),
    )
    o = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, ids, sinks))(q, k, v, segment_ids)
    return o.swapaxes(1, 2)[:, :length]


def _block_sizes(length):
    names = ("block_q", "block_kv", "block_kv_compute")
    backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    block = next(size for size in (512, 256, 128) if length % size == 0)
    return splash.BlockSizes(**dict.fromkeys(names + backward, block))
