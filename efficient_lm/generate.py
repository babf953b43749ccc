"""Sample text from a trained run: python -m efficient_lm.generate --run runs/x --prompt "The state of the union"

Decoding is token by token with each mixer's own state (KV cache or recurrent state), compiled once.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm import checkpoint, metrics
from efficient_lm.config import from_dict
from efficient_lm.data import open_data
from efficient_lm.model import LM
from efficient_lm.optim import make_optimizer
from efficient_lm.schema import ConfigError
from efficient_lm.train import make_init


def load_run(run, step: int = 0):
    """(config, LM, params) of a run directory; the averaged parameters when the run has them. Raises ConfigError."""
    run = Path(run)
    if not (run / "config.json").is_file():
        raise ConfigError(f"--run {run}: is no run directory (it has no config.json)")
    cfg = from_dict(metrics.read_json(run / "config.json"))
    found = checkpoint.steps(run / "ckpt")
    if not found:
        raise ConfigError(f"--run {run}: has no checkpoint yet")
    lm = LM(cfg.model)
    like = jax.eval_shape(make_init(lm, cfg, make_optimizer(lm, cfg.optim)), jax.random.key(0))
    state = checkpoint.restore(run / "ckpt", step or found[-1], like)
    return cfg, lm, state["ema"] if cfg.train.ema else state["params"]


def sample(lm: LM, params, prompt, n_new: int, *, temperature: float = 1.0, top_k: int = 0, seed: int = 0):
    """prompt [B, P] int32 (P >= 1) -> [B, P + n_new] int32. temperature 0 = the likeliest token; top_k 0 = all."""
    prompt = jnp.asarray(prompt, jnp.int32)
    return np.asarray(_sample(lm, params, prompt, n_new, temperature, top_k, jax.random.key(seed)))


@functools.partial(jax.jit, static_argnames=("lm", "n_new", "temperature", "top_k"))
def _sample(lm, params, prompt, n_new, temperature, top_k, key):
    batch, length = prompt.shape
    total = length + n_new
    forced = jnp.pad(prompt, ((0, 0), (0, n_new)))

    def step(carry, t):
        token, state = carry
        logits, state = lm.step(params, token, state)
        drawn = _draw(logits, temperature, top_k, jax.random.fold_in(key, t))
        token = jnp.where(t + 1 < length, forced[:, jnp.minimum(t + 1, total - 1)], drawn)
        return (token, state), token

    start = (forced[:, 0], lm.init_state(params, batch, total))
    _, tokens = jax.lax.scan(step, start, jnp.arange(total - 1))
    return jnp.concatenate([forced[:, :1], tokens.T], axis=1)


def _draw(logits, temperature, top_k, key):
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k:
        threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def main(argv=None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m efficient_lm.generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, help="run directory of efficient_lm.train")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest tokens; 0 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, default=0, help="checkpoint to use; 0 = the last")
    args = parser.parse_args(argv)
    try:
        for name, low in (("tokens", 1), ("temperature", 0), ("top_k", 0)):
            if getattr(args, name) < low:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
        cfg, lm, params = load_run(args.run, args.step)
        data = open_data(cfg.data, seq_len=cfg.train.seq_len, batch_size=1, seed=cfg.seed, split="validation")
        if data.tokenizer is None:
            raise ConfigError(f"--run {args.run}: was trained on synthetic data {cfg.data.source!r}, which is no text")
        prompt = data.tokenizer.encode(args.prompt)
        if len(prompt) == 0:
            raise ConfigError("--prompt '': must have at least one token")
        if args.top_k > cfg.model.vocab_size:
            raise ConfigError(f"--top-k {args.top_k}: must be at most the vocabulary, {cfg.model.vocab_size}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokens = sample(
        lm, params, np.asarray(prompt)[None], args.tokens,
        temperature=args.temperature, top_k=args.top_k, seed=args.seed,
    )  # fmt: skip
    print(data.tokenizer.decode(tokens[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
