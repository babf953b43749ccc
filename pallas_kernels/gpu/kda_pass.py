"""Mosaic GPU kernels (Hopper) for the two walks of Kimi Delta Attention: a delta rule with a decay per key channel.

One head and one chunk of 64 tokens, S the entering state, R the gradient of the leaving one, A and Y as in
`channel_pass`, w = -k e^b and T the solved triangle times diag(beta):
    E  = V + w S,   O = (A T) E + X S,   S <- diag(2^total) S + (T^T Y)^T E           `kda_forward`
    dV = (A T)^T dO + (T^T Y) R,         R <- diag(2^total) R + X^T dO + w^T dV       `kda_reverse`
U = T E alternates in sign where keys look alike, and Y^T U and A U are small differences of it: so U is not what gets
rounded, A T and T^T Y are (`channel_pass.chunk_weights`). Only the other gradients need U (`chunk_gradients`). Value
columns are independent: every compute warpgroup owns 64.
"""
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import T_CONTRACT, WGMMA, add_products, present, products
from pallas_kernels.gpu.walk import walk_chunks


def kda_forward(weights, v, init, *, keep, split, interpret=None):
    """Outputs and final state, and with `keep` what the backward pass needs.

    Args:
      weights: the dict of `chunk_weights`; v: [B, T, H, V] bf16, V in {64, 128}; init: float32 [B, H, K, V] or None.
      split: programs per head, each with its own value columns.
    Returns: dict with state [B, H, K, V] float32 and o [B, T, H, V], with `keep` also u [B, T, H, V] and the states
      entering the chunks, entering [B, H, N, K, V] bf16.
    """
    keys = {name: weights[name] for name in ("w", "y", "x")}
    solved = ("t", "t_low") if keep else ()
    squares = {name: weights[name] for name in ("a", *solved)}
    arrays = present(total=weights["total"], z=v, init=init)
    results = ("o", "u", "entering") if keep else ("o",)

    def chunk(walk):
        smem, s16, own, values = walk.smem, walk.state16, walk.own, walk.smem("z")
        error, result = products((smem("w"), s16), (smem("x"), s16))
        error = error + plgpu.load(values, layout=WGMMA).astype(jnp.float32)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk wrote has left shared memory
        own[...] = error.astype(own.dtype)
        plgpu.commit_smem()
        terms = [(walk.decayed(walk.state), smem("y").transpose(T_CONTRACT), own), (result, smem("a"), own)]
        if keep:
            walk.wait_late()
            nothing = plgpu.layout_cast(jnp.zeros_like(error), WGMMA)
            terms.append((nothing, tuple(map(smem, solved)), (own, own)))
        state, result, *u = add_products(*terms, interpret=interpret)
        own[...] = result.astype(own.dtype)
        if keep:
            values[...] = u[0].astype(own.dtype)
        plgpu.commit_smem()
        walk.store("o", own)
        if keep:
            walk.store("u", values)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the stage is about to be filled again
        return state

    return walk_chunks(chunk, keys, squares, arrays, results, reverse=False, split=split, late=solved,
                       interpret=interpret)


def kda_reverse(weights, do, dfinal, *, split, interpret=None):
    """dV, in a walk from the end of the sequence with R, the gradient of the state, in registers.

    Args: as `kda_forward`; do [B, T, H, V]; dfinal float32 [B, H, K, V] or None.
    Returns: dict with dv [B, T, H, V], entering [B, H, N, K, V] bf16 = R of every chunk, and state [B, H, K, V], the
      gradient of the initial state.
    """
    keys = {name: weights[name] for name in ("w", "x", "y")}
    arrays = present(total=weights["total"], z=do, init=dfinal)

    def chunk(walk):
        smem, own = walk.smem, walk.own
        dv, = products(((smem("y"), smem("a").transpose(T_CONTRACT)), (walk.state16, smem("z"))))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        own[...] = dv.astype(own.dtype)
        plgpu.commit_smem()
        walk.store("dv", own)
        reads = smem("x").transpose(T_CONTRACT), smem("w").transpose(T_CONTRACT)
        return add_products((walk.decayed(walk.state), reads, (smem("z"), own)), interpret=interpret)[0]

    return walk_chunks(chunk, keys, {"a": weights["a"]}, arrays, ("dv", "entering"), reverse=True, split=split,
                       interpret=interpret)
