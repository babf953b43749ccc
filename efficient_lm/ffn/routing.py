"""Token-choice routing: scores, selection, weights, balancing losses, statistics; N tokens, E experts, float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_lm.layers import wide


class Routing(NamedTuple):
    """What a router decides.

    experts: [N, k] int32, the chosen experts, best first.  weights: [N, k], theirs.
    probabilities: [N, E], rows that sum to 1, for the balancing loss.
    """

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array


def router_logits(x, kernel):
    """x [N, d] times kernel [d, E], as exact as in float32 whatever the dtype of x; for float64 arrays in float64."""
    if x.dtype == jnp.bfloat16:
        return _split_product(x, kernel)
    return jnp.matmul(wide(x), wide(kernel), precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _split_product(x, kernel):
    """bfloat16 times float32 on matrix units: `kernel` is the sum of three bfloat16 matrices, whose products with x
    are exact in float32."""
    return _sum_parts(jnp.matmul(x, _parts(kernel, 3), preferred_element_type=jnp.float32), 3)


def _split_backward(saved, g):
    x, kernel = saved
    dkernel = jnp.matmul(x.T, _parts(g, 3), preferred_element_type=jnp.float32)
    # dx is rounded to bfloat16: the product of the two small parts would not show.
    high, low = jnp.split(_parts(g, 2), 2, axis=1)
    kernel_parts = jnp.concatenate([_parts(kernel, 2), _parts(kernel, 1)], axis=1)
    return jnp.concatenate([high, high, low], axis=1) @ kernel_parts.T, _sum_parts(dkernel, 3)


_split_product.defvjp(lambda x, kernel: (_split_product(x, kernel), (x, kernel)), _split_backward)


def _parts(x, count: int):
    """x [n, m] float32 -> bfloat16 [n, count m], matrices whose sum is x but for 2^-8 of the last one."""
    parts = []
    for _ in range(count):
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return jnp.concatenate(parts, axis=1).astype(jnp.bfloat16)


def _sum_parts(y, count: int):
    return sum(reversed(jnp.split(y, count, axis=1)))


def route(logits, bias, cfg) -> Routing:
    """logits [N, E], bias [E] or None -> Routing, by the settings of a MoEConfig.

    score 'softmax' is that of Switch (2101.03961), 'sigmoid' of DeepSeek-V3 (2412.19437). The bias (2408.15664) takes
    part in the selection only. With n_groups, a group counts as the sum of its two best experts, and only experts of
    the `top_groups` best groups can be chosen.
    """
    if cfg.score == "softmax":
        scores = probabilities = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
        probabilities = scores / jnp.sum(scores, axis=-1, keepdims=True)
    ranking = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if cfg.n_groups > 1:
        ranking = jnp.where(best_groups(ranking, cfg.n_groups, cfg.top_groups), ranking, -jnp.inf)
    experts = jax.lax.top_k(ranking, cfg.top_k)[1]
    # A product with 0/1 instead of a gather, whose gradient would be a scatter.
    weights = jnp.sum(one_hot(experts, logits) * scores[:, None, :], axis=-1)
    if cfg.normalise:
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
    return Routing(experts, cfg.route_scale * weights, probabilities)


def best_groups(ranking, n_groups: int, top_groups: int):
    """[N, E] -> bool [N, E]: the experts of the top_groups groups with the largest sums of two best experts."""
    tokens, experts = ranking.shape
    grouped = ranking.reshape(tokens, n_groups, experts // n_groups)
    strength = jnp.sum(jax.lax.top_k(grouped, min(2, experts // n_groups))[0], axis=-1)
    chosen = jax.lax.top_k(strength, top_groups)[1]
    kept = jnp.any(one_hot(chosen, strength) > 0, axis=1)
    return jnp.repeat(kept, experts // n_groups, axis=-1)


def one_hot(index, like):
    """[N, k] -> [N, k, E] of like's dtype, E = like.shape[-1]."""
    return jax.nn.one_hot(index, like.shape[-1], dtype=like.dtype)


def loads(routing: Routing, real):
    """Tokens that chose each expert [E]; `real` [N] is 1 for tokens that count, 0 for padding."""
    chosen = jnp.sum(one_hot(routing.experts, routing.probabilities), axis=1)
    return jnp.sum(chosen * real[:, None], axis=0)


def balance_loss(routing: Routing, real, rows: int = 1, load=None):
    """E sum_e f_e P_e, 1 at perfect balance (2101.03961, with the 1/k of top-k routing).

    f_e: share of the choices that went to e, P_e: mean probability. Taken over each of `rows` equal parts of the
    tokens and averaged; f comes from `load` [E] where that is given: that of these tokens, or of the whole last step
    (2501.11873).
    """
    n_experts, k = routing.probabilities.shape[-1], routing.experts.shape[-1]
    real = real.reshape(rows, -1, 1)
    count = jnp.maximum(jnp.sum(real, axis=1), 1.0)
    mean = jnp.sum(routing.probabilities.reshape(*real.shape[:2], -1) * real, axis=1) / count
    if load is None:
        chosen = jnp.sum(one_hot(routing.experts, routing.probabilities), axis=1).reshape(*real.shape[:2], -1)
        share = jnp.sum(chosen * real, axis=1) / (k * count)
    else:
        share = load / jnp.maximum(jnp.sum(load), 1.0)
    return n_experts * jnp.mean(jnp.sum(jax.lax.stop_gradient(share) * mean, axis=-1))


def z_loss(logits, real):
    """Mean squared logsumexp of the logits (2202.08906)."""
    return masked_mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), real)


def document_information(routing: Routing, real, rows: int, documents=None):
    """How far experts specialise in documents: nats that the document of a token tells about its experts.

    The mutual information of document and expert over these tokens, less what chance alone gives to so few choices
    (Miller and Madow's (documents - 1)(experts - 1) / 2 choices); about 0 where every document uses the experts alike.
    The N tokens are `rows` sequences; `documents` [rows, T] numbers the segments of each, None: a row is a document.
    """
    chosen = jnp.sum(one_hot(routing.experts, routing.probabilities), axis=1) * real[:, None]
    chosen = chosen.reshape(rows, -1, chosen.shape[-1])
    if documents is None:
        counts = jnp.sum(chosen, axis=1)
    else:
        starts = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))
        place = jnp.cumsum(starts.astype(jnp.int32), axis=1)
        counts = jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, documents.shape[1]))(chosen, place)
    counts = counts.reshape(-1, counts.shape[-1])
    load, size, total = jnp.sum(counts, 0), jnp.sum(counts, 1, keepdims=True), jnp.sum(counts)
    expected = size * load / jnp.maximum(total, 1.0)
    ratio = jnp.where(counts > 0, counts / jnp.where(expected > 0, expected, 1.0), 1.0)
    chance = (jnp.sum(size > 0) - 1) * (jnp.sum(load > 0) - 1) / 2
    return (jnp.sum(counts * jnp.log(ratio)) - chance) / jnp.maximum(total, 1.0)


def statistics(logits, routing: Routing, real) -> dict:
    """Scalars for the log: entropy of the router in nats, root mean square of the logits."""
    entropy = -jnp.sum(jax.scipy.special.xlogy(routing.probabilities, routing.probabilities), axis=-1)
    return {
        "router_entropy": masked_mean(entropy, real),
        "router_logit_rms": jnp.sqrt(masked_mean(jnp.mean(jnp.square(logits), axis=-1), real)),
    }


def load_statistics(load) -> dict:
    """For the log, of the loads [E] of a whole step: router_load_profile [E], loads / their mean; max_violation, its
    largest - 1 (2408.15664); dead experts, the share without a token."""
    relative = load / jnp.maximum(jnp.mean(load), 1e-9)
    return {
        "router_load_profile": relative,
        "router_max_violation": jnp.max(relative) - 1.0,
        "router_dead_experts": jnp.mean(load == 0),
    }


def masked_mean(values, real):
    """Mean of `values` [N] over tokens with real = 1."""
    return jnp.sum(values * real) / jnp.maximum(jnp.sum(real), 1.0)


def next_bias(bias, load, rate: float):
    """The router bias after a step with these loads: b + rate (s - mean s), s = sign(mean load - load).

    2408.15664, centred as in Ling 2.0, so that the biases keep their sum.
    """
    step = jnp.sign(jnp.mean(load) - load)
    return bias + rate * (step - jnp.mean(step))
