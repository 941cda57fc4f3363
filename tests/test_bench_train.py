"""The benchmark of a training step compares like with like, and judges by the best of the peers."""

import json
import math
import subprocess
import sys

import bench_train as bench
import pytest

NAMES = {row.split()[1] for row in bench.EXPECTED.splitlines() if row}


def runs(speed=1.0, peak=1.0, growth=1.0, loss=0.6, logps=(-5.0, -6.0)) -> list[dict]:
    """Two rounds' measurements, the second on a machine that is half as fast."""
    losses = [math.log(2), loss]
    rest = dict(peak=peak, growth=growth, losses=losses, logps=list(logps))
    return [dict(rest, pairs_cpu=speed), dict(rest, pairs_cpu=speed / 2)]


def values(**rivals: list[dict]) -> dict:
    found = {}
    for name, setting in bench.SETTINGS.items():
        found[name] = {variant: runs(speed=4) for variant in setting.variants.split()}
        found[name] |= {f"trl-{rival}": r for rival, r in rivals.items() if setting.rival}
    return bench.values_of(found)


def test_each_goal_is_stated_and_measured_against_the_fastest_and_the_smallest_peer():
    fast, small = runs(speed=2, peak=4), runs(speed=1, peak=2)
    found = values(fast=fast, small=small)
    assert set(found) == NAMES
    assert found["tiny_two"] == {"speed": 2, "peak": 0.5} == values(a=small, b=fast)["tiny_two"]
    assert found["smollm2_three"]["speed"] == 2  # of two rounds that differ by a factor
    assert set(values()) == {"prefix_sharing", "head"}


def test_a_peer_that_does_other_work_is_found():
    def same_work(*rivals):
        return values(**{f"peer{k}": rival for k, rival in enumerate(rivals)})["same_work"]

    assert same_work(runs()) == {"loss": 0, "least": 0.6, "logps": 0}
    assert same_work(runs(), runs(loss=0.61))["loss"] == pytest.approx(0.01 / (math.log(2) - 0.6))
    assert same_work(runs(logps=(-5.0, -6.6)))["logps"] == pytest.approx(1 / 11)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from /proc")
def test_the_quick_run_states_every_goal_and_its_variants_do_the_same_work(tmp_path):
    command = [sys.executable, bench.__file__, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench_train.json").read_text())
    data = result["data"]
    assert set(result["claims"]) | set(data["left_out"]) == NAMES
    assert set(data["left_out"]) == {"same_work", "tiny_two", "wide_two", "smollm2_three"}
    assert "left out" in done.stdout
    for name in ("tiny", "wide", "150", "450"):
        variants = data[name]
        assert list(variants) == bench.SETTINGS[name].variants.split()
        for count, start in (("two", math.log(2)), ("three", math.log(2) * (1 + 1 / bench.LAM))):
            losses = [row["losses"] for key, row in variants.items() if key.startswith(count)]
            for one in losses:
                assert one[0] == pytest.approx(start, abs=1e-6)
                assert one[1] < start - 1e-4  # it learns, and whatever the layout, the same
                assert one == pytest.approx(losses[0], abs=1e-6)
        assert all(row["pairs_cpu"]["low"] > 0 < row["peak"]["low"] for row in variants.values())
    assert data["tokens_saved"]["450"]["three"] > data["tokens_saved"]["150"]["three"] > 1.3
