"""Mixture of experts: y = sum over the chosen experts of w_e FFN_e(x) + shared experts (always on).

Sizes in the words of the Efficiency Leverage paper (2507.17702): activation ratio A = (top_k + n_shared) /
(n_experts + n_shared), granularity G = 2 d_model / d_expert, shared ratio S = n_shared / (top_k + n_shared).
Krajewski et al. (2402.07871) call 4 d_model / d_expert the granularity.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.ffn import dispatch, expert_parallel, routing
from efficient_lm.ffn.activations import activation_params, find_activation, make_activation
from efficient_lm.ffn.base import FFN, FFNS, FFNConfig
from efficient_lm.ffn.dense import Dense, DenseConfig
from efficient_lm.flops import Flops, dense
from efficient_lm.layers import recomputed, wide
from efficient_lm.schema import ConfigError, setting
from pallas_kernels import api


@dataclass(frozen=True)
class MoEConfig(FFNConfig):
    n_experts: int = setting(8, "routed experts", low=1)
    top_k: int = setting(2, "routed experts per token", low=1)
    n_shared: int = setting(1, "experts that see every token", low=0)
    d_expert: int = setting(0, "hidden width of an expert; 0 = from granularity", low=0)
    granularity: float = setting(2.0, "2 d_model / d_expert, as 2507.17702 counts", low=0.01)
    activation: str = setting("silu", "registered activation of the experts")
    glu: bool = setting(True, "gated experts: act(gate) * up")
    score: str = setting("softmax", "router scores", choices=("softmax", "sigmoid"))
    normalise: bool = setting(True, "weights of the chosen experts sum to 1 (times route_scale)")
    route_scale: float = setting(1.0, "factor on the weights", low=0.0)
    n_groups: int = setting(1, "group-limited routing: groups of experts", low=1)
    top_groups: int = setting(1, "groups that a token may use", low=1)
    balance: float = setting(0.01, "weight of the balancing loss", low=0.0)
    balance_scope: str = setting(
        "batch",
        "over which tokens loads are balanced: each sequence, the micro-batch of all devices, or the last whole step",
        choices=("sequence", "batch", "step"),
    )
    z_loss: float = setting(1e-3, "weight of the router's z-loss", low=0.0)
    bias_rate: float = setting(0.0, "step of the selection bias that balances loads without a loss; 0 = none", low=0.0)
    bias_freeze: float = setting(
        0.034,
        "share of the run at whose end the selection bias stays as it is: 0.5 of 14.8T tokens in 2412.19437",
        low=0.0,
        high=1.0,
    )
    temperature: float = setting(1.0, "of the router's logits at the start (dense to sparse)", low=1.0)
    temperature_decay: float = setting(0.999, "factor on the temperature per step, down to 1", low=0.0, high=1.0)
    capacity_factor: float = setting(0.0, "rows per expert and sequence / mean load; 0 = dropless", low=0.0)
    parallel: str = setting(
        "data",
        "on several devices: 'data' gathers the experts' weights, 'expert' splits experts over mesh axis fsdp",
        choices=("data", "expert"),
    )
    exchange_factor: float = setting(
        2.0,
        "expert parallel: rows from device to device / mean; what is beyond is dropped, by place in the batch",
        low=0.1,
    )
    implementation: str = setting(
        "sorted",
        "'sorted' by expert, with the best grouped product for the device or the one named; 'dense' runs all experts "
        "on every token: exact, slow",
        choices=("sorted", "dense", "xla", "pallas_tpu", "pallas_gpu"),
        volatile=True,
    )

    def width(self, d_model: int) -> int:
        """Hidden width of one expert."""
        return self.d_expert or max(1, round(2 * d_model / self.granularity))

    def activated_width(self, d_model: int) -> int:
        """Hidden width of the dense FFN with the same FLOPs per token (router excluded)."""
        return (self.top_k + self.n_shared) * self.width(d_model)

    def rows_per_expert(self, length: int) -> int:
        """Rows that an expert has for a sequence of `length` tokens, where capacity is limited."""
        return math.ceil(self.capacity_factor * self.top_k * length / self.n_experts)

    def shared(self, d_model: int) -> DenseConfig:
        """The shared experts as one dense FFN."""
        return DenseConfig(activation=self.activation, glu=self.glu, d_ff=self.n_shared * self.width(d_model))


class Experts(nnx.Module):
    """E linear maps d_in -> d_out, as one array [E, d_in, d_out]."""

    def __init__(self, make, n_experts: int, d_in: int, d_out: int):
        self.kernel = make.matrix(d_in, d_out, copies=n_experts, cast=True)


class Bank(nnx.Module):
    """The hidden layers of all routed experts."""

    def __init__(self, cfg, model, make):
        d, width, n = model.d_model, cfg.width(model.d_model), cfg.n_experts
        self.up = Experts(make, n, d, width)
        self.gate = Experts(make, n, d, width) if cfg.glu else None
        self.down = Experts(make, n, width, d)
        self.act = make_activation(cfg.activation, make)
        self.product = None if cfg.implementation == "sorted" else cfg.implementation

    def dense(self, x, weights):
        """[N, d] or [E, N, d] -> [E, N, d]: every expert on all tokens, or on its own, times `weights` [E, N]."""
        product = lambda x, kernels: jnp.concatenate([x @ kernel for kernel in kernels], axis=-1)  # noqa: E731
        return self._apply(product, x, weights)

    def grouped(self, x, weights, sizes):
        """Rows [S, d] sorted by expert, `sizes` [E] rows each -> [S, d], times `weights` [S]."""
        product = functools.partial(api.grouped_matmul, group_sizes=sizes, implementation=self.product)
        return self._apply(product, x, weights)

    def _apply(self, product, x, weights):
        """product(x, matrices): the products with matrices [E, d_in, d_out] side by side."""

        def through(x, *layers):
            return product(x, tuple(layer.kernel[...].astype(x.dtype) for layer in layers))

        @recomputed
        def weighted(weights, *factors):
            return (weights[..., None] * math.prod(map(wide, factors))).astype(x.dtype)

        if self.gate is None:
            factors = (self.act(through(x, self.up)),)
        else:
            up, gate = jnp.split(through(x, self.up, self.gate), 2, axis=-1)
            factors = self.act(gate), up
        # Weights come before the last product: its output then need not be kept for their gradient.
        return through(weighted(weights, *factors), self.down)


@FFNS.register("moe")
class MoE(FFN):
    """Token-choice mixture of experts with a float32 router."""

    Config = MoEConfig

    def __init__(self, cfg, model, make):
        self.cfg = cfg
        d, n = model.d_model, cfg.n_experts
        self.router = make.matrix(d, n)
        self.experts = Bank(cfg, model, make)
        self.shared = Dense(cfg.shared(d), model, make) if cfg.n_shared else None
        self.bias = make.state(jnp.zeros(n)) if cfg.bias_rate else None
        self.load = make.state(jnp.ones(n)) if cfg.balance_scope == "step" else None
        self.temperature = make.state(cfg.temperature) if cfg.temperature > 1.0 else None

    def __call__(self, x, ctx):
        cfg, rows = self.cfg, x.shape[0]
        tokens = x.reshape(-1, x.shape[-1])
        logits = routing.router_logits(tokens, self.router[...])
        if self.temperature is not None:
            logits /= self.temperature[...]
        routed = routing.route(logits, None if self.bias is None else self.bias[...], cfg)
        y, dropped = self._experts(tokens, routed, rows)
        y = y.reshape(x.shape)
        if self.shared is not None:
            y += self.shared(x, ctx)[0]

        ids = None if ctx is None else ctx.segment_ids
        real = jnp.ones(len(tokens)) if ids is None else (ids.reshape(-1) > 0).astype(jnp.float32)
        load = jax.lax.stop_gradient(routing.loads(routed, real))
        aux = routing.statistics(logits, routed, real) | {"observed": {"load": load}}
        information = routing.document_information(jax.lax.stop_gradient(routed), real, rows, ids)
        aux["router_document_information"] = information
        if cfg.capacity_factor or cfg.parallel == "expert":
            aux["router_dropped"] = routing.masked_mean(dropped, real)
        if cfg.balance:
            if cfg.balance_scope == "sequence":
                balance = routing.balance_loss(routed, real, rows)
            else:
                balance = routing.balance_loss(routed, real, load=load if self.load is None else self.load[...])
            aux["balance_loss"] = cfg.balance * balance
        if cfg.z_loss:
            aux["router_z_loss"] = cfg.z_loss * routing.z_loss(logits, real)
        return y, aux

    def _experts(self, x, routed, rows):
        """x [N, d] -> weighted sum of the chosen experts [N, d], share of choices dropped [N]."""
        cfg = self.cfg
        if cfg.implementation == "dense":
            weights = routed.weights[:, :, None] * routing.one_hot(routed.experts, routed.probabilities)
            outputs = self.experts.dense(x, jnp.sum(weights, axis=1).T)
            return jnp.sum(outputs, axis=0), jnp.zeros(len(x))
        mixed = functools.partial(mix, cfg)
        devices = expert_parallel.shards(rows)
        if devices is None:
            return mixed(self.experts, x, routed.experts, routed.weights, rows)
        return expert_parallel.run(devices, cfg, mixed, self.experts, x, routed.experts, routed.weights, rows)

    @staticmethod
    def next_state(cfg, params, observed, progress):
        """Balance bias, loads and temperature after a step in which `observed` was summed over all tokens."""
        params = dict(params)
        if "bias" in params:
            rate = jnp.where(progress > 1.0 - cfg.bias_freeze, 0.0, cfg.bias_rate)
            params["bias"] = routing.next_bias(params["bias"], observed["load"], rate)
        if "load" in params:
            params["load"] = observed["load"]
        if "temperature" in params:
            params["temperature"] = jnp.maximum(1.0, params["temperature"] * cfg.temperature_decay)
        return params

    @staticmethod
    def statistics(cfg, observed):
        return routing.load_statistics(observed["load"])

    @classmethod
    def check(cls, cfg, model, path):
        find_activation(cfg.activation, f"{path}.activation")
        limit = cfg.n_experts // cfg.n_groups * cfg.top_groups
        if cfg.n_experts % cfg.n_groups:
            raise ConfigError(f"{path}.n_groups = {cfg.n_groups}: must divide n_experts = {cfg.n_experts}")
        if cfg.top_groups > cfg.n_groups:
            raise ConfigError(f"{path}.top_groups = {cfg.top_groups}: must be at most n_groups = {cfg.n_groups}")
        if cfg.top_k > limit:
            raise ConfigError(f"{path}.top_k = {cfg.top_k}: must be at most the {limit} experts to choose from")
        if cfg.capacity_factor and cfg.parallel == "expert":
            raise ConfigError(f"{path}.capacity_factor = {cfg.capacity_factor}: must be 0 with parallel = 'expert'")
        if cfg.capacity_factor and cfg.implementation == "dense":
            raise ConfigError(f"{path}.implementation = 'dense': drops nothing; capacity_factor must be 0 with it")
        if cfg.top_k == 1 and cfg.normalise and cfg.n_experts > 1:
            raise ConfigError(f"{path}.normalise = True: must be False with top_k = 1 (no gradient to the router)")

    @staticmethod
    def flops_per_token(cfg, model):
        """`hardware` leaves out the rows that grouped products add to fill tiles."""
        d, expert = model.d_model, _expert(cfg, model)
        router = dense(d * cfg.n_experts)
        ideal = 2.0 * (cfg.top_k + cfg.n_shared) * expert
        if cfg.implementation == "dense":
            executed = 2.0 * (cfg.n_experts + cfg.n_shared) * expert
        else:
            executed = 2.0 * (cfg.top_k * (cfg.capacity_factor or 1.0) + cfg.n_shared) * expert
        return router + Flops(ideal, ideal, executed)

    @staticmethod
    def param_count(cfg, model):
        return _parameters(cfg, model, cfg.n_experts)

    @classmethod
    def active_param_count(cls, cfg, model):
        return _parameters(cfg, model, cfg.top_k)


def mix(cfg, bank, x, experts, weights, rows, exchange=None):
    """x [N, d] of `rows` sequences -> weighted sum of the chosen experts [N, d], share of choices dropped [N]."""
    if exchange is not None:
        outputs, slots, sources = exchange(bank.grouped, x, experts, weights)
    elif cfg.capacity_factor:
        shape = rows, cfg.n_experts, cfg.rows_per_expert(len(x) // rows), -1
        slots, sources = dispatch.assign_capacity(experts, cfg.n_experts, rows, shape[2])
        packed = jnp.swapaxes(dispatch.scatter_tokens(x, slots, sources).reshape(shape), 0, 1)
        scale = jnp.swapaxes(dispatch.scatter_choices(weights, slots, sources).reshape(shape[:3]), 0, 1)
        per_expert = cfg.n_experts, rows * shape[2]
        outputs = bank.dense(packed.reshape(*per_expert, -1), scale.reshape(per_expert))
        outputs = jnp.swapaxes(outputs.reshape(packed.shape), 0, 1).reshape(-1, x.shape[-1])
    else:
        slots, sources, sizes = dispatch.sort_by_expert(experts, cfg.n_experts)
        scale = dispatch.scatter_choices(weights, slots, sources)
        outputs = bank.grouped(dispatch.scatter_tokens(x, slots, sources), scale, sizes)
    dropped = jnp.mean(slots == len(sources), axis=-1, dtype=jnp.float32)
    return dispatch.combine(outputs, slots, sources), dropped


def _expert(cfg, model) -> int:
    """Weights of one expert."""
    return model.d_model * cfg.width(model.d_model) * (3 if cfg.glu else 2)


def _parameters(cfg, model, experts: int) -> int:
    activations = activation_params(cfg.activation) * (2 if cfg.n_shared else 1)
    return (experts + cfg.n_shared) * _expert(cfg, model) + model.d_model * cfg.n_experts + activations
