"""The preset tiny through the trainer itself: python tests/study_tiny_lm.py --out OUT

What `python train_mistral.py` shows for seed 0, on seeds that no setting was chosen on: SPAC by the
preset, the same without its critic, and the story's DPO, each in as many steps; of each the last
weights and the averaged ones, by their true reward on 500 new prompts. And: which of the two
held-out measures, which need no true reward, ranks a run's rounds as the true reward does?
Writes OUT/tiny_lm.json; ten minutes of two quiet cores. Runs that are done are kept under
out/tiny_lm.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from scipy import stats  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import toy_bandit as bandit  # noqa: E402
import train_mistral as trainer  # noqa: E402

EXPECTED = """
goal tiny_average_leads   low      1e-9 1 SPAC's average less DPO's, last or average: 95 % low
goal tiny_critic_matters  lead     .03  1 SPAC's average less that of the same with lam = inf
goal tiny_average_helps   low      1e-9 1 SPAC's average less its last policy: 95 % interval's low
goal heldout_ranks        absolute .5   1 rank correlation of heldout_accuracy with the true reward
goal heldout_ranks        implied  .5   1 the same of heldout_implied: over rounds, mean of runs
"""  # kind, claim, value, least and most expected, what it is: written before it was run

SEEDS = range(70, 78)
RUNS = {  # flags beside the preset's
    "SPAC": [],
    "SPAC without critic": ["--lam", "inf"],
    "DPO": trainer.DPO[2:],  # but for --out
}
FACTS = "reward outside heldout_accuracy heldout_implied".split()


def rounds_of(job: tuple[str, int, tuple]) -> list[dict]:
    """The log's rounds of one run of the trainer."""
    name, seed, more = job
    out = ROOT / "out/tiny_lm" / f"{name}-{seed}{''.join(more)}"
    if not (out / "done.json").exists():
        torch.set_num_threads(1)
        shutil.rmtree(out, ignore_errors=True)
        argv = ["--preset", "tiny", "--seed", str(seed), "--out", str(out), *RUNS[name], *more]
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            trainer.main(trainer.parse(argv))
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        told = [line for line in lines if line["event"] == "round"]
        (out / "done.json").write_text(json.dumps(told))
        for folder in out.glob("*/"):  # weights, samples
            shutil.rmtree(folder)
    return json.loads((out / "done.json").read_text())


def interval(values: np.ndarray) -> list[float]:
    """The mean over the seeds, and its 95 % interval by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]


def curves(runs: list[list[dict]]) -> dict[str, np.ndarray]:
    """{"last reward": (seeds, rounds), ..}; the average begins with round 1."""
    found = {f"last {fact}": [[r[fact] for r in run] for run in runs] for fact in FACTS}
    found |= {
        f"average {fact}": [[r[f"average_{fact}"] for r in run[1:]] for run in runs]
        for fact in FACTS
    }
    return {key: np.array(values) for key, values in found.items()}


def ranks(found: dict[str, np.ndarray], measure: str) -> list[float]:
    """Spearman's correlation over the rounds from 1 on, of each run's last and averaged weights."""
    rows = [(found["last reward"][:, 1:], found[f"last {measure}"][:, 1:])]
    rows += [(found["average reward"], found[f"average {measure}"])]
    pairs = [pair for rewards, told in rows for pair in zip(rewards, told)]
    ranked = [stats.spearmanr(*pair).statistic for pair in pairs if np.ptp(pair[1]) > 0]
    return [float(value) for value in ranked]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="out", help="folder for tiny_lm.json")
    parser.add_argument("--workers", type=int, default=2, help="processes; they change no number")
    parser.add_argument("--quick", action="store_true", help="two seeds of few pairs")
    args = parser.parse_args()
    small = tuple("--rows 60 --heldout 20 --sft_epochs 1 --batch 30".split() if args.quick else [])
    seeds = SEEDS[:2] if args.quick else SEEDS
    jobs = [(name, seed, small) for name in RUNS for seed in seeds]
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        done = dict(zip(jobs, pool.map(rounds_of, jobs)))
    found = {name: curves([done[name, seed, small] for seed in seeds]) for name in RUNS}
    ends = {
        f"{name}, {which}": rounds[f"{which} reward"][:, -1]
        for name, rounds in found.items()
        for which in ("last", "average")
    }
    ours = ends["SPAC, average"]
    leads = {
        name: interval(ours - values) for name, values in ends.items() if name != "SPAC, average"
    }
    measures = {"absolute": "heldout_accuracy", "implied": "heldout_implied"}
    ranked = {key: ranks(found["SPAC"], measure) for key, measure in measures.items()}
    values = {
        "tiny_average_leads": {"low": min(leads["DPO, last"][1], leads["DPO, average"][1])},
        "tiny_critic_matters": {"lead": leads["SPAC without critic, average"][0]},
        "tiny_average_helps": {"low": leads["SPAC, last"][1]},
        "heldout_ranks": {key: float(np.mean(values)) for key, values in ranked.items()},
    }
    claims = {}
    for name, value in values.items():
        claims |= bandit.judge(name, value, len(seeds), EXPECTED)
    data = {"reward": {name: interval(value) for name, value in ends.items()}}
    data |= {"SPAC's average less": leads, "rank correlations": ranked}
    data["rounds"] = {
        name: {key: values.mean(0).tolist() for key, values in rounds.items()}
        for name, rounds in found.items()
    }
    (out := Path(args.out)).mkdir(parents=True, exist_ok=True)
    setting = {"seeds": [*seeds], "runs": RUNS, "quick": args.quick}
    setting["transformers"] = transformers.__version__
    return bandit.report(out, "tiny_lm", claims, data, setting)


if __name__ == "__main__":
    raise SystemExit(main())
