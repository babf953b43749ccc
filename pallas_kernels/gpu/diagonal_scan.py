"""Diagonal recurrence h_t = exp(log_decay_t) h_{t-1} + x_t on Hopper GPUs through Pallas Mosaic GPU.

The bound is memory bandwidth, so every array is read or written once. A program owns C channels and walks T in tiles
of W pieces of L tokens, which the copy engine brings in several tiles ahead. Each thread scans a piece of neighbouring
channels from a zero state in registers, folds the ends of the pieces before its own (in a fixed order, through shared
memory) into the state that enters its piece, and adds that state under the decay since the start of the piece. So one
pass over memory serves many channels and few: narrow blocks of channels (more programs) go with more pieces. Where
programs are few, two warpgroups take turns: one scans its tile from zero while the other waits for the state before.

Backward, with e_t = exp(log_decay_{t+1}) d_{t+1}: d_t = dh_t + e_t, dx = d, dlog_decay_t = e_{t-1} h_{t-1}, the same
walk from the last token to the first.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuned
from pallas_kernels.gpu.tiles import not_hopper

LOG2_E = 1.4426950408889634
THREADS = 128
PROGRAMS = 132  # multiprocessors of an H100 or H200
MEMORY = 220 * 1024  # shared memory of one, bytes
MAX_ROWS = 256  # of one transfer by the copy engine


class Config(NamedTuple):
    channels: int  # of one program: 16, 32, 64 or 128
    piece: int  # tokens of one thread; odd, so that the threads of a warp read different banks
    stages: int  # tiles of each input in flight
    vector: int  # neighbouring channels of one thread
    warpgroups: int = 1  # that take tiles in turns: 1, or 2 with an even number of stages


def supports(*, x, log_decay, **_):
    """None where `diagonal_scan` takes these arrays, else why not, in one line."""
    if reason := not_hopper():
        return reason
    for name, a in (("x", x), ("log_decay", log_decay)):
        if a.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, got {a.dtype}"
    if x.shape[2] % 8:
        return f"channels must be a multiple of 8, got {x.shape[2]}"
    return None


def diagonal_scan(x, log_decay, *, initial_state=None, segment_ids=None, reverse=False, config=None, interpret=None):
    """See `pallas_kernels.api.diagonal_scan`. x and log_decay [B, T, D]; returns (h, float32 final state).

    Raises: ValueError where `supports` gives a reason.
    """
    if reason := supports(x=x, log_decay=log_decay):
        raise ValueError(f"pallas_gpu diagonal_scan: {reason}")
    if reverse:
        x, log_decay, segment_ids = (a if a is None else jnp.flip(a, 1) for a in (x, log_decay, segment_ids))
    if segment_ids is not None:
        start = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        log_decay = jnp.where(start[..., None], -jnp.inf, log_decay)
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    h, final = _scan(x, log_decay, initial_state, config, interpret)
    return (jnp.flip(h, 1) if reverse else h), final


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scan(x, log_decay, initial, config, interpret):
    return forward_pass(x, log_decay, initial, config, interpret)


def _vjp_forward(x, log_decay, initial, config, interpret):
    h, final = _scan(x, log_decay, initial, config, interpret)
    return (h, final), (log_decay, h, initial)


def _vjp_backward(config, interpret, residuals, cotangents):
    log_decay, h, initial = residuals
    dh, dfinal = cotangents
    dx, dlog_decay, dinitial = backward_pass(log_decay, h, dh, dfinal, config, interpret)
    if initial is None:
        return dx, dlog_decay, None
    # not `at[:, 0].set`: XLA merges that with the call whose other result it needs, and finds a cycle when B = 1
    first = jnp.arange(h.shape[1])[:, None] == 0
    return dx, jnp.where(first, (dinitial * initial)[:, None].astype(dlog_decay.dtype), dlog_decay), dinitial


_scan.defvjp(_vjp_forward, _vjp_backward)


def rows(config):
    """Tokens of a tile."""
    return THREADS * config.vector // config.channels * config.piece


def shared_memory(config, inputs, outputs):
    """Bytes of a program for arrays of the given dtypes."""
    per_piece = THREADS * config.vector
    stages = config.stages * sum(jnp.dtype(d).itemsize for d in inputs) + 2 * sum(
        jnp.dtype(d).itemsize for d in outputs
    )
    return per_piece * config.piece * stages + 2 * 2 * 2 * per_piece * 4  # tiles; decay and end of two tiles


def default_config(shape, inputs, outputs):
    """A configuration for arrays [B, T, D] of the given dtypes, from their sizes alone."""
    batch, _, width = shape
    channels = next((c for c in (64, 32) if batch * pl.cdiv(width, c) >= PROGRAMS - 4), 16)
    vector = 8 // max(jnp.dtype(d).itemsize for d in (*inputs, *outputs))
    limit = MEMORY // (2 if channels == 64 else 1)  # two programs per multiprocessor where there are enough
    configs = [Config(channels, 7, stages, vector) for stages in range(2, 11)]
    return [c for c in configs if shared_memory(c, inputs, outputs) <= limit][-1]


def call_class(direction, shape, inputs):
    """Class of a call in the tuned tables: direction, bytes of the widest input, channels of all sequences together."""
    channels = round(math.log2(shape[0] * shape[2]))
    return f"{direction}, {max(jnp.dtype(d).itemsize for d in inputs)} bytes, 2^{channels} channels"


def _configure(direction, shape, inputs, outputs):
    known = tuned.lookup("diagonal_scan", call_class(direction, shape, inputs))
    return Config(**known) if known else default_config(shape, inputs, outputs)


class _Walk:
    """Tiles of one program and its buffers: what forward and backward share."""

    def __init__(self, shape, config, reverse, interpret):
        self.batch, self.length, self.width = shape
        self.config, self.reverse, self.interpret = config, reverse, interpret
        self.pieces = THREADS * config.vector // config.channels
        self.rows = rows(config)
        self.tiles = pl.cdiv(self.length, self.rows)
        self.layout = plgpu.Layout.WG_STRIDED((self.pieces, config.channels), vec_size=config.vector)

    def load(self, ref):
        return plgpu.load(ref, layout=self.layout, optimized=False)

    def read(self, ref, i):
        """Token i of each piece of a tile [rows, channels]: float32 [pieces, channels]."""
        if self.interpret:  # the interpreter reshapes no references
            return ref[...].reshape(self.pieces, self.config.piece, -1)[:, i].astype(jnp.float32)
        return self.load(self._step(ref, i)).astype(jnp.float32)

    def write(self, ref, i, value):
        if self.interpret:
            for piece in range(self.pieces):
                ref.at[pl.ds(piece * self.config.piece + i, 1)][...] = value[piece : piece + 1].astype(ref.dtype)
        else:
            self._step(ref, i)[...] = value.astype(ref.dtype)

    def _step(self, ref, i):
        return ref.reshape(self.pieces, self.config.piece, self.config.channels).at[:, i]

    def full(self, value):
        return plgpu.layout_cast(jnp.full((self.pieces, self.config.channels), value, jnp.float32), self.layout)

    def start(self, k):
        """First token of the k-th tile of the walk."""
        return (self.tiles - 1 - k if self.reverse else k) * self.rows

    def fold(self, decay, end):
        """State that enters each piece, from decay and end [2 W, C]: in order of the walk, W rows (decay 0) whose last
        is the state that the tile before left, then the W pieces of this tile."""
        state = self.full(0.0)
        order = range(self.pieces, 0, -1) if self.reverse else range(self.pieces)
        for j in order:
            state = self.load(decay.at[pl.ds(j, self.pieces)]) * state + self.load(end.at[pl.ds(j, self.pieces)])
        return state

    def run(self, body, inputs, initial, outs):
        """Launches body(smem tiles of a stage, out tiles, fold, leave) for every tile.

        The body folds the decay and end of its pieces into the state that enters each, and leaves that after its tile.

        inputs maps a name to (array, shift in tokens: what lies outside the array reads as zero).
        Returns the arrays `outs` and the last state [B, D].
        """
        config, names = self.config, list(inputs)
        if initial is None:
            initial = jnp.zeros((self.batch, self.width), jnp.float32)
        c, rows, pieces, stages, turns = config.channels, self.rows, self.pieces, config.stages, config.warpgroups
        tile = lambda n, dtype: plgpu.SMEM((n, rows, c), dtype)  # noqa: E731
        carried = pieces if self.reverse else 0  # rows of the fold that hold the tile before, one of which is read
        carry = 0 if self.reverse else pieces - 1
        # the copy engine moves all W rows: one alone may not be aligned
        initial = jnp.pad(initial[:, None], ((0, 0), (carry, pieces - 1 - carry), (0, 0)))
        scratch = {
            "in": {n: tile(stages, a.dtype) for n, (a, _) in inputs.items()},
            "out": {n: tile(2, o.dtype) for n, o in outs.items()},
            "decay": plgpu.SMEM((2, 2 * pieces, c), jnp.float32),
            "end": plgpu.SMEM((2, 2 * pieces, c), jnp.float32),
        }

        def kernel(*refs):
            gmem = dict(zip((*names, "initial", *outs, "last"), refs, strict=False))
            smem, full, carried_over = refs[len(gmem) :]
            batch, columns = lax.axis_index("batch"), pl.ds(lax.axis_index("block") * c, c)
            mine = lax.axis_index("warpgroup")

            def fetch(k):
                slot = lax.rem(k, jnp.int32(stages))
                for n in names:
                    here = pl.ds(self.start(k) + inputs[n][1], rows)
                    plgpu.copy_gmem_to_smem(gmem[n].at[batch, here, columns], smem["in"][n].at[slot], full.at[slot])

            before = pl.ds(carried, pieces)
            for parity in range(2):

                @pl.when(mine == parity % turns)
                def _(parity=parity):
                    smem["decay"].at[parity, before][...] = self.full(0.0)

            for k in range(min(stages, self.tiles)):

                @pl.when(mine == k % turns)
                def _(k=k):
                    fetch(jnp.int32(k))
                    if k == 0:
                        end = smem["end"].at[0, before]
                        plgpu.copy_gmem_to_smem(gmem["initial"].at[batch, :, columns], end, carried_over.at[0])

            def one(turn, _):
                k = turn * turns + mine
                slot, parity = lax.rem(k, jnp.int32(stages)), lax.rem(k, jnp.int32(2))
                plgpu.barrier_wait(full.at[slot])

                def fold(decay, end):
                    here = pl.ds(pieces - carried, pieces)
                    smem["decay"].at[parity, here][...] = decay
                    smem["end"].at[parity, here][...] = end
                    plgpu.wait_smem_to_gmem(2 // turns - 1, wait_read_only=True)  # the tile two before has left
                    plgpu.commit_smem()
                    plgpu.barrier_wait(carried_over.at[parity])
                    return self.fold(smem["decay"].at[parity], smem["end"].at[parity])

                def leave(state):
                    smem["end"].at[1 - parity, before][...] = state

                    @pl.when(k + 1 < self.tiles)
                    def _():
                        plgpu.barrier_arrive(carried_over.at[1 - parity])

                tiles = {n: smem["in"][n].at[slot] for n in names}
                body(tiles, {n: smem["out"][n].at[parity] for n in outs}, fold, leave)
                plgpu.commit_smem()
                for n in outs:
                    there = gmem[n].at[batch, pl.ds(self.start(k), rows), columns]
                    plgpu.copy_smem_to_gmem(smem["out"][n].at[parity], there, commit_group=n == list(outs)[-1])

                @pl.when(k + stages < self.tiles)
                def _():
                    fetch(k + stages)

            lax.fori_loop(0, lax.div(self.tiles - mine + turns - 1, turns), one, None)

            @pl.when(mine == (self.tiles - 1) % turns)
            def _():
                plgpu.copy_smem_to_gmem(smem["end"].at[self.tiles % 2, before], gmem["last"].at[batch, :, columns])

            plgpu.wait_smem_to_gmem(0)

        last = jax.ShapeDtypeStruct((self.batch, pieces, self.width), jnp.float32)
        *results, last = plgpu.kernel(
            kernel,
            out_type=(*outs.values(), last),
            scratch_types=(
                scratch,
                plgpu.Barrier(num_arrivals=len(names), num_barriers=stages),
                plgpu.Barrier(num_barriers=2),
            ),
            grid=(pl.cdiv(self.width, c), self.batch),
            grid_names=("block", "batch"),
            num_threads=turns,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
            interpret=self.interpret,
        )(*(a for a, _ in inputs.values()), initial)
        return *results, last[:, carry]


def forward_pass(x, log_decay, initial=None, config=None, interpret=None):
    """(h, final state) of x, log_decay [B, T, D] and initial [B, D] or None for zero."""
    config = config or _configure("forward", x.shape, (x.dtype, log_decay.dtype), (x.dtype,))
    walk = _Walk(x.shape, config, False, interpret)
    steps = range(config.piece)

    def body(tiles, out, fold, leave):
        h, product = [], []  # from a zero state; the decay since the start of the piece
        for i in steps:
            a = jnp.exp2(walk.read(tiles["log_decay"], i) * LOG2_E)
            u = walk.read(tiles["x"], i)
            h.append(a * h[-1] + u if h else u)
            product.append(a * product[-1] if product else a)
        state = fold(product[-1], h[-1])
        leave(h[-1] + product[-1] * state)
        for i in steps:
            walk.write(out["h"], i, h[i] + product[i] * state)

    inputs = {"x": (x, 0), "log_decay": (log_decay, 0)}
    return walk.run(body, inputs, initial, {"h": jax.ShapeDtypeStruct(x.shape, x.dtype)})


def backward_pass(log_decay, h, dh, dfinal, config=None, interpret=None):
    """(dx, dlog_decay, gradient of the initial state), where dlog_decay_0 is that of a zero initial state."""
    if config is None:
        inputs, outputs = (h.dtype, log_decay.dtype, dh.dtype), (dh.dtype, log_decay.dtype)
        config = _configure("backward", h.shape, inputs, outputs)
    walk = _Walk(h.shape, config, True, interpret)
    steps = range(config.piece - 1, -1, -1)

    def body(tiles, out, fold, leave):
        e, product = {}, {}  # past token i: what the tokens of this piece give; the decay of what enters it
        for i in steps:
            a = jnp.exp2(walk.read(tiles["log_decay"], i) * LOG2_E)
            d = walk.read(tiles["dh"], i)
            e[i] = a * (d + e[i + 1]) if e else a * d
            product[i] = a * product[i + 1] if product else a
        entering = state = fold(product[0], e[0])
        leave(e[0] + product[0] * state)
        for i in steps:
            walk.write(out["dx"], i, walk.read(tiles["dh"], i) + entering)
            entering = e[i] + product[i] * state
            walk.write(out["dlog_decay"], i, entering * walk.read(tiles["h"], i))

    # h one token earlier; the copy engine fills what lies before the array with zeros, the interpreter does not
    before = (jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1], 0) if interpret else (h, -1)
    inputs = {"log_decay": (log_decay, 0), "h": before, "dh": (dh, 0)}
    outs = {"dx": jax.ShapeDtypeStruct(h.shape, dh.dtype), "dlog_decay": jax.ShapeDtypeStruct(h.shape, log_decay.dtype)}
    return walk.run(body, inputs, dfinal, outs)
