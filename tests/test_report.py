"""The report of a comparison, from results made up here: what it says, what it holds, what it leaves out."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from pyvolconv.cost.answer import answer
from pyvolconv.cost.breakdown import PathProfile
from pyvolconv.cost.machine import Machine
from pyvolconv.cost.profiler import StepEntry, StepProfile
from pyvolconv.cost.report import path_notes, path_rows, write_report
from pyvolconv.cost.results import (
    ComparisonResult,
    DataFacts,
    Epoch,
    NetworkFacts,
    PathTiming,
    TrainingRun,
)
from pyvolconv.cost.terminal import print_result
from pyvolconv.cost.timing import Timing

MACHINE = Machine(
    cpu="Example CPU <8-core>",
    architecture="x86_64",
    isa="AVX2+FMA",
    cores=2,
    threads=2,
    caches={"L1d": 32 * 1024, "L2": 512 * 1024, "L3": 32 * 2**20},
    memory_bytes=24 * 2**30,
    device="cpu",
    peak_flops=190e9,
    peak_source="12 independent accumulators per thread",
    copy_bandwidth=21e9,
    openmp="libgomp of torch",
    gpu=None,
    versions={"torch": "2.13.0"},
)
PASS_SHARES = {"forward": 0.3, "grad_input": 0.3, "grad_weight": 0.4}


def timing(path, milliseconds, pages, *, ours=False, layout="ncdhw", network="cnn", samples=32, fused=False):
    conv = network == "cnn"
    shares = {"forward": 0.25, "grad_input": 0.15, "grad_weight": 0.2, "other": 0.4}
    return PathTiming(
        path=path,
        network=network,
        backend=path.split()[0] if ours else "torch",
        layout=layout if conv else None,
        ours=ours,
        fused=fused,
        dense_backward="dense" in path,
        pages=pages,
        milliseconds=milliseconds,
        steps=1 if samples < 32 else 5,
        samples=samples,
        batch_size=32,
        page_faults=120_000.0 if pages == "returned" else 12.0,
        memory_bytes=int(milliseconds * 2**20) if pages == "returned" and samples == 32 else None,
        **{part: milliseconds * share if conv else None for part, share in shares.items()},
    )


def entry(layer, kind, pass_, seconds, flops=0.0, min_bytes=0.0, **more):
    least = max(flops / MACHINE.peak_flops, min_bytes / MACHINE.copy_bandwidth)
    defaults = {"page_faults": 0.0, "backend": "aten", "split_estimated": False, "problem": None}
    return StepEntry(
        layer, kind, pass_, "aten.op", seconds, 1.0, flops, min_bytes, least_seconds=least, **{**defaults, **more}
    )


def profile(path, scale, *, ours, pages="kept"):
    entries = []
    for layer, seconds, flops, traffic in (
        ("conv1", 0.09, 1.45e9, 114e6),
        ("conv2", 0.06, 4.5e9, 35e6),
        ("conv3", 0.02, 1.3e9, 7e6),
    ):
        for pass_, share in PASS_SHARES.items():
            if (layer, pass_) == ("conv1", "grad_input"):
                continue
            backend = path if ours else "aten"
            took = seconds * share * scale
            entries.append(entry(layer, "conv", pass_, took, flops, traffic, backend=backend, split_estimated=not ours))
        for kind in ("activation", "pool"):
            name = f"{kind} of {layer}"
            entries.append(entry(name, kind, "forward", seconds / 4, traffic / 8, 2 * traffic))
            entries.append(
                entry(name, "activation", "backward", seconds / 3, traffic / 8, 2 * traffic, page_faults=9000.0)
            )
    entries.append(entry("dense1", "linear", "forward", 2e-4, 1.8e6, 8e5))
    entries.append(entry("optimizer", "optimizer", "update", 4e-4, 1e6, 1.5e6))
    framework = {"forward": 1e-3, "backward": 4e-3, "update": 1e-4, "other": 1e-4}
    total = sum(item.seconds for item in entries) + sum(framework.values())
    found = StepProfile(
        entries=tuple(entries),
        framework_seconds=framework,
        framework_faults=dict.fromkeys(framework, 3.0),
        instrument_seconds=1e-3,
        profiled_seconds=total + 1e-3,
        step=Timing((total, total * 1.01, total * 0.99)),
        machine=MACHINE,
    )
    return PathProfile(path, ours, pages, 32, found)


def epochs(count, seconds, rate):
    return [
        Epoch(number, number * seconds, 0.9 * seconds, 0.7 * rate**number, round(1 - 0.5 * rate**number, 4))
        for number in range(1, count + 1)
    ]


def complete_result():
    paths = []
    for pages, scale in (("returned", 1.0), ("kept", 0.65)):
        paths += [
            timing("torch contiguous", 700 * scale, pages),
            timing("torch channels_last_3d", 520 * scale, pages, layout="ndhwc"),
            timing("im2col", 900 * scale, pages, ours=True),
            timing("numba", 21_000.0, pages, ours=True, samples=2),
            timing("cpp", 330 * scale, pages, ours=True, layout="ndhwc"),
            timing("cpp fused, dense backward", 280 * scale, pages, ours=True, fused=True),
            timing("cpp fused", 230 * scale, pages, ours=True, layout="ndhwc", fused=True),
            timing("LSTM", 17 * scale, pages, network="lstm"),
        ]
    return ComparisonResult(
        date="2031-05-04 12:00 UTC",
        versions={"pyvolconv": "0.1.0", "torch": "2.13.0"},
        settings={"seed": 0, "batch_size": 32, "quick": False},
        machine=MACHINE,
        data=DataFacts("digits", "Handwritten digits that move.", (29, 30, 60), 2, 512, 128, 128, 0.51),
        networks=[
            NetworkFacts("cnn", "Conv3d 1-16-24-32, dense 16, dense 2", 97_194, 620e6, 1063.0),
            NetworkFacts("lstm", "LSTM 1800-16-16, dense 2", 118_562, 20e6, 29.0),
        ],
        training=[
            TrainingRun("LSTM", "lstm", "LSTM", False, "kept", epochs(60, 0.4, 0.93), 0.985),
            TrainingRun("CNN, ours (cpp fused)", "cnn", "cpp fused", True, "kept", epochs(10, 3.1, 0.66), 0.996),
            TrainingRun("CNN, torch", "cnn", "torch contiguous", False, "kept", epochs(3, 8.2, 0.66), None, 10),
        ],
        paths=paths,
        profiles=[
            profile("torch contiguous", 2.4, ours=False, pages="returned"),
            profile("torch channels_last_3d", 1.0, ours=False),
            profile("cpp fused", 0.35, ours=True),
        ],
        unavailable={"triton": "no CUDA device"},
        notes=["Difficulty was set so that the networks behave as the mission reports."],
        sections={"machine": 2.0, "steps": 90.0, "training": 139.0},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    page = write_report(complete_result(), folder)
    return folder, page.read_text(encoding="utf-8")


def test_report_is_self_contained(written):
    _, page = written
    references = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)\)|@import""", page)
    assert references
    assert all(source.startswith("data:image/png;base64,") for source, _ in references)
    assert "http://" not in page
    assert "https://" not in page


def test_report_holds_the_measured_numbers(written):
    _, page = written
    for text in (
        "41.2×",  # 700 / 17, the CNN over the LSTM as installed
        "97,194",
        "118,562",
        "190 GF/s",
        "21.0 GB/s",
        "12 independent accumulators per thread",
        "51.0%",  # linear model on frame averages
        "99.6%",
        "120,000",
        "no CUDA device",
        "620 MFLOP",
        "3.04×",  # 700 / 230, cpp fused over torch contiguous
    ):
        assert text in page, text


def test_names_from_outside_are_escaped(written):
    _, page = written
    assert "<8-core>" not in page
    assert "&lt;8-core&gt;" in page


def test_every_plot_is_drawn_for_light_and_dark(written):
    folder, page = written
    for name in ("accuracy", "paths", "layers", "roofline"):
        for suffix in ("", "-dark"):
            assert (folder / f"{name}{suffix}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 8


def test_results_json_holds_what_the_report_shows(written):
    folder, _ = written
    plain = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert plain["schema_version"] == 1
    assert plain["machine"]["peak_flops"] == 190e9
    assert [run["epochs_to_target"] for run in plain["training"]] == [54, 10, 10]
    assert [run["projected"] for run in plain["training"]] == [False, False, True]
    assert plain["paths"][0]["milliseconds"] == 700
    rows = plain["profiles"][0]["rows"]
    assert rows[0]["layer"] == "conv1"
    assert rows[0]["gflops_per_second"] == pytest.approx(1.45e9 / (0.09 * 0.3 * 2.4) / 1e9)
    assert plain["answer"]["headline"] == answer(complete_result()).headline


def test_time_ratio_is_work_ratio_over_rate_ratio():
    factors = answer(complete_result()).factors
    assert [item.path for item in factors] == ["torch contiguous", "torch channels_last_3d", "cpp fused"]
    for item in factors:
        assert item.work_ratio == pytest.approx(31.0)
        assert item.time_ratio == pytest.approx(item.work_ratio / item.rate_ratio)


def test_headline_sets_ours_against_torch_at_its_best_too():
    headline = answer(complete_result()).headline
    assert "150 ms instead of 700 ms, 4.68× faster" in headline
    assert "2.26× faster than torch at its best (338 ms: channels_last_3d, pages kept)" in headline


@pytest.mark.parametrize(("milliseconds", "said"), [(228.0, False), (236.0, False), (222.0, True), (238.0, True)])
def test_a_difference_within_the_noise_is_not_called_a_saving(milliseconds, said):
    """ "Pages kept", which comes after a step of 230 ms."""
    result = complete_result()
    paths = [
        replace(one, milliseconds=milliseconds) if (one.path, one.pages) == ("cpp fused", "kept") else one
        for one in result.paths
    ]
    words = next(text for text in answer(replace(result, paths=paths)).paragraphs if text.startswith("Keeping freed"))
    assert ("makes no difference beyond the noise" in words) == (not said)
    assert ("takes away 8.00 ms of 230 ms" in words or "adds 8.00 ms to 230 ms" in words) == said


def test_each_change_has_its_own_row():
    rows = answer(complete_result()).rows
    assert [(row.name, row.timing.path, row.timing.pages) for row in rows] == [
        ("torch as installed", "torch contiguous", "returned"),
        ("torch, better layout", "torch channels_last_3d", "returned"),
        ("direct (cpp)", "cpp", "returned"),
        ("+ fused forward", "cpp fused, dense backward", "returned"),
        ("+ sparse backward", "cpp fused", "returned"),
        ("+ pages kept", "cpp fused", "kept"),
        ("torch, pages kept", "torch channels_last_3d", "kept"),
        ("LSTM, pages kept", "LSTM", "kept"),
    ]
    assert [row.removed for row in rows] == pytest.approx([None, 180, 190, 50, 50, 80.5, None, None])
    assert rows[5].speed_up == pytest.approx(700 / (0.65 * 230))
    assert rows[5].to_lstm == pytest.approx(230 / 17)
    assert (rows[7].speed_up, rows[7].to_lstm) == (None, 1.0)


def test_row_with_dense_backward_says_that_it_scatters(written):
    _, page = written
    words = next(row for row in answer(complete_result()).rows if row.timing.dense_backward).meaning
    assert "scattered" in words
    assert "this row includes" in words
    assert words in page


@pytest.mark.parametrize(
    ("keep", "names"),
    [
        (lambda timing: timing.path != "cpp fused, dense backward", ["direct (cpp)", "+ sparse backward"]),
        (lambda timing: not timing.fused, ["direct (cpp)"]),
        (lambda timing: timing.path != "cpp", ["+ fused forward", "+ sparse backward"]),
    ],
    ids=["no dense backward", "nothing fused", "no direct"],
)
def test_rows_close_up_where_a_path_was_not_timed(keep, names):
    result = complete_result()
    rows = answer(replace(result, paths=list(filter(keep, result.paths)))).rows
    assert [row.name for row in rows if row.timing.ours] == [*names, "+ pages kept"]
    assert sum(row.removed for row in rows if row.removed) == pytest.approx(
        700 - [row for row in rows if row.timing.ours][-1].timing.milliseconds
    )


def test_rows_in_one_allocator_state_only():
    result = complete_result()
    rows = answer(replace(result, paths=[one for one in result.paths if one.pages == "returned"])).rows
    assert [row.name for row in rows][-2:] == ["+ sparse backward", "LSTM, pages returned"]


def test_terminal_shows_every_row():
    console = Console(width=120, record=True, file=io.StringIO())
    print_result(console, complete_result())
    text = console.export_text()
    for row in answer(complete_result()).rows:
        assert f" {row.name} " in text


@pytest.mark.parametrize("width", [80, 114, 124])
def test_terminal_tables_fit_their_width(width):
    console = Console(width=width, record=True, file=io.StringIO())
    result = complete_result()
    cut = replace(result.training[2], label="CNN, torch channels_last_3d", epochs=result.training[0].epochs)
    print_result(console, replace(result, training=[*result.training, cut]))
    text = console.export_text()
    assert "…" not in text
    assert ("everything else  " in text) is (width >= 114)


def test_memory_of_a_step_is_shown_in_both_states(written):
    _, page = written
    result = complete_result()
    rows = answer(result).rows
    assert [row.memory_bytes // 2**20 for row in rows] == [700, 520, 330, 280, 230, 230, 520, 17]
    assert result.memory("numba") is None
    assert any(note.startswith("Memory:") for note in path_notes(result))
    assert page.count("<td>230 MiB</td>") == 3
    unmeasured = replace(result, paths=[replace(one, memory_bytes=None) for one in result.paths])
    assert not any(note.startswith("Memory:") for note in path_notes(unmeasured))


def test_removals_add_up_to_the_whole_saving():
    result = complete_result()
    removals = answer(result).removals
    assert sum(item.milliseconds for item in removals) == pytest.approx(700 - 0.65 * 230)
    for item in removals:
        assert sum(item.parts.values()) == pytest.approx(item.milliseconds)


def test_every_other_path_is_set_against_torch_in_its_layout():
    others = answer(complete_result()).other_paths
    assert [item.change for item in others] == [
        "im2col instead of torch contiguous",
        "numba instead of torch contiguous",
    ]
    assert others[0].milliseconds == pytest.approx(0.65 * (700 - 900))


def test_speed_up_is_against_torch_in_the_same_allocator_state():
    rows = {(pages, row.timing.path): row for pages, group in path_rows(complete_result()).items() for row in group}
    assert rows["kept", "cpp fused"].speed_up == pytest.approx(700 / 230)
    assert rows["kept", "cpp fused"].to_lstm == pytest.approx(230 / 17)
    assert rows["kept", "LSTM"].speed_up is None


def test_paths_on_whole_batches_come_before_scaled_ones():
    result = complete_result()
    result.paths.append(timing("gemm", 1.0, "kept", ours=True, samples=2))
    assert result.best("kept", ours=True).path == "cpp fused"
    result.paths[:] = [row for row in result.paths if row.scaled]
    assert result.best("kept", ours=True).path == "gemm"


def test_scaled_and_missing_paths_are_marked(written):
    _, page = written
    notes = path_notes(complete_result())
    assert any("numba (2 of 32)" in note for note in notes)
    assert "triton was left out: no CUDA device" in notes
    assert "few samples" in page


def test_projected_run_takes_epochs_from_the_complete_one():
    run = complete_result().training[2]
    assert run.projected
    assert run.epochs_to_target == 10
    assert run.seconds_to_target == pytest.approx(82.0)


@pytest.mark.parametrize(
    "missing",
    [
        {"training": []},
        {"paths": []},
        {"profiles": []},
        {"machine": None},
        {"training": [], "paths": [], "profiles": [], "networks": [], "data": None, "machine": None},
    ],
    ids=lambda missing: "+".join(missing),
)
def test_partial_result_is_still_a_report(missing, tmp_path):
    result = replace(complete_result(), interrupted=True, **missing)
    page = write_report(result, tmp_path / "new" / "folder").read_text(encoding="utf-8")
    assert "Interrupted" in page
    assert json.loads((tmp_path / "new" / "folder" / "results.json").read_text())["interrupted"] is True


def test_json_has_no_number_that_json_lacks(tmp_path):
    result = replace(complete_result(), sections={"steps": float("nan")})
    result.write_json(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["seconds"] is None
