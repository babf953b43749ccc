"""The language model: tokens -> logits. Parameters are a plain nested dict of float32 arrays.

    params = {"embed": {"table"}, "prefix": {"0": {...}}, "pattern": {"0": {...}, "1": {...}}, "tail": {...},
              "final_norm": {...}, "head": {"table"}}
Blocks of "pattern" carry a leading axis over repeats, which `lax.scan` walks; "prefix" and "tail" blocks do not. Where
the pattern adds to the carry that crosses layers, its first repeat is part of "prefix" (`scan_start`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.blocks import RESIDUALS
from efficient_lm.ffn import FFNS
from efficient_lm.layers import Context, Maker, layer_specs, logits_product, power_iteration, width_multiplier
from efficient_lm.mixers import MIXERS
from efficient_lm.norms import NORMS

GROUPS = ("prefix", "pattern", "tail")
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Embedding(nnx.Module):
    """A [vocab_size, d_model] table, for tokens or for logits."""

    def __init__(self, make, model, role):
        self.table = make.table(model.vocab_size, model.d_model, role)


class LM:
    """A decoder-only LM described by a resolved ModelConfig. Holds no arrays."""

    def __init__(self, model):
        self.model = model
        self.dtype = jnp.dtype(model.dtype)
        specs = layer_specs(model)
        start, period = scan_start(model), len(model.pattern)
        self.repeats = (model.n_layers - start) // period
        tail = start + self.repeats * period
        # group -> {block name: layer of its first (or only) occurrence}
        self.groups = {
            "prefix": {str(i): i for i in range(start)},
            "pattern": {str(i): start + i for i in range(period)} if self.repeats else {},
            "tail": {str(i): tail + i for i in range(model.n_layers - tail)},
        }
        self.used = tuple(group for group in GROUPS if self.groups[group])
        block = RESIDUALS[model.residual]
        self.parts = {"embed": self._part(lambda make: Embedding(make, model, "embedding"))}
        for group, blocks in self.groups.items():
            for name, layer in blocks.items():
                create = functools.partial(block, model, specs[layer])
                self.parts[f"{group}/{name}"] = self._part(create, layer)
        self.parts["final_norm"] = self._part(lambda make: NORMS[model.norm](make, model.d_model, model.norm_eps))
        if not model.tie_embeddings:
            self.parts["head"] = self._part(lambda make: Embedding(make, model, "output"))
        self.logit_scale = 1.0 / width_multiplier(model)

    def _part(self, create, layer=0):
        return Part(lambda key, layer=layer: create(Maker(key, self.model, layer)), layer)

    # ------------------------------------------------------------------ parameters

    def init(self, key: jax.Array) -> dict:
        """Parameters from a PRNG key."""
        params = {}
        for index, (path, part) in enumerate(self.parts.items()):
            part_key = jax.random.fold_in(key, index)
            if path.startswith("pattern/"):
                layers = part.layer + len(self.model.pattern) * jnp.arange(self.repeats)
                _set(params, path, jax.vmap(part.init)(jax.random.split(part_key, self.repeats), layers))
            else:
                _set(params, path, part.init(part_key, part.layer))
        return params

    def shapes(self) -> dict:
        """Parameters as jax.ShapeDtypeStruct."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def roles(self) -> dict:
        """The role (layers.ROLES) of every parameter, a tree like `init`'s."""
        return self._metadata("role")

    def cast(self, params) -> dict:
        """`params` with the matrices that are used in the compute dtype only in it: cast once for several batches."""
        used = self._metadata("cast", False)
        return jax.tree.map(lambda p, cast: p.astype(self.dtype) if cast else p, params, used)

    def _metadata(self, name, default=None) -> dict:
        tree = {}
        for path, part in self.parts.items():
            _set(tree, path, part.metadata(name, default))
        return tree

    # ------------------------------------------------------------------ parallel form

    def __call__(self, params, tokens, segment_ids=None, positions=None, constrain=lambda x: x):
        """tokens [B, T] -> logits [B, T, vocab_size] float32, aux {name: scalar, mean over layers}.

        Names that end in _profile hold [layers, n] instead. aux["observed"], where there is one, is what `next_state`
        and `statistics` need; it adds up over micro-batches.
        segment_ids [B, T]: tokens with different ids don't see each other (0 = padding); positions [B, T] default
        to 0..T-1. `constrain` is applied to the residual stream (a sharding constraint).
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        ctx = Context(segment_ids, positions)

        def visit(block, x, ctx, state):
            x, aux = block(x, ctx)
            return constrain(x), aux

        x, aux = self._walk(params, constrain(self._embed(params, tokens)), ctx, visit, remat=self.model.remat)
        observed = _take_observed(aux)
        logged = _mean_over_layers(aux, self.layers)
        return self._logits(params, x), logged | ({"observed": observed} if observed else {})

    def look(self, params, tokens, look, segment_ids=None, positions=None, constrain=lambda x: x):
        """{group: {block name: look(block, x, y, ctx)}} for the input x and output y of every block; see `layers`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        def visit(block, x, ctx, state):
            before = Context(ctx.segment_ids, ctx.positions, dict(ctx.carry))  # the block adds to the carry
            y = constrain(block(x, ctx)[0])
            return y, look(block, x, y, before)

        x = constrain(self._embed(params, tokens))
        return self._walk(params, x, Context(segment_ids, positions), visit)[1]

    def layers(self, group: str, name: str) -> range:
        """The layers of a block: one of "prefix" or "tail", one for each repeat of "pattern"."""
        first, period = self.groups[group][name], len(self.model.pattern)
        count = self.repeats if group == "pattern" else 1
        return range(first, first + count * period, period)

    def next_state(self, params, observed, progress):
        """Parameters with the arrays of role 'state' after a step in which `observed` was added up.

        progress: share of the run's steps that are done, this one included.
        """
        for group, blocks in observed.items():
            for name, parts in blocks.items():
                for part, seen in parts.items():
                    kind, cfg = self._kind(group, name, part)
                    update = functools.partial(kind.next_state, cfg, progress=progress)
                    update = jax.vmap(update) if group == "pattern" else update
                    block = params[group][name]
                    block = block | {part: update(block[part], seen)}
                    params = params | {group: params[group] | {name: block}}
        return power_iteration(params) if self.model.parametrization == "sigma" else params

    def statistics(self, observed):
        """What to log of a step's `observed`: {name: scalar, mean over layers}, or [layers, n] as in `__call__`."""
        outs = {}
        for group, blocks in observed.items():
            for name, parts in blocks.items():
                for part, seen in parts.items():
                    kind, cfg = self._kind(group, name, part)
                    found = functools.partial(kind.statistics, cfg)
                    found = (jax.vmap(found) if group == "pattern" else found)(seen)
                    outs.setdefault(group, {}).setdefault(name, {}).update(found)
        return _mean_over_layers(outs, self.layers)

    def _kind(self, group, name, part):
        """The class and the settings of the "mixer" or "ffn" of a block."""
        mixer, ffn = layer_specs(self.model)[self.groups[group][name]]
        registry, cfg = (MIXERS, self.model.mixers[mixer]) if part == "mixer" else (FFNS, self.model.ffns[ffn])
        return registry[cfg.kind], cfg

    def _walk(self, params, x, ctx, visit, state=None, remat="none", groups=None):
        """visit(block, x, ctx, block's state) -> x, out for every block of `groups` (None: all) in turn.

        Returns x and {group: {block name: out}}, those of "pattern" with a leading axis over repeats. With `state` they
        are tuples over repeats, like the states: stacked, every cache would be copied for every token.
        """

        def run(group, flow, inputs):
            (x, carry), (params, state), outs = flow, inputs, {}
            carry = dict(carry)  # blocks add to it
            for name in self.groups[group]:
                block = self.parts[f"{group}/{name}"].bind(params[name])
                here = Context(ctx.segment_ids, ctx.positions, carry)
                x, outs[name] = visit(block, x, here, None if state is None else state[name])
            return (x, carry), outs

        flow, outs = (x, ctx.carry), {}
        for group in self.used if groups is None else groups:
            inputs = params[group], None if state is None else state[group]
            body = functools.partial(run, group)
            if group != "pattern":
                flow, outs[group] = body(flow, inputs)
                continue
            if state is not None:
                repeats = []
                for i in range(self.repeats):
                    states = {name: one[i] for name, one in state[group].items()}
                    flow, out = body(flow, (_repeat(params[group], i), states))
                    repeats.append(out)
                outs[group] = {name: tuple(out[name] for out in repeats) for name in self.groups[group]}
                continue
            if remat != "none":
                body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
            unroll = self.model.scan_unroll or (self.repeats if jax.default_backend() == "cpu" else 1)
            flow, outs[group] = jax.lax.scan(body, flow, inputs, unroll=min(unroll, self.repeats))
        return flow[0], outs

    def _embed(self, params, tokens):
        return params["embed"]["table"][tokens].astype(self.dtype)

    def _logits(self, params, x):
        x = self.parts["final_norm"].bind(params["final_norm"])(x)
        table = params["embed" if self.model.tie_embeddings else "head"]["table"].astype(self.dtype)
        logits = logits_product(x, table) * self.logit_scale
        cap = self.model.logit_cap
        return cap * jnp.tanh(logits / cap) if cap else logits

    # ------------------------------------------------------------------ step by step

    def init_state(self, params, batch: int, max_len: int) -> dict:
        """Decoding state for `batch` sequences of at most `max_len` tokens."""
        state = {"position": jnp.zeros(batch, jnp.int32)}
        for group, blocks in self.groups.items():
            for name in blocks:
                block = params[group][name]
                first = _repeat(block, 0) if group == "pattern" else block
                one = self.parts[f"{group}/{name}"].bind(first).mixer.init_state(batch, max_len)
                _set(state, f"{group}/{name}", (one,) * self.repeats if group == "pattern" else one)
        return state

    def prefill(self, params, tokens, max_len: int):
        """The prompt in parallel form: tokens [B, n] -> logits [B, vocab_size] of its last token, the state after it.

        `max_len` as in `init_state`. Raises ValueError where the prompt is longer. Where the last groups of layers hold
        no state of their own (the second half of YOCO, 2405.05254, and SambaY), only the last token goes through them.
        """
        batch, length = tokens.shape
        if length > max_len:
            raise ValueError(f"tokens.shape = {tokens.shape}: a prompt must be no longer than max_len = {max_len}")
        groups = self._groups_with_state()
        if len(groups) < len(self.used):
            state = self.init_state(params, batch, max_len)
            if length > 1:
                state |= self._prefill(params, tokens[:, :-1], max_len, groups)[1]
            return self.step(params, tokens[:, -1], state)
        x, state = self._prefill(params, tokens, max_len, groups)
        return self._logits(params, x[:, -1]), state

    def _groups_with_state(self):
        """The groups up to the last one that has decoding state."""
        mixers = [self.model.mixers[mixer] for mixer, _ in layer_specs(self.model)]
        size = [MIXERS[cfg.kind].state_bytes(cfg, self.model, 1) for cfg in mixers]
        with_state = [any(size[layer] for layer in self.groups[group].values()) for group in self.used]
        return self.used[: len(with_state) - with_state[::-1].index(True)] if any(with_state) else ()

    def _prefill(self, params, tokens, max_len, groups):
        """The residual stream after `groups` [B, n, d], and the state with their part of it."""
        batch, length = tokens.shape
        ctx = Context(None, jnp.broadcast_to(jnp.arange(length), tokens.shape))

        def visit(block, x, ctx, state):
            return block.prefill(x, ctx, max_len)

        x, state = self._walk(params, self._embed(params, tokens), ctx, visit, groups=groups)
        for name, stacked in state.get("pattern", {}).items():
            state["pattern"][name] = tuple(_repeat(stacked, i) for i in range(self.repeats))
        return x, {"position": jnp.full(batch, length, jnp.int32), **state}

    def step(self, params, tokens, state):
        """One token per sequence: tokens [B] -> logits [B, vocab_size], state."""
        position = state["position"]

        def visit(block, x, ctx, state):
            return block.step(x, state, ctx)

        x, new = self._walk(params, self._embed(params, tokens), Context(None, position), visit, state)
        return self._logits(params, x), {"position": position + 1, **new}


class Part:
    """One NNX module as (graph, plain dict): `init` makes the dict, `bind` puts a dict back into a module."""

    def __init__(self, create, layer):
        self.create, self.layer = create, layer

    @functools.cached_property
    def _split(self):
        # Abstract, so that a module costs no memory; nnx.split would otherwise hold the arrays.
        return nnx.split(nnx.eval_shape(lambda: self.create(jax.random.key(0))))

    def init(self, key, layer):
        return _plain(nnx.split(self.create(key, layer))[1])

    def roles(self):
        return self.metadata("role")

    def metadata(self, name, default=None):
        _, state = self._split
        return nnx.to_pure_dict(nnx.map_state(lambda _, var: var.get_metadata().get(name, default), state))

    def bind(self, params):
        graph, state = self._split
        expected = jax.tree.structure(_plain(state))
        if jax.tree.structure(params) != expected:
            raise ValueError(f"parameters do not fit the module: expected {expected}, got {jax.tree.structure(params)}")
        state = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)


def _repeat(stacked, i):
    """One repeat of a pytree with a leading axis over repeats."""
    return jax.tree.map(lambda a: a[i], stacked)


def _plain(state):
    return nnx.to_pure_dict(state)


def _set(tree, path, value):
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def scan_start(model) -> int:
    """Number of blocks before the layer scan: those of the prefix, and one repeat of a pattern that adds to the carry.

    What a scan carries must have the same structure from the first repeat to the last.
    """
    mixers = [model.mixers[mixer] for mixer, _ in layer_specs(model)]
    start, period = len(model.prefix), len(model.pattern)
    given = {key for cfg in mixers[:start] for key in MIXERS[cfg.kind].gives(cfg, model)}
    new = {key for cfg in mixers[start:] for key in MIXERS[cfg.kind].gives(cfg, model)} - given
    return min(start + period, model.n_layers) if new else start


def _take_observed(outs):
    """{group: {block: aux["observed"]}} of the blocks that have one, which is taken out of their aux."""
    observed = {}
    for group, blocks in outs.items():
        for name, aux in blocks.items():
            if "observed" in aux:
                observed.setdefault(group, {})[name] = aux.pop("observed")
    return observed


def _mean_over_layers(outs, layers_of):
    """{group: {block: {name: [layers]}}} -> {name: mean}, the sum where a name ends in _loss.

    Where a name ends in _profile the layers that have it stay apart, in their order: [layers, n]. `layers_of(group,
    block)` are the layers of a block.
    """
    collected, layers = {}, {}
    for group, blocks in outs.items():
        for block, aux in blocks.items():
            for name, values in aux.items():
                shape = (-1, values.shape[-1]) if name.endswith("_profile") else (-1,)
                collected.setdefault(name, []).append(jnp.reshape(values, shape))
                layers.setdefault(name, []).extend(layers_of(group, block))
    return {name: _reduce(name, values, layers[name]) for name, values in collected.items()}


def _reduce(name, values, layers):
    if name.endswith("_profile"):
        # Layers with fewer entries than others end in zeros.
        longest = max(value.shape[-1] for value in values)
        values = [jnp.pad(value, ((0, 0), (0, longest - value.shape[-1]))) for value in values]
        return jnp.concatenate(values)[np.argsort(layers)]
    return (jnp.sum if name.endswith("_loss") else jnp.mean)(jnp.concatenate(values))
