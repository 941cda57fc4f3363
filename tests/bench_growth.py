"""How does a step's cost grow? python tests/bench_growth.py --trl PYTHON --out results

Wall seconds and peak memory of a training step, one thing changed at a time: tokens of the prompt,
tokens of each response, pairs a step, processes. Ours with three responses (SPAC's work) and with
two (DPO's), beside TRL's DPOTrainer with two, its reference scored beforehand; the processes of
bench_train.py, which names the model (hidden 256, four layers, V 32,000) and how PYTHON is made.
Two processes share a step's pairs, ours by FSDP2, TRL's by DDP, one thread each; a peak is the
first process's. Medians over rounds. Writes OUT/bench_growth.json (with clock times, hence never
twice the same) and the picture bench_growth.png. Linux; 20 minutes on two quiet cores; --quick,
whose figures say nothing: a minute.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import bench_train  # noqa: E402  (TRL's environment imports this file too: no matplotlib here)

EXPECTED = """
goal cost_grows  two    1 1e9 TRL's seconds / ours with two responses, at the worst point
goal cost_grows  three  1 1e9 TRL's seconds, two responses / ours with three, at the worst point
goal cost_grows  peak   0 1   our peak with three responses / TRL's with two, at the worst point
goal processes   two    0 .65 our seconds with two processes / with one: half is perfect
"""  # kind, claim, value, least and most expected, what it is: written before it was run

BASE = {"prompt": 128, "response": 64, "pairs": 4, "processes": 1}
GRID = {
    "prompt": [32, 128, 512],
    "response": [16, 64, 256],
    "pairs": [1, 4, 16],
    "processes": [1, 2],
}
TITLES = {
    "prompt": "tokens of the prompt",
    "response": "tokens of a response",
    "pairs": "pairs a step",
    "processes": "processes",
}
LINES = {
    "three": ("SPAC, ours: three responses", "#0072B2", "-"),
    "two": ("DPO, ours: two responses", "#D55E00", "-"),
    "trl": ("DPO, TRL: two responses", "#999999", "--"),
}


def work(path: Path) -> None:
    """What each process does: the job is read from a file; the first process writes its figures."""
    import torch

    torch.set_num_threads(1)
    job, rank = json.loads(path.read_text()), int(os.environ.get("RANK", 0))
    trl = job["variant"].startswith("trl")
    found = (bench_train.trl_steps if trl else bench_train.our_steps)(job)
    if rank == 0:
        path.with_suffix(".out").write_text(json.dumps(found))


def measure(job: dict, processes: int, temporary: Path) -> dict:
    """Seconds a step and MiB at the peak, in fresh processes."""
    path = temporary / "job.json"
    path.write_text(json.dumps(job))
    for left in (path.with_suffix(".out"), Path(job["out"] + ".jsonl")):
        left.unlink(missing_ok=True)
    alone = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [job["python"], *(several if processes > 1 else []), __file__, "--work", str(path)]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    found = json.loads(path.with_suffix(".out").read_text())
    return {"seconds": job["pairs"] / found["pairs_wall"], "peak": found["peak"]}


def jobs_of(config, folder: Path) -> list[tuple[dict, str, dict]]:
    """(point, variant, job) of all that is measured. Makes the weights."""
    import torch
    import transformers

    shape = bench_train.MODELS["tiny"]
    shape |= dict(hidden_size=64, intermediate_size=128, vocab_size=500) if config.quick else {}
    mistral = transformers.MistralConfig(**shape, sliding_window=None, pad_token_id=0)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(mistral).save_pretrained(folder)
    points = [BASE | {name: value} for name, grid in GRID.items() for value in grid]
    points, jobs = [p for i, p in enumerate(points) if p not in points[:i]], []
    for point in points:
        lengths = [(point[key],) * 2 for key in ("prompt", "response")]
        setting = bench_train.Setting("tiny", point["pairs"], *lengths, False, "")
        rows = bench_train.pairs_of(setting, shape["vocab_size"], 8 if config.quick else 1)
        job = dict(folder=str(folder), rows=rows, vocabulary=shape["vocab_size"], recompute=False)
        job |= dict(steps=config.steps, lr=3e-6, out=str(folder.parent / "trl"))
        for name in LINES:
            more = dict(variant=name, python=sys.executable, pairs=point["pairs"])
            if name == "trl":
                more |= dict(variant="trl-precomputed", python=config.trl)
            alone = name == "two" and point["processes"] > 1  # the trainer has no such path
            if more["python"] and not alone:
                jobs.append((point, name, job | more))
    return jobs


def values_of(points: list[dict]) -> dict[str, dict[str, float]]:
    """{claim: values}, as far as what they need was measured."""
    told = [{key: p[key]["seconds"] for key in LINES if key in p} for p in points]
    pairs = [
        p["three"]["seconds"] for p in points if BASE.items() <= (p | {"processes": 1}).items()
    ]
    values = {"processes": {"two": pairs[1] / pairs[0]}}
    if "trl" in told[0]:
        grows = {key: min(t["trl"] / t[key] for t in told if key in t) for key in ("two", "three")}
        grows["peak"] = max(p["three"]["peak"] / p["trl"]["peak"] for p in points)
        values["cost_grows"] = grows
    return values


def draw(points: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots(2, len(GRID), sharex="col", sharey="row")
    for column, name in enumerate(GRID):
        there = [p for p in points if all(p[key] == BASE[key] for key in BASE if key != name)]
        there.sort(key=lambda point: point[name])
        for row, key in enumerate(("seconds", "peak")):
            ax = axes[row, column]
            for line, (label, color, style) in LINES.items():
                curve = [(p[name], p[line][key]) for p in there if line in p]
                if curve:
                    ax.plot(*zip(*curve), style, color=color, marker="o", ms=4, label=label)
            ax.set_xscale("log", base=2)
            ax.set_xticks(GRID[name], [str(n) for n in GRID[name]])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        axes[0, column].set_yscale("log")
        axes[1, column].set_xlabel(TITLES[name])
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak MiB of a process")
    axes[1, 0].set_ylim(bottom=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=3, loc="outside upper center")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="out", help="folder for bench_growth.json and .png")
    parser.add_argument("--trl", metavar="PYTHON", help="python of an environment with TRL")
    parser.add_argument("--rounds", type=int, default=3, help="of all points")
    parser.add_argument("--steps", type=int, default=2, help="that count, of each process")
    parser.add_argument("--quick", action="store_true", help="a smoke test: short pairs, one round")
    config = parser.parse_args()
    if config.quick:
        config.rounds = config.steps = 1
    import bench_bandit

    import toy_bandit as bandit

    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    load, found = os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory() as temporary:
        jobs = jobs_of(config, Path(temporary) / "model")
        for number in range(config.rounds):
            for k, (point, name, job) in enumerate(jobs):
                print(f"\rround {number + 1}: {k} of {len(jobs)} ", end="", file=sys.stderr)
                told = measure(job, point["processes"], Path(temporary))
                found.setdefault((*point.values(), name), []).append(told)
    print(file=sys.stderr)
    points = {}
    for point, name, _ in jobs:
        runs = found[*point.values(), name]
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        points.setdefault(tuple(point.values()), dict(point))[name] = middle
    points = list(points.values())
    claims = {}
    for name, values in values_of(points).items():
        claims |= bandit.judge(name, values, config.rounds, EXPECTED)
    draw(points, out / "bench_growth.png")
    setting = {"processor": bench_bandit.processor(), "cores": os.cpu_count(), "load_before": load}
    setting |= {"quick": config.quick, "rounds": config.rounds, "steps": config.steps}
    if config.trl:
        asking = [config.trl, "-c", "from importlib.metadata import version; print(version('trl'))"]
        setting["trl"] = subprocess.run(asking, capture_output=True, text=True).stdout.strip()
    return bandit.report(out, "bench_growth", claims, {"step": {"points": points}}, setting)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
    else:
        raise SystemExit(main())
