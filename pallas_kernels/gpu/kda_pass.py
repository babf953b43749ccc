"""Mosaic GPU kernels (Hopper) for the two walks of Kimi Delta Attention: a delta rule with a decay per key channel.

One head and one chunk of 64 tokens, S the entering state, R the gradient of the leaving one, A and Y as in
`channel_pass`, w = -k e^b and T the solved triangle times diag(beta):
    E  = V + w S,   O = (A T) E + X S,   S <- diag(2^total) S + (T^T Y)^T E           `kda_forward`
    dV = (A T)^T dO + (T^T Y) R,         R <- diag(2^total) R + X^T dO + w^T dV       `kda_reverse`
U = T E alternates in sign where keys look alike, and Y^T U and A U are small differences of it: so U is not what gets
rounded, A T and T^T Y are (`channel_pass.chunk_weights`). Only the other gradients need U (`chunk_gradients`). Value
columns are independent: every compute warpgroup owns 64.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import (
    BLOCK,
    CHUNK,
    T_CONTRACT,
    WGMMA,
    Walk,
    add_products,
    launch,
    present,
    products,
    release,
    rows,
    tile,
)

STAGES = 2


def kda_forward(weights, v, init, *, output, split, interpret=None):
    """Outputs and final state, or, without `output`, what the backward pass needs.

    Args:
      weights: the dict of `chunk_weights`; v: [B, T, H, V] bf16, V in {64, 128}; init: float32 [B, H, K, V] or None.
      split: programs per head, each with its own value columns.
    Returns: dict with state [B, H, K, V] float32 and o [B, T, H, V], or instead of o, u [B, T, H, V] and the states
      entering the chunks, entering [B, H, N, K, V] bf16.
    """
    names = ("w", "y", "total", *(("x", "a") if output else ("t", "t_low")))
    operands = present(**{name: weights[name] for name in names}, z=v, init=init)
    results = ("o",) if output else ("u", "entering")

    def chunk(walk):
        smem, s16, own = walk.smem, walk.state16, walk.own
        if output:
            error, result = products((smem("w"), s16), (smem("x"), s16))
        else:
            error, = products((smem("w"), s16))
            result = plgpu.layout_cast(jnp.zeros_like(error), WGMMA)
        error = error + plgpu.load(smem("z"), layout=WGMMA).astype(jnp.float32)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk wrote has left shared memory
        own[...] = error.astype(own.dtype)
        plgpu.commit_smem()
        write = walk.decayed_state(), smem("y").transpose(T_CONTRACT), own
        squares = (smem("a"),) if output else (smem("t"), smem("t_low"))
        state, result = add_products(write, (result, squares, (own,) * len(squares)), interpret=interpret)
        own[...] = result.astype(own.dtype)
        plgpu.commit_smem()
        walk.store(results[0], own)
        return state

    return _walk(chunk, operands, results, reverse=False, split=split, interpret=interpret)


def kda_reverse(weights, do, dfinal, *, split, interpret=None):
    """dV, in a walk from the end of the sequence with R, the gradient of the state, in registers.

    Args: as `kda_forward`; do [B, T, H, V]; dfinal float32 [B, H, K, V] or None.
    Returns: dict with dv [B, T, H, V], entering [B, H, N, K, V] bf16 = R of every chunk, and state [B, H, K, V], the
      gradient of the initial state.
    """
    names = ("w", "x", "y", "total", "a")
    operands = present(**{name: weights[name] for name in names}, z=do, init=dfinal)

    def chunk(walk):
        smem, own = walk.smem, walk.own
        dv, = products(((smem("y"), smem("a").transpose(T_CONTRACT)), (walk.state16, smem("z"))))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        own[...] = dv.astype(own.dtype)
        plgpu.commit_smem()
        walk.store("dv", own)
        reads = smem("x").transpose(T_CONTRACT), smem("w").transpose(T_CONTRACT)
        return add_products((walk.decayed_state(), reads, (smem("z"), own)), interpret=interpret)[0]

    return _walk(chunk, operands, ("dv", "entering"), reverse=True, split=split, interpret=interpret)


class _Chunk:
    """What one compute warpgroup sees of one chunk: tiles by name, its state, and where its results go."""

    def __init__(self, tiles, state, state16, own, destinations):
        self.smem, self.state, self.state16, self.own = tiles.__getitem__, state, state16, own
        self.destinations = destinations

    def decayed_state(self):
        total = plgpu.load(self.smem("total"), layout=WGMMA.reduce(1))
        return self.state * rows(jnp.exp2(total), self.state.shape)

    def store(self, name, ref):
        plgpu.copy_smem_to_gmem(ref, self.destinations[name])


def _walk(chunk_step, operands, results, *, reverse, split, interpret):
    """Walks all chunks of every head; `chunk_step(_Chunk)` returns the next state.

    Operands: w, x, y [B, T, H, K], a, t, t_low [B, H, N, 64, 64], total [B, H, N, K], z [B, T, H, V], init or none.
    """
    b_size, t_size, heads, k_size = operands["y"].shape
    v_size, dtype = operands["z"].shape[-1], operands["z"].dtype
    chunks = t_size // CHUNK
    n_wg = v_size // BLOCK // split
    outs = {"state": jax.ShapeDtypeStruct((b_size, heads, k_size, v_size), jnp.float32)}
    for name in results:
        shape = (b_size, heads, chunks, k_size, v_size) if name == "entering" else operands["z"].shape
        outs[name] = jax.ShapeDtypeStruct(shape, dtype)
    keys = [name for name in ("w", "x", "y") if name in operands]
    squares = [name for name in ("a", "t", "t_low") if name in operands]
    scratch = {name: tile((STAGES, CHUNK, k_size), dtype) for name in keys}
    scratch |= {name: tile((STAGES, CHUNK, CHUNK), dtype) for name in squares}
    scratch |= {"z": tile((STAGES, n_wg, CHUNK, BLOCK), dtype), "total": plgpu.SMEM((STAGES, k_size), jnp.float32),
                "state16": tile((n_wg, k_size, BLOCK), dtype), "own": tile((n_wg, CHUNK, BLOCK), dtype)}

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty = refs[len(names):]
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        walk = Walk(chunks, 1, STAGES, reverse, 0)
        first_block = lax.axis_index("piece") * n_wg

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[name].at[batch, here, head], smem[name].at[slot]) for name in keys]
            pairs += [(gmem["z"].at[batch, here, head, pl.ds((first_block + w) * BLOCK, BLOCK)], smem["z"].at[slot, w])
                      for w in range(n_wg)]
            return pairs + [(gmem[n].at[batch, head, chunk], smem[n].at[slot]) for n in (*squares, "total")]

        @pl.when(wg == n_wg)
        def _():
            walk.load(copies, full, empty)

        @pl.when(wg < n_wg)
        def _():
            plgpu.set_max_registers(232 if n_wg == 2 else 216, action="increase")
            cols = pl.ds((first_block + wg) * BLOCK, BLOCK)
            state16, own = smem["state16"].at[wg], smem["own"].at[wg]
            if "init" in operands:
                state = plgpu.load(gmem["init"].at[batch, head, :, cols], layout=WGMMA, optimized=False)
            else:
                state = plgpu.layout_cast(jnp.zeros((k_size, BLOCK), jnp.float32), WGMMA)
            state16[...] = state.astype(dtype)
            plgpu.commit_smem()

            def step(i, state):
                slot, chunk = walk.slot(i), walk.chunk(i)
                here = pl.ds(chunk * CHUNK, CHUNK)
                tiles = {name: smem[name].at[slot] for name in (*keys, *squares, "total")}
                tiles["z"] = smem["z"].at[slot, wg]
                destinations = {name: gmem[name].at[batch, here, head, cols] for name in results if name != "entering"}
                plgpu.barrier_wait(full.at[slot])
                if "entering" in results:
                    plgpu.copy_smem_to_gmem(state16, gmem["entering"].at[batch, head, chunk, :, cols])
                state = chunk_step(_Chunk(tiles, state, state16, own, destinations))
                release(empty.at[slot])
                state16[...] = state.astype(dtype)
                plgpu.commit_smem()
                return state

            state = lax.fori_loop(0, walk.steps, step, state)
            gmem["state"].at[batch, head, :, cols][...] = state
            plgpu.wait_smem_to_gmem(0)

    return launch(body, operands, outs, arrivals=len(keys) + len(squares) + 1 + n_wg, consumers=n_wg, stages=STAGES,
                  extra_scratch=(), grid=(heads, split, b_size), scratch=scratch, interpret=interpret)
