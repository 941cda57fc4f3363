"""The GPU benchmark's rehearsal runs every line on a CPU, keeps what it had, and claims nothing."""

import json
import math
import os
import subprocess
import sys
import time

import bench_gpu as bench
import pytest

ON = {"device": "cpu", "small": True, "status": "done"}


def begin(out, *argv):
    command = [sys.executable, bench.__file__, "--small", "--out", str(out), *argv]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="as the trainer")
def test_a_rehearsal_that_is_cut_short_keeps_its_parts_and_a_later_run_adds_the_others(tmp_path):
    path, process = tmp_path / "gpu.json", begin(tmp_path, "noise", "full")

    def found():
        return json.loads(path.read_text())["data"] if path.exists() else {}

    while process.poll() is None and "full" not in found():
        time.sleep(0.005)
    process.kill()
    said, _ = process.communicate()
    assert process.returncode == -9, said
    cut = found()
    assert cut["noise"] | ON == cut["noise"] and cut["full"]["status"] == "running"

    process = begin(tmp_path, "smoke", "full")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    result = json.loads(path.read_text())
    smoke, noise, full = (result["data"][part] for part in bench.PARTS)
    assert result["claims"] == {} and noise == cut["noise"]
    assert smoke | ON == smoke and full | ON == full
    assert noise["gradients"] == 0 < noise["layers_2"]["gradients"]
    assert noise["gap"] == noise["layers_2"]["as_trained"]["gap"] < 0.1
    assert smoke["samples"] == 2 * 64 + 5 * 16  # to train; held-out of 3 rounds and 2 averages
    assert smoke["unequal"] == smoke["log_lines_unequal"] == smoke["unequal_at_kill"] == 0
    assert 5 < smoke["lines_at_kill"] < smoke["log_lines"] == 2 * 4 + 3
    assert smoke["loaded_gap"] < 0.01 < smoke["gap_of_round_1"]  # control: other weights
    assert smoke["dtype"] == "torch.bfloat16"
    assert full["table_GB"] == {"play": 61, "train": 65}
    assert {"load", "generate", "score", "train"} <= {*full["peaks_GB"]}
    assert full["peak_GB"] == max(full["peaks_GB"].values())
    assert min(full["matmul_tflop_a_second"], *full["tokens_a_second"].values()) > 0
    assert 0 < full["share"] == full["training"]["share"] < full["training"]["share_in_passes"] < 1
    assert (full["training"]["pairs"], full["training"]["average"]) == (8, 0.5)
    assert {"micro_batch_2", "micro_batch_4", "micro_batch_8"} <= {*full}
    assert {"any_order", "any_order_micro_batch_4", "logits_chunk_128", "rows_apart"} <= {*full}


def test_a_part_that_fails_or_comes_too_late_says_so_and_leaves_the_others(tmp_path, monkeypatch):
    def fail(record):
        record.note("smoke", samples=3)
        raise SystemExit("no samples")

    record = bench.Record(tmp_path, bench.SMALL, None, math.inf, ON | {"status": ""}, {})
    monkeypatch.setitem(bench.PARTS, "smoke", fail)
    monkeypatch.setitem(bench.PARTS, "noise", lambda record: record.note("noise", gap=0.0))
    bench.tm.start_processes()
    ends = [bench.attempt(record, name) for name in ("smoke", "noise")]
    record.limit = bench.time.perf_counter() - bench.BEGAN + 1
    ends.append(bench.attempt(record, "full"))
    bench.torch.distributed.destroy_process_group()
    assert ends == ["failed", "done", ends[2]] and ends[2].startswith("left out: full takes about")
    data = json.loads((tmp_path / "gpu.json").read_text())["data"]
    assert [data[part]["status"] for part in bench.PARTS] == ends
    assert data["smoke"]["samples"] == 3 and "SystemExit: no samples" in data["smoke"]["error"]


def test_goals_are_judged_where_a_gpu_measured_them_at_full_size_and_nowhere_else():
    card = {"device": "NVIDIA H100", "small": False}
    values = {"smoke": {"unequal": 0, "loaded_gap": 0.01}, "noise": {"gap": 0.2, "gradients": 1}}
    values["full"] = {"share": 0.45, "peak_GB": 78.1}
    data = {part: found | card for part, found in values.items()}
    verdicts = {name: claim["holds"] for name, claim in bench.claims_of(data).items()}
    assert verdicts == dict(
        smoke_resumed=True, noise_repeats=False, smoke_loaded=True, noise_step_0=False,
        full_speed=True, full_memory=False,
    )  # fmt: skip
    assert {*bench.claims_of({"full": card | {"peak_GB": 60}})} == {"full_memory"}
    for rehearsal in ({"small": True}, {"device": "cpu"}):
        assert bench.claims_of({part: found | rehearsal for part, found in data.items()}) == {}
