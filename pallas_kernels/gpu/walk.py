"""The walk over the chunks of every head with the state on chip, for the families whose chunks are prepared apart."""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import BLOCK, CHUNK, WGMMA, Walk, launch, release, rows, tile

STAGES = 2


class ChunkStep:
    """What one compute warpgroup sees of one chunk: tiles by name, its state, and where its results go."""

    def __init__(self, tiles, state, state16, own, destinations, late):
        self.smem, self.state, self.state16, self.own = tiles.__getitem__, state, state16, own
        self.destinations, self.late = destinations, late

    def decayed(self, state):
        total = plgpu.load(self.smem("total"), layout=WGMMA.reduce(1))
        return state * rows(jnp.exp2(total), state.shape)

    def store(self, name, ref):
        plgpu.copy_smem_to_gmem(ref, self.destinations[name])

    def wait_late(self):
        plgpu.barrier_wait(self.late[0])


def walk_chunks(chunk_step, keys, squares, arrays, results, *, reverse, split=1, pieces=None, late=(), stages=STAGES,
                interpret):
    """Walks all chunks of every head; `chunk_step(ChunkStep)` returns the next state.

    Args:
      keys, squares: dicts of arrays [B, T, H, K] and [B, H, N, 64, 64] by name.
      arrays: dict with z [B, T, H, V], total [B, H, N, K], and if any init [B, H, K, V] and keep [B, N], the factors of
        the state that enters each chunk.
      results: names of outputs [B, T, H, V]; "entering" for the states that enter the chunks.
      split: programs per head, each with its own value columns. Every compute warpgroup owns 64 of them.
      pieces: pieces that T is cut in, each walked by programs of its own: init is then [B, H, P, K, V], of each piece,
        and so is the state returned. Without results the piece that is walked last is left out.
      late: names of keys and squares with room for one chunk only; `ChunkStep.wait_late` comes before their first use.
    Returns: dict of the results and state [B, H, K, V] float32.
    """
    operands = keys | squares | arrays
    b_size, t_size, heads, v_size = operands["z"].shape
    k_size, dtype = operands["total"].shape[-1], operands["z"].dtype
    chunks = t_size // CHUNK
    n_wg = v_size // BLOCK // split
    walked = 1 if pieces is None else pieces if results else pieces - 1
    axis = () if pieces is None else (walked,)
    outs = {"state": jax.ShapeDtypeStruct((b_size, heads, *axis, k_size, v_size), jnp.float32)}
    for name in results:
        shape = (b_size, heads, chunks, k_size, v_size) if name == "entering" else operands["z"].shape
        outs[name] = jax.ShapeDtypeStruct(shape, dtype)
    scratch = {name: tile((*(() if name in late else (stages,)), CHUNK, k_size if name in keys else CHUNK), dtype)
               for name in (*keys, *squares)}
    scratch |= {"z": tile((stages, n_wg, CHUNK, BLOCK), dtype), "total": plgpu.SMEM((stages, k_size), jnp.float32),
                "state16": tile((n_wg, k_size, BLOCK), dtype), "own": tile((n_wg, CHUNK, BLOCK), dtype)}

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty, *late_barriers = refs[len(names):]
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        program = lax.axis_index("piece")
        out_piece, part = lax.div(program, jnp.int32(split)), lax.rem(program, jnp.int32(split))
        piece = out_piece + (walked != (pieces or 1) and reverse)
        walk = Walk(chunks, pieces or 1, stages, reverse, piece)
        first_block = part * n_wg
        entered, left = ((batch, head, *(() if pieces is None else (p,))) for p in (piece, out_piece))

        def source(name, chunk):
            if name in keys:
                return gmem[name].at[batch, pl.ds(chunk * CHUNK, CHUNK), head]
            return gmem[name].at[batch, head, chunk]

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(source(name, chunk), smem[name].at[slot]) for name in (*keys, *squares) if name not in late]
            pairs += [(gmem["z"].at[batch, here, head, pl.ds((first_block + w) * BLOCK, BLOCK)], smem["z"].at[slot, w])
                      for w in range(n_wg)]
            return [*pairs, (source("total", chunk), smem["total"].at[slot])]

        def late_copies(chunk):
            return [(source(name, chunk), smem[name]) for name in late]

        @pl.when(wg == n_wg)
        def _():
            walk.load(copies, full, empty, (late_copies, *late_barriers) if late else None)

        @pl.when(wg < n_wg)
        def _():
            plgpu.set_max_registers(232 if n_wg == 2 else 216, action="increase")
            cols = pl.ds((first_block + wg) * BLOCK, BLOCK)
            state16, own = smem["state16"].at[wg], smem["own"].at[wg]
            if "init" in operands:
                state = plgpu.load(gmem["init"].at[(*entered, slice(None), cols)], layout=WGMMA, optimized=False)
            else:
                state = plgpu.layout_cast(jnp.zeros((k_size, BLOCK), jnp.float32), WGMMA)
            state16[...] = state.astype(dtype)
            plgpu.commit_smem()

            def step(i, state):
                slot, chunk = walk.slot(i), walk.chunk(i)
                here = pl.ds(chunk * CHUNK, CHUNK)
                ring = ("total", *(name for name in (*keys, *squares) if name not in late))
                tiles = {name: smem[name] for name in late} | {name: smem[name].at[slot] for name in ring}
                tiles["z"] = smem["z"].at[slot, wg]
                destinations = {name: gmem[name].at[batch, here, head, cols] for name in results if name != "entering"}
                plgpu.barrier_wait(full.at[slot])
                if "entering" in results:
                    plgpu.copy_smem_to_gmem(state16, gmem["entering"].at[batch, head, chunk, :, cols])
                if "keep" in operands:
                    state = state * gmem["keep"][batch, chunk]
                state = chunk_step(ChunkStep(tiles, state, state16, own, destinations, late_barriers))
                release(empty.at[slot])
                if late:
                    plgpu.barrier_arrive(late_barriers[1])
                state16[...] = state.astype(dtype)
                plgpu.commit_smem()
                return state

            state = lax.fori_loop(0, walk.steps, step, state)
            gmem["state"].at[(*left, slice(None), cols)][...] = state
            plgpu.wait_smem_to_gmem(0)

    late_barriers = (plgpu.Barrier(num_arrivals=len(late)), plgpu.Barrier(num_arrivals=n_wg)) if late else ()
    arrivals = len(keys) + len(squares) - len(late) + 1 + n_wg
    return launch(body, operands, outs, arrivals=arrivals, consumers=n_wg, stages=stages, extra_scratch=late_barriers,
                  grid=(heads, walked * split, b_size), scratch=scratch, interpret=interpret)
