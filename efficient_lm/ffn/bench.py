"""Speed of a mixture of experts beside the dense model that spends the same FLOPs per token.

    python -m efficient_lm.ffn.bench --config configs/moe.py:340M --config.model.n_layers=8 --out bench.json

The dense twin has, in place of each mixture, an FFN as wide as the experts that a token activates. Timed are whole
training steps of both (train.grad_accum micro-batches of --rows sequences and one update, random tokens), forward and
backward of one FFN layer, its experts alone, their matrix products and gradients one by one, and the other parts of the
mixture, with the casts of the experts' float32 parameters and gradients (the rest of a layer: shared experts, losses
and statistics). TFLOP/s count the rows that tokens chose, not padding. Medians of calls queued back to back.
"""

import json
import sys

import jax
import jax.numpy as jnp

from efficient_lm import config as configs
from efficient_lm import hardware
from efficient_lm.bench import training
from efficient_lm.ffn import FFNS, dispatch, routing
from efficient_lm.ffn.moe import Bank, MoEConfig
from efficient_lm.layers import Context, Maker
from efficient_lm.model import Part
from efficient_lm.schema import ConfigError, to_dict
from pallas_kernels import api
from pallas_kernels.bench.timing import seconds
from pallas_kernels.commands import Parser, command

LIMIT = 0.2  # seconds of timing a part


def mixture(cfg) -> str:
    """Name of the section of `cfg.model.ffns` that is a mixture. Raises ConfigError."""
    names = [name for name, ffn in cfg.model.ffns.items() if isinstance(ffn, MoEConfig)]
    if len(names) != 1:
        raise ConfigError(f"config.model.ffns has {len(names)} mixtures of experts: the benchmark needs one")
    return names[0]


def dense_twin(cfg):
    """`cfg` with an FFN of the activated width in place of its mixture."""
    name, model = mixture(cfg), cfg.model
    moe = model.ffns[name]
    values = to_dict(cfg)
    values["model"]["ffns"][name] = {
        **{"kind": "dense", "activation": moe.activation, "glu": moe.glu},
        **{"d_ff": moe.activated_width(model.d_model)},
    }
    return configs.from_dict(values)


def both_ways(function, *args) -> dict:
    """{"forward_ms", "ms"} of function(*args) and of it with the gradients to all floating-point arguments."""
    ways = [i for i, arg in enumerate(args) if jnp.issubdtype(jax.tree.leaves(arg)[0].dtype, jnp.floating)]

    def vjp(cotangent, *args):
        def of_floats(*floats):
            whole = list(args)
            for i, arg in zip(ways, floats, strict=True):
                whole[i] = arg
            return function(*whole)

        y, pull = jax.vjp(of_floats, *[args[i] for i in ways])
        return y, pull(cotangent)

    forward, backward = jax.jit(function), jax.jit(vjp)
    cotangent = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), jax.eval_shape(function, *args))
    return {
        "forward_ms": 1e3 * seconds(forward, *args, limit=LIMIT),
        "ms": 1e3 * seconds(backward, cotangent, *args, limit=LIMIT),
    }


def layer(cfg, name: str, rows: int) -> dict:
    """One FFN on [rows, T, d] of the compute dtype, forward + backward."""
    model, ffn = cfg.model, cfg.model.ffns[name]
    part = Part(lambda key, layer=0: FFNS[ffn.kind](ffn, model, Maker(key, model, layer)), 0)
    params = part.init(jax.random.key(0), 0)
    x = jax.random.normal(jax.random.key(1), (rows, cfg.train.seq_len, model.d_model), model.dtype)
    timed = both_ways(lambda params, x: part.bind(params)(x, Context())[0], params, x)
    flops = 3 * FFNS[ffn.kind].flops_per_token(ffn, model).causal * rows * cfg.train.seq_len
    return timed | {"tflops": flops / timed["ms"] / 1e9}


def parts(cfg, rows: int) -> dict:
    """The parts of a mixture on [rows, T, d], forward + backward, loads as a fresh router gives them."""
    model, moe = cfg.model, cfg.model.ffns[mixture(cfg)]
    n, d = rows * cfg.train.seq_len, model.d_model
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (n, d), model.dtype)
    router = d**-0.5 * jax.random.normal(keys[1], (d, moe.n_experts))

    def route(x, router):
        logits = routing.router_logits(x, router)
        routed = routing.route(logits, None, moe)
        load = jax.lax.stop_gradient(routing.loads(routed, jnp.ones(n)))
        loss = routing.balance_loss(routed, jnp.ones(n), load=load) + routing.z_loss(logits, jnp.ones(n))
        return routed.weights + loss, routed.experts

    weights, experts = jax.jit(route)(x, router)
    order = jax.jit(lambda experts: dispatch.sort_by_expert(experts, moe.n_experts))
    slots, sources, sizes = order(experts)
    part = Part(lambda key, layer=0: Bank(moe, model, Maker(key, model, layer)), 0)
    masters = part.init(keys[2], 0)

    def cast(params):
        return jax.tree.map(lambda leaf: leaf.astype(model.dtype), params)

    bank = jax.jit(cast)(masters)
    packed = jax.jit(dispatch.scatter_tokens)(x, slots, sources)
    scale = jax.jit(dispatch.scatter_choices)(weights, slots, sources)
    alone = both_ways(
        lambda bank, packed, scale, sizes: part.bind(bank).grouped(packed, scale, sizes), bank, packed, scale, sizes
    )
    flops = 6 * n * moe.top_k * d * moe.width(d) * (3 if moe.glu else 2)
    return {
        "router": both_ways(lambda x, router: route(x, router)[0], x, router),
        "order": {"forward_ms": 1e3 * seconds(order, experts, limit=LIMIT)},
        "pack": both_ways(dispatch.scatter_tokens, x, slots, sources),
        "experts": alone | {"tflops": flops / alone["ms"] / 1e9},
        "products": products(moe, bank, packed, sizes),
        "combine": both_ways(dispatch.combine, packed, slots, sources),
        "casts": both_ways(cast, masters),
        "largest load / mean": float(jnp.max(sizes) / jnp.mean(sizes)),
    }


def products(moe, bank, packed, sizes) -> dict:
    """The grouped products of the experts alone and the gradients to their inputs (dx) and matrices (dw)."""
    into = tuple(bank[name]["kernel"] for name in ("up", "gate") if name in bank)
    down = bank["down"]["kernel"]
    hidden = jax.random.normal(jax.random.key(3), (len(packed), down.shape[1]), packed.dtype)
    implementation = None if moe.implementation == "sorted" else moe.implementation

    def product(lhs, rhs, sizes):
        return api.grouped_matmul(lhs, rhs, sizes, implementation=implementation)

    def gradient(index):
        return lambda dy, lhs, rhs, sizes: jax.vjp(lambda *a: product(*a, sizes), lhs, rhs)[1](dy)[index]

    def timed(function, with_cotangent):
        function, total = jax.jit(function), 0.0
        for args in ((packed, into, sizes), (hidden, (down,), sizes)):
            shape = jax.eval_shape(product, *args)
            args = (jnp.ones(shape.shape, shape.dtype), *args) if with_cotangent else args
            total += 1e3 * seconds(function, *args, limit=LIMIT)
        flops = 2 * float(jnp.sum(sizes)) * down.shape[1] * down.shape[2] * (len(into) + 1)
        return {"ms": total, "tflops": flops / total / 1e9}

    return {"forward": timed(product, False), "dx": timed(gradient(0), True), "dw": timed(gradient(1), True)}


def measure(cfg, rows: int, implementations: list[str]) -> dict:
    """The table: the dense twin, and the mixture under each implementation."""
    name, twin = mixture(cfg), dense_twin(cfg)
    out = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": cfg.model.dtype, "rows": rows}
    out |= {"seq_len": cfg.train.seq_len, "moe": to_dict(cfg.model.ffns[name]), "n_layers": cfg.model.n_layers}
    out["dense"] = {"training": _shown("dense training", training(twin, rows)())}
    for implementation in implementations:
        one, row = configs.replace(cfg, **{f"model.ffns.{name}.implementation": implementation}), {}
        out[implementation] = row
        try:
            row["training"] = _shown(f"{implementation} training", training(one, rows)())
            share = row["training"]["tokens_per_s"] / out["dense"]["training"]["tokens_per_s"]
            row["share of the dense tokens/s"] = _shown(f"{implementation} share of the dense tokens/s", share)
            row["layer"] = _shown(f"{implementation} layer", layer(one, name, rows))
            row["parts"] = _shown(f"{implementation} parts", parts(one, rows))
        except ValueError as error:  # this device can't run it
            row["error"] = _shown(f"{implementation} error", str(error).splitlines()[0])
    out["dense"]["layer"] = _shown("dense layer", layer(twin, name, rows))
    return out


def _shown(name, value):
    print(name, json.dumps(value, default=str), flush=True)
    return value


def parser() -> Parser:
    out = Parser(prog="python -m efficient_lm.ffn.bench", description=__doc__.partition("\n")[0])
    out.add_argument("--config", required=True, help="config with a mixture, e.g. configs/moe.py:340M, and overrides")
    out.add_argument("--rows", type=int, default=8, help="sequences of a micro-batch (default 8)")
    out.add_argument("--implementations", default="sorted", help="of the mixture, separated by commas")
    out.add_argument("--out", help="JSON file for the table")
    return out


@command
def main(argv=None) -> int:
    overrides, rest = configs.split_args(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(rest)
    if args.rows < 1:
        raise ConfigError(f"--rows {args.rows}: must be at least 1")
    hardware.require_devices()
    hardware.enable_compile_cache()
    table = measure(configs.load(args.config, overrides), args.rows, args.implementations.split(","))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(table, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
