"""A real model whose true reward is known: python tests/study_smollm2.py --model MODEL --data PAIRS

MODEL is the folder of a small chat model (SmolLM2-135M-Instruct), PAIRS any rows of the trainer's
whose prompts are used and whose answers are not. The model answers each of 300 prompts twice; the
true reward of an answer is 20 x the share of its words that have at most four letters: plain words.
Bradley-Terry labels each pair once. From 200 pairs the trainer runs SPAC in three rounds and, in as
many steps, DPO; both are judged by the plain words of their answers to the other 100 prompts.
Writes smollm2/ under OUT: summary.json, reward.png, logs and samples; an hour and a half of one
core. What is done is kept under out/smollm2.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import toy_bandit as bandit  # noqa: E402
import train_mistral as tm  # noqa: E402

EXPECTED = """
goal smollm2_learns  gain  .03  1 plain words: SPAC's average less the start
goal smollm2_beside  lead -.02  1 plain words: SPAC's average less the better of DPO's two
goal smollm2_keeps   words  .5  2 words an answer, SPAC's average / the start: nothing collapses
"""  # kind, claim, value, least and most expected, what it is: written before it was run

SETTING = "--preset mistral-7b --heldout 100 --max_prompt 96 --max_response 48 --lr 2e-5 --batch 10"
SETTING = (SETTING + " --micro_batch 5 --generate_batch 50 --generate_tokens 4000").split()
RUNS = {"DPO": "--lam inf --rounds 1 --epochs 3".split(), "SPAC": "--rounds 3".split()}


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


def plain(text: str) -> float:
    """The share of words of at most four letters, in [0, 1]; the true reward is 20 times that."""
    return sum(len(word) <= 4 for word in words(text)) / max(1, len(words(text)))


def pairs_of(model: str, data: str, count: int, out: Path, seed: int = 0) -> Path:
    """Prompts of the data, answered twice by the model and labelled once: a .jsonl file."""
    path = out / "pairs.jsonl"
    if path.exists():
        return path
    options = f"--model {model} --data {data} --no-bf16 --out {out}/none"
    config = tm.parse([*SETTING, *options.split()])
    tm.start_processes()
    run = tm.prepare(config, "2026-01-01")
    rows = sorted(run.rows + run.heldout)[:count]
    lines, draw = Path(data).read_text().splitlines(), random.Random(seed)
    prompts = [row.prompt for row in rows]
    said = [tm.sample(run, prompts, seed_of) for seed_of in (1, 2)]
    with open(path.with_suffix(".part"), "w") as file:
        for row, *both in zip(rows, *said):
            a, b = (run.tokenizer.decode(y, skip_special_tokens=True) for y in both)
            ahead = 20 * (plain(a) - plain(b))
            chosen, rejected = (a, b) if draw.random() < 1 / (1 + math.exp(-ahead)) else (b, a)
            prompt = json.loads(lines[row.number - 1])["prompt"]
            line = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(line) + "\n")
    return path.with_suffix(".part").rename(path)


def answers(folder: Path, which: str, number: int, tokenizer) -> list[str]:
    """What a round's weights answered to the held-out prompts, in the order of their rows."""
    told = {}
    for path in sorted((folder / "play" / f"{which}-{number}").glob("*")):
        told |= torch.load(path, weights_only=True)
    return [tokenizer.decode(told[n][0][0], skip_special_tokens=True) for n in sorted(told)]


def facts(texts: list[str], start: list[str]) -> dict:
    """Plain words, how far they are from the start's on the same prompts, and words an answer."""
    gain = np.array([plain(a) - plain(b) for a, b in zip(texts, start, strict=True)])
    half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
    found = {"plain": float(np.mean([plain(text) for text in texts]))}
    found["gain"] = [float(x) for x in (gain.mean(), gain.mean() - half, gain.mean() + half)]
    return found | {"words": float(np.mean([len(words(text)) for text in texts]))}


def draw(data: dict, path: Path) -> None:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    for name, color in (("SPAC", "#0072B2"), ("DPO", "#D55E00")):
        for which, width in (("average", 3), ("heldout", 1)):
            points = [data[name][which][0], *data[name][which][1:]]
            steps = np.linspace(0, 3, len(points))
            label = f"{name}, {'averaged' if which == 'average' else 'last'} weights"
            plain = [point["plain"] for point in points]
            ax.plot(steps, plain, "o-", color=color, lw=width, label=label)
    ax.set(xlabel="passes over the 200 pairs (SPAC: rounds)", ylabel="share of plain words")
    ax.set_xticks(range(4))
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder of a small chat model")
    parser.add_argument("--data", required=True, help=".jsonl whose prompts are used")
    parser.add_argument("--out", default="out", help="smollm2/ is written here")
    parser.add_argument("--count", type=int, default=300, help="prompts")
    parser.add_argument("--more", default="", help="flags beside those of the study, for a trial")
    args = parser.parse_args()
    work, out = ROOT / "out/smollm2", Path(args.out) / "smollm2"
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of(args.model, args.data, args.count, work)
    for name, flags in RUNS.items():
        command = [sys.executable, str(ROOT / "train_mistral.py"), *SETTING, *flags, "--model"]
        command += [args.model, "--data", str(pairs), "--out", str(work / name)]
        subprocess.run([*command, *args.more.split()], check=True)
        for kind in ("log", "samples"):
            shutil.copy(work / name / f"{kind}.jsonl", out / f"{name.lower()}_{kind}.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    start = answers(work / "SPAC", "heldout", 0, tokenizer)
    data = {"start": facts(start, start)}
    for name, flags in RUNS.items():
        rounds = range(1, 1 + int(flags[flags.index("--rounds") + 1]))
        data[name] = {
            which: [data["start"]]
            + [facts(answers(work / name, which, n, tokenizer), start) for n in rounds]
            for which in ("heldout", "average")
        }
    ours = data["SPAC"]["average"][-1]
    rival = max(data["DPO"][which][-1]["plain"] for which in data["DPO"])
    values = {
        "smollm2_learns": {"gain": ours["gain"][0]},
        "smollm2_beside": {"lead": ours["plain"] - rival},
        "smollm2_keeps": {"words": ours["words"] / data["start"]["words"]},
    }
    claims = {}
    for name, value in values.items():
        claims |= bandit.judge(name, value, len(start), EXPECTED)
    draw(data, out / "reward.png")
    setting = {"flags": SETTING, "runs": RUNS, "more": args.more, "prompts": args.count}
    setting |= {"model": "SmolLM2-135M-Instruct (Apache-2.0), fp32"}
    setting |= {"prompts of": "LLaMA-Factory's data/dpo_en_demo.json (Apache-2.0)"}
    return bandit.report(out, "summary", claims, data, setting)


if __name__ == "__main__":
    raise SystemExit(main())
