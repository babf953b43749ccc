"""The benchmark's command line and table."""
import json

import pytest

from pallas_kernels.bench.__main__ import main


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
    with pytest.raises(SystemExit) as error:
        main(flags)
    assert error.value.code != 0 and message in capsys.readouterr().err
