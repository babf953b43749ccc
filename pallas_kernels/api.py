"""Sequence operators of efficient language models. One function per family; `implementation` picks the backend.

Conventions
  layout            [B, T, H, D]: batch, time, heads, channels. q and k may have fewer heads than v, by a whole factor.
  log_decay         natural log, <= 0; -inf (forget everything) is allowed. Log decays below -64 act as -64.
  scale             of the queries; None = K ** -0.5.
  initial_state     [B, H, K, V] float32, or None for zero. It belongs to the segment of the first token.
  segment_ids       [B, T] integers. Where the id changes the state restarts from zero: segments never see each other.
  returns           (o, final_state); o has v's dtype; final_state is float32, None unless output_final_state=True.
  implementation    None (best for this platform, shape and dtype), 'reference', 'xla', 'pallas_tpu', 'pallas_gpu'.
  errors            ValueError in one line naming the argument, its value and what is allowed.
Gradients flow to every array argument but segment_ids; first order only.
"""
import jax.numpy as jnp

from pallas_kernels import dispatch, steps


def _fail(name, value, allowed):
    raise ValueError(f"{name} = {value}: {allowed}")


def _check_qkv(q, k, v):
    """Checks the shapes of q [B, T, Hk, K], k like q, v [B, T, H, V]; Hk divides H."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            _fail(f"{name}.shape", x.shape, "must be [B, T, H, D]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            _fail(f"{name}.dtype", x.dtype, "must be a floating type")
    if k.shape != q.shape:
        _fail("k.shape", k.shape, f"must equal q.shape = {q.shape}")
    if v.shape[:2] != q.shape[:2]:
        _fail("v.shape", v.shape, f"must start with [B, T] = {q.shape[:2]} of q")
    if v.shape[2] % q.shape[2]:
        _fail("heads of v", v.shape[2], f"must be a multiple of the {q.shape[2]} heads of q and k")
    if q.shape[1] == 0:
        _fail("T", 0, "at least one token")


def _check_shape(name, x, *allowed):
    if x is not None and x.shape not in allowed:
        _fail(f"{name}.shape", x.shape, "must be " + " or ".join(map(str, allowed)))


def _check_options(q, v, initial_state, segment_ids, chunk_size):
    b, t, h = v.shape[:3]
    _check_shape("initial_state", initial_state, (b, h, q.shape[-1], v.shape[-1]))
    _check_shape("segment_ids", segment_ids, (b, t))
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        _fail("segment_ids.dtype", segment_ids.dtype, "must be an integer type")
    if chunk_size is not None and (chunk_size < 1 or chunk_size > 256 or chunk_size & (chunk_size - 1)):
        _fail("chunk_size", chunk_size, "must be a power of two from 1 to 256, or None")


def _run(op, implementation, arrays, *, output_final_state, chunk_size, **options):
    """Calls the chosen implementation; those that always return the final state get it dropped here."""
    name, function = dispatch.choose(op, implementation, dict(arrays, chunk_size=chunk_size, **options))
    if name == "xla":
        options |= {"output_final_state": output_final_state, "chunk_size": chunk_size}
    o, final_state = function(**arrays, **options)
    return o, final_state if output_final_state else None


def linear_attention(q, k, v, log_decay=None, *, scale=None, initial_state=None, segment_ids=None,
                     output_final_state=False, chunk_size=None, implementation=None):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    The shape of log_decay names the family: None, plain linear attention (2006.16236); [H], RetNet and Lightning
    (2307.08621, 2401.04658); [B, T, H], Mamba-2 and simple GLA (2405.21060); [B, T, H, K], GLA and HGRN2 (2312.06635).

    Args:
      q, k: [B, T, Hk, K].  v: [B, T, H, V], H a multiple of Hk.
      chunk_size: tokens per chunk (a power of two up to 256), None = chosen for the platform.
      Others: see the module's conventions.
    """
    _check_qkv(q, k, v)
    b, t, h = v.shape[:3]
    _check_shape("log_decay", log_decay, (h,), (b, t, h), (b, t, h, q.shape[-1]))
    _check_options(q, v, initial_state, segment_ids, chunk_size)
    arrays = dict(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state, segment_ids=segment_ids)
    return _run("linear_attention", implementation, arrays, scale=q.shape[-1] ** -0.5 if scale is None else scale,
                output_final_state=output_final_state, chunk_size=chunk_size)


linear_attention_step = steps.linear_attention_step
