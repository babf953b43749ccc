"""What a run scores: loss, perplexity, bits per byte and accuracy on its validation data, accuracy on tasks."""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from efficient_lm import checkpoint, metrics, train
from efficient_lm import config as configs
from efficient_lm.data import open_data
from efficient_lm.data.batches import load_sources
from efficient_lm.data.tasks import TASKS
from efficient_lm.generate import load_run
from efficient_lm.model import LM
from efficient_lm.schema import ConfigError, to_dict

BATCH_TOKENS = 8192
# Text runs: the tokens that a task may use are looked for in so many batches of the validation data.
ALPHABET_BATCHES = 8
TEXT_VOCAB = 64


@dataclass(frozen=True)
class TaskSpec:
    """A task and the options that differ from those of the run, or from the defaults where it had another task."""

    name: str
    options: dict = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "TaskSpec":
        """From 'mqar:pairs=16:power=1'. Raises ConfigError."""
        load_sources()
        name, *parts = text.split(":")
        TASKS.find(name, "--tasks")
        pairs = [part.partition("=") for part in parts]
        if not all(equals and key for key, equals, _ in pairs):
            raise ConfigError(f"--tasks {text!r}: must be NAME or NAME:OPTION=VALUE:...")
        return cls(name, {key: configs.parse_literal(value) for key, _, value in pairs})


def evaluate_run(run, specs=(), *, lengths=(), rows=1024, vocab_size=0, step=0, validation=True, each=lambda it: it):
    """What evals.json of a run directory holds.

    Args:
      run: run directory.
      specs: TaskSpecs, each evaluated at each of `lengths` (default: the training length) on `rows` rows.
      vocab_size: of the tasks; 0 = that of the run's data (a run on text: at most 64 of the tokens that it has seen).
      step: checkpoint; 0 = the last.
      validation: also evaluate the run's own validation data.
      each: wraps the list of (spec, length), for a progress bar.
    Raises:
      ConfigError: where a task can't be put to this run; one line.
    """
    cfg, _, params = load_run(run, step)
    score = functools.partial(_score, cfg, _eval_step(json.dumps(to_dict(cfg.model))), params)
    result = {"run_id": configs.run_id(cfg), "step": step or _last_step(run), "made": metrics.utc_now()}
    if validation:
        own = train.open_split(cfg, "validation", max(1, BATCH_TOKENS // cfg.train.seq_len))
        metrics.require_own_tokens(run, cfg, own.spec, "bring those back, or leave them out with --no-validation")
        scores = score(own)
        bpb = scores["loss"] / math.log(2) / own.bytes_per_token
        result["validation"] = {"perplexity": math.exp(min(scores["loss"], 700)), "bpb": bpb, **scores}
    result["tasks"] = []
    for spec, length in each([(s, n) for s in specs for n in lengths or (cfg.train.seq_len,)]):
        data, options, V = _open_task(cfg, spec, length, rows, vocab_size)
        facts = {"task": spec.name, "options": options, "length": length, "vocab_size": V}
        result["tasks"].append({**facts, "chance_accuracy": data.spec["chance_accuracy"], **score(data)})
    return result


@functools.lru_cache(maxsize=4)
def _eval_step(model: str):
    """One compiled function for all runs of the same architecture, given as JSON."""
    lm = LM(configs.from_dict({"model": json.loads(model)}).model)
    return jax.jit(train.make_eval_step(lm, lambda x: x))


def _last_step(run) -> int:
    return checkpoint.steps(Path(run) / "ckpt")[-1]


def _score(cfg, eval_step, params, data) -> dict:
    """Loss in nats per counted token, accuracy with its standard error over rows, share of rows without a mistake."""
    batches = train.prefetch(lambda k: train.fields_used(cfg, data[k]), range(len(data)))
    sums = np.concatenate([jax.device_get(s) for s in [eval_step(params, b) for b in batches]], axis=1)
    nll, right, counted = sums[:, sums[2] > 0].astype(np.float64)
    accuracy = right.sum() / counted.sum()
    return {
        "loss": float(nll.sum() / counted.sum()),
        "accuracy": float(accuracy),
        "stderr": float(np.sqrt(np.sum((right - accuracy * counted) ** 2)) / counted.sum()),
        "exact": float((right == counted).mean()),
        "rows": len(counted),
        "answers": int(counted.sum()),
    }


def _open_task(cfg, spec: TaskSpec, length: int, rows: int, vocab_size: int):
    """(batches, all options, vocabulary) of a task for the run `cfg`. Raises ConfigError."""
    on_task, same = cfg.data.source in TASKS, cfg.data.source == spec.name
    if not on_task and not TASKS[spec.name].for_text:
        fit = ", ".join(sorted(name for name, task in TASKS.items() if task.for_text))
        raise ConfigError(
            f"--tasks {spec.name}: this run was trained on {cfg.data.source!r}, so it can't know what is asked; tasks "
            f"whose answer a text would go on with: {fit}"
        )
    tokens = None if on_task else _alphabet(cfg)
    V = vocab_size or (cfg.data.vocab_size if on_task else min(TEXT_VOCAB, len(tokens)))
    options = {**(to_dict(cfg.data.task.for_validation()) if same else {}), **spec.options}
    data_cfg = dataclasses.replace(
        cfg.data, source=spec.name, task=options, vocab_size=V, validation_tokens=rows * length
    )
    batch_size = max(1, min(rows, BATCH_TOKENS // length))
    try:
        data = open_data(data_cfg, seq_len=length, batch_size=batch_size, seed=cfg.seed, split="validation")
    except ConfigError as error:
        raise ConfigError(f"--tasks {spec.name} at length {length}: {error}") from None
    allowed = cfg.model.vocab_size if on_task else len(tokens)
    if data.vocab_size > allowed:
        has = "has a vocabulary of" if on_task else "has seen"
        raise ConfigError(f"--tasks {spec.name}: needs {data.vocab_size} tokens, but this run {has} {allowed}")
    return data if on_task else Translated(data, tokens), data.spec["asked"], data.vocab_size


class Translated:
    """Batches whose token i is `tokens[i]`."""

    def __init__(self, batches, tokens):
        self.batches, self.tokens, self.spec = batches, tokens, batches.spec

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, k):
        batch = self.batches[k]
        return {**batch, **{name: self.tokens[batch[name]] for name in ("inputs", "targets")}}


def _alphabet(cfg):
    """Tokens in the validation data, the commonest first: int32 [n]. Others were never trained."""
    data = train.open_split(cfg, "validation", max(1, BATCH_TOKENS // cfg.train.seq_len))
    batches = [data[k] for k in range(min(ALPHABET_BATCHES, len(data)))]
    counts = sum(np.bincount(b["inputs"][b["segment_ids"] > 0], minlength=cfg.model.vocab_size) for b in batches)
    return np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].astype(np.int32)
