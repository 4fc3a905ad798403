"""What other processes took of the machine: from counters made up here, and from the system's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvolconv.cost.busy import SHORTEST, STAT, Load, Sample, disturbance, sample


def between(*, own, busy, cores=2, seconds=10.0):
    return Load.between(Sample(5.0, 1.0, 100.0, cores), Sample(5.0 + seconds, 1.0 + own, 100.0 + busy, cores))


def test_others_are_all_but_this_process():
    assert between(own=19.0, busy=19.5).others == pytest.approx(0.05)
    assert between(own=10.0, busy=18.0).others == pytest.approx(0.8)
    assert between(own=12.0, busy=11.9).others == 0.0
    assert between(own=0.0, busy=1.0, seconds=0.0).others == 0.0


@pytest.mark.parametrize(
    ("others", "cores", "threads", "missing"),
    [(0.0, 2, 2, 0.0), (0.5, 2, 2, 0.5), (0.5, 2, 1, 0.0), (1.5, 2, 1, 0.5), (3.0, 8, 4, 0.0), (0.0, 2, 8, 0.0)],
)
def test_cores_that_others_had(others, cores, threads, missing):
    load = Load(others, cores)
    assert load.missing(threads) == pytest.approx(missing)
    assert load.disturbs(threads) is (missing > 0)


def test_a_little_is_tolerated():
    assert not Load(0.15, 2).disturbs(2)
    assert Load(0.25, 2).disturbs(2)


def test_what_disturbs_is_told_from_what_cannot_be_known():
    def found(own, busy, seconds=10.0):
        return disturbance(Sample(5.0, 0.0, 0.0, 2), Sample(5.0 + seconds, own, busy, 2), 2)

    assert found(15.0, 20.0) == Load(0.5, 2)
    assert found(15.0, 16.0) is None
    assert found(0.0, 2 * SHORTEST, SHORTEST / 2) is None
    assert disturbance(None, Sample(0.0, 0.0, 0.0, 2), 2) is None
    assert disturbance(Sample(0.0, 0.0, 0.0, 2), None, 2) is None


def test_only_cores_of_this_process_count(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\n"
        "cpu0 100 20 30 4000 500 6 7 8 90 0\n"
        "cpu1 1 1 1 1 1 1 1 1 1 1\n"
        "cpu12 200 0 0 0 0 0 0 0 0 0\n"
        "intr 5 4 3\n"
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 12}, raising=False)
    found = sample(stat)
    assert found.cores == 2
    assert found.busy == pytest.approx((100 + 20 + 30 + 6 + 7 + 8 + 200) / os.sysconf("SC_CLK_TCK"))


def test_a_system_that_does_not_count_has_no_sample(tmp_path):
    assert sample(tmp_path / "stat") is None


@pytest.mark.skipif(not Path(STAT).exists(), reason="the system does not count busy time")
def test_the_systems_counters_grow():
    before = sample()
    sum(range(3_000_000))
    after = sample()
    assert after.own > before.own
    assert after.busy >= before.busy
    assert 0 <= Load.between(before, after).others <= after.cores


@pytest.mark.skipif(not STAT.exists(), reason="no /proc/stat")
def test_programs_that_this_process_ran_are_its_own():
    before = sample()
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert sample().own - before.own >= 0.45
