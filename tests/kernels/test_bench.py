"""The benchmarks' command lines, tables and processes."""
import importlib
import json
import os
import time

import jax
import pytest

from pallas_kernels.bench.__main__ import main
from pallas_kernels.bench.turns import compile_all, run_all
from pallas_kernels.gpu import bench_cases, bench_gpu, bench_table, run_once


def test_table_of_two_operators(tmp_path, capsys):
    out = tmp_path / "bench.json"
    main(["--op", "simple_gla,softmax", "--shapes", "1,32,1,8,8", "--implementations", "xla,pallas_gpu", "--seconds",
          "0.01", "--peak-flops", "1e10", "--peak-bandwidth", "1e10", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(r["op"], r["implementation"]) for r in rows] == [
        ("simple_gla", "xla"), ("simple_gla", "pallas_gpu"), ("softmax", "auto")]
    assert "cannot run" in rows[1]["error"]
    forward = rows[0]["forward"]
    assert forward["bytes"] == 4 * 32 * (8 * 4 + 1)  # q, k, v, o and one gate per token
    assert forward["floor_ms"] == pytest.approx(1e3 * max(forward["bytes"], forward["flops"]) / 1e10)
    assert rows[0]["forward_backward"]["ms"] > 0 and "simple_gla" in capsys.readouterr().out


@pytest.mark.parametrize("flags,message", [
    (["--op", "glaa"], "--op glaa: allowed are linear"),
    (["--shapes", "1,2,3"], "five positive numbers"),
    (["--shapes", "1,2,x,4,5"], "whole numbers"),
])
def test_bad_flags_give_one_line(flags, message, capsys):
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_gpu_tasks_begin_with_every_family_at_the_first_shape():
    tasks = bench_gpu.tasks(list(bench_cases.FAMILIES), list(bench_cases.SHAPES))
    n = len(bench_cases.FAMILIES)
    assert [name for name, _, _ in tasks[:n]] == list(bench_cases.FAMILIES)
    assert {shape for _, shape, _ in tasks[:n]} == {bench_cases.SHAPES[0], bench_cases.GROUPED[0]}
    assert len(set(tasks)) == len(tasks)
    assert [t[2] for t in tasks[-2 * n:]] == [bench_gpu.ERRORS] * n + ["xla"] * n
    for name, family in bench_cases.FAMILIES.items():
        assert all((name, shape, family.implementation) in tasks for shape in family.shapes)


def prepare(task):
    """Stands in for compiling: gives a function of when the last task was compiled."""
    if task == "bad":
        raise ValueError("does not compile")
    time.sleep(0.1)
    return lambda scale: os._exit(1) if task == "crash" else (scale * task, time.time(), os.getpid())


def test_tasks_compile_side_by_side_and_run_in_turns():
    tasks = [1, "bad", 2, "crash", 3, 4]
    holders, errors = compile_all(tasks, prepare, 2, limit=60)
    compiled = time.time()
    assert errors == {"bad": "ValueError: does not compile"} and set(holders) == set(tasks) - {"bad"}
    shared = [task for task in tasks if task in holders and holders[task] is holders["crash"]]
    rows = {task: (result, error) for task, result, error in run_all(tasks, holders, 10)}
    assert set(rows) == set(holders)
    order = [holders[task] for task in rows]
    assert all(a is b for a, b in zip(order, sorted(order, key=order.index), strict=True))  # a process after the other
    lost = {"crash", *shared[shared.index("crash"):]}
    assert {task for task, (_, error) in rows.items() if error} == lost
    results = [rows[task][0] for task in rows if task not in lost]
    assert [r[0] for r in results] == [10 * task for task in rows if task not in lost]
    times = [r[1] for r in results]
    assert compiled < times[0] and times == sorted(times)


def test_no_task_is_begun_after_the_limit():
    assert compile_all([1, 2], prepare, 1, limit=0) == ({}, {})


@pytest.mark.parametrize("name, forward, both", [  # GFLOP and MB of kernels.md's table: 262144 token-heads, D = 128
    ("scalar decay per token", (25.8, 269.5), (90.2, 741.3)),
    ("Gated DeltaNet", (48.3, 270.5), (181.5, 744.5)),
    ("KDA", (48.3, 403.7), (181.5, 1144.0)),
    ("DPLR (RWKV-7)", (74.1, 469.8), (259.3, 1342.2)),
    ("causal attention", (137.4, 268.4), (481.0, 805.3)),
])
def test_gpu_work_counts_each_array_once(name, forward, both):
    family, shape = bench_cases.FAMILIES[name], bench_cases.SHAPES[0]
    arrays = jax.eval_shape(lambda: bench_cases.make_inputs(family, shape, jax.random.key(0)))
    work = bench_cases.work(family, shape, arrays, arrays["v"])
    for mode, (flops, size) in (("fwd", forward), ("fwdbwd", both)):
        assert work[mode] == (pytest.approx(flops * 1e9, rel=2e-3), pytest.approx(size * 1e6, rel=2e-3))


def test_gpu_tables_from_files(tmp_path, capsys):
    row = dict(family="Gated DeltaNet", shape=[8, 2048, 16, 128], ms=0.3, of_floor=0.5, tflops=100.0, gbs=900.0,
               first_step_s=4.2)
    rows = [row | dict(implementation="pallas_gpu", mode="fwd", kernel_ms=0.2),
            row | dict(implementation="pallas_gpu", mode="fwdbwd", kernel_ms=0.8),
            row | dict(implementation="xla", mode="fwd", kernel_ms=4.0),
            dict(family="KDA", shape=[8, 2048, 16, 128], implementation="pallas_gpu", failed="out of memory")]
    files = [tmp_path / name for name in ("old.json", "new.json", "peers.json", "page.md", "same.json", "others.json")]
    limits = dict(device="NVIDIA H100", date="2026-01-02", matmul_tflops=700.0, copy_gbs=2900.0)
    files[0].write_text(json.dumps(limits | {"rows": rows}))
    files[1].write_text(json.dumps(limits | {"rows": [rows[0] | dict(kernel_ms=0.1)]}))  # measured again
    peer = dict(family=row["family"], shape=row["shape"], mode="fwd")
    peers = [peer | dict(name="FlashQLA", kernel_ms=0.25), peer | dict(name="fla", ms=0.6)]
    other = peer | dict(name="cuDNN", ms=1.0)
    files[2].write_text(json.dumps(dict(device="NVIDIA H100", rows=peers)))
    files[4].write_text(json.dumps(dict(device="NVIDIA H100", date="2026-01-02", rows=[
        peers[0] | dict(kernel_ms=0.19), peers[0] | dict(mode="fwdbwd", kernel_ms=0.72),
        dict(name="TFLA", failed="no")])))
    files[5].write_text(json.dumps(dict(device="NVIDIA B200", date="2026-01-02", rows=[other])))
    files[3].write_text("text\n<!-- kernels: full -->\nold\n<!-- kernels: end -->\nrest\n")
    peers = [str(files[i]) for i in (2, 4, 5)]
    bench_table.main(["--rows", *map(str, files[:2]), "--peers", *peers, "--write", str(files[3])])
    page = files[3].read_text()
    assert "| Gated DeltaNet | 8, 2048, 16, 128 | 0.100 / 0.800 |" in page
    assert ("| FlashQLA 0.190 / 0.720: 1.9x / 0.9x; fla 0.600 flushed, recorded: 2.0x; cuDNN 1.000 flushed (B200) |"
            in page)
    assert "4.00 |" in page and "old" not in page and "KDA" not in page and page.endswith("end -->\nrest\n")


@pytest.mark.parametrize("row, message", [
    (dict(family="GLA"), "row 0 lacks name"),
    (dict(family="GLA", name="fla", shape=[1], mode="fwd", ms=1), "family GLA: allowed are scalar decay per token"),
    (dict(family="KDA", name="fla", shape=[1], mode="bwd", ms=1), "mode fwd or fwdbwd"),
    (dict(family="KDA", name="fla", shape=[1], mode="fwd"), "kernel_ms or ms"),
])
def test_bad_peers_give_one_line(row, message, tmp_path, capsys):
    path = tmp_path / "peers.json"
    path.write_text(json.dumps(dict(device="H100", rows=[row])))
    assert bench_table.main(["--peers", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--families", "glaa"], "--families glaa: allowed are scalar decay per token"),
    (["--shapes", "7"], "indices from 0 to 3"),
    ([], "a GPU is needed"),
])
def test_bad_gpu_flags_give_one_line(flags, message, capsys):
    assert bench_gpu.main(["--out", "unused.json", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", run_once.OWN)
def test_run_once_has_shapes_that_the_kernels_take(name):
    family = run_once.OWN[name]
    supports = importlib.import_module(f"pallas_kernels.gpu.{family.op}").supports
    for shape in run_once.shapes(family):
        arrays = jax.eval_shape(lambda shape=shape: bench_cases.make_inputs(family, shape, jax.random.key(0)))
        given = arrays | ({"rhs": (arrays["rhs"],)} if "rhs" in arrays else {})
        assert supports(**given, **family.options) is None
        outputs = jax.eval_shape(run_once.program(family, "xla", shape), jax.random.key(0))
        assert set(outputs) == {"o", *arrays} - {"group_sizes"}
