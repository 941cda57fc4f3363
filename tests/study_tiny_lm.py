"""Does SPAC hold its level on a language model with few pairs? python tests/study_tiny_lm.py

The tiny preset's world (six digits to be copied, true reward known), 300 preference pairs, 240
gradient steps for every method: 8 rounds of 6 epochs, each with its own warm-up and cosine, each
evaluated on 500 held-out prompts. All methods of a seed share the pairs and the start, a model
supervised on 1,000 other pairs' responses. Settings are tuned on seeds 0-4 and frozen; the claims
are about other seeds. Every method is train_mistral.main: SPAC and iterated DPO (lam = inf) as it
stands; for DPO the study hands it round 1's log-probabilities in every round, so that the reference
stays pi_1 while rounds only mark where the curve is read; RPO is another loss on the same numbers.
Writes OUT/tiny_lm.json and OUT/tiny_lm.png; about 40 minutes of one quiet core. Runs that are done
are kept under out/tiny_lm, by the trainer's hash, so that it can go on.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from scipy import stats  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import spac  # noqa: E402
import toy_bandit as bandit  # noqa: E402
import train_mistral as trainer  # noqa: E402

EXPECTED = """
goal spac_holds             drop -1   .03 SPAC's own best round less its last (share of best reward)
goal beats_dpo_last         low   1e-6 1  SPAC's last less DPO's last: 95 % interval's lower end
goal matches_dpo_oracle_stop lead -.01 1  SPAC's last less DPO's best early stop, seed by seed
goal stays_inside           ratio 0   .25 share outside the data's support, SPAC's last over DPO's
goal beats_dpo_same_lr      low   1e-6 1  as beats_dpo_last, DPO at SPAC's learning rate
goal stays_inside_same_lr   ratio 0   .25 as stays_inside, DPO at SPAC's learning rate
goal critic_is_the_cause    low   1e-6 1  SPAC's last less the same with lam = inf: 95 % interval
goal critic_is_the_cause    drop  .03 1   lam = inf: its own best round less its last
"""  # kind, claim, value, least and most expected, what it is; means over the report seeds
# SPAC is the form (linear or smoothed) that tuning chose. DPO is tuned as SPAC is, learning rate
# too: a small rate is an early stop that only the true reward could choose. So DPO at SPAC's rate
# stands beside it. Its early stop is each seed's best round, as no user could know it, at whichever
# DPO setting shown this is best on the mean.

FIRST, TUNING, REPORT = range(1), range(5), range(15, 25)  # an earlier study has seen 5 to 14
SIZES = dict(rows=300, heldout=500, rounds=8, epochs=6)
START = dict(rows=1000, heldout=500, sft_epochs=10, sft_lr=3e-3, rounds=1, epochs=1)
QUICK = SIZES | dict(rows=64, heldout=32, rounds=2, epochs=1), START | dict(rows=64, heldout=32)
DPO = {"kind": "DPO", "lam": "inf", "lr": 1e-4}
SAME = "DPO, same lr"
OFF = {"kind": "SPAC", "lam": "inf", "lr": 1e-4}
RPO = {"kind": "RPO", "lam": "inf", "lr": 1e-4}
LINEAR = {"kind": "SPAC", "critic": "linear", "lr": 1e-4}
SMOOTHED = {"kind": "SPAC", "critic": "smoothed", "lr": 1e-4}
BETAS, RATES = (0.03, 0.1, 0.3), (3e-5, 1e-4, 3e-4)
LONGER = {"rounds": 16, "epochs": 3}  # the same steps in twice as many rounds
GRID = {  # first trials; then VARIED from the best of them, past a grid's edge where that was best
    "DPO": [DPO | {"beta": beta, "lr": lr} for beta in BETAS for lr in RATES],
    "iterated DPO": [OFF | {"beta": beta} for beta in BETAS],
    "RPO": [RPO | {"beta": b, "sft": w} for b in (0.03, 0.1) for w in (0.03, 0.1, 0.3)],
    "SPAC, linear": [LINEAR | {"beta": b, "lam": lam} for b in (0.1, 0.3) for lam in (2, 5, 10)],
    "SPAC, smoothed": [SMOOTHED | {"beta": b, "lam": w} for b in (0.1, 0.3) for w in (1, 2.5, 5)],
}
VARIED = {
    "DPO": [],
    "iterated DPO": [{"lr": 3e-5}, {"lr": 3e-4}],
    "RPO": [{"lr": 3e-4}, {"sft": 0.01}, {"beta": 0.3}],
    "SPAC, linear": [{"lr": 3e-5}, {"lr": 3e-4}, {"lam": 20}, LONGER],
    "SPAC, smoothed": [{"lr": 3e-4}, {"lam": 10}, LONGER],
}


# -------------------------------------------------------- one run of the trainer
def rpo_loss(weight: float):
    """DPO, and `weight` nats of supervised loss on the chosen response; spac_loss's signature."""

    def loss(policy, opponent, beta, lam, critic):
        h_chosen, h_rejected, _ = (p - q for p, q in zip(policy, opponent))
        preference = spac.preference_term(h_chosen, h_rejected, beta)
        return preference - weight * policy[0], preference, -policy[0]

    return loss


def fixed_reference(play):
    """The trainer's play(), whose first round's log-probabilities stand in every round."""
    first = []

    def replay(run, rows, name):
        if not name.startswith("round-"):
            return play(run, rows, name)
        if first:  # the opponent is pi_1, not pi_t: the trainer's check that it is must not stop us
            trainer.TOLERANCE[False] = math.inf
        else:
            first.append(play(run, rows, name))
        return first[0]

    return replay


def train(out: Path, **flags) -> list[dict]:
    """A run of train_mistral.py; its log's rounds."""
    argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    config = trainer.parse(
        ["--out", str(out), "--checkpoint_every", "100000", "--average", "0", *argv]
    )
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(trainer, "draw_curves"):
        trainer.main(config)
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "round"]


def learn(job: tuple[int, dict, dict, dict]) -> dict:
    """(seed, setting, sizes, start's flags) -> reward and share outside after each round."""
    torch.set_num_threads(1)
    seed, setting, sizes, start = job
    sources = [Path(module.__file__).read_bytes() for module in (trainer, spac)]
    code = hashlib.sha256(b"".join(sources) + json.dumps(start).encode()).hexdigest()[:8]
    begin = ROOT / "out/tiny_lm" / f"{code}-start-{seed}"
    if setting is None:
        return (begin / "round-1").exists() or train(begin, seed=1000 + seed, **start)
    text = json.dumps([seed, setting, sizes])
    kept = begin.with_name(f"{code}-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    if kept.with_suffix(".json").exists():
        return json.loads(kept.with_suffix(".json").read_text())

    def model(world, seed):
        return transformers.AutoModelForCausalLM.from_pretrained(begin / "round-0")

    flags = {name: value for name, value in setting.items() if name not in ("kind", "sft")}
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(trainer.CopyDigits, "model", model))
        patches.enter_context(mock.patch.object(trainer.Run, "save_model"))
        patches.enter_context(mock.patch.dict(trainer.TOLERANCE))
        if setting["kind"] in ("DPO", "RPO"):
            play = fixed_reference(trainer.play)
            patches.enter_context(mock.patch.object(trainer, "play", play))
        if setting["kind"] == "RPO":
            patches.enter_context(mock.patch.object(spac, "spac_loss", rpo_loss(setting["sft"])))
        rounds = train(kept, seed=seed, sft_epochs=0, **(sizes | flags))
    shutil.rmtree(kept)
    shown = {"reward": "reward", "outside": "outside", "largest": "max_implied_reward"}
    result = {name: [event[key] for event in rounds] for name, key in shown.items()}
    kept.with_suffix(".json").write_text(json.dumps(result))
    return result


# -------------------------------------------------------- tuning, and what it is judged by
class Lab:
    """Runs settings on seeds, some at a time; each (setting, seed) once."""

    def __init__(self, workers: int, sizes: dict, start: dict):
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        self.sizes, self.start = sizes, start

    def run(self, settings: list[dict], seeds) -> list[dict]:
        """Of each setting, by name: a table (seeds, reads), read at the start and at each eighth of
        the steps."""
        for todo in ([None], settings):  # the starts first: two runs must not make the same one
            jobs = [(seed, setting, self.sizes, self.start) for seed in seeds for setting in todo]
            found = list(self.pool.map(learn, jobs))
        tables = []
        for k in range(len(settings)):
            runs, table = found[k :: len(settings)], {}
            for name in runs[0]:
                whole = np.array([run[name] for run in runs])
                table[name] = whole[:, :: (whole.shape[1] - 1) // self.sizes["rounds"]]
            tables.append(table)
        return tables


def tune(lab: Lab) -> tuple[dict, list[dict]]:
    """{method: chosen settings}, and every trial.

    By the mean true reward of the last round: all trials on seed 0, the three best of a method on
    seeds 0-4. DPO's setting with the best early stop on seed 0 goes along."""
    trials = []

    def score(method: str, settings: list[dict], seeds) -> list[dict]:
        for setting, table in zip(settings, lab.run(settings, seeds)):
            rewards = table["reward"]
            about = {"last": rewards[:, -1].mean(), "best stop": rewards.max(1).mean()}
            about |= {"outside": table["outside"][:, -1].mean(), "seeds": len(seeds)}
            trials.append({"method": method, "setting": setting} | about)
        return sorted(trials[-len(settings) :], key=lambda trial: -trial["last"])

    chosen = {}
    for method, grid in GRID.items():
        ranked = score(method, grid, FIRST)
        if VARIED[method]:
            varied = [ranked[0]["setting"] | change for change in VARIED[method]]
            ranked = sorted(ranked + score(method, varied, FIRST), key=lambda trial: -trial["last"])
        stop = max(ranked, key=lambda trial: trial["best stop"])["setting"]
        best = score(method, [trial["setting"] for trial in ranked[:3]], TUNING)[0]["setting"]
        chosen[method] = [best]
        if method == "DPO":
            chosen[method] = [best, stop]
    return chosen, trials


def interval(values: np.ndarray) -> tuple:
    """The mean over the seeds (axis 0), and its 95 % interval by Student's t."""
    mean, spread = values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))
    half = stats.t.ppf(0.975, len(values) - 1) * spread
    return mean, mean - half, mean + half


def judge(tables: dict, dpo: list[dict], headline: str) -> tuple[dict, dict]:
    """The claims, and beside each method's curve what was measured of it."""
    last = {name: table["reward"][:, -1] for name, table in tables.items()}
    best = {name: table["reward"].max(1) for name, table in tables.items()}
    stop = max((table["reward"].max(1) for table in dpo), key=np.mean)
    lead = {name: interval(last[headline] - last[name]) for name in tables if name != headline}
    drop = {name: (best[name] - last[name]).mean() for name in tables}
    outside = {name: table["outside"][:, -1] for name, table in tables.items()}

    def share(name: str) -> float:
        return outside[headline].mean() / max(outside[name].mean(), 1e-9)

    value = {
        "spac_holds": {"drop": drop[headline]},
        "beats_dpo_last": {"low": lead["DPO"][1]},
        "matches_dpo_oracle_stop": {"lead": (last[headline] - stop).mean()},
        "stays_inside": {"ratio": share("DPO")},
        "beats_dpo_same_lr": {"low": lead[SAME][1]},
        "stays_inside_same_lr": {"ratio": share(SAME)},
        "critic_is_the_cause": {"low": lead["critic off"][1], "drop": drop["critic off"]},
    }
    claims = {}
    for name, values in value.items():
        claims |= bandit.judge(name, values, len(stop), EXPECTED)
    columns = {}
    for name, table in tables.items():
        measured = {"last": last[name], "best round": best[name], "outside": outside[name]}
        columns[name] = {what: [*map(float, interval(values))] for what, values in measured.items()}
        columns[name] |= {"SPAC's lead": [*map(float, lead.get(name, (0, 0, 0)))]}
        columns[name] |= {"drop": drop[name], "largest": table["largest"][:, -1].mean()}
        columns[name] |= {f"{what} by seed": v.tolist() for what, v in measured.items()}
        columns[name] |= {"outside by round": table["outside"].mean(0).tolist()}
    return claims, columns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="out", help="folder for tiny_lm.json and tiny_lm.png")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; changes no number")
    parser.add_argument("--quick", action="store_true", help="two seeds, short runs, no tuning")
    config = parser.parse_args()
    seeds = REPORT[:2] if config.quick else REPORT
    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    lab = Lab(config.workers, *(QUICK if config.quick else (SIZES, START)))
    chosen, trials = {name: grid[:1] * (1 + (name == "DPO")) for name, grid in GRID.items()}, []
    if not config.quick:
        chosen, trials = tune(lab)
    forms = [t for t in trials if "SPAC" in t["method"] and t["seeds"] == len(TUNING)]
    headline = max(forms, key=lambda t: t["last"])["method"] if forms else "SPAC, linear"
    ours, (tuned, stop) = chosen[headline][0], chosen.pop("DPO")
    others = {
        name: chosen[name] for name in ("RPO", "SPAC, linear", "SPAC, smoothed", "iterated DPO")
    }
    chosen = {headline: [ours], "DPO": [tuned], SAME: [stop | {"lr": ours["lr"]}]}
    chosen |= {"critic off": [ours | {"lam": "inf"}]} | others
    if stop not in chosen[SAME] + [tuned]:
        chosen["DPO, early stop"] = [stop]
    shown = {name: lab.run(settings, seeds)[0] for name, settings in chosen.items()}
    dpo = [table for name, table in shown.items() if name.startswith("DPO")]
    claims, columns = judge(shown, dpo, headline)
    every = SIZES["epochs"] * math.ceil(SIZES["rows"] / 64)
    lines, steps = {}, [every * k for k in range(lab.sizes["rounds"] + 1)]
    for name in (headline, "RPO", "DPO", SAME, "critic off"):  # the others lie on these
        sides = zip(("mean", "low", "high"), interval(shown[name]["reward"]))
        rate = f", lr {chosen[name][0]['lr']:.0e}" * name.startswith("DPO")
        lines[name.split(",")[0] + rate if rate else name] = {k: v.tolist() for k, v in sides}
    label = f"gradient steps ({every} a round)"
    panel = {"xlabel": label, "ylabel": "true reward / best: mean, 95 % band", "x": steps}
    data = {
        "headline": headline,
        "settings": chosen,
        "methods": columns,
        "tuning": trials,
        "tiny_lm": {"panels": [panel | {"lines": lines, "scale": "linear"}]},
    }
    seeds = {"tuning seeds": [*TUNING], "report seeds": [*seeds]}
    setting = {"sizes": lab.sizes, "start": lab.start, "quick": config.quick} | seeds
    setting |= {"transformers": transformers.__version__}
    return bandit.report(out, "tiny_lm", claims, data, setting)


if __name__ == "__main__":
    sys.exit(main())
