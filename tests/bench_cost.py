"""What does a step of train_mistral.py cost, and why? python tests/bench_cost.py --out results

floor: the multiplications that a step must do, by a formula that torch's counter must confirm, and
how long they alone take here, each product at its own shape; the step's distance from that, and
where the rest goes. play: sample() beside transformers' generate and continuous batching, scoring
beside training's forward pass, and what batch-mates change. growth: seconds and bytes of a step
with pairs, prompt, response and vocabulary; of a run with rounds and processes; and the model that
explains them. CPU, fp32, one thread (CPU seconds), random weights. Writes OUT/bench_cost.json
(with clock times, hence never twice the same). About eight minutes; --quick: two.

Tried on tiny, did not pay (CPU seconds of a step, in turns):
 - Other chunks of the head: 256 positions cost what 128 do and hold twice the logits; 64 are a
   tenth slower, 32 half (each chunk adds a whole gradient of the head's matrix).
 - F.cross_entropy in token_logps: no faster than log_softmax and gather, and a label of -100
   would silently have log-probability 0.
 - An autograd function of our own for log-softmax: 4 % beyond log_softmax and gather, 14 lines.
 - The head's gradient made in its forward pass, to save the recomputation: what a position weighs
   in the loss is known only when all of its response is scored.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bench_bandit as bench
import numpy as np
import torch
from scipy.optimize import nnls
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    MistralConfig,
)

sys.path.insert(0, str(bench.ROOT))

import toy_bandit as bandit  # noqa: E402
import train_mistral as tm  # noqa: E402

EXPECTED = """
theorem flops      deviation 0    1e-9 largest |formula / torch's counter - 1|, all shapes
goal    floor      tiny      .6   1    seconds of the products a step must do / seconds of the step
goal    floor      wide      .8   1    the same with 7B's proportions
goal    scoring    tiny      0    1.1  seconds to score / of training's forward pass, the same rows
goal    scoring    wide      0    1.1  the same with 7B's proportions
goal    generate   tiny      1.7  1e9  tokens a second, sample() / transformers' generate
goal    generate   wide      1.4  1e9  the same with 7B's proportions
goal    continuous tiny      1    1e9  the same, sample() / transformers' continuous batching
goal    continuous wide      1    1e9  the same with 7B's proportions
goal    batchmates logits    0    1e-4 largest change of a logit by padding and batch-mates
goal    batchmates logp      0    1e-3 largest change of log pi(y|x) by batch-mates, nats
goal    growth     seconds   .75  1.25 model / measured, the point furthest off
goal    growth     bytes     .75  1.25 the same of a step's peak memory growth
goal    rounds     seconds   .75  1.25 work of 2 rounds: line through 1 and 4 rounds / measured
"""  # kind, claim, value, least and most expected, what it is

SIZES = {  # hidden, inner, layers, vocabulary, heads, key-value heads
    "tiny": (256, 896, 4, 32_000, 4, 2),
    "wide": (2048, 7168, 1, 2064, 16, 4),  # not 2,048: the profile tells vocabulary from hidden
}
CHUNK = 128  # positions of the head at once


def model_of(hidden, inner, layers, vocabulary, heads, keys) -> torch.nn.Module:
    shape = MistralConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, head_dim=None,
        vocab_size=vocabulary, num_attention_heads=heads, num_key_value_heads=keys,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape)


class Sizes(NamedTuple):
    pairs: int
    prompt: int
    response: int  # tokens of each of three


def run_of(lm, sizes: Sizes, **options) -> tuple[tm.Run, list[tm.Row]]:
    """A run that shares prompts, and rows with three responses of the same length."""
    draw, options = random.Random(0), dict(micro_batch=sizes.pairs, lam=5.0) | options
    run = tm.Run(tm.Config(**options), None, tm.Scorer(lm, True, CHUNK), None, set(), [], [], {})

    def ids(length):
        return array("i", draw.choices(range(3, lm.config.vocab_size), k=length))

    answers = [[ids(sizes.response) for _ in "123"] for _ in range(sizes.pairs)]
    logps = [-5.0 * sizes.response] * 3
    return run, [
        tm.Row(i, ids(sizes.prompt), *ys[:2], ys[2:], logps) for i, ys in enumerate(answers)
    ]


def step_of(lm, sizes: Sizes, **options):
    """A function that does one training step."""
    run, rows = run_of(lm, sizes, **options)
    weights = list(run.scorer.parameters())
    optimizer = tm.OPTIMIZERS["adamw"](weights, lr=1e-6, weight_decay=0.0)

    def step():
        tm.accumulate(run, rows)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        run.scorer.zero_grad()  # last, so that peak_bytes() finds no gradient made before its book

    return step


# -------------------------------------------------------- the floor


class Product(NamedTuple):
    """count products (m, k) x (k, n); passes: forward, two of the backward, recomputation."""

    group: str
    count: int
    m: int
    k: int
    n: int
    passes: float

    @property
    def flops(self) -> float:
        return 2 * self.count * self.m * self.k * self.n * self.passes


def products(shape, sizes: Sizes, again: bool = False, must: bool = False) -> list[Product]:
    """A step's. again: layers are recomputed (but for the last product, whose result nobody
    needs). must: neither recomputation nor attention to what the mask hides."""
    pairs, prompt, response = sizes
    row, layers, hidden = prompt + 3 * response, shape.num_hidden_layers, shape.hidden_size
    heads, inner = shape.num_attention_heads, shape.intermediate_size
    width = getattr(shape, "head_dim", None) or hidden // heads
    tokens, more = pairs * row, int(again and not must)
    seen = prompt**2 + 3 * response * (2 * prompt + response) + row  # twice the visible pairs
    seen = seen / (2 * row**2) if must else 1
    keys = shape.num_key_value_heads * width
    return [
        Product("body", 2 * layers, tokens, hidden, heads * width, 3 + more),  # queries, output
        Product("body", 2 * layers, tokens, hidden, keys, 3 + more),  # keys and values
        Product("body", 2 * layers, tokens, hidden, inner, 3 + more),  # gate, up
        Product("body", layers, tokens, inner, hidden, 3),  # down
        Product("attention", pairs * heads * layers, row, width, row, (3 + more) * seen),
        Product("attention", pairs * heads * layers, row, row, width, (3 + more) * seen),
        Product("head", 1, 3 * pairs * response, hidden, shape.vocab_size, 3 if must else 4),
    ]


def flops(found: list[Product]) -> dict:
    total = Counter()
    for product in found:
        total[product.group] += product.flops
    return dict(total) | {"all": sum(total.values())}


def counted(lm, sizes: Sizes) -> float:
    """Floating-point operations of a step, by torch; it counts attention in its eager form only."""
    before = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    run, rows = run_of(lm, sizes)
    with FlopCounterMode(display=False) as counter:
        tm.accumulate(run, rows)
    lm.set_attn_implementation(before)
    return counter.get_total_flops()


def alone(found: list[Product], repetitions: int) -> float:
    """CPU seconds of the products and nothing else: forward, gradient of the input, of the weight,
    each a third of the passes, written where memory already is."""
    total = 0.0
    for group, count, m, k, n, passes in found:
        if group == "head":
            count, m = count * m / min(m, CHUNK), min(m, CHUNK)
        few = min(count, 16) if group == "attention" else 1  # a kernel call does many heads
        x, w, y = (torch.randn(few, *size) for size in ((m, k), (n, k), (m, n)))
        forms = [(x, w.mT, y.clone()), (y, w, x.clone()), (y.mT, x, w.clone())]
        once = {i: partial(torch.bmm, a, b, out=out) for i, (a, b, out) in enumerate(forms)}
        times = bench.take_turns(once, repetitions, time.process_time)
        total += sum(times.values()) / few * count * passes / 3
    return total


def group_of(event, vocabulary: int) -> str:
    """Which part of a step an operation of the profile belongs to, by its caller and shapes."""
    names, caller = [], event
    while caller:
        names, caller = [*names, caller.name], caller.cpu_parent
    sizes = [n for shape in event.input_shapes for n in shape if isinstance(n, int)]
    if any(name.startswith("Optimizer.") or "foreach" in name for name in names):
        return "optimizer, clip"
    if event.name in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "head" if vocabulary in sizes else "body"
    if any("scaled_dot_product" in name for name in names):
        return "attention"
    if vocabulary in sizes:
        return "log-softmax"  # and adding up the head's gradient
    return "norms, rope, rest" if event.name.startswith("aten::") else "autograd"


def shares(step, vocabulary: int) -> dict:
    """Share of a step's CPU time by part; what no operation accounts for is Python's."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        wall = bench.seconds(step)
    spent = Counter()
    for event in found.events():
        spent[group_of(event, vocabulary)] += event.self_cpu_time_total / 1e6
    spent["Python"] = max(0.0, wall - sum(spent.values()))
    return {name: t / sum(spent.values()) for name, t in spent.most_common()}


def floor(lm, sizes: Sizes, repetitions: int) -> dict:
    step, doing = step_of(lm, sizes), products(lm.config, sizes)
    must = products(lm.config, sizes, must=True)
    seconds = bench.take_turns({"step": step}, repetitions, time.process_time)["step"]
    least, done = alone(must, repetitions), alone(doing, repetitions)
    small = Sizes(1, 5, 4)
    return {
        "sizes": sizes._asdict() | {"tokens": sizes.pairs * (sizes.prompt + 3 * sizes.response)},
        "must_gflop": {name: n / 1e9 for name, n in flops(must).items()},
        "does_gflop": {name: n / 1e9 for name, n in flops(doing).items()},
        "deviation": abs(flops(products(lm.config, small))["all"] / counted(lm, small) - 1),
        "gflop_a_second": flops(must)["all"] / least / 1e9,
        "seconds": {"must": least, "does": done, "step": seconds},
        "share_of_floor": least / seconds,
        "share_with_recomputation": done / seconds,
        "profile": shares(step, lm.config.vocab_size),
    }


# -------------------------------------------------------- play: sampling and scoring


def ragged(run: tm.Run, count: int, longest: int) -> list[list[int]]:
    """Prompts of 1/8 to all of longest tokens. As a random model seldom ends, each token is now an
    end with probability 4 / max_response, so that answers are ragged too."""
    draw, V = random.Random(1), run.scorer.lm.config.vocab_size
    run.stops.update(range(3, 3 + 4 * V // run.config.max_response))
    return [draw.choices(range(3, V), k=draw.randint(longest // 8, longest)) for _ in range(count)]


def bare(run: tm.Run) -> GenerationConfig:
    """All that would bend a sample of transformers' off."""
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0,
        max_new_tokens=run.config.max_response, eos_token_id=[*run.stops], pad_token_id=0,
    )  # fmt: skip


def generate(run: tm.Run, prompts: list[list[int]], batch: int) -> list[list[int]]:
    """True samples by transformers' generate: so many at a time, all until the last has ended."""
    lm, answers = run.scorer.lm, []
    lm.generation_config = GenerationConfig()
    for part in (prompts[i : i + batch] for i in range(0, len(prompts), batch)):
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(x)) + x for x in part])
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in part])
        drawn = lm.generate(ids, bare(run), attention_mask=mask)[:, longest:].tolist()
        ends = [next((i for i, t in enumerate(y, 1) if t in run.stops), len(y)) for y in drawn]
        answers += [y[:end] for y, end in zip(drawn, ends)]
    return answers


def continuous(run: tm.Run, prompts: list[list[int]], batch: int) -> list[list[int]]:
    """True samples by transformers' continuous batching, whose errors are not raised."""
    lm, logger = run.scorer.lm, logging.getLogger("ContinuousBatchingLogger")
    logger.setLevel(logging.CRITICAL)
    # On a CPU it would take most of the memory for its cache: pages of 256 tokens.
    room = dict(num_blocks=2 * len(prompts), max_batch_tokens=512)
    room = room if lm.device.type == "cpu" else {}
    attention = lm.config._attn_implementation
    options = ContinuousBatchingConfig(seed=0, max_requests_per_batch=batch, **room)
    found = [*lm.generate_batch(prompts, bare(run), options).values()]
    lm.set_attn_implementation(attention)
    failed = [result.error for result in found if result.error]
    if failed or len(found) < len(prompts):
        raise RuntimeError(f"{len(prompts) - len(found)} missing, errors: {failed[:3]}")
    return [result.generated_tokens for result in found]


def generation(run: tm.Run, prompts: list, batch: int, repetitions: int, clock) -> dict:
    """Tokens a second, all with places for batch prompts: sample(); generate, sorted by length as
    play() would; and continuous batching."""
    prompts, made = sorted(prompts, key=len), {}

    def keep(name, way, *more):
        made[name] = way(run, prompts, *more)

    ways = {
        "sample": partial(keep, "sample", tm.sample, 0),
        "generate": partial(keep, "generate", generate, batch),
        "continuous": partial(keep, "continuous", continuous, batch),
    }
    seconds = bench.take_turns(ways, repetitions, clock)
    tokens = {name: sum(map(len, made[name])) for name in ways}
    rates = {name: tokens[name] / seconds[name] for name in ways}
    ratios = {name: rates["sample"] / rates[name] for name in ("generate", "continuous")}
    found = {"tokens_a_second": rates, "tokens": tokens, "ratios": ratios}
    return found | {"prompts": len(prompts), "batch": batch}


def scoring(run: tm.Run, rows: list[tm.Row], repetitions: int) -> dict:
    """CPU seconds to score rows as play() does (sorted, no gradient) and of training's forward
    pass (in the order of a step, keeping what the backward pass needs)."""
    size, alike = run.config.micro_batch, sorted(rows, key=lambda row: len(row.prompt))

    def score():
        with run.scorer.eval().gathered():
            for i in range(0, len(alike), size):
                run.scorer(
                    [(row.prompt, [*row[2:4], *row.generated]) for row in alike[i : i + size]]
                ).tolist()

    def forward():
        for i in range(0, len(rows), size):
            tm.losses(run, rows[i : i + size])["loss"].tolist()

    once = {"score": score, "forward": forward, "train": lambda: tm.accumulate(run, rows)}
    seconds = bench.take_turns(once, repetitions, time.process_time)
    return {"seconds": seconds, "ratio": seconds["score"] / seconds["forward"], "rows": len(rows)}


@torch.no_grad()
def batchmates(run: tm.Run, rows: list[tm.Row]) -> dict:
    """What company does to a row. It cannot change what is computed, only the order in which
    floating-point sums are made: one prompt alone and left-padded beside a longer one, its log pi
    alone and in a batch. The control forgets the mask: then company changes what is computed."""
    lm, (short, *_, long) = run.scorer.lm.eval(), sorted(rows, key=lambda row: len(row.prompt))
    padding = len(long.prompt) - len(short.prompt)
    ids = torch.tensor([[0] * padding + [*short.prompt], [*long.prompt]])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    own = lm(torch.tensor([[*short.prompt]])).logits[0, -1]
    padded = lm(ids, attention_mask=mask, position_ids=positions).logits[0, -1]
    unmasked = lm(ids).logits[0, -1]
    items = [(row.prompt, [*row[2:4], *row.generated]) for row in (short, *rows)]
    return {
        "logits": (padded - own).abs().max().item(),
        "logp": (run.scorer(items)[0] - run.scorer(items[:1])[0]).abs().max().item(),
        "logits_without_mask": (unmasked - own).abs().max().item(),
        "padding": padding,
    }


def play(lm, quick: bool, repetitions: int) -> dict:
    longest, count, batch = (32, 8, 4) if quick else (128, 64, 16)
    sizes = dict(max_response=longest // 2, generate_tokens=batch * 3 * longest // 2)
    run, _ = run_of(lm, Sizes(1, 1, 1), micro_batch=4, **sizes)
    prompts = ragged(run, count, longest)
    scored = prompts[: count // 2]
    answers = [tm.sample(run, scored, seed) for seed in range(3)]
    logps = [-5.0 * longest] * 3
    rows = [tm.Row(0, array("i", x), *ys[:2], ys[2:], logps) for x, *ys in zip(scored, *answers)]
    found = {"scoring": scoring(run, rows, repetitions), "batchmates": batchmates(run, rows)}
    return found | {"generation": generation(run, prompts, batch, repetitions, time.process_time)}


# -------------------------------------------------------- growth

BASE = dict(pairs=4, prompt=100, response=50, vocabulary=8000)
GRIDS = dict(pairs=[1, 2, 8], prompt=[25, 50, 400], response=[12, 25, 200])
GRIDS |= dict(vocabulary=[2000, 4000, 32_000])
HELD_OUT = [dict(pairs=2, prompt=200, response=100, vocabulary=16_000)]  # the fit never sees them
HELD_OUT += [dict(pairs=8, prompt=50, response=100, vocabulary=4000)]


def peak_bytes(step) -> int:
    """The largest sum of tensors alive at once that a step adds, by the allocator's own book."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    book = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(book, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def explain(values: list[float], causes: list[list[float]], kept_back: int) -> list[float]:
    """value = a non-negative number for each cause, fitted to relative errors without the last
    kept_back values. Returns model / measured of all."""
    X, y = np.array(causes), np.array(values)
    X = X / X.max(0)
    fitted = slice(len(y) - kept_back)
    coefficients, _ = nnls((X / y[:, None])[fitted], np.ones(len(y) - kept_back))
    return [float(x) for x in X @ coefficients / y]


def growth(quick: bool, repetitions: int) -> dict:
    """A 2-layer model of hidden size 256, one thing changed at a time."""
    points = [BASE, *(BASE | {name: n} for name, grid in GRIDS.items() for n in grid), *HELD_OUT]
    if quick:
        points = [point | {"prompt": point["prompt"] // 4} for point in points]
    steps, bytes_, time_causes, byte_causes = {}, [], [], []
    for i, point in enumerate(points):
        sizes = Sizes(point["pairs"], point["prompt"], point["response"])
        lm = model_of(256, 896, 2, point["vocabulary"], 4, 2)
        steps[i] = step_of(lm, sizes)
        steps[i]()  # the optimizer's state is there
        bytes_.append(peak_bytes(steps[i]))
        weights, arithmetic = (
            sum(w.numel() for w in lm.parameters()),
            flops(products(lm.config, sizes)),
        )
        answers, row = 3 * sizes.pairs * sizes.response, sizes.prompt + 3 * sizes.response
        logits, tokens = answers * point["vocabulary"], sizes.pairs * row
        time_causes.append([1, arithmetic["all"], logits, tokens, tokens * row, weights])
        chunk = min(answers, CHUNK) * point["vocabulary"]
        byte_causes.append([1, chunk, tokens, tokens * row, weights])
    seconds = [*bench.take_turns(steps, repetitions, time.process_time).values()]
    return {
        "points": points,
        "seconds": seconds,
        "bytes": bytes_,
        "causes_seconds": "1, multiplications, logits, tokens, tokens x row, weights",
        "causes_bytes": "1, logits of a chunk, tokens, tokens x row, weights",
        "model/measured": {
            "seconds": explain(seconds, time_causes, len(HELD_OUT)),
            "bytes": explain(bytes_, byte_causes, len(HELD_OUT)),
        },
    }


def whole_run(rounds: int, processes: int, rows: int) -> dict:
    """python train_mistral.py in fresh processes: wall seconds, and those of each phase, summed
    over rounds on the first process: the run's work, without its start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(bench.ROOT / "train_mistral.py")]
    command += f"--rows {rows} --heldout 50 --sft_epochs 2 --rounds {rounds} --out".split()
    with tempfile.TemporaryDirectory() as out:
        call = partial(subprocess.run, [*command, out], check=True, stdout=subprocess.DEVNULL)
        phases, wall = Counter(), bench.seconds(call)
        lines = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
        for line in lines:
            phases.update(line["seconds"] if line["event"] == "round" else {})
    return {"rounds": rounds, "processes": processes, "seconds": wall, "phases": dict(phases)}


def runs(quick: bool) -> dict:
    found = [whole_run(r, p, 128 if quick else 512) for r, p in ((1, 1), (2, 1), (4, 1), (2, 2))]
    first, second, fourth, _ = (sum(run["phases"].values()) for run in found)
    return {"runs": found, "line/measured": (first + (fourth - first) / 3) / second}


def furthest(ratios: list[float]) -> float:
    return max(ratios, key=lambda ratio: abs(np.log(ratio)))


def main() -> int:
    style = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("--out", default="out", help="folder for bench_cost.json")
    parser.add_argument("--repetitions", type=int, default=5, help="of each timing, taking turns")
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M: its floor too")
    parser.add_argument("--quick", action="store_true", help="small shapes, two repetitions")
    config = parser.parse_args()
    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    setting = {"processor": bench.processor(), "cores": os.cpu_count(), "quick": config.quick}
    setting |= {"load_before": os.getloadavg()[0], "repetitions": config.repetitions}
    torch.set_num_threads(1)
    tm.start_processes()
    quick, repetitions = config.quick, 2 if config.quick else config.repetitions

    floors, plays = {}, {}
    for name, pairs in (("tiny", 4), ("wide", 2), ("smollm2", 1)):
        if name == "smollm2" and not config.smollm2:
            continue
        if name == "smollm2":
            lm = AutoModelForCausalLM.from_pretrained(config.smollm2, dtype=torch.float32)
        else:
            lm = model_of(*SIZES[name])
        sizes = Sizes(1, 20, 16) if quick else Sizes(pairs, 150, 100)
        tm.say(f"{name}: floor")
        floors[name] = floor(lm, sizes, repetitions)
        if name != "smollm2":
            tm.say(f"{name}: play")
            plays[name] = play(lm, quick, repetitions)
        del lm
    tm.say("growth")
    growing, rounds = growth(quick, repetitions), runs(quick)

    def judge(name, values):
        return bandit.judge(name, values, repetitions, EXPECTED)

    deviation = max(found["deviation"] for found in floors.values())
    claims = judge("flops", {"deviation": deviation})
    claims |= judge("floor", {name: floors[name]["share_of_floor"] for name in SIZES})
    claims |= judge("scoring", {name: found["scoring"]["ratio"] for name, found in plays.items()})
    for name in ("generate", "continuous"):
        ratios = {shape: found["generation"]["ratios"][name] for shape, found in plays.items()}
        claims |= judge(name, ratios)
    mates = [found["batchmates"] for found in plays.values()]
    claims |= judge("batchmates", {key: max(m[key] for m in mates) for key in ("logits", "logp")})
    ratios = growing["model/measured"]
    claims |= judge("growth", {name: furthest(column) for name, column in ratios.items()})
    claims |= judge("rounds", {"seconds": rounds["line/measured"]})
    data = {"floor": floors, "play": plays, "growth": growing, "runs": rounds}
    status = bandit.report(out, "bench_cost", claims, data, setting)
    show(data)
    return status


def show(data: dict) -> None:
    for name, found in data["floor"].items():
        spent, parts = found["seconds"], found["profile"].items()
        print(f"\n{name}: a step {spent['step']:.2f} s, its products alone {spent['must']:.2f} s")
        print(f"  at {found['gflop_a_second']:.0f} GFLOP/s;", *(f" {k} {v:.1%}" for k, v in parts))
    for name, found in data["play"].items():
        print(f"{name}, tokens a second: {found['generation']['tokens_a_second']}")
    table, heads = data["growth"], (*BASE, "seconds", "model/", "MiB", "model/")
    print(("\n" + "{:>11}" * 8).format(*heads))
    ratios = table["model/measured"]
    columns = zip(table["seconds"], ratios["seconds"], table["bytes"], ratios["bytes"])
    for point, (seconds, ratio, size, other) in zip(table["points"], columns):
        cells = "".join(f"{n:11,}" for n in point.values())
        print(f"{cells}{seconds:11.3f}{ratio:11.2f}{size / 2**20:11.0f}{other:11.2f}")
    for run in data["runs"]["runs"]:
        phases = "  ".join(f"{name} {spent:.1f}" for name, spent in run["phases"].items())
        print("{rounds} rounds, {processes} processes: {seconds:.1f} s".format_map(run), phases)


if __name__ == "__main__":
    sys.exit(main())
