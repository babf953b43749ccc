"""Mosaic GPU kernels (Hopper) for small float32 results of every chunk of 64 tokens, each reading its inputs once.

In XLA both are a product summed over an axis, whose operand it writes out transposed, in float32, before it sums.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.gates import rounded
from pallas_kernels.gpu.tiles import CHUNK, T_CONTRACT, WGMMA, Walk, launch, products, release, tile

PROGRAMS = 528  # four for each multiprocessor of an H100
STAGES = 3


def row_dots(x, y, *, interpret):
    """sum_d x_d y_d of bf16 x, y [B, T, H, D] -> float32 [B, H, N, 64]; T a multiple of 64."""
    def compute(x, y):
        x, y = (plgpu.load(a, layout=WGMMA).astype(jnp.float32) for a in (x, y))
        return jnp.sum(x * y, axis=1)

    return _per_chunk(compute, CHUNK, dict(x=x, y=y), interpret)


def chunk_sums(x, weights, *, interpret):
    """sum_j weights_j x_j over the tokens of each chunk, float32 [B, H, N, K].

    Args: x bf16 [B, T, H, K], K 64 or 128, T a multiple of 64; weights float32 [B, H, N, 64].
    """
    def compute(x, weights):
        return jnp.sum(products((x.transpose(T_CONTRACT), weights.transpose(T_CONTRACT)))[0], axis=1)

    return _per_chunk(compute, x.shape[-1], dict(x=x, weights=bf16_parts(weights)), interpret)


def bf16_parts(x):
    """float32 [..., K] as bf16 [..., 8, K] whose first three rows add up to it and whose others are zero."""
    parts = []
    for _ in range(3):
        high = rounded(x)
        parts.append(high.astype(jnp.bfloat16))
        x = x - high
    return jnp.stack(parts + [jnp.zeros_like(parts[0])] * 5, axis=-2)


def _per_chunk(compute, size, arrays, interpret):
    """float32 [B, H, N, size]: `compute` of the tiles of each chunk of bf16 [B, T, H, D] or [B, H, N, 8, 64] arrays."""
    b_size, t_size, heads, _ = arrays["x"].shape
    chunks = t_size // CHUNK
    pieces = min(chunks, pl.cdiv(PROGRAMS, b_size * heads))
    pieces = pl.cdiv(chunks, pl.cdiv(chunks, pieces))  # none is empty
    scratch = {name: tile((STAGES, CHUNK if a.ndim == 4 else 8, a.shape[-1]), a.dtype) for name, a in arrays.items()}
    scratch["out"] = plgpu.SMEM((size,), jnp.float32)
    outs = {"out": jax.ShapeDtypeStruct((b_size, heads, chunks, size), jnp.float32)}

    def body(*refs):
        gmem = dict(zip((*arrays, "out"), refs[: len(arrays) + 1], strict=True))
        smem, full, empty = refs[len(arrays) + 1:]
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        walk = Walk(chunks, pieces, STAGES, False, lax.axis_index("piece"))

        def copies(chunk, slot):
            for name, a in arrays.items():
                place = (batch, pl.ds(chunk * CHUNK, CHUNK), head) if a.ndim == 4 else (batch, head, chunk)
                yield gmem[name].at[place], smem[name].at[slot]

        @pl.when(wg == 1)
        def _():
            walk.load(copies, full, empty)

        @pl.when(wg == 0)
        def _():
            @pl.loop(0, walk.steps)
            def _(i):
                slot = walk.slot(i)
                plgpu.barrier_wait(full.at[slot])
                result = compute(*(smem[name].at[slot] for name in arrays))
                release(empty.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem["out"][...] = result
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem["out"], gmem["out"].at[batch, head, walk.chunk(i)])

            plgpu.wait_smem_to_gmem(0)

    return launch(body, arrays, outs, arrivals=len(arrays), consumers=1, stages=STAGES, extra_scratch=(),
                  grid=(heads, pieces, b_size), scratch=scratch, interpret=interpret)["out"]
