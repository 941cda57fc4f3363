"""How fast and how large is a training step? python tests/bench_train.py --out results

Beside TRL's DPOTrainer with --trl PYTHON: the same weights, pairs and batch, fp32, one thread, and
layers recomputed where ours are. PYTHON is an environment's, made by hand, one for each version:

    python -m venv peer && peer/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.24.0

Each variant has a fresh process, all take turns, several rounds. A process loads the model, scores
the pairs by the start (its cost stands apart), makes a step to warm up and then those that count.
Every step sees the same pairs, so that the losses tell whether two trainers do the same: log 2
first, then what gradient and AdamW made of it. y' is given: sampling is no part of a step. A ratio
is taken within a round; its median counts, and for speed and memory each the best TRL. Variants:

    trl-VERSION          its reference model in memory, as by default; -precomputed: without it;
                         -huge: without it, and tensors on huge pages, which ours asks torch for
    two, three           responses of a pair in one row: DPO's work, SPAC's work
    two-rows, three-rows a row for each response
    two-rows-logits      and logits at every position, not chunks of the responses' positions

Writes OUT/bench_train.json (with clock times, hence never twice the same). Linux. 35 minutes on a
quiet core with two versions of TRL and SmolLM2, 10 without; --quick, whose figures say nothing: 10
seconds.
"""

import argparse
import ctypes
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

# TRL's environment imports this file too, and has neither matplotlib nor scipy: what needs them,
# and torch, is imported where it is used.

EXPECTED = """
theorem same_work      loss    0    .01  |loss - TRL's| / |loss - log 2| of the second step, largest
theorem same_work      least   .01  .693 the smallest of these losses: saturated, they tell nothing
theorem same_work      logps   0    1e-5 |log pi / TRL's - 1| of chosen and rejected at the start
goal    tiny_two       speed   2.2  1e9  pairs a CPU second, two responses / the fastest TRL
goal    tiny_two       peak    0    .55  peak of the whole process / the smallest TRL
goal    wide_two       speed   1.2  1e9  pairs a CPU second, two responses / the fastest TRL
goal    smollm2_three  speed   1.15 1e9  pairs a CPU second, three responses / TRL's two
goal    prefix_sharing 150     1.25 1e9  three responses in one row / three rows, prompts of 150
goal    prefix_sharing 450     1.6  1e9  the same, prompts of 450 tokens
goal    head           growth  0    .45  growth of a step, chunks of the head / all logits
goal    head           speed   1    1e9  pairs a CPU second, the same two
"""  # kind, claim, value, least and most expected, what it is


class Setting(NamedTuple):
    model: str
    pairs: int  # a step
    prompt: tuple[int, int]  # tokens, least and most
    response: tuple[int, int]
    recompute: bool  # layers, in the backward pass
    variants: str
    rival: str = ""  # the one that TRL is to be compared with


MODELS = {  # wide has Mistral-7B's proportions, and half of its width
    "tiny": dict(
        hidden_size=256, intermediate_size=896, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=32_000,
    ),
    "wide": dict(
        hidden_size=2048, intermediate_size=7168, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=2048,
    ),
}  # fmt: skip
LENGTHS, HEAD, SHARING = ((64, 150), (80, 120)), "two-rows two-rows-logits", "three three-rows"
SETTINGS = {
    "tiny": Setting("tiny", 4, *LENGTHS, False, f"two {HEAD} three", "two"),
    "wide": Setting("wide", 2, *LENGTHS, False, "two two-rows three", "two"),
    "smollm2": Setting("smollm2", 2, *LENGTHS, True, "two three", "three"),
    "150": Setting("wide", 1, (150, 150), (226, 226), True, SHARING),
    "450": Setting("wide", 1, (450, 450), (226, 226), True, SHARING),
}
BETA, LAM, CLIP = 0.1, 10.0, 1.0
PAD, END = 0, 1  # ids; from 2 on a token is its number


# -------------------------------------------------------- a process that is measured


def memory(field: str) -> int:
    """Bytes: VmRSS, held now; VmHWM, the peak since it was reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(field + ":")[1].split()[0])


class Meter:
    """CPU and wall seconds of each step and how far memory rose in it; the process's peak."""

    def __init__(self):
        self.steps, self.losses, self.peak = [], [], 0

    def start(self) -> None:
        self.peak = max(self.peak, memory("VmHWM"))
        ctypes.CDLL(None).malloc_trim(0)  # or what the last step freed would hide this one's growth
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self.held, self.since = memory("VmRSS"), (time.process_time(), time.perf_counter())

    def stop(self) -> None:
        cpu, wall = time.process_time() - self.since[0], time.perf_counter() - self.since[1]
        self.steps.append({"cpu": cpu, "wall": wall, "growth": memory("VmHWM") - self.held})

    def told(self, pairs: int, logps: list[float], scoring: float) -> dict:
        """Medians of the steps after the first, which fills caches and makes AdamW's state."""
        self.peak = max(self.peak, memory("VmHWM"))
        cpu, wall, growth = (median(s[key] for s in self.steps[1:]) for key in self.steps[0])
        speed = {"pairs_cpu": pairs / cpu, "pairs_wall": pairs / wall, "scoring": scoring / pairs}
        size = {"peak": self.peak / 2**20, "growth": growth / 2**20}
        return speed | size | {"losses": self.losses, "logps": logps}


def work() -> None:
    """What a process does: jobs are read from stdin, their measurements go to stdout."""
    import torch

    torch.set_num_threads(1)
    step = {True: trl_steps, False: our_steps}
    found = [step[job["variant"].startswith("trl")](job) for job in json.load(sys.stdin)]
    print("\n" + json.dumps(found))


def our_steps(job: dict) -> dict:
    """train_mistral.py's step. Two responses: spac.py's preference term of the same Scorer, as the
    trainer, which always has y', has no path of its own for them."""
    import torch
    from transformers import AutoModelForCausalLM

    import spac
    import train_mistral as trainer

    trainer.start_processes()
    lm = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
    scorer = trainer.Scorer(lm, sharing="rows" not in job["variant"])
    trainer.shard(scorer, torch.device("cpu"), trainer.Config(recompute=job["recompute"]))

    def all_logits(items):
        table, states_at, _, lengths = trainer.lay_out(items, sharing=False)
        ids = table[..., 0]
        logps = spac.token_logps(lm(ids, use_cache=False).logits[:, :-1], ids[:, 1:])
        sums = [response.sum() for response in logps[states_at.unbind()].split(lengths)]
        return torch.stack(sums).view(len(items), -1)

    def dpo() -> float:
        h = score(items) - opponent
        loss = spac.preference_term(*h.unbind(1), BETA).mean()
        loss.backward()
        return loss.item()

    def self_play() -> float:
        return fmean(pair["loss"] for pair in trainer.accumulate(run, rows))

    score = all_logits if "logits" in job["variant"] else scorer
    two = job["variant"].startswith("two")
    items = [(prompt, given[: 2 if two else 3]) for prompt, *given in job["rows"]]
    since = time.process_time()
    with torch.no_grad():
        opponent = score(items)
    scoring = time.process_time() - since
    played = zip(job["rows"], opponent.tolist())
    rows = [trainer.Row(i, *row[:3], [*row[3:]], logps) for i, (row, logps) in enumerate(played)]
    config = trainer.Config(beta=BETA, lam=LAM, micro_batch=len(rows))
    run = trainer.Run(config, Path(), scorer, None, set(), rows, [], {})
    weights, meter = list(lm.parameters()), Meter()
    optimizer = trainer.OPTIMIZERS["adamw"](weights, lr=job["lr"], weight_decay=0.0)
    for _ in range(1 + job["steps"]):
        meter.start()
        meter.losses.append(dpo() if two else self_play())
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        lm.zero_grad()  # here, as in TRL: a step's growth holds its gradients
        meter.stop()
    return meter.told(len(rows), opponent.mean(0).tolist(), scoring)


def one_dataset(pairs: list[dict], path: Path, rank: int):
    """Rows in a file, read by every process: of rows in memory TRL's other ranks seek the reference
    scores where the first one did not write them."""
    import datasets

    if rank == 0:
        (temporary := path.with_suffix(".tmp")).write_text("\n".join(map(json.dumps, pairs)))
        os.replace(temporary, path)
    while not path.exists():
        time.sleep(0.05)
    cache = str(path.with_suffix(".cache"))
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)


def trl_steps(job: dict) -> dict:
    """DPOTrainer's step: what can be left out on a CPU (bf16, saving, reports) is left out."""
    import datasets
    import tokenizers
    import transformers
    import trl

    meter, scoring = Meter(), [0.0]
    world, rank = (int(os.environ.get(name, k)) for k, name in ((1, "WORLD_SIZE"), (0, "RANK")))

    class Clock(transformers.TrainerCallback):  # from end to end: fetching the batch is in it
        def on_train_begin(self, *args, **kwargs):
            meter.start()

        def on_step_end(self, *args, **kwargs):
            meter.stop()
            meter.start()

    class Trainer(trl.DPOTrainer):
        def _precompute_ref_logps(self, *args, **kwargs):
            since = time.process_time()
            scored = super()._precompute_ref_logps(*args, **kwargs)
            scoring[0] = time.process_time() - since
            return scored

    names = ["<pad>", "<end>", *map(str, range(2, job["vocabulary"]))]
    words = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, names[PAD])
    words = tokenizers.Tokenizer(words)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token=names[PAD], eos_token=names[END])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    texts = [["".join(f" {names[token]}" for token in ids) for ids in row] for row in job["rows"]]
    pairs = [dict(prompt=x, chosen=chosen, rejected=other) for x, chosen, other, _ in texts]
    precomputed = job["variant"].endswith(("-precomputed", "-huge"))
    config = trl.DPOConfig(
        job["out"], max_steps=1 + job["steps"], beta=BETA,
        per_device_train_batch_size=len(pairs) // world,
        learning_rate=job["lr"], lr_scheduler_type="constant", max_grad_norm=CLIP, max_length=None,
        precompute_ref_log_probs=precomputed, bf16=False, use_cpu=True,
        gradient_checkpointing=job["recompute"], save_strategy="no", report_to="none",
        gradient_checkpointing_kwargs={"use_reentrant": False}, dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "float32"}, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(pairs)
    if world > 1:
        rows = one_dataset(pairs, Path(job["out"] + ".jsonl"), rank)
    about = dict(processing_class=tokenizer, train_dataset=rows)
    trainer = Trainer(job["folder"], args=config, callbacks=[Clock()], **about)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    meter.losses = [logs["loss"] for logs in logged]
    logps = [logged[0][f"logps/{which}"] for which in ("chosen", "rejected")]
    return meter.told(len(pairs), logps, scoring[0])


# -------------------------------------------------------- jobs, in turn


def pairs_of(setting: Setting, vocabulary: int, shorter: int) -> list[list]:
    """Rows of ids [x, y+, y-, y']: random words, lengths uniform from least to most."""
    rng = random.Random(0)

    def words(least: int, most: int) -> list[int]:
        length = rng.randint(least, most) // shorter
        return [rng.randrange(2, vocabulary) for _ in range(length)]

    def row() -> list[list[int]]:
        return [words(*setting.prompt), *([*words(*setting.response)[1:], END] for _ in "+-'")]

    return [row() for _ in range(setting.pairs)]


def jobs_of(config, peers: dict[str, str], temporary: Path) -> Iterator[dict]:
    """A job for each setting and variant. Makes the weights and the pairs."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name, setting in SETTINGS.items():
        model = setting.model
        if model not in MODELS and not config.smollm2:
            continue
        folder = temporary / model if model in MODELS else Path(config.smollm2).resolve()
        if not folder.exists():
            small = dict(hidden_size=64, intermediate_size=128, vocab_size=500)
            shape = MODELS[model] | (small if config.quick else {})
            shape = transformers.MistralConfig(**shape, sliding_window=None, pad_token_id=PAD)
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        rows = pairs_of(setting, vocabulary, 10 if config.quick else 1)
        job = dict(folder=str(folder), rows=rows, vocabulary=vocabulary, steps=config.steps)
        job |= dict(lr=1e-4 if config.quick else 3e-6)  # the loss leaves log 2, stays far from 0
        job |= dict(setting=name, recompute=setting.recompute, out=str(temporary / "trl"))
        for variant in [*(peers if setting.rival else ()), *setting.variants.split()]:
            yield job | dict(variant=variant, python=peers.get(variant, sys.executable))


def measure(jobs: list[dict]) -> list[dict]:
    """The measurements of a fresh process."""
    alone = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    if jobs[0]["variant"].startswith("trl"):
        alone |= dict(THP_MEM_ALLOC_ENABLE=str(int(jobs[0]["variant"].endswith("huge"))))
    command = [jobs[0]["python"], "-c", "import bench_train; bench_train.work()"]
    style = dict(cwd=HERE, env=os.environ | alone, capture_output=True, text=True)
    done = subprocess.run(command, input=json.dumps(jobs), **style)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(jobs: list[dict], config) -> dict[str, dict[str, list[dict]]]:
    """{setting: {variant: a measurement a round}}"""
    found, batches = {}, [[job] for job in jobs]
    if config.quick:  # a process for each environment
        pythons = dict.fromkeys(job["python"] for job in jobs)
        batches = [[job for job in jobs if job["python"] == python] for python in pythons]
    for number in range(1, config.rounds + 1):
        for k, batch in enumerate(batches):
            print(f"\rround {number}: {k} of {len(batches)} done ", end="", file=sys.stderr)
            for job, measured in zip(batch, measure(batch)):
                variants = found.setdefault(job["setting"], {})
                variants.setdefault(job["variant"], []).append(measured)
    print(file=sys.stderr)
    return found


# -------------------------------------------------------- what was found


def ratio(ours: list[dict], theirs: list[dict], key: str) -> float:
    return median(a[key] / b[key] for a, b in zip(ours, theirs))


def values_of(found: dict[str, dict[str, list[dict]]]) -> dict[str, dict[str, float]]:
    """{claim: values}, as far as what they need was measured."""
    values, gaps, losses, logps = {}, [], [], []
    for name, variants in found.items():
        rivals = [runs for variant, runs in variants.items() if variant.startswith("trl")]
        if not rivals:
            continue
        ours, (two, *_) = variants[SETTINGS[name].rival], variants["two"]
        claim = values[f"{name}_{SETTINGS[name].rival}"] = {}
        claim["speed"] = min(ratio(ours, runs, "pairs_cpu") for runs in rivals)
        if name == "tiny":
            claim["peak"] = max(ratio(ours, runs, "peak") for runs in rivals)
        losses.append(two["losses"][1])
        for theirs in sum(rivals, []):
            gap = abs(losses[-1] - theirs["losses"][1])
            gaps.append(gap / max(1e-9, abs(losses[-1] - math.log(2))))
            logps += [abs(a / b - 1) for a, b in zip(two["logps"], theirs["logps"])]
    if losses:
        values["same_work"] = {"loss": max(gaps), "least": min(losses), "logps": max(logps)}
    rows = {key: map(found[key].get, SHARING.split()) for key in ("150", "450")}
    values["prefix_sharing"] = {key: ratio(*both, "pairs_cpu") for key, both in rows.items()}
    head = [found["tiny"][variant] for variant in HEAD.split()]
    values["head"] = {"growth": ratio(*head, "growth"), "speed": ratio(*head, "pairs_cpu")}
    return values


def summary(runs: list[dict]) -> dict:
    """Medians over rounds, least and most; the losses of the first."""
    found = {"losses": runs[0]["losses"]}
    for key in ("pairs_cpu", "pairs_wall", "scoring", "peak", "growth"):
        column = [run[key] for run in runs]
        found[key] = {"median": median(column), "low": min(column), "high": max(column)}
    return found


def tokens_saved(rows: list[list]) -> dict[str, float]:
    """Tokens of a row for each response / tokens of one row for all."""
    prompts, saved = sum(len(row[0]) for row in rows), {}
    for name, count in (("two", 2), ("three", 3)):
        answers = sum(len(y) for row in rows for y in row[1 : 1 + count])
        saved[name] = (count * prompts + answers) / (prompts + answers)
    return saved


def print_table(data: dict) -> None:
    heads = dict(pairs_cpu="pairs/CPU s", pairs_wall="pairs/s", peak="peak MiB", growth="step MiB")
    form = "{median:.3g} [{low:.3g}-{high:.3g}]"
    for setting, saved in data["tokens_saved"].items():
        print(f"\n{setting:26}" + "".join(f"{head:22}" for head in heads.values()))
        for variant, row in data[setting].items():
            cells = [form.format_map(row[key]) for key in heads]
            print(f"  {variant:24}" + "".join(f"{cell:22}" for cell in cells))
        print("  one row saves tokens, two: {two:.2f}x, three: {three:.2f}x".format_map(saved))


def main() -> int:
    style = dict(allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("--out", default="out", help="folder for bench_train.json")
    about = "python of an environment with TRL; again for another version"
    parser.add_argument("--trl", action="append", default=[], metavar="PYTHON", help=about)
    parser.add_argument("--smollm2", metavar="FOLDER", help="SmolLM2-135M, as downloaded")
    parser.add_argument("--rounds", type=int, default=3, help="of all variants")
    parser.add_argument("--steps", type=int, default=2, help="that count, of each process")
    about = "a smoke test: small models, short pairs, one round"
    parser.add_argument("--quick", action="store_true", help=about)
    config = parser.parse_args()
    if config.quick:
        config.rounds = config.steps = 1
    import bench_bandit

    import toy_bandit as bandit

    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    peers, load = {}, os.getloadavg()[0]
    for python in config.trl:
        asking = [python, "-c", "from importlib.metadata import version; print(version('trl'))"]
        done = subprocess.run(asking, capture_output=True, text=True, check=True)
        name = f"trl-{done.stdout.strip()}"
        peers |= {variant: python for variant in (name, f"{name}-precomputed", f"{name}-huge")}

    with tempfile.TemporaryDirectory() as temporary:
        jobs = list(jobs_of(config, peers, Path(temporary)))
        found = take_turns(jobs, config)
    claims, values = {}, values_of(found)
    names = dict.fromkeys(row.split()[1] for row in EXPECTED.splitlines() if row)
    for name in [name for name in names if name in values]:
        claims |= bandit.judge(name, values[name], config.rounds, EXPECTED)
    for verdict in claims.values() if config.quick else ():
        verdict["says"] = "--quick, small models and short pairs: " + verdict["says"]
    data = {setting: {variant: summary(runs) for variant, runs in variants.items()}
            for setting, variants in found.items()}  # fmt: skip
    data["tokens_saved"] = {job["setting"]: tokens_saved(job["rows"]) for job in jobs}
    data["left_out"] = [name for name in names if name not in values]
    setting = {"processor": bench_bandit.processor(), "cores": os.cpu_count(), "load_before": load}
    setting |= {"quick": config.quick, "steps": config.steps, "models": MODELS}
    setting["settings"] = {name: SETTINGS[name]._asdict() for name in found}
    status = bandit.report(out, "bench_train", claims, data, setting)
    for name in data["left_out"]:
        print(f"{'left out':10}{name:24}needs --trl" + ", --smollm2" * ("smollm2" in name))
    print_table(data)
    return status


if __name__ == "__main__":
    sys.exit(main())
