"""The picture of growing costs compares what it says it compares."""

import sys

import bench_growth as bench
import pytest

NAMES = {row.split()[1] for row in bench.EXPECTED.splitlines() if row}


def points(**seconds: float) -> list[dict]:
    """All points of the grid, each variant at so many seconds and as many MiB."""
    grid = [bench.BASE | {name: value} for name, values in bench.GRID.items() for value in values]
    grid = [dict(point) for i, point in enumerate(grid) if point not in grid[:i]]
    for point in grid:
        there = {"three": 3.0, "two": 2.0, "trl": 4.0} | seconds
        point |= {name: {"seconds": s, "peak": s} for name, s in there.items()}
        if point["processes"] == 2:
            del point["two"]
            point["three"]["seconds"] /= 2
    return grid


def test_every_goal_is_judged_at_its_worst_point():
    even = bench.values_of(points())
    assert set(even) == NAMES
    assert even["cost_grows"] == {"two": 2, "three": pytest.approx(4 / 3), "peak": 0.75}
    assert even["processes"] == {"two": 0.5}
    uneven = points()
    uneven[2]["two"]["seconds"], uneven[4]["three"]["peak"] = 5.0, 6.0
    worst = bench.values_of(uneven)["cost_grows"]
    assert (worst["two"], worst["peak"]) == (0.8, 1.5)
    alone = [{key: p[key] for key in p if key != "trl"} for p in points()]
    assert set(bench.values_of(alone)) == {"processes"}  # without a peer, nothing about it


def test_each_panel_has_the_base_point_and_one_thing_changed():
    for name, values in bench.GRID.items():
        assert bench.BASE[name] in values and values == sorted(values)
    assert set(bench.TITLES) == set(bench.GRID) == set(bench.BASE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from /proc")
def test_two_processes_share_the_pairs_of_a_step(tmp_path):
    config = type("Config", (), dict(quick=True, steps=1, trl=None))
    jobs = bench.jobs_of(config, tmp_path / "model")
    assert {name for _, name, _ in jobs} == {"three", "two"}
    point, name, job = next(job for job in jobs if job[0]["processes"] == 2)
    assert name == "three" and len(job["rows"]) == bench.BASE["pairs"] == job["pairs"]
    found = bench.measure(job, 2, tmp_path)
    assert found["seconds"] > 0 < found["peak"]
