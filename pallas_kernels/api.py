"""Sequence operators of efficient language models. One function per family; `implementation` picks the backend.

Conventions
  layout            [B, T, H, D]: batch, time, heads, channels. q and k may have fewer heads than v, by a whole factor.
  log_decay         natural log, <= 0; -inf (forget everything) is allowed. Log decays below -64 act as -64.
  scale             of the queries; None = K ** -0.5.
  initial_state     [B, H, K, V] float32, or None for zero. It belongs to the segment of the first token.
  segment_ids       [B, T] integers. Where the id changes the state restarts from zero: segments never see each other.
  returns           (o, final_state); o has v's dtype; final_state is float32, None unless output_final_state=True.
  implementation    None (best for platform, shape and dtype), 'reference', 'xla', 'pallas_tpu', 'pallas_gpu', 'cudnn'.
  errors            ValueError in one line naming the argument, its value and what is allowed.
Gradients flow to every array argument but segment_ids; first order only.
"""
import functools

import jax.numpy as jnp

from pallas_kernels import attention as _attention
from pallas_kernels import dispatch, readout, reference, steps
from pallas_kernels import mlstm as _mlstm


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


def _check_options(q, v, initial_state, segment_ids, chunk_size, extra=0):
    """`extra`: value channels that the state has beyond those of v."""
    b, t, h = v.shape[:3]
    _check_shape("initial_state", initial_state, (b, h, q.shape[-1], v.shape[-1] + extra))
    _check_shape("segment_ids", segment_ids, (b, t))
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        _fail("segment_ids.dtype", segment_ids.dtype, "must be an integer type")
    if chunk_size is not None and (chunk_size < 1 or chunk_size > 256 or chunk_size & (chunk_size - 1)):
        _fail("chunk_size", chunk_size, "must be a power of two from 1 to 256, or None")


def _run(op, implementation, arrays, *, output_final_state, chunk_size, **options):
    """Calls the chosen implementation; those that always return the final state get it dropped here."""
    name, function = dispatch.choose(op, implementation, dict(arrays, chunk_size=chunk_size, **options))
    if name in ("xla", "pallas_tpu"):
        options["chunk_size"] = chunk_size
    if name != "pallas_gpu":
        for promise in ("min_log_decay", "max_beta"):  # only kernels of GPUs make use of them
            options.pop(promise, None)
    if name == "xla":
        options["output_final_state"] = output_final_state
    o, final_state = function(**arrays, **options)
    return o, final_state if output_final_state else None


def _gpu_kernel(op, implementation, arrays, chunk_size):
    """The GPU kernel of an operator that runs on `linear_attention` elsewhere, or None."""
    asked = dict(arrays, chunk_size=chunk_size)
    if implementation is None:
        chosen = dispatch.automatic(op, asked)
    else:
        chosen = dispatch.choose(op, implementation, asked) if implementation == "pallas_gpu" else None
    return chosen and chosen[1]


def linear_attention(q, k, v, log_decay=None, *, scale=None, bonus=None, normalise=False, initial_state=None,
                     segment_ids=None, output_final_state=False, chunk_size=None, implementation=None):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    The shape of log_decay names the family: None, plain linear attention (2006.16236); [H], RetNet and Lightning
    (2307.08621, 2401.04658); [B, T, H], Mamba-2 and simple GLA (2405.21060); [B, T, H, K], GLA and HGRN2 (2312.06635).

    Args:
      q, k: [B, T, Hk, K].  v: [B, T, H, V], H a multiple of Hk.
      bonus: [H, K] or None. With it the present token is read under its own weight and the state before its decay,
        o_t = scale (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t; S_t as above. RWKV-6 (2404.05892), which has scale = 1.
      normalise: divides o_t by scale z_t . q_t + 1e-10, where z_t = exp(log_decay_t) z_{t-1} + k_t (2006.16236); for q
        and k that are not negative. z is one more value channel, of ones: states are [B, H, K, V + 1] with z last, and
        a bonus counts in the normaliser too. Computed in float32, but for a kernel of 'pallas_gpu' that wants bfloat16
        and has neither a bonus nor a decay per channel.
      chunk_size: tokens per chunk (a power of two up to 256), None = chosen for the platform.
      Others: see the module's conventions.
    """
    _check_qkv(q, k, v)
    b, t, h = v.shape[:3]
    _check_shape("log_decay", log_decay, (h,), (b, t, h), (b, t, h, q.shape[-1]))
    _check_shape("bonus", bonus, (h, q.shape[-1]))
    _check_options(q, v, initial_state, segment_ids, chunk_size, extra=int(normalise))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    readout_options = dict(scale=scale, bonus=bonus, normalise=normalise, initial_state=initial_state,
                           segment_ids=segment_ids)
    if implementation == "reference":
        o, final_state = reference.linear_attention(q, k, v, log_decay, **readout_options)
        return o, final_state if output_final_state else None

    def run(q, k, v):
        arrays = dict(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state, segment_ids=segment_ids)
        return _run("linear_attention", implementation, arrays, scale=scale, output_final_state=output_final_state,
                    chunk_size=chunk_size)
    if bonus is None and not normalise:
        return run(q, k, v)
    if bonus is None and (log_decay is None or log_decay.ndim < 4):
        arrays = dict(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state, segment_ids=segment_ids)
        if kernel := _gpu_kernel("normalised_linear_attention", implementation, arrays, chunk_size):
            o, final_state = kernel(**arrays, scale=scale)
            return o, final_state if output_final_state else None
    return readout.linear_attention(run, q, k, v, **readout_options)


def delta_rule(q, k, v, beta, log_decay=None, *, scale=None, max_beta=2.0, initial_state=None, segment_ids=None,
               output_final_state=False, chunk_size=None, implementation=None, qk_l2norm=False):
    """S' = exp(log_decay_t) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = scale S_t^T q_t.

    log_decay None is DeltaNet (2406.06484); [H] or [B, T, H], Gated DeltaNet (2412.06464); [B, T, H, K], Kimi Delta
    Attention (2510.26692). beta in [0, 2]; above 1 the transition has negative eigenvalues (2411.12537). Stable for
    beta |k|^2 <= 2, so keys should have unit length: qk_l2norm=True divides q and k by sqrt(sum x^2 + 1e-6).

    Args:
      q: [B, T, Hk, K].  k: [B, n T, Hk, K].  v: [B, n T, H, V].  beta: [B, n T, H]. With n > 1, rows n t to
        n t + n - 1 are the n steps of token t, taken one after the other after one decay (DeltaProduct, 2502.10297).
      max_beta: a promise that beta |k|^2 is nowhere higher, at most 2. Up to 1, as for a sigmoid and normalised keys,
        GPU kernels spare digits that only reflections need.
      Others: see the module's conventions.
    """
    b, t, h = q.shape[0], q.shape[1], v.shape[2]
    steps_per_token = k.shape[1] // max(t, 1)
    if k.shape[1] != steps_per_token * t or steps_per_token == 0:
        _fail("k.shape[1]", k.shape[1], f"must be a whole multiple of T = {t}")
    _check_shape("beta", beta, (b, k.shape[1], h))
    if not 0 < max_beta <= 2:
        _fail("max_beta", max_beta, "must be above 0 and at most 2")
    _check_shape("log_decay", log_decay, (h,), (b, t, h), (b, t, h, q.shape[-1]))
    _check_shape("segment_ids", segment_ids, (b, t))
    if qk_l2norm:
        q, k = steps.l2_normalise(q), steps.l2_normalise(k)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if steps_per_token > 1:
        q, log_decay, segment_ids = _spread(steps_per_token, q, log_decay, segment_ids, v)
    _check_qkv(q, k, v)
    _check_options(q, v, initial_state, segment_ids, chunk_size)
    arrays = dict(q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state, segment_ids=segment_ids)
    o, final_state = _run("delta_rule", implementation, arrays, scale=scale, max_beta=max_beta,
                          output_final_state=output_final_state, chunk_size=chunk_size)
    return o[:, steps_per_token - 1::steps_per_token], final_state


def _spread(n, q, log_decay, segment_ids, v):
    """Rows for n steps per token: the query at the last step, the decay at the first."""
    def rows(x, at):
        shape = list(x.shape)
        shape[1] *= n
        return jnp.zeros(shape, x.dtype).at[:, at::n].set(x)

    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, q.shape[:2] + log_decay.shape)
        log_decay = rows(log_decay, 0)
    return rows(q, n - 1), log_decay, segment_ids if segment_ids is None else jnp.repeat(segment_ids, n, axis=1)


def dplr(q, k, v, a, b, log_decay, *, scale=1.0, min_log_decay=None, initial_state=None, segment_ids=None,
         output_final_state=False, chunk_size=None, implementation=None):
    """S_t = (diag(exp(log_decay_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    Diagonal plus low rank: RWKV-7 (2503.14456) with a = -kappa, b = kappa * eta. The removal a^T S reads the state
    before its decay. scale is 1 by default, as in RWKV-7.

    Args:
      q, k, a, b: [B, T, Hk, K].  v: [B, T, H, V].  log_decay: [B, T, H, K].
      min_log_decay: a promise that log_decay is nowhere lower, which the GPU kernels need, or None.
      Others: see the module's conventions.
    """
    _check_qkv(q, k, v)
    for name, x in (("a", a), ("b", b)):
        _check_shape(name, x, q.shape)
    _check_shape("log_decay", log_decay, v.shape[:3] + q.shape[3:])
    _check_options(q, v, initial_state, segment_ids, chunk_size)
    arrays = dict(q=q, k=k, v=v, a=a, b=b, log_decay=log_decay, initial_state=initial_state, segment_ids=segment_ids)
    return _run("dplr", implementation, arrays, scale=scale, min_log_decay=min_log_decay,
                output_final_state=output_final_state, chunk_size=chunk_size)


def mlstm(q, k, v, input_gate, forget_gate, *, input_activation="exp", scale=None, initial_state=None, segment_ids=None,
          output_final_state=False, chunk_size=None, implementation=None):
    """Matrix LSTM; gates [B, T, H] before activation, f = sigmoid(forget_gate).

    input_activation 'exp' (2405.04517): C_t = f C_{t-1} + e^i k v^T, n_t = f n_{t-1} + e^i k,
    o = scale C^T q / max(|scale n . q|, 1), with a running stabiliser m that leaves the result unchanged; its states
    are (C [B, H, K, V], n [B, H, K], m [B, H]) with C and n scaled by e^-m, and m is a constant for gradients.
    'sigmoid' (2503.14376): e^i becomes sigmoid(i), no normaliser, and the state is C. Both run on `linear_attention`,
    whose implementations they take; 'pallas_gpu' has a kernel for 'exp', whose normaliser others compute in float32.
    """
    _check_qkv(q, k, v)
    for name, x in (("input_gate", input_gate), ("forget_gate", forget_gate)):
        _check_shape(name, x, v.shape[:3])
    if input_activation not in ("exp", "sigmoid"):
        _fail("input_activation", repr(input_activation), "must be 'exp' or 'sigmoid'")
    if initial_state is not None:
        memory = initial_state[0] if input_activation == "exp" else initial_state
        _check_shape("initial_state", memory, (v.shape[0], v.shape[2], q.shape[-1], v.shape[-1]))
    _check_options(q, v, None, segment_ids, chunk_size)
    options = dict(scale=q.shape[-1] ** -0.5 if scale is None else scale, input_activation=input_activation,
                   initial_state=initial_state, segment_ids=segment_ids)
    if implementation == "reference":
        o, state = reference.mlstm(q, k, v, input_gate, forget_gate, **options)
        return o, state if output_final_state else None
    if input_activation == "exp":
        arrays = dict(q=q, k=k, v=v, input_gate=input_gate, forget_gate=forget_gate, initial_state=initial_state,
                      segment_ids=segment_ids)
        if kernel := _gpu_kernel("mlstm", implementation, arrays, chunk_size):
            o, state = kernel(**arrays, scale=options["scale"])
            return o, state if output_final_state else None
    run = functools.partial(linear_attention, chunk_size=chunk_size, implementation=implementation)
    return _mlstm.mlstm(run, q, k, v, input_gate, forget_gate, output_final_state=output_final_state, **options)


def diagonal_scan(x, log_decay, *, initial_state=None, segment_ids=None, reverse=False, output_final_state=False,
                  implementation=None):
    """h_t = exp(log_decay_t) h_{t-1} + x_t per channel (S4D, RG-LRU, HGRN, EMA). Returns (h, final_state or None).

    Args:
      x: [B, T, D], real or complex.  log_decay: [D] or [B, T, D], real or complex, real part <= 0.
      initial_state: [B, D] state before the first token (after the last one when reverse=True).
      reverse: run from the last token to the first; segments restart there likewise.
    A complex log_decay gives a complex h; otherwise h has x's dtype.
    """
    if x.ndim != 3:
        _fail("x.shape", x.shape, "must be [B, T, D]")
    _check_shape("log_decay", log_decay, x.shape[2:], x.shape)
    _check_shape("initial_state", initial_state, (x.shape[0], x.shape[2]))
    _check_shape("segment_ids", segment_ids, x.shape[:2])
    arrays = dict(x=x, log_decay=jnp.broadcast_to(log_decay, x.shape), initial_state=initial_state,
                  segment_ids=segment_ids)
    return _run("diagonal_scan", implementation, arrays, reverse=reverse, output_final_state=output_final_state,
                chunk_size=None)


def causal_conv1d(x, weight, bias=None, *, activation=None, initial_state=None, segment_ids=None,
                  output_final_state=False, implementation=None):
    """y_t = sum_j weight_j x_{t - W + 1 + j} + bias per channel, then SiLU if activation='silu'.

    Returns (y, final_state or None).

    Args:
      x: [B, T, D].  weight: [W, D], its last row for the current token.  bias: [D] or None.
      initial_state: [B, W - 1, D] inputs before the first token, oldest first; None = zeros. final_state likewise, in
        the dtype of x, since it holds inputs and no sums.
      segment_ids: [B, T]; taps that reach before the start of a segment read zero.
    """
    if x.ndim != 3:
        _fail("x.shape", x.shape, "must be [B, T, D]")
    if weight.ndim != 2 or weight.shape[1] != x.shape[2] or weight.shape[0] == 0:
        _fail("weight.shape", weight.shape, f"must be [W, D] with D = {x.shape[2]}")
    if activation not in (None, "silu"):
        _fail("activation", repr(activation), "must be None or 'silu'")
    _check_shape("bias", bias, x.shape[2:])
    _check_shape("initial_state", initial_state, (x.shape[0], weight.shape[0] - 1, x.shape[2]))
    _check_shape("segment_ids", segment_ids, x.shape[:2])
    arrays = dict(x=x, weight=weight, bias=bias, initial_state=initial_state, segment_ids=segment_ids)
    return _run("causal_conv1d", implementation, arrays, activation=activation, output_final_state=output_final_state,
                chunk_size=None)


def attention(q, k, v, *, window=None, segment_ids=None, log_forget=None, sinks=None, logit_cap=None, sigmoid_bias=None,
              scale=None, implementation=None):
    """Causal softmax attention, o_t = sum_j w_tj v_j over the keys j <= t of t's segment. Returns o [B, T, H, V].

    w_tj = e^s_tj / sum_i e^s_ti with s_tj = scale q_t.k_j; 'xla' computes it by blocks (2205.14135), in memory linear
    in T. Query head h reads key head h // (H / G): GQA (2305.13245), MQA with G = 1.

    Args:
      q: [B, T, H, K].  k: [B, T, G, K].  v: [B, T, G, V], H a multiple of G.
      window: keys that a query sees, itself included; None = all.
      log_forget: [B, T, H] log forget gates; s_tj gains those of the tokens j + 1 .. t (2503.02130).
      sinks: [H] logits b that join the denominator, e^b + sum_i e^s_ti; zeros give softmax-off-by-one.
      logit_cap: c of the soft cap c tanh(s / c), before gates and biases.
      sigmoid_bias: makes w_tj = sigmoid(s_tj + sigmoid_bias), with no denominator (2409.04431).
      implementation: also 'cudnn'; see the module's conventions.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            _fail(f"{name}.shape", x.shape, "must be [B, T, H, D]")
    b, t, h, width = q.shape
    _check_shape("k", k, (b, t, k.shape[2], width))
    _check_shape("v", v, k.shape[:3] + v.shape[3:])
    if h % k.shape[2]:
        _fail("heads of q", h, f"must be a multiple of the {k.shape[2]} heads of k and v")
    _check_shape("segment_ids", segment_ids, (b, t))
    _check_shape("log_forget", log_forget, (b, t, h))
    _check_shape("sinks", sinks, (h,))
    if window is not None and window < 1:
        _fail("window", window, "must be at least 1, or None")
    if sigmoid_bias is not None and sinks is not None:
        _fail("sinks", "given", "must be None with sigmoid_bias, which has no denominator")
    if segment_ids is not None:  # an id that comes back later is another segment
        segment_ids = jnp.cumsum(steps.segment_starts(segment_ids), 1)
    arrays = dict(q=q, k=k, v=v, segment_ids=segment_ids, log_forget=log_forget, sinks=sinks)
    options = dict(window=window, logit_cap=logit_cap, sigmoid_bias=sigmoid_bias,
                   scale=width ** -0.5 if scale is None else scale)
    _, function = dispatch.choose("attention", implementation, arrays | options)
    return function(**arrays, **options)


def grouped_matmul(lhs, rhs, group_sizes, *, implementation=None):
    """Rows times the matrix of their group: y_m = lhs_m rhs_g(m), for the experts of a mixture. Returns y [M, N].

    Args:
      lhs: [M, K] with the rows of group 0 first, then those of group 1, ...; y has its dtype.
      rhs: [E, K, N], or a tuple of such arrays: y then holds their products side by side, [M, N + N + ...].
      group_sizes: [E] integers, zeros allowed, with a sum of at most M; rows behind the last group give zeros.
      implementation: see the module's conventions. No implementation drops rows.
    """
    if lhs.ndim != 2 or lhs.shape[0] == 0:
        _fail("lhs.shape", lhs.shape, "must be [M, K] with at least one row")
    rhs = rhs if isinstance(rhs, tuple) else (rhs,)
    for one in rhs:
        if one.ndim != 3 or one.shape[1] != lhs.shape[1]:
            _fail("rhs.shape", one.shape, f"must be [E, K, N] with K = {lhs.shape[1]}")
        _check_shape("rhs", one, rhs[0].shape)
    _check_shape("group_sizes", group_sizes, rhs[0].shape[:1])
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        _fail("group_sizes.dtype", group_sizes.dtype, "must be an integer type")
    arrays = dict(lhs=lhs, rhs=rhs, group_sizes=group_sizes)
    _, function = dispatch.choose("grouped_matmul", implementation, arrays)
    return function(**arrays)


attention_step = _attention.attention_step
linear_attention_step = steps.linear_attention_step
delta_rule_step = steps.delta_rule_step
dplr_step = steps.dplr_step
mlstm_step = steps.mlstm_step
diagonal_scan_step = steps.diagonal_scan_step
causal_conv1d_step = steps.causal_conv1d_step
