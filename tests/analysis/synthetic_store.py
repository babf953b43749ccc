"""Writes a run store that looks like a small IsoFLOP sweep of two architectures, with every kind of broken run."""

import json

import numpy as np

# Losses of a byte-level model of 3k-150k parameters: 1.6-2.4 nats. gla needs less compute than attention.
LAWS = {
    "attention": dict(E=1.1, A=13.0, B=60.0, alpha=0.35, beta=0.32),
    "gla": dict(E=1.1, A=12.2, B=55.0, alpha=0.35, beta=0.32),
}
RESUMED_LOSS = 2.41  # the second value of a step that a resumed run repeats
BUDGETS = (1e11, 3e11, 1e12)


def loss(arch, N, D):
    p = LAWS[arch]
    return p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * D ** -p["beta"]


def optimum(arch, C, factor=6.0):
    p = LAWS[arch]
    G = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    return G * (C / factor) ** (p["beta"] / (p["alpha"] + p["beta"]))


def write_run(
    store, run_id, *, arch, N, D, loss, budget, status="done", reason=None, seed=0, curve=12, data="bytes", sha256=None
):  # fmt: skip
    """One run directory in the format of the trainer; `loss` None for a run without a final loss."""
    path = store / run_id
    path.mkdir(parents=True)
    steps = 100
    per_token = {"model_causal": 6.0 * N, "model_full": 6.6 * N, "hardware": 7.0 * N, "6n": 6.0 * N}
    embedding, head = int(0.1 * N), int(0.1 * N)
    run = {
        "run_id": run_id, "name": arch, "status": status, "reason": reason, "sweep": {"arch": arch, "budget": budget},
        "seed": seed, "steps_done": steps if status == "done" else 40, "steps_total": steps, "tokens": D,
        "params": {"total": int(N) + embedding, "embedding": embedding, "non_embedding": int(N) - head,
                   "active": int(N), "head": head},
        "flops_per_token": per_token, "flops": {key: value * D for key, value in per_token.items()},
        "final_loss": loss, "final_bpb": None if loss is None else loss / np.log(2), "wall_seconds": 20.0,
        "data": {"name": "corpus", "tokenizer": data, "vocab_size": 256, "sha256": sha256},
    }  # fmt: skip
    (path / "config.json").write_text("{}")
    (path / "run.json").write_text(json.dumps(run))
    lines = []
    for step in np.linspace(1, steps, curve).astype(int):
        tokens = D * step / steps
        value = (loss or 2.5) + 3.0 * np.exp(-8 * step / steps)
        row = {"kind": "train", "step": int(step), "tokens": tokens, "flops": 6 * N * tokens, "loss": value}
        lines.append(json.dumps(row))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def write_store(store, *, seed=0, noise=0.004, sizes=6, budgets=BUDGETS, archs=("attention", "gla"), broken=True):
    """A whole sweep: sizes within a factor 6 of the optimum on each budget; returns the number of good runs."""
    rng = np.random.default_rng(seed)
    good, cells = 0, []
    for arch in archs:
        for budget in budgets:
            for i, ratio in enumerate(np.geomspace(1 / 5, 5, sizes)):
                N = round(optimum(arch, budget) * ratio)
                D = round(budget / (6 * N))
                run_id = f"{arch[:3]}{budget:.0e}{i}".replace("+", "")
                value = loss(arch, N, D) + noise * rng.standard_normal()
                write_run(store, run_id, arch=arch, N=N, D=D, loss=value, budget=budget)
                cells.append({"run_id": run_id, "axes": {"arch": arch, "budget": budget}})
                good += 1
    if broken:
        common = dict(arch=archs[0], N=20000, D=1e6, loss=None, budget=budgets[0])
        write_run(store, "diverged0", status="diverged", reason="loss is nan at step 40", **common)
        write_run(store, "failed0", status="failed", reason="out of memory", **common)
        write_run(store, "running0", status="running", **common)
        write_run(store, "preempted0", status="preempted", **common)
        write_run(store, "noloss0", **common)
        torn = write_run(store, "torn0", **common)
        (torn / "run.json").write_text('{"run_id": "torn0", "stat')
        metrics = store / cells[0]["run_id"] / "metrics.jsonl"  # killed and resumed: step 100 again, then a torn line
        repeated = {**json.loads(metrics.read_text().splitlines()[-1]), "loss": RESUMED_LOSS}
        metrics.write_text(metrics.read_text() + json.dumps(repeated) + '\n{"kind": "train", "step": 101, "lo')
        (store / "empty0").mkdir()
        (store / "started0").mkdir()
        (store / "started0" / "config.json").write_text("{}")
        cells.append({"run_id": "never0", "axes": {"arch": archs[0], "budget": budgets[0]}, "tokens": 1e6})
    (store / "sweep.json").write_text(json.dumps({"name": "test", "cells": cells}))
    return good
