"""What bf16 costs in nats: python tests/study_precision.py --model FOLDER --data PAIRS --out OUT

A real model scores real pairs in fp32 and in bf16, each response in a row of its own or all in one,
in two layouts of micro-batches, and once more in the same. Differences are per root token (the rms
over responses is what the trainer's check compares with its tolerance) and in h+ - h-, the margin
over beta. Also what each remedy costs: padded tokens of scoring in the training steps' own layout,
seconds of a head in fp32. And how far AdamW and Adafactor move new weights at which rate. Writes
OUT/precision.json; some minutes on a CPU. The record is SmolLM2-135M-Instruct's.
"""

import argparse
import copy
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import toy_bandit as bandit  # noqa: E402
import train_mistral as tm  # noqa: E402

EXPECTED = """
goal    tolerance_holds      rms      1e-3 .1   bf16 against fp32: rms of nats per root token
goal    tolerance_holds      sharing  1e-3 .1   in bf16, one row against a row each
goal    tolerance_holds      layout   0    .1   in bf16, micro-batches of 4 against 1
theorem the_same_is_exact    again    0    0    in bf16, the same micro-batches twice: largest gap
goal    noise_in_a_margin    nats     .1   1    rms of h+ - h- between two bf16 paths
goal    a_head_in_fp32       share    .2   1    of that noise which is left with the head in fp32
goal    adafactors_rate      same     0    .1   moves of weights over AdamW's, at AdamW's rate
goal    adafactors_rate      default  .5   2    at the trainer's default for Adafactor
"""  # kind, claim, value, least and most expected, what it is


@torch.no_grad()
def scores(lm, items, bf16: bool, sharing: bool, micro: int, head=torch.float32):
    """log pi (pairs, 2), and the seconds it took. head: the precision of its product in bf16."""
    lm = copy.deepcopy(lm).to(torch.bfloat16 if bf16 else torch.float32)
    scorer = tm.Scorer(lm, sharing=sharing)
    if bf16 and head == torch.float32:
        last = lm.get_output_embeddings()
        lm.set_output_embeddings(copy.deepcopy(last).to(head))
        scorer.head = lambda states, labels: tm.spac.token_logps(
            lm.get_output_embeddings()(states.to(head)), labels
        )
    since = time.process_time()
    parts = [scorer(items[i : i + micro]) for i in range(0, len(items), micro)]
    return torch.cat(parts).double(), time.process_time() - since


def padding(items, micro: int) -> float:
    """Tokens with their padding, over tokens, all responses in one row."""
    rows = [len(x) + sum(map(len, ys)) for x, ys in items]
    parts = [rows[i : i + micro] for i in range(0, len(rows), micro)]
    return sum(len(part) * max(part) for part in parts) / sum(rows)


def moved(optimizer: str, rate: float, steps=60) -> float:
    """Rms of what steps of noisy gradients do to weights of N(0, .02)."""
    draw = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(256, 256, generator=draw)
    weight, slope = start.clone(), torch.randn(256, 256, generator=draw)
    optimizer = tm.OPTIMIZERS[optimizer]([weight], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = slope + torch.randn(256, 256, generator=draw)
        optimizer.step()
    return (weight - start).square().mean().sqrt().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--out", default="out", help="folder for precision.json")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--data", required=True, help="pairs, as the trainer reads them")
    parser.add_argument("--pairs", type=int, default=32, help="how many are scored")
    args = parser.parse_args()
    tm.start_processes()
    torch.set_num_threads(1)
    words = f"--preset mistral-7b --model {args.model} --data {args.data} --max_response 96"
    config = tm.parse([*words.split(), "--max_prompt", "256"])
    lm, tokenizer = tm.load_model(config)
    rows, dropped = tm.load_rows(config.data, tokenizer, {tokenizer.eos_token_id}, config)
    chosen = random.Random(0).sample(rows, args.pairs)
    items = [(row.prompt, [row.chosen, row.rejected]) for row in chosen]
    sizes = torch.tensor([[len(y) for y in ys] for _, ys in items]).double()

    exact, _ = scores(lm, items, bf16=False, sharing=True, micro=4)
    usual, seconds = scores(lm, items, True, True, 4, torch.bfloat16)
    again, _ = scores(lm, items, True, True, 4, torch.bfloat16)
    apart, _ = scores(lm, items, True, False, 4, torch.bfloat16)
    alone, _ = scores(lm, items, True, True, 1, torch.bfloat16)
    finer, longer = scores(lm, items, True, True, 4)
    finer_apart, _ = scores(lm, items, True, False, 4)

    def gap(a, b) -> dict:
        off = (a - b) / sizes.sqrt()
        margin = (a - b)[:, 0] - (a - b)[:, 1]
        return {"rms": off.square().mean().sqrt().item(), "largest": off.abs().max().item(),
                "mean nats": (a - b).mean().item(),
                "margin": margin.square().mean().sqrt().item()}  # fmt: skip

    gaps = {"bf16 - fp32": gap(usual, exact), "one row - a row each": gap(usual, apart),
            "micro-batches of 4 - 1": gap(usual, alone), "the same twice": gap(usual, again),
            "head in fp32: bf16 - fp32": gap(finer, exact),
            "head in fp32: one row - a row each": gap(finer, finer_apart)}  # fmt: skip
    usually = moved("adamw", 5e-7)
    found = {
        "tolerance_holds": {"rms": gaps["bf16 - fp32"]["rms"],
                            "sharing": gaps["one row - a row each"]["rms"],
                            "layout": gaps["micro-batches of 4 - 1"]["rms"]},
        "the_same_is_exact": {"again": gaps["the same twice"]["largest"]},
        "noise_in_a_margin": {"nats": gaps["one row - a row each"]["margin"]},
        "a_head_in_fp32": {"share": gaps["head in fp32: one row - a row each"]["margin"]
                           / gaps["one row - a row each"]["margin"]},
        "adafactors_rate": {"same": moved("adafactor", 5e-7) / usually,
                            "default": moved("adafactor", tm.ADAFACTOR * 5e-7) / usually},
    }  # fmt: skip
    claims = {}
    for name, values in found.items():
        claims |= bandit.judge(name, values, len(items), EXPECTED)
    by_length = sorted(items, key=lambda item: len(item[0]))
    cost = {"padding by length": padding(by_length, 4), "padding in the steps": padding(items, 4)}
    print(f"a head in fp32 takes {longer / seconds:.2f} of the CPU seconds")  # no clock in a record
    used = {
        "rows": len(rows),
        "dropped": len(dropped),
        "reasons": sorted({d["reason"] for d in dropped}),
    }
    print(json.dumps({"gaps": gaps, "cost": cost, "read": used}, indent=1))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    setting = {"pairs": len(items), "tokens a response": 96, "torch": torch.__version__,
               "transformers": transformers.__version__}  # fmt: skip
    return bandit.report(
        Path(args.out), "precision", claims, {"gaps": gaps, "cost": cost, "read": used}, setting
    )


if __name__ == "__main__":
    raise SystemExit(main())
