"""Mistral-7B's shape on one 80 GB card: python tests/bench_gpu.py --out results

Random weights, made on the card, so that nothing is downloaded: fp32 masters and gradients (29 GB
each), bf16 compute through train_mistral.shard (FSDP2), layers recomputed, Adafactor. Real code
throughout: play() samples and scores, train() trains, rows of 1,024 tokens. Measured: tokens a
second and their share of the card's own bf16 matmul rate; peak memory by part; generation beside
transformers' continuous batching; the largest micro-batch, doubled until memory runs out (last, as
nothing can be trusted afterwards). A part that fails says so in the record and the others go on.
Not run on a GPU yet; ten minutes is an estimate. Without a GPU, --small runs every line on a CPU
with a tiny model; its numbers mean nothing. Writes OUT/bench_gpu.json, which says what it ran on.
"""

import argparse
import dataclasses
import gc
import os
import random
import resource
import sys
import tempfile
import time
from array import array
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import bench_bandit as bench  # noqa: E402
import bench_cost as cost  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, MistralConfig  # noqa: E402

sys.path.insert(0, str(bench.ROOT))

import toy_bandit as bandit  # noqa: E402
import train_mistral as tm  # noqa: E402

EXPECTED = """
goal matmul_share training   .45 1   FLOPs a step must do / its seconds, of the bf16 matmul rate
goal generation   continuous 3   1e9 tokens a second, continuous batching / sample(), plain bf16
goal memory       peak_GB    0   80  largest peak of playing and training, GB
"""  # kind, claim, value, least and most expected, what it is
NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Plan:
    shape: MistralConfig  # its defaults are Mistral-7B-v0.1's
    sizes: cost.Sizes  # a micro-batch; prompt + 3 responses are a row
    passes: int = 4  # micro-batches a step
    steps: int = 3
    samples: int = 128  # prompts that generation answers
    most: int = 256  # pairs of the largest micro-batch tried
    product: tuple = (8192, 4096, 14336)  # of the card's matmul rate


def small_plan() -> Plan:
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=500)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2)
    sizes, product = cost.Sizes(2, 16, 16), (256, 64, 128)
    return Plan(MistralConfig(**shape), sizes, 2, 2, 8, 4, product)


def wait(device: torch.device) -> float:
    """The clock, once the card has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device: torch.device, action) -> float:
    start = wait(device)
    action()
    return wait(device) - start


def bytes_now(device: torch.device) -> int:
    gpu = device.type == "cuda"
    return torch.cuda.memory_allocated() if gpu else resource.getrusage(0).ru_maxrss * 1024


def peak(device: torch.device) -> int:
    """The most bytes alive since the last call; a CPU's process never falls."""
    if device.type != "cuda":
        return bytes_now(device)
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rate(plan: Plan, device: torch.device) -> float:
    """FLOPs a second of one large bf16 product."""
    m, k, n = plan.product
    x, w = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in ((m, k), (k, n)))
    (x @ w).sum()
    times = [seconds(device, lambda: [x @ w for _ in range(20)]) / 20 for _ in range(5)]
    return 2 * m * k * n / sorted(times)[2]


def rows_of(plan: Plan, count: int) -> list[tm.Row]:
    draw, (_, prompt, response) = random.Random(0), plan.sizes

    def ids(length):
        return array("i", draw.choices(range(3, plan.shape.vocab_size), k=length))

    return [tm.Row(i, ids(prompt), ids(response), ids(response)) for i in range(1, count + 1)]


def run_of(plan: Plan, out: Path, device: torch.device, dtype: torch.dtype) -> tm.Run:
    """A run of train_mistral.py with random weights, made where they will be used."""
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(plan.shape, dtype=dtype)
    pairs, prompt, response = plan.sizes
    config = tm.Config(
        preset="mistral-7b", out=str(out), max_prompt=prompt, max_response=response, epochs=1,
        beta=0.1, lam=10.0, optimizer="adafactor", lr=1e-9, batch=pairs * plan.passes,
        micro_batch=pairs, generate_batch=64, heldout=0,
    )  # fmt: skip
    state = dict(round=1, step=0, saves=0, pi_t="", largest=0.0, seconds={}, peak_bytes={})
    state |= {"noise": 0.0, "first": {}}
    state["logs"] = {"log.jsonl": [], "samples.jsonl": []}
    rows = rows_of(plan, config.batch * plan.steps)
    return tm.Run(config, out, tm.Scorer(lm), None, {2}, rows, [], state)


# -------------------------------------------------------- parts


def generation(plan: Plan, out: Path, device: torch.device) -> dict:
    """Of a plain bf16 copy, which FSDP2 does not surround: sample() and continuous batching on the
    same prompts; answers end where they end, on average after a quarter of the longest."""
    gpu = device.type == "cuda"
    run = run_of(plan, out, device, torch.bfloat16 if gpu else torch.float32)
    run.scorer.requires_grad_(False)
    longest = 2 * plan.sizes.response
    run.config = dataclasses.replace(run.config, max_response=longest)
    prompts = cost.ragged(run, plan.samples, plan.sizes.prompt)
    return cost.generation(run, prompts, 64, 1, partial(wait, device)) | {"longest": longest}


def training(run: tm.Run, plan: Plan, device: torch.device, card: float) -> dict:
    """play() and train() of train_mistral.py, once warm, and the memory of each part."""
    tm.Run.save_state = lambda *_: None  # 29 GB a state, and nothing to go on with
    run.config = dataclasses.replace(run.config, bf16=True, recompute=True, average=0.0)
    tm.shard(run.scorer, device, run.config)
    free()
    memory = {"weights": bytes_now(device)}
    peak(device)
    tm.check_model(run)

    spent = run.state["seconds"]
    run.since = wait(device)
    played = tm.play(run, run.rows, "bench")
    drawn = sum(len(row.generated[0]) for row in played)
    row = plan.sizes.prompt + 3 * plan.sizes.response
    found = {"play_seconds": dict(spent), "sampled_tokens_a_second": drawn / spent["generate"]}
    found["scored_tokens_a_second"] = len(played) * row / spent["score"]
    memory["playing_peak"] = max(run.state["peak_bytes"].values())
    free()
    peak(device)
    tm.accumulate(run, played[: run.config.micro_batch])
    memory["backward_peak"], memory["weights_and_gradients"] = peak(device), bytes_now(device)
    memory["gradients"] = memory["weights_and_gradients"] - memory["weights"]
    memory["activations"] = memory["backward_peak"] - memory["weights_and_gradients"]

    def train(rows):
        run.state["step"] = 0
        return seconds(device, lambda: tm.train(run, rows, None))

    run.scorer.zero_grad()  # train() clears its own gradients alone
    train(played[: run.config.batch])
    memory["optimizer_and_rest"] = bytes_now(device) - memory["weights"]  # no gradient is left
    # That step's rate was next to nothing: pi is pi_t still, and train() will check it.
    step = train(played) / plan.steps
    memory["training_peak"] = max(peak(device), run.state["peak_bytes"]["train"])
    must, does = (
        plan.passes * cost.flops(cost.products(plan.shape, plan.sizes, True, must))["all"]
        for must in (True, False)
    )
    tokens = run.config.batch * row
    found |= {"tokens_a_second": tokens / step, "step_seconds": step, "tokens_a_step": tokens}
    found |= {"share": must / step / card, "share_with_recomputation": does / step / card}
    return found | {"memory_GB": {name: size / 1e9 for name, size in memory.items()}}


def largest_batch(run: tm.Run, plan: Plan, device: torch.device) -> dict:
    """Tokens a second of forward and backward by pairs a micro-batch, until memory runs out."""
    length, rows, pairs, tried = plan.sizes.prompt + 3 * plan.sizes.response, run.rows, 1, {}
    while pairs <= plan.most:
        few = (rows * pairs)[:pairs]
        few = [row._replace(generated=[[*row.chosen]], logps=[-1.0] * 3) for row in few]
        run.config = dataclasses.replace(run.config, micro_batch=pairs)
        run.scorer.zero_grad()
        free()
        peak(device)
        try:
            once = seconds(device, lambda few=few: tm.accumulate(run, few))
        except torch.OutOfMemoryError:
            break
        tried[pairs] = {"tokens_a_second": pairs * length / once, "peak_GB": peak(device) / 1e9}
        pairs *= 2
    return {"tried": tried, "largest": pairs // 2, "memory_ran_out": pairs <= plan.most}


def attempt(name: str, part, *arguments):
    """What a part found, or why it failed: a first run should come back with the rest."""
    tm.say(name)
    try:
        return part(*arguments)
    except (Exception, SystemExit) as error:
        tm.say(f"{name} failed: {error!r}")
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def main() -> int:
    style = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("--out", default="out", help="folder for bench_gpu.json")
    parser.add_argument("--small", action="store_true", help="a tiny model, on a CPU too")
    config = parser.parse_args()
    if not (torch.cuda.is_available() or config.small):
        raise SystemExit("no GPU here, nothing was measured; --small tries the code on this CPU")
    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    device, gpu = tm.start_processes(), torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)
    plan = small_plan() if config.small else Plan(MistralConfig(), cost.Sizes(8, 256, 256))
    ran_on = torch.cuda.get_device_name() if gpu else f"CPU only: {bench.processor()}"
    setting = {"ran_on": ran_on, "small": config.small, "cuda": torch.version.cuda}
    setting |= {"sizes": plan.sizes._asdict(), "shape": plan.shape.to_diff_dict()}
    tm.say(f"on {ran_on}" + ", a tiny model: its numbers mean nothing" * config.small)

    card = rate(plan, device)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        generated = attempt("generation", generation, plan, place, device)
        free()
        run = run_of(plan, place, device, torch.float32)
        setting["parameters"] = sum(weight.numel() for weight in run.scorer.parameters())
        trained = attempt("training", training, run, plan, device, card)
        widest = attempt("largest micro-batch", largest_batch, run, plan, device)

    memory = trained.get("memory_GB", {})
    most = max(memory.get("playing_peak", NAN), memory.get("training_peak", NAN))
    claims = bandit.judge("matmul_share", {"training": trained.get("share", NAN)}, 1, EXPECTED)
    ratio = 1 / generated.get("ratio", NAN)
    claims |= bandit.judge("generation", {"continuous": ratio}, 1, EXPECTED)
    claims |= bandit.judge("memory", {"peak_GB": most}, 1, EXPECTED)
    data = {"generation": generated, "training": trained, "micro_batch": widest}
    data["matmul"] = {"tflop_a_second": card / 1e12}
    status = bandit.report(out, "bench_gpu", claims, data, setting)
    for name, found in data.items():
        print(f"\n{name}")
        for key, value in found.items():
            print(f"  {key:28}{value}")
    return status


if __name__ == "__main__":
    sys.exit(main())
