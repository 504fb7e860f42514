"""What benchmarks make of what they measured, with numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import run_all, targets
from benchmarks.harness import Report
from benchmarks.serving import Trace
from benchmarks.serving_gpu import figures


def test_the_figures_of_a_load_are_percentiles_of_its_requests() -> None:
    # The second answer has a letter of two tokens in one event.
    traces = [Trace(0.0, [0.1, 0.2, 0.4], tokens=3), Trace(1.0, [1.3, 1.4, 1.6], tokens=4)]
    found = figures(traces)
    assert found["output tokens"] == pytest.approx(7 / 1.6)
    assert (found["ttft p50"], found["ttft p99"]) == (pytest.approx(100), pytest.approx(300))
    assert (found["tpot p50"], found["tpot p99"]) == (pytest.approx(100), pytest.approx(150))
    assert found["itl p99"] == pytest.approx(200)


def test_samples_of_the_clocks_that_are_cut_off_or_not_there_are_left_out() -> None:
    lines = ["1980, 3201, 412.5, 51", "1755, 3201, 690.1, 60", "[N/A], 3201, 1, 2", "1980, 32", ""]
    assert list(run_all.parse(lines)) == [(1980, 3201, 412.5, 51), (1755, 3201, 690.1, 60)]


def test_one_command_knows_every_benchmark_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    files = {path.stem for path in (run_all.ROOT / "benchmarks" / "kernels").glob("bench_*.py")}
    assert {f"benchmarks.kernels.{name}" for name in files} < set(run_all.modules())
    for module in run_all.modules():
        assert (run_all.ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_a_benchmark_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_all, "modules", lambda: ["one", "two", "three"])
    monkeypatch.setattr(run_all, "run", lambda module, _out: module != "two")
    monkeypatch.setattr("sys.argv", ["run_all", "--out", str(tmp_path)])
    assert run_all.main() == 1
    assert "2 of 3 ran; failed: two" in capsys.readouterr().out


def test_pictures_are_drawn_from_results_alone(tmp_path: Path) -> None:
    plot = pytest.importorskip("benchmarks.plot", reason="matplotlib is not installed", exc_type=ImportError)
    report = Report("gpu", "0" * 64)
    for case, value, unit in (("read", 4000, "GB/s"), ("bf16 8192³", 800, "TFLOP/s")):
        report.add("roof", case, value, metric="rate", unit=unit, better="higher")
    report.add("matmul", "bf16 M=1 4096x4096", 10.0, metric="time in a chain")
    report.add("matmul", "bf16 M=1 4096x4096", 12.0)
    report.add("attention_decode", "fp8 32/8/128 page16 64x4096", 150.0)
    report.add(
        "attention_prefill", "bf16 32/8/128 page16 causal 1x8192", 512.0, metric="rate", unit="TFLOP/s"
    )
    report.add("decode_step", "llama-3.1-8b bf16 B=8", 5.0, unit="ms", baselines={"vllm": 7.0})
    for metric, value in (("output tokens", 2000.0), ("tpot p50", 9.0), ("ttft p99", 80.0)):
        report.add("serving", "llama-3.1-8b bf16 512/256, 8 req/s", value, metric=metric)
    report.write(tmp_path / "some.jsonl")
    records = plot.records_of(tmp_path)
    found = {point.label: point for point in plot.points(records)}
    assert set(found) == {"M=1", "fp8 64×4096", "1×8192", "B=8"}
    assert found["M=1"].tflops == pytest.approx(2 * 4096**2 / 10e-6 / 1e12)
    assert found["M=1"].flops_per_byte == pytest.approx(1, rel=1e-2)
    assert found["fp8 64×4096"].flops_per_byte == 8, (
        "four query heads to a key head, two flops each, a byte a value"
    )
    assert found["1×8192"].tflops == 512
    assert plot._served(records) == [(8.0, (2000.0, 9.0))]
    for draw in (plot.roofline, plot.latency):
        draw(records, "gpu").savefig(tmp_path / "picture.png")
    with pytest.raises(SystemExit, match="holds no results"):
        plot.records_of(tmp_path / "nowhere")


def test_results_that_are_kept_are_whole() -> None:
    for file in (run_all.ROOT / "benchmarks" / "results").rglob("*.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            assert (
                record["bench"] and record["case"] and record["date"] and len(record["csrc_sha256"]) == 64
            ), file


def test_targets_name_cases_that_benchmarks_write_and_know_which_way_is_better() -> None:
    target = targets.Target("b", "c", "m", 10, 8)
    assert [targets.verdict(target, value, "lower") for value in (7, 8, 9, 10, 11)] == [
        "goal", "goal", "pass", "pass", "MISSED",
    ]  # fmt: skip
    rate = targets.Target("b", "c", "m", 500, 600)
    assert [targets.verdict(rate, value, "higher") for value in (700, 550, 400)] == ["goal", "pass", "MISSED"]
    record = {
        "bench": "sampling",
        "case": "greedy B=1",
        "metric": "time",
        "value": 4.5,
        "unit": "us",
        "better": "lower",
    }
    found = {row[:3]: row[3:] for row in targets.rows([record])}
    assert len(found) == len(targets.TARGETS), "no case twice"
    assert found["sampling", "greedy B=1", "time"] == ("4.5 us", "15", "8", "goal")
    assert found["sampling", "greedy B=64", "time"][-1] == "not measured"


def test_a_target_may_be_a_multiple_of_another_figure() -> None:
    bf16, int4 = (
        {"bench": "prefill", "case": f"llama-3.1-8b {name} 1x8192", "metric": "time", "value": value, "unit": "ms",
         "better": "lower"}
        for name, value in (("bf16", 200.0), ("gptq-int4-g128", 209.0))
    )  # fmt: skip
    key = ("prefill", "llama-3.1-8b gptq-int4-g128 1x8192", "time")
    verdicts = [
        {row[:3]: row[3:] for row in targets.rows(records)}[key] for records in ([bf16, int4], [int4], [bf16])
    ]
    assert verdicts[0] == ("209 ms", "210", "210", "goal")
    assert [found[-1] for found in verdicts[1:]] == ["not measured"] * 2
