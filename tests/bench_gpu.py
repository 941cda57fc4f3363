"""What a GPU makes of train_mistral.py: python tests/bench_gpu.py --out results [PART ...]

smoke  the trainer as a user starts it: a Mistral of 100M random weights, bf16, recomputed layers,
       two rounds; killed (SIGKILL) in round 2, then the same command again. Are its samples those
       of a run that nothing interrupted? Does round-2 as transformers loads it score as it did?
noise  how far log pi of a training step is from play()'s at step 0, where both should be equal:
       7B's width, few layers, ragged rows. As a control, the same rows in play()'s own order.
       Does a gradient made twice repeat every bit: in the trainer's setting, in torch's own?
full   7B's shape, random weights made on the card, Adafactor, the preset's longest rows: tokens a
       second of generation, scoring, training; its share of the card's own bf16 matmul rate; peak
       memory beside the table in train_mistral.py's docstring. What sums in any order, chunks of
       128 logits, a row a response, and wider micro-batches would change.

Parts come in the order of their worth, and OUT/gpu.json is written anew with every figure: a run
cut short keeps what it had, and a later run of other parts adds to it. A part that fails, or that
--limit leaves no time for, says so there. --small rehearses every line with tiny shapes, on a CPU
too (a minute): no goal is judged by its numbers. All of it takes seven minutes of an H100.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from array import array
from pathlib import Path
from statistics import fmean
from typing import NamedTuple
from unittest import mock

BEGAN = time.perf_counter()  # before the seconds that imports take

import bench_bandit as bench  # noqa: E402
import bench_cost as cost  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, MistralConfig  # noqa: E402

sys.path.insert(0, str(bench.ROOT))

import toy_bandit as bandit  # noqa: E402
import train_mistral as tm  # noqa: E402

EXPECTED = """
goal smoke_resumed unequal    0   0  samples unlike those of an uninterrupted run
goal noise_repeats gradients  0   0  gradients that a second pass does not repeat, of all
goal smoke_loaded  loaded_gap 0   .1 round-2 by transformers: rms of nats / root of tokens
goal noise_step_0  gap        0   .1 bf16 at 7B's width: rms of nats / root of tokens
goal full_speed    share      .45 1  FLOPs a step must do / its seconds, of the matmul rate
goal full_memory   peak_GB    0   78 largest peak of playing and training 7B with Adafactor
"""  # kind, part_claim, value, least and most expected, what it is
SMOKE = "--preset mistral-7b --bf16 --recompute --rounds 2 --rows 64 --heldout 16 --lr 1e-4 "
SMOKE += "--max_prompt 16 --max_response 16 --batch 16 --micro_batch 8 --generate_batch 16 "
SMOKE += "--checkpoint_every 2"  # four steps a round
ADAFACTOR = "--preset mistral-7b --optimizer adafactor --bf16 --recompute --lam 10 "


class Plan(NamedTuple):
    start: dict  # shape of smoke's model
    shape: dict  # of noise's and full's; MistralConfig's own is Mistral-7B's
    options: str  # of their trainer, beside the preset's
    depths: tuple  # layers of noise's models, the last one judged
    layers: int  # of full's
    seconds: dict  # a part starts only if so many are left


SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
WIDE, TINY = (dict(zip(SIZES.split(), n)) for n in ((768, 3072, 12, 12, 4), (64, 128, 2, 4, 2)))
CARD = Plan(WIDE, {}, "--generate_batch 128", (2, 8), 32, dict(smoke=115, noise=40, full=80))
SHORT = "--max_prompt 16 --max_response 16 --batch 8 --micro_batch 2 --generate_batch 8"
SMALL = Plan(TINY, TINY | {"vocab_size": 500}, SHORT, (1, 2), 2, dict(smoke=60, noise=2, full=4))


@dataclasses.dataclass
class Record:
    """OUT/gpu.json, and what every part needs."""

    out: Path
    plan: Plan
    device: torch.device
    limit: float  # seconds that the run may take
    about: dict  # where and with what it runs; stands in each part
    data: dict  # part -> what it found

    def left(self) -> float:
        return self.limit - (time.perf_counter() - BEGAN)

    def note(self, part: str, **found) -> None:
        tm.say(f"[{self.limit - self.left():4.0f} s] {part}: {json.dumps(found)[:400]}")
        self.data[part] |= found
        setting = {"processor": bench.processor(), "limit": self.limit}
        result = {"claims": claims_of(self.data), "data": self.data, "setting": setting}
        temporary = self.out / "gpu.json.tmp"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, self.out / "gpu.json")

    def need(self, seconds: float, what: str) -> None:
        told = f"{what} takes about {seconds:.0f} s, and {self.left():.0f} s are left"
        tm.require(self.left() >= seconds, told, TimeoutError)


def claims_of(data: dict) -> dict:
    """The verdicts on what a GPU has measured at full size."""
    claims = {}
    for _, claim, key, *_ in map(str.split, EXPECTED.split("\n")[1:-1]):
        found = data.get(claim.partition("_")[0], {})
        if key in found and found["device"] != "cpu" and not found["small"]:
            claims |= bandit.judge(claim, {key: found[key]}, 1, EXPECTED)
    return claims


def wait() -> float:
    """The clock, once a card has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# -------------------------------------------------------- smoke: the trainer, killed
def lines_of(log: Path) -> list[dict]:
    """Its whole lines, without clock times and memory."""
    lines = map(json.loads, log.read_text().split("\n")[:-1] if log.exists() else [])
    return [{k: v for k, v in x.items() if k not in ("seconds", "peak_bytes")} for x in lines]


def launch(record: Record, command: list[str], out: Path, most: float = math.inf) -> None:
    """Runs the trainer to its end, or to SIGKILL once round 2 has logged so many steps."""
    with open(f"{out}.txt", "a") as told:
        process = subprocess.Popen([*command, str(out)], stdout=told, stderr=told)
    done, end = 0, record.left() - record.plan.seconds["smoke"]
    while process.poll() is None and done < most and record.left() > max(0, end):
        time.sleep(0.01)
        done = sum((x["event"], x["round"]) == ("step", 2) for x in lines_of(out / "log.jsonl"))
    process.kill()
    code, said = process.wait(), Path(f"{out}.txt").read_text()[-2000:]
    expected = 0 if most == math.inf else -signal.SIGKILL
    tm.require(code == expected, f"{out.name} ended with {code}: {said}", RuntimeError)


def played_in(out: Path) -> dict:
    """{(name of play(), row): (answers, log pi)}"""
    files = {path: torch.load(path, weights_only=True) for path in out.glob("play/*/*")}
    return {(path.parent.name, row): told for path in files for row, told in files[path].items()}


def smoke(record: Record) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, world = Path(name), tm.CopyDigits()
        data, straight, killed = (folder / name for name in ("pairs.jsonl", "straight", "killed"))
        pairs, tokenizer = world.pairs(100, seed=0), world.tokenizer()
        data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        torch.manual_seed(0)
        shape = MistralConfig(**record.plan.start, vocab_size=len(tokenizer))
        lm = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        for part in (lm, tokenizer):
            part.save_pretrained(folder / "start")
        argv = [*SMOKE.split(), "--model", str(folder / "start"), "--data", str(data), "--out"]
        command = [sys.executable, str(bench.ROOT / "train_mistral.py"), *argv]
        record.note("smoke", parameters=sum(weight.numel() for weight in lm.parameters()))

        launch(record, command, straight)
        launch(record, command, killed, most=3)
        before = lines_of(killed / "log.jsonl")
        launch(record, command, killed)
        expected, played = played_in(straight), played_in(killed)
        unlike = [key for key in expected if played.get(key, [()])[0] != expected[key][0]]
        logs = [lines_of(out / "log.jsonl") for out in (straight, killed)]
        record.note(
            "smoke", samples=len(expected), unequal=len(unlike), unlike=unlike[:20],
            log_lines=len(logs[0]), log_lines_unequal=sum(a != b for a, b in zip(*logs)),
            # Where lines differ before the kill, the card's arithmetic does, and not the restart.
            lines_at_kill=len(before), unequal_at_kill=sum(a != b for a, b in zip(logs[0], before)),
        )  # fmt: skip

        rows, _ = tm.load_rows(str(data), tokenizer, {lm.config.eos_token_id}, tm.parse(argv[:-1]))
        told = {row: logps for (name, row), (_, logps) in played.items() if name == "heldout-2"}
        for key, number in (("loaded_gap", 2), ("gap_of_round_1", 1)):  # the latter a control
            lm, off = AutoModelForCausalLM.from_pretrained(killed / f"round-{number}"), []
            lm.to(record.device)
            for row in (row for row in rows if row.number in told):
                logp = tm.own_logp(lm, row.prompt, row.chosen).item()
                off.append((logp - told[row.number][0]) ** 2 / len(row.chosen))
            record.note("smoke", **{key: fmean(off) ** 0.5}, dtype=str(lm.dtype))


# -------------------------------------------------------- noise: step 0 in bf16
@contextlib.contextmanager
def run_of(record: Record, layers: int, ragged: bool):
    """A run with random weights, made where they will be used. Ragged: prompts and responses of
    1/8 to all of the longest, and answers that end; else all are longest. Here noise is measured,
    where the trainer would refuse it."""
    with tempfile.TemporaryDirectory() as out, mock.patch.dict(tm.TOLERANCE, {True: math.inf}):
        config = tm.parse([*(ADAFACTOR + record.plan.options).split(), "--out", out])
        shape = MistralConfig(**record.plan.shape | {"num_hidden_layers": layers})
        torch.manual_seed(0)
        with record.device:
            lm = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        draw, V, longest = random.Random(0), shape.vocab_size, config.max_response

        def ids(most):
            length = draw.randint(most // 8, most) if ragged else most
            return array("i", draw.choices(range(3, V), k=length))

        sizes = config.max_prompt, longest, longest
        rows = [tm.Row(i, *map(ids, sizes)) for i in range(1, config.generate_batch + 1)]
        often = range(3, 3 + 4 * V // longest)  # one of them is drawn with probability 4 / longest
        stops = {*often} if ragged else {V}  # the latter is never drawn
        state = dict(round=1, step=0, saves=0, pi_t="", largest=0.0, noise=0.0, first={})
        state |= {"seconds": {}, "peak_bytes": {}, "logs": {"log.jsonl": []}}
        run = tm.Run(config, Path(out), tm.Scorer(lm), None, stops, rows, [], state)
        tm.shard(run.scorer, record.device, config)
        tm.check_model(run)
        run.charge("load")
        yield run


def unrepeated(run: tm.Run, rows: list[tm.Row], repeatable: bool) -> int:
    """How many weights' gradients a second pass over the same rows does not repeat to the bit."""
    torch.use_deterministic_algorithms(repeatable)
    made = []
    for _ in "ab":
        run.scorer.zero_grad()
        tm.accumulate(run, rows)
        made.append([tm.local(weight.grad).clone() for weight in run.scorer.parameters()])
    run.scorer.zero_grad()
    torch.use_deterministic_algorithms(torch.cuda.is_available())  # as the trainer has it
    return sum(not a.equal(b) for a, b in zip(*made))


def noise(record: Record) -> None:
    for layers in record.plan.depths:
        with run_of(record, layers, ragged=True) as run:
            played, found = tm.play(run, run.rows, "noise"), {"sharing": run.state["sharing"]}
            run.config = dataclasses.replace(run.config, batch=len(played))
            alike = sorted(played, key=lambda row: (len(row.prompt), row.number))  # as in play()
            for order, rows in {"trained": tm.batches_of(run, played)[0], "played": alike}.items():
                tm.check_step(run, values := tm.accumulate(run, rows), norm=0.0)
                gap = fmean(pair["gap"] for pair in values) ** 0.5  # as check_step() has it
                found[f"as_{order}"] = {"gap": gap, "margin": run.state["noise"]}
                run.scorer.zero_grad()
            for name, repeatable in {"repeatable": True, "any_order": False}.items():
                few = rows[: run.config.micro_batch]
                found[f"unrepeated_{name}"] = unrepeated(run, few, repeatable)
            found["gradients"] = len([*run.scorer.parameters()])
        record.note("noise", **{f"layers_{layers}": found})
    record.note("noise", gap=found["as_trained"]["gap"], gradients=found["unrepeated_repeatable"])


# -------------------------------------------------------- full: 7B's shape
def matmul_rate(record: Record) -> float:
    """FLOPs a second of the model's largest bf16 product: the best of six times fifty."""
    shape, device, times = MistralConfig(**record.plan.shape), record.device, []
    m, k, n = 8192, shape.hidden_size, shape.intermediate_size
    x, w = (torch.randn(size, device=device).bfloat16() for size in ((m, k), (k, n)))
    for _ in range(6):
        start = wait()
        for _ in range(50):
            torch.mm(x, w)
        times.append(wait() - start)
    return 50 * 2 * m * k * n / min(times)


def tokens_of(rows: list[tm.Row]) -> int:
    return sum(len(ids) for row in rows for ids in (*row[1:4], *row.generated))


def peaks(run: tm.Run) -> dict:
    """GB by phase, as the trainer notes them: of the card; without one, the process's so far."""
    return {phase: size / 1e9 for phase, size in run.state["peak_bytes"].items()}


def training(run: tm.Run, played: list[tm.Row], card: float, **options) -> dict:
    """train() makes two steps. The second one is measured: all of it, and its passes alone."""
    config = run.config = dataclasses.replace(run.config, **options)
    rows, accumulate, starts, passes, ends = played * config.batch, tm.accumulate, [], [], []

    def timed(run, batch):
        starts.append(wait())
        values = accumulate(run, batch)
        passes.append(wait() - starts[-1])
        return values

    run.log, run.save_state = lambda *_: ends.append(wait()), lambda *_: None
    run.average, run.state["step"], run.state["peak_bytes"]["train"] = (), 0, 0
    with mock.patch.object(tm, "accumulate", timed):
        tm.train(run, rows[: 2 * config.batch], None)
    sizes = cost.Sizes(config.batch, config.max_prompt, config.max_response)
    must = cost.flops(cost.products(run.scorer.lm.config, sizes, must=True))["all"] / card
    seconds = [end - start for start, end in zip(starts, ends)]
    return {
        "pairs": config.batch, "micro_batch": config.micro_batch, "average": config.average,
        "step_seconds": seconds, "pass_seconds": passes, "peak_GB": peaks(run)["train"],
        "tokens_a_second": tokens_of(rows[: config.batch]) / seconds[1],
        "share": must / seconds[1], "share_in_passes": must / passes[1],
    }  # fmt: skip


def full(record: Record) -> None:
    card = matmul_rate(record)
    told = re.search(r"^ +1 +(\d+) +(\d+) +\d+$", tm.__doc__, re.M)  # one card, Adafactor
    table = dict(zip(("play", "train"), map(int, told.groups())))
    record.note("full", matmul_tflop_a_second=card / 1e12, table_GB=table)
    with run_of(record, record.plan.layers, ragged=False) as run:
        count, spent = sum(w.numel() for w in run.scorer.parameters()), run.state["seconds"]
        record.note("full", parameters=count, load_seconds=spent["load"], peaks_GB=peaks(run))
        played = tm.play(run, run.rows, "full")
        rates = {"generated": sum(len(row.generated[0]) for row in played) / spent["generate"]}
        rates["scored"] = tokens_of(played) / spent["score"]
        record.note("full", tokens_a_second=rates, peaks_GB=peaks(run))

        # Steps of two micro-batches: the second one lies beside the first one's gradients.
        batch, pairs, average = run.config.batch, run.config.micro_batch, run.config.average

        def steps(name: str, micro: int, **change) -> dict:
            record.need(4 * micro * pace + 5, name)
            before = {key: getattr(run.scorer, key) for key in change}
            vars(run.scorer).update(change)
            options = dict(batch=2 * micro, micro_batch=micro, average=0.0)
            record.note("full", **{name: (found := training(run, played, card, **options))})
            vars(run.scorer).update(before)
            return found

        pace = 0.0  # seconds a pair, not known yet
        few = steps(f"micro_batch_{pairs}", pairs)
        pace = few["pass_seconds"][1] / (2 * pairs)
        record.note("full", noise_of_margins=run.state["noise"])  # at step 0, all layers
        record.need(2 * batch * pace + 20, "training")
        step = training(run, played, card, batch=batch, micro_batch=pairs, average=average)
        most = max(peaks(run).values())
        record.note("full", training=step, share=step["share"], peaks_GB=peaks(run), peak_GB=most)

        torch.use_deterministic_algorithms(False)
        steps("any_order", pairs)
        steps(f"any_order_micro_batch_{2 * pairs}", 2 * pairs)
        torch.use_deterministic_algorithms(torch.cuda.is_available())
        steps("logits_chunk_128", pairs, logits_chunk=128)
        steps("rows_apart", pairs, sharing=False)
        steps(f"micro_batch_{2 * pairs}", 2 * pairs)
        try:  # last: once memory ran out, nothing can be trusted
            steps(f"micro_batch_{4 * pairs}", 4 * pairs)
        except torch.OutOfMemoryError:
            record.note("full", memory_ran_out_at=4 * pairs)


PARTS = {"smoke": smoke, "noise": noise, "full": full}


def attempt(record: Record, name: str) -> str:
    """Runs a part. A first run on a card should come back with the others, whatever fails."""
    start, found, record.data[name] = time.perf_counter(), {"status": "done"}, {**record.about}
    record.note(name, status="running")
    try:
        record.need(record.plan.seconds[name], name)
        PARTS[name](record)
    except TimeoutError as error:
        found = {"status": f"left out: {error}"}
    except (Exception, SystemExit) as error:
        found = {"status": "failed", "error": traceback.format_exc()[-3000:]}
        if isinstance(error, torch.OutOfMemoryError):
            found["peak_GB"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    record.note(name, **found, seconds=time.perf_counter() - start)
    gc.collect()
    torch.cuda.empty_cache()
    return found["status"]


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(None, None, __doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help="of the above; none: all")
    parser.add_argument("--out", default="out", help="folder for gpu.json")
    parser.add_argument("--limit", type=float, default=400, help="seconds that all may take")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on a CPU too")
    config, gpu = parser.parse_args(), torch.cuda.is_available()
    if unknown := {*config.parts} - {*PARTS}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    if not (gpu or config.small):
        raise SystemExit("no GPU here, nothing was measured; --small tries the code on this CPU")
    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    threads = len(os.sched_getaffinity(0)) if gpu else 1  # bench_bandit asked for one
    torch.set_num_threads(threads)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}  # of smoke's processes
    about = {"device": torch.cuda.get_device_name() if gpu else "cpu", "small": config.small}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"cuda": torch.version.cuda, "threads": threads}
    path, plan = out / "gpu.json", SMALL if config.small else CARD
    data = json.loads(path.read_text())["data"] if path.exists() else {}
    record = Record(out, plan, tm.start_processes(), config.limit, about, data)
    ends = [attempt(record, name) for name in PARTS if name in (config.parts or PARTS)]
    for claim, verdict in claims_of(record.data).items():
        print("ok" if verdict["holds"] else "MISSED", claim, verdict["value"], verdict["limit"])
    return int("failed" in ends)


if __name__ == "__main__":
    sys.exit(main())
