"""Sample text from a trained run: python -m efficient_lm.generate --run runs/x --prompt "The state of the union"

The prompt is read in parallel form; then decoding is token by token with each mixer's own state (KV cache or recurrent
state). Several prompts go together: --prompt may be given more than once.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm import checkpoint, hardware, metrics
from efficient_lm.config import from_dict
from efficient_lm.data import open_data
from efficient_lm.model import LM
from efficient_lm.optim import make_optimizer
from efficient_lm.schema import ConfigError
from efficient_lm.train import make_init
from pallas_kernels.commands import Parser, command


def run_config(run):
    """The config of a run directory. Raises ConfigError."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise ConfigError(f"--run {run}: is no run directory (it has no config.json)")
    stored = metrics.read_json(path)
    if stored is None:
        raise ConfigError(f"--run {run}: its config.json can't be read")
    return from_dict(stored)


def load_run(run, step: int = 0):
    """(config, LM, params) of a run directory; the averaged parameters when the run has them. Raises ConfigError."""
    run, cfg = Path(run), run_config(run)
    hardware.require_devices()
    found = checkpoint.steps(run / "ckpt")
    if not found:
        raise ConfigError(f"--run {run}: has no checkpoint yet")
    lm = LM(cfg.model)
    like = jax.eval_shape(make_init(lm, cfg, make_optimizer(lm, cfg.optim)), jax.random.key(0))
    state = checkpoint.restore(run / "ckpt", step or found[-1], like)
    return cfg, lm, state["ema"] if cfg.train.ema else state["params"]


def sample(lm: LM, params, prompts, n_new: int, *, lengths=None, temperature: float = 1.0, top_k: int = 0, seed=0):
    """prompts [B, P] int32 (P >= 1) -> [B, P + n_new] int32. temperature 0 = the likeliest token; top_k 0 = all.

    lengths [B]: tokens of each prompt (the rest of a row is not read), all P by default. A row is continued from its
    own end, so that a shorter prompt gets more new tokens.
    """
    prompts = jnp.asarray(prompts, jnp.int32)
    lengths = np.full(len(prompts), prompts.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.min() < 1 or lengths.max() > prompts.shape[1]:
        raise ValueError(f"lengths = {lengths.tolist()}: must be between 1 and prompts.shape[1] = {prompts.shape[1]}")
    key, shortest = jax.random.key(seed), int(lengths.min())
    return np.asarray(_sample(lm, params, prompts, jnp.asarray(lengths), key, shortest, n_new, temperature, top_k))


@functools.partial(jax.jit, static_argnames=("lm", "shortest", "n_new", "temperature", "top_k"))
def _sample(lm, params, prompts, lengths, key, shortest, n_new, temperature, top_k):
    """What all prompts have in parallel form, then token by token: a longer prompt's next token, or a drawn one."""
    total = prompts.shape[1] + n_new
    prompts = jnp.pad(prompts, ((0, 0), (0, n_new)))

    def token_after(t, logits):
        drawn = _draw(logits, temperature, top_k, jax.random.fold_in(key, t))
        return jnp.where(t + 1 < lengths, prompts[:, t + 1], drawn)

    def step(carry, t):
        token, state = carry
        logits, state = lm.step(params, token, state)
        token = token_after(t, logits)
        return (token, state), token

    logits, state = lm.prefill(params, prompts[:, :shortest], total)
    first = token_after(shortest - 1, logits)
    _, tokens = jax.lax.scan(step, (first, state), jnp.arange(shortest, total - 1))
    return jnp.concatenate([prompts[:, :shortest], first[:, None], tokens.T], axis=1)


def _draw(logits, temperature, top_k, key):
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k:
        threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


@command
def main(argv=None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(prog="python -m efficient_lm.generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, help="run directory of efficient_lm.train")
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; may be repeated")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest tokens; 0 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, default=0, help="checkpoint to use; 0 = the last")
    args = parser.parse_args(argv)
    for name, low in (("tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(args, name) >= low:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    cfg, lm, params = load_run(args.run, args.step)
    data = open_data(cfg.data, seq_len=cfg.train.seq_len, batch_size=1, seed=cfg.seed, split="validation")
    if data.tokenizer is None:
        raise ConfigError(f"--run {args.run}: was trained on synthetic data {cfg.data.source!r}, which is no text")
    trained = (metrics.read_json(Path(args.run) / "run.json") or {}).get("data") or {}
    if trained.get("tokenizer_hash", data.tokenizer.hash) != data.tokenizer.hash:
        where = cfg.data.path or cfg.data.tokenizer
        raise ConfigError(f"--run {args.run}: {where!r} is another tokenizer now than that of the run; bring that back")
    prompts = [data.tokenizer.encode(text) for text in args.prompt]
    if not all(len(prompt) for prompt in prompts):
        raise ConfigError("--prompt '': must have at least one token")
    if args.top_k > cfg.model.vocab_size:
        raise ConfigError(f"--top-k {args.top_k}: must be at most the vocabulary, {cfg.model.vocab_size}")
    first = [data.vocab_size - 1] if cfg.data.pack == "bos" else []  # what every row of training began with
    prompts = [np.concatenate([np.asarray(first, np.int32), prompt]) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    rows = np.stack([np.pad(prompt, (0, max(lengths) - len(prompt))) for prompt in prompts])
    tokens = sample(
        lm, params, rows, args.tokens,
        lengths=lengths, temperature=args.temperature, top_k=args.top_k, seed=args.seed,
    )  # fmt: skip
    for row, length in zip(tokens, lengths, strict=True):
        print(data.tokenizer.decode(row[len(first) : length + args.tokens]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
