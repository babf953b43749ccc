"""Comparison of architectures, plots and the report."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from analysis import cli, compare, frontier, plots, report, tables
from analysis.load import load_table
from analysis.result import Options
from tests.analysis import synthetic_store
from tests.analysis.coverage import sweep


def true_gain(C):
    """Compute at which attention reaches the loss of gla at C, both at their best size."""

    def best(arch, C):
        N = synthetic_store.optimum(arch, C)
        return synthetic_store.loss(arch, N, C / (6 * N))

    grid = np.geomspace(C, 5 * C, 4000)
    return grid[np.argmin(np.abs([best("attention", c) - best("gla", C) for c in grid]))] / C


@pytest.fixture(scope="module")
def compared(store):
    return compare.compare_architectures(load_table(store), "attention", ["gla"])


def test_gain_is_the_true_compute_ratio(compared):
    frontiers, (result,) = compared
    for point in result["points"]:
        assert point["gain"]["lo"] < true_gain(point["C"]) < point["gain"]["hi"]
        assert point["gain"]["hi"] / point["gain"]["lo"] < 1.2
    assert result["resolved"]
    assert "gla needs 0.6" in result["verdict"] and "no trend with compute is resolved" in result["verdict"]
    assert result["judged"]["C"] < 1e12  # judged no further than the base's lowest loss
    assert result["constant_gain"]["lo"] < true_gain(3e11) < result["constant_gain"]["hi"]
    b, v = frontier.share_floor(list(frontiers.values()))
    np.testing.assert_allclose(b.compute_for(*b.law([2e11]))[0], 2e11, rtol=1e-9)
    assert frontier.share_exponent([b, v])["E"][0] == pytest.approx(1.1, abs=0.15)


def test_gain_inverts_when_base_and_variant_change_places(store, compared):
    _, (forward,) = compared
    _, (back,) = compare.compare_architectures(load_table(store), "gla", ["attention"])
    assert forward["points"][1]["gain"]["value"] == pytest.approx(1 / back["points"][1]["gain"]["value"], rel=0.01)
    assert "that is more" in back["verdict"]


def test_noise_gives_not_resolved(noisy_store):
    _, (result,) = compare.compare_architectures(load_table(noisy_store), "attention", ["gla"])
    assert not result["resolved"]
    assert result["verdict"].startswith("not resolved") and "the interval includes 1" in result["verdict"]
    assert result["judged"]["gain"]["lo"] < 1 < result["judged"]["gain"]["hi"]


def test_other_costs_at_equal_loss(compared):
    """In this store both architectures spend 6 N FLOPs per token: ratios follow from the sizes of equal loss."""
    _, (result,) = compared
    C = result["judged"]["C"]
    need = true_gain(C) * C
    N = {arch: synthetic_store.optimum(arch, c) for arch, c in (("attention", need), ("gla", C))}
    truth = {"inference": N["attention"] / N["gla"], "wall": 1.0}  # every run took 20 s
    truth["tokens"] = true_gain(C) / truth["inference"]
    for name, value in truth.items():
        entry = result["judged"][name]
        assert entry["lo"] <= value * 1.001 and value * 0.999 <= entry["hi"], name
        assert entry["value"] == pytest.approx(value, rel=0.1), name
        # and as a curve: a ratio with its interval at every budget
        assert all(p[name]["lo"] <= p[name]["value"] <= p[name]["hi"] for p in result["points"]), name
    assert not frontier.resolved(result["judged"]["wall"]) and frontier.resolved(result["judged"]["tokens"])
    assert not result["crossover"]["resolved"]


def test_ratios_follow_from_the_truth_at_every_compute(compared):
    """The curve that is drawn, not only its points: bands hold the true ratio over the whole range of compute."""
    frontiers, _ = compared
    base, variant = frontier.share_floor([frontiers["attention"], frontiers["gla"]])
    C = np.geomspace(*frontier.common_range(base, variant), 9)[1:-1]
    found = frontier.ratios(base, variant, C)
    gain = np.array([true_gain(c) for c in C])
    optima = [synthetic_store.optimum(arch, c) for arch, c in (("attention", gain * C), ("gla", C))]
    truth = {"compute": gain, "inference": optima[0] / optima[1], "tokens": gain * optima[1] / optima[0]}
    for name, values in truth.items():
        lo, hi = np.quantile(found[name][1], [0.005, 0.995], axis=0)
        assert ((lo < values) & (values < hi)).all(), name
        np.testing.assert_allclose(found[name][0], values, rtol=0.05)


def test_architectures_without_common_compute_are_not_compared():
    rng, found = np.random.default_rng(0), {}
    for name, budgets in (("base", (1e18, 3e18)), ("same", (1e18, 3e18)), ("dear", (1e20, 3e20))):
        found[name] = frontier.frontier_points(sweep(rng, 1e-3, budgets=budgets), name, Options(bootstrap=50))
    result = frontier.compare(found["base"], found["dear"])
    assert result["verdict"] == "not resolved: base and dear share no range of compute" and not result["resolved"]
    assert "verdict: not resolved" in compare.text_table(result)
    assert len(plots.gain(found, "base").axes) == 3  # compute, tokens, forward FLOPs; `dear` is left out
    with pytest.raises(ValueError, match="no architecture shares a range of compute with base"):
        plots.gain({name: found[name] for name in ("base", "dear")}, "base")


def test_a_cost_that_some_runs_lack_is_left_out_with_a_note(store):
    table = load_table(store)
    label = table.rows.index[table.rows["arch"] == "gla"][0]
    table.rows.loc[label, "wall_seconds"] = np.nan
    _, (result,) = compare.compare_architectures(table, "attention", ["gla"], options=Options(bootstrap=50))
    assert "wall" not in result["judged"] and "tokens" in result["judged"]
    assert (
        f"gla: wall time of training not compared, 1 runs lack it (first: {table.rows.loc[label, 'run_id']})"
        in (result["notes"])
    )


def test_crossover_of_two_power_laws():
    """Losses 1.5 + k C^-gamma that meet at 1e18 FLOP, with little noise."""
    rng, found = np.random.default_rng(0), []
    C = np.geomspace(1e17, 1e19, 5)
    for gamma in (0.10, 0.13):
        k = 0.5 * 1e18**gamma
        loss = 1.5 + k * C**-gamma
        draws = 1.5 + (loss - 1.5) * np.exp(2e-3 * rng.standard_normal((400, 5)))
        name = f"gamma {gamma}"
        found.append(frontier.Frontier(name, C, loss, draws, []).with_floor(0.0, 0.0))
    result = frontier.compare(*found)
    crossing = result["crossover"]
    assert crossing["resolved"] and crossing["lo"] < 1e18 < crossing["hi"]
    assert crossing["value"] == pytest.approx(1e18, rel=0.1)
    assert "they cross at C = " in result["verdict"] and "its advantage grows with compute" in result["verdict"]
    behind = frontier.compare(*found[::-1])
    assert behind["judged"]["gain"]["value"] < 1 and "its lag grows with compute" in behind["verdict"]


def test_compare_command_line(store, tmp_path, capsys):
    argv = ["--store", str(store), "--base", "attention", "--variant", "gla", "--bootstrap", "100", "--out",
            str(tmp_path / "c.json"), "--plot", str(tmp_path / "gain.png")]  # fmt: skip
    assert cli.run(compare.main, compare.parser(), argv) == 0
    text = capsys.readouterr().out
    assert "verdict: gla needs" in text and "crossover: not resolved" in text
    assert "forward FLOPs per token: 1." in text and "wall time of training: 1.00 [1.00, 1.00], not resolved" in text
    assert "note: wall times count where every run had the same hardware to itself" in text
    assert json.loads((tmp_path / "c.json").read_text())[0]["variant"] == "gla"
    assert (tmp_path / "gain.png").stat().st_size > 5000
    assert cli.run(compare.main, compare.parser(), [*argv[:3], "dense", *argv[4:]]) == 2
    assert "arch 'dense' has no finished run" in capsys.readouterr().err


class Checker(HTMLParser):
    """Collects images and text, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_says_what_was_run_found_and_refused(store, tmp_path):
    argv = ["--store", str(store), "--out", str(tmp_path / "r.html"), "--bootstrap", "100", "--quiet"]
    argv += ["--figures", str(tmp_path / "figures")]
    assert cli.run(report.main, report.parser(), argv) == 0
    page = Checker((tmp_path / "r.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert len(page.images) == 10 and all(image["src"].startswith("data:image/svg+xml") for image in page.images)
    assert "gla needs 0.6" in text
    drawn = ["envelope", "frontiers", "gain", "hold-out", "isoflop", "loss_curves", "parametric_attention",
             "parametric_gla", "residuals_attention", "residuals_gla"]  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in drawn for kind in ("pdf", "svg"))
    for part in (
        "Profile likelihood beside the bootstrap",
        "envelope of learning curves",
        "Huber threshold 0.01",
        "without the dearest budget",
        "hardware",
        "Akaike weight",
        "by both AIC",
        "forward FLOPs per token",
        "36 runs used, 8 left out",
        "1 diverged: loss is nan at step 40 attention diverged0 (C 1.00e+11)",
        "wall time of training",
        "python -m analysis.report --store",
        "jax ",
    ):
        assert part in text, part
    for reason in ("loss is nan at step 40", "out of memory", "planned, not run", "done, but final_loss is missing"):
        assert reason in text
    assert "Excluded (8)" in text and "next budget" in text
    assert "nan" not in text.replace("is nan at step", "").lower().split()
    source = (tmp_path / "r.html").read_text()
    assert "<script" not in source and not re.findall(r"""(?:src|href)=["'](?!data:|#)""", source)  # no network


def test_report_of_a_poor_sweep_still_says_why(store):
    poor = load_table(store, where="N < 6000")
    poor.excluded = poor.excluded.iloc[:0]  # a table from which nothing was left out
    context = report.build(poor, options=Options(bootstrap=50))
    assert context["comparisons"] == [] and context["figures"] == {}
    page = Checker(report.render(context))
    text = " ".join(" ".join(page.text).split())
    assert "too few points: 5 rows for 5 parameters" in text and "No comparison" in text
    assert "too few points: 2 different sizes" in text
    assert "No run was left out" in text


def test_one_architecture_and_an_edge_minimum_suggest_cells(store):
    table = load_table(store, where="arch == 'gla'", x_range={"N": (0, 12000)})
    found = frontier.frontier_points(load_table(store, where="arch == 'gla'").rows, "gla")
    cells = report._next_cells(found, table.rows)
    assert len(cells) == 5 and all(cell["C"] > 1e12 for cell in cells)
    smaller = [p for p in found.profiles]
    smaller[0].refused, smaller[0].edge = "minimum at an edge: the largest size is the best", "large"
    cells = report._next_cells(found, table.rows)
    assert [cell["N"] > smaller[0].x.max() for cell in cells] == [True, True]
    for cell in cells:
        assert 6 * cell["N"] * cell["D"] == pytest.approx(cell["C"], rel=0.01)


@pytest.mark.quick
def test_numbers_are_short():
    assert [tables.number(v) for v in (0.5139, 2143.4, 7.3e10, 0, float("nan"), 1.0e-5, 0.9999)] == [
        "0.514", "2143", "7.30e+10", "0", "-", "1.00e-05", "1.00",
    ]  # fmt: skip
    assert [tables.count(v) for v in (950, 12345, 2.36e6, 7.32e9, 999.9)] == ["950", "12.3k", "2.36M", "7.32B", "1k"]
    assert tables.with_interval({"value": 0.5, "lo": 0.4, "hi": 0.61}) == "0.500 [0.400, 0.610]"
    assert [tables.duration(s) for s in (45, 740, 18400)] == ["45 s", "12.3 min", "5.1 h"]


@pytest.mark.quick
def test_many_architectures_keep_different_looks():
    names = [f"arch {i}" for i in range(20)]
    for first in (0, 1):
        look = plots.looks(names, first)
        assert len(set(look.values())) == 20
        assert look["arch 0"] == (plots.ARCH_COLOURS[first], plots.MARKERS[first])
