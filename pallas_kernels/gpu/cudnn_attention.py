"""cuDNN's flash attention, through jax.nn."""

import jax
import jax.numpy as jnp


def attention(q, k, v, *, scale, window, segment_ids, **_):
    """See `pallas_kernels.api.attention`."""
    same = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    return jax.nn.dot_product_attention(
        *(q, k, v, None, same),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def supports(*, q, v, sinks, logit_cap, log_forget, sigmoid_bias, **_):
    """None where cuDNN serves the call, else the reason why not."""
    width = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype} inputs: only bfloat16 and float16"
    if width % 8 or width > 128 or v.shape[-1] != width:
        return f"K = {width}, V = {v.shape[-1]}: equal, at most 128, in steps of 8"
    given = dict(sinks=sinks, logit_cap=logit_cap, log_forget=log_forget, sigmoid_bias=sigmoid_bias)
    options = [name for name, value in given.items() if value is not None]
    return f"no {' or '.join(options)}" if options else None
