"""Times on disk: found again by the next process, and never the reason for an error."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time

import pytest

import pyvolconv
from pyvolconv import dispatch, tuned, tuned_file
from pyvolconv.problem import ConvProblem

PROBLEM = ConvProblem.parse("cpu-float32-ncdhw-n2ic16oc16-i4x5x6-k3-p1")
TIMES = {"im2col": 0.125, "aten": 2.0, "cpp.direct": 1.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYVOLCONV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYVOLCONV_NO_CACHE", "")
    return tmp_path / "cache"


@pytest.fixture
def file(folder):
    folder.mkdir()
    return folder / "tuned.json"


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="pyvolconv")
    return lambda: [record.getMessage() for record in caplog.records]


def as_new_process():
    tuned.forget()
    dispatch.forget_choices()


def chosen():
    as_new_process()
    return dispatch.choose(PROBLEM, "forward").name


def test_the_next_process_finds_the_times(folder, warnings):
    untuned = chosen()
    tuned.remember({(PROBLEM, "forward"): TIMES})
    code = (
        "import pyvolconv\nfrom pyvolconv import dispatch\n"
        f"p = pyvolconv.ConvProblem.parse('{PROBLEM}')\n"
        "print(dispatch.choose(p, 'forward').name, dispatch.choose(p, 'grad_input').name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "im2col" != untuned
    assert done.stdout.split()[1] != "im2col"
    assert done.stderr == ""
    assert warnings() == []
    assert [path.name for path in sorted(folder.iterdir())] == ["tuned.json", "tuned.lock"]


def test_what_the_file_says_can_be_read(folder):
    tuned.remember({(PROBLEM, "forward"): TIMES})
    content = json.loads((folder / "tuned.json").read_text())
    assert content["format"] == tuned_file.FORMAT
    (entry,) = content["measured"]
    assert entry["milliseconds"] == {str(PROBLEM): {"forward": TIMES}}
    setting = entry["setting"]
    assert (setting["precision"], setting["pyvolconv"]) == ("default", pyvolconv.__version__)
    assert setting.keys() == {"processor", "isa", "threads", "precision", "pyvolconv", "torch", "extension"}


def test_newer_times_replace_older_ones_and_nothing_else(folder):
    tuned.remember({(PROBLEM, "forward"): TIMES, (PROBLEM, "grad_input"): {"aten": 3.0}})
    as_new_process()
    tuned.remember({(PROBLEM, "forward"): {"aten": 1.0}, (PROBLEM.with_(batch=5), "forward"): {"aten": 4.0}})
    as_new_process()
    assert tuned.milliseconds(PROBLEM, "forward") == {"aten": 1.0}
    assert tuned.milliseconds(PROBLEM, "grad_input") == {"aten": 3.0}
    assert tuned.milliseconds(PROBLEM.with_(batch=5), "forward") == {"aten": 4.0}
    assert tuned.count() == 2


def test_old_settings_make_room(folder):
    setting = tuned.current_setting("cpu")
    path = folder / "tuned.json"
    table = {str(PROBLEM): {"forward": {"aten": 1.0}}}
    for threads in range(tuned_file.MOST_SETTINGS + 2):
        tuned_file.add(path, tuned_file.Setting(**{**vars(setting), "threads": threads + 1}), table)
    kept = [setting.threads for setting in tuned_file.read(path)]
    assert kept == list(range(3, tuned_file.MOST_SETTINGS + 3))


def valid(**changes):
    setting = {**vars(tuned.current_setting("cpu")), **changes.pop("setting", {})}
    entry = {"setting": setting, "milliseconds": {str(PROBLEM): {"forward": TIMES}}, **changes.pop("entry", {})}
    return {"format": 1, "measured": [entry], **changes}


def test_the_valid_file_of_the_next_test_counts(file):
    file.write_text(json.dumps(valid()))
    assert chosen() == "im2col"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        b"\xff\xfe\x00",
        lambda: valid(format=99),
        lambda: valid(format=None),
        lambda: valid(measured={}),
        lambda: valid(measured=[1]),
        lambda: valid(setting={"threads": "2"}),
        lambda: valid(entry={"setting": {}}),
        lambda: valid(entry={"milliseconds": [1]}),
        lambda: valid(entry={"milliseconds": {str(PROBLEM): {"sideways": TIMES}}}),
        lambda: valid(entry={"milliseconds": {str(PROBLEM): {"forward": {}}}}),
        lambda: valid(entry={"milliseconds": {str(PROBLEM): {"forward": {"im2col": "fast"}}}}),
        lambda: valid(entry={"milliseconds": {str(PROBLEM): {"forward": {"im2col": -1.0}}}}),
        lambda: valid(entry={"milliseconds": {str(PROBLEM): {"forward": {"im2col": float("nan")}}}}),
        lambda: valid(entry={"milliseconds": {str(PROBLEM): {"forward": {"im2col": 10**400}}}}),
    ],
)
def test_corrupt_file_is_one_warning_and_replaced(file, warnings, content):
    content = json.dumps(content()) if callable(content) else content
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert chosen() != "im2col"
    dispatch.choose(PROBLEM, "grad_input")
    (warning,) = warnings()
    assert str(file) in warning
    tuned.remember({(PROBLEM, "forward"): TIMES})
    assert len(warnings()) == 1
    assert chosen() == "im2col"
    assert len(warnings()) == 1


@pytest.mark.parametrize("name", ["pyvolconv", "torch", "extension"])
def test_stale_file_is_one_warning_and_kept(file, warnings, name):
    file.write_text(json.dumps(valid(setting={name: "another"})))
    assert chosen() != "im2col"
    tuned.remember({(PROBLEM, "forward"): TIMES})
    (warning,) = warnings()
    assert "another build or version" in warning
    assert chosen() == "im2col"
    assert len(tuned_file.read(file)) == 2
    assert len(warnings()) == 1


@pytest.mark.parametrize("change", [{"processor": "another"}, {"threads": 999}, {"isa": "x"}, {"precision": "high"}])
def test_times_of_other_machines_and_settings_are_no_matter(file, warnings, change):
    file.write_text(json.dumps(valid(setting=change)))
    assert chosen() != "im2col"
    assert warnings() == []


def test_unreadable_file_is_one_warning(file, warnings):
    file.mkdir()
    assert chosen() != "im2col"
    tuned.remember({(PROBLEM, "forward"): TIMES})
    dispatch.forget_choices()
    assert dispatch.choose(PROBLEM, "forward").name == "im2col", "it holds in this process all the same"
    assert len(warnings()) == 1
    assert [path.name for path in file.parent.iterdir() if path.name.startswith("tuned.json")] == ["tuned.json"]


def test_folder_that_cannot_be_made_is_one_warning(tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("PYVOLCONV_NO_CACHE", "0")
    monkeypatch.setenv("PYVOLCONV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert chosen() != "im2col"
    (tmp_path / "file").touch()
    as_new_process()
    for _ in range(2):
        tuned.remember({(PROBLEM, "forward"): TIMES})
    assert dispatch.choose(PROBLEM, "forward").name == "im2col"
    assert len(warnings()) == 1
    assert "Not a directory" in tuned.write_error()
    monkeypatch.setenv("PYVOLCONV_CACHE_DIR", str(tmp_path / "cache"))
    tuned.remember({(PROBLEM, "forward"): TIMES})
    assert tuned.write_error() is None


def test_lock_that_is_never_given_back_is_one_warning(file, warnings, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(tuned_file, "LOCK_SECONDS", 0.0)
    with open(file.with_suffix(".lock"), "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for _ in range(2):
            tuned.remember({(PROBLEM, "forward"): TIMES})
    assert len(warnings()) == 1
    assert not file.exists()


def test_turned_off_nothing_is_read_or_written(file, monkeypatch, warnings):
    file.write_text("{")
    monkeypatch.setenv("PYVOLCONV_NO_CACHE", "1")
    as_new_process()
    assert tuned.location() is None
    tuned.remember({(PROBLEM, "forward"): TIMES})
    assert dispatch.choose(PROBLEM, "forward").name == "im2col"
    assert file.read_text() == "{"
    assert list(file.parent.iterdir()) == [file]
    assert warnings() == []


def test_without_a_variable_it_lies_where_caches_lie(monkeypatch):
    monkeypatch.delenv("PYVOLCONV_NO_CACHE")
    monkeypatch.delenv("PYVOLCONV_CACHE_DIR", raising=False)
    assert tuned.location().parent.name == "pyvolconv"
    assert tuned.location().parent != tuned.location().parent.home()


WRITER = """
import sys, time
from pyvolconv import tuned
from pyvolconv.problem import ConvProblem
problem = ConvProblem.parse(sys.argv[1])
while time.time() < float(sys.argv[3]):
    time.sleep(0.001)
for batch in range(1, 31):
    tuned.remember({(problem.with_(batch=batch, in_channels=int(sys.argv[2])), "forward"): {"aten": 1.0}})
"""


def test_processes_that_write_at_once_lose_nothing(folder):
    start = time.time() + 6
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(PROBLEM), str(channels), str(start)], stderr=subprocess.PIPE, text=True
        )
        for channels in (1, 2, 3)
    ]
    assert [writer.communicate()[1] for writer in writers] == [""] * 3
    (table,) = tuned_file.read(folder / "tuned.json").values()
    assert len(table) == 3 * 30
    assert sorted(path.name for path in folder.iterdir()) == ["tuned.json", "tuned.lock"]
