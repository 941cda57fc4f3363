"""SPAC on causal language models: offline preference pairs in, aligned rounds out.

    python train_mistral.py                 a tiny Mistral whose true reward is known
    torchrun --nproc_per_node 8 train_mistral.py --preset mistral-7b --model .. --data .. --out OUT

Round t: play() draws a true sample y' ~ pi_t for every prompt and keeps log pi_t of (chosen,
rejected, y'); train() starts pi at pi_t and descends spac.spac_loss. Those numbers are all that is
left of pi_t: no second model is in memory. Round 0 is the start, or a short SFT. A pair is prompt,
chosen, rejected, as text or lists of role/content messages, or two whole conversations. OUT gets
round-N (Hugging Face folders), log.jsonl, curves.png, samples.jsonl, dropped.jsonl (rows not used,
and why), run.json, and what a restart needs: the same command goes on where a run was cut.

What fits where: fp32 master weights are sharded by FSDP2, GPUs compute in bf16. Bytes a parameter:
4 weights + 4 gradients + 8 for AdamW, next to none for Adafactor (row and column means). Mistral-7B
(7.24e9): AdamW 116 GB, 14.5 a card on 8; Adafactor 58 GB, one 80 GB card. While playing each card
holds bf16 weights besides, 14.5 GB; activations of 8k tokens, recomputed by layers, take 4 GB.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import threading
import time
from array import array
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import datasets
import jinja2
import safetensors
import tokenizers
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

import spac

CRITICS = {"smoothed": spac.smoothed_critic, "linear": spac.linear_critic}
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}
SFT_MODEL = "alignment-handbook/zephyr-7b-sft-full@ac6e600eefcce74f5e8bae1035d4f66019e93190"
PAIRS = "HuggingFaceH4/ultrafeedback_binarized"
TOLERANCE = {"cpu": 1e-4, "cuda": 0.05}  # of log pi in fp32, bf16: nats per root of its tokens
RESCUE = "Go on from the last whole round in a new folder: --model OUT/round-N --out NEW"
LEFT = "asked to stop: what is done is saved, the same command goes on from here"
leaving = threading.Event()  # set by SIGTERM


def require(condition, problem: str, error=SystemExit) -> None:
    if not condition:
        raise error(problem)


# -------------------------------------------------------- configuration
def option(tiny, mistral_7b, help: str, choices=None):
    presets = {"tiny": tiny, "mistral-7b": mistral_7b}
    return dataclasses.field(default=tiny, metadata=dict(presets, help=help, choices=choices))


@dataclasses.dataclass(frozen=True)
class Config:
    """Each value in the presets tiny and mistral-7b (our choice, not the paper's; yours too)."""

    preset: str = option("tiny", "mistral-7b", "named defaults", ["tiny", "mistral-7b"])
    out: str = option("out/tiny", "out/mistral-7b", "folder of the run, new or to go on with")
    model: str = option("", SFT_MODEL, "where self-play starts: folder, or hub NAME[@REVISION]")
    data: str = option("", PAIRS, "pairs: .jsonl, .parquet, or hub NAME[@REVISION]")
    split: str = option("", "train_prefs", "split of hub data")
    rows: int = option(1000, 0, "train on the first ROWS usable rows; 0 is all")
    heldout: int = option(500, 500, "rows split off for held-out accuracy and each round's samples")
    heldout_data: str = option("", "", "such rows from another file instead")
    max_prompt: int = option(8, 512, "tokens of a prompt; a longer one loses its beginning")
    max_response: int = option(8, 512, "tokens of a response, y' too; a longer one is cut")
    rounds: int = option(5, 3, "rounds of self-play")
    epochs: int = option(2, 1, "passes over the pairs in a round")
    sft_epochs: int = option(10, 0, "passes of supervised training on both responses, as round 0")
    sft_lr: float = option(3e-3, 1e-5, "learning rate of those")
    beta: float = option(0.3, 0.1, "1 / eta: reward per nat of log-ratio to pi_t")
    lam: float = option(5.0, 10.0, "weight of the data against the critic's doubt; inf: no critic")
    critic: str = option("smoothed", "smoothed", "the doubt: Eq. 30 or Eq. 29", list(CRITICS))
    optimizer: str = option("adamw", "adamw", "adafactor: lr is per weight RMS", list(OPTIMIZERS))
    lr: float = option(3e-4, 5e-7, "peak of warm-up and cosine, anew each round")
    warmup: float = option(0.1, 0.1, "share of a round's steps that warm up")
    clip: float = option(1.0, 1.0, "largest gradient norm")
    batch: int = option(64, 128, "pairs a step, over all processes")
    micro_batch: int = option(64, 4, "pairs a forward pass of a process: memory, not the loss")
    generate_batch: int = option(250, 64, "prompts sampled together; each batch has its seed")
    checkpoint_every: int = option(50, 50, "steps between saved states")
    seed: int = option(0, 0, "of everything random")
    dry_run: bool = option(False, False, "print the plan and touch nothing")


def parse(argv: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    fields = {field.name: field.metadata for field in dataclasses.fields(Config)}
    for name, about in fields.items():
        text = f"{about['help']} [{about['tiny']} | {about['mistral-7b']}]"
        kind = dict(type=type(about["tiny"]), choices=about["choices"])
        kind = kind if name != "dry_run" else dict(action="store_true")
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "tiny")
    config = Config(**{name: about[preset] for name, about in fields.items()} | given)
    if preset == "tiny" and (config.model or config.data):
        parser.error("tiny makes its own model and data: add --preset mistral-7b to use yours")
    least = dict(max_prompt=2, rows=0, heldout=0, sft_epochs=0, seed=0, warmup=0.0)
    for name, value in vars(config).items():
        bound = least.get(name, 1 if type(value) is int else 1e-12)
        if type(value) in (int, float) and not value >= bound:
            parser.error(f"--{name} must be at least {bound}")
    return config


# -------------------------------------------------------- a world whose true reward is known
class CopyDigits:
    """Six digits, to be repeated. The data policy copies each with probability .6 and else writes
    a random digit. Letters, which the model could write, and other lengths it never does."""

    characters = "=0123456789abcdefghij"
    best = 3.0

    def reward(self, prompt: str, response: str) -> float:
        """r* = 3 x the share of right positions, in [0, 3]."""
        return self.best * sum(a == b for a, b in zip(prompt[:6], response)) / 6

    def outside(self, response: str) -> bool:
        """Whether no response of the data can look like this one."""
        return not (len(response) == 6 and response.isdigit())

    def pairs(self, count: int, seed: int):
        """Two draws of the data policy a prompt, labelled by Bradley-Terry on r*."""
        rng, digits = random.Random(seed), "0123456789"
        for _ in range(count):
            x = "".join(rng.choices(digits, k=6))
            copies = [[d if rng.random() < 0.6 else rng.choice(digits) for d in x] for _ in "ab"]
            a, b = map("".join, copies)
            ahead = self.reward(x, a) - self.reward(x, b)
            chosen, rejected = (a, b) if rng.random() < 1 / (1 + math.exp(-ahead)) else (b, a)
            yield {"prompt": x, "chosen": chosen, "rejected": rejected}

    def tokenizer(self):
        ids = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *self.characters])}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges=[]))  # a character a token
        backend.decoder = tokenizers.decoders.Fuse()
        special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m.content }}"
            "{{ '=' if m.role == 'user' else eos_token }}{% endfor %}"
        )
        return tokenizer

    def model(self, seed: int):
        shape = transformers.MistralConfig(
            vocab_size=3 + len(self.characters), hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=None,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(shape)


# -------------------------------------------------------- pairs, from text to ids
PLAIN_TEMPLATE = (  # for a tokenizer without a chat template; the rounds are saved with it
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


class Unusable(ValueError):
    """Why a row is dropped."""


class Row(NamedTuple):
    number: int  # in its source, from 1
    prompt: array  # ids; the same for all responses, y' too
    chosen: array
    rejected: array


def pinned(source: str) -> tuple[str, str]:
    """NAME or NAME@REVISION -> both."""
    name, _, revision = (source, "", "") if os.path.exists(source) else source.partition("@")
    return name, revision or "main"


def read_raw(source: str, config: Config):
    """Yields the rows of a .jsonl (None for a line that is not JSON), .parquet or hub data set."""
    if config.preset == "tiny":
        yield from CopyDigits().pairs(config.rows + config.heldout, config.seed)
    elif source.endswith(".parquet"):
        yield from datasets.load_dataset("parquet", data_files=source, split="train")
    elif not source.endswith(".jsonl"):
        name, revision = pinned(source)
        yield from datasets.load_dataset(name, revision=revision, split=config.split)
    else:
        for line in Path(source).read_bytes().splitlines():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):  # also what is not UTF-8, or nested without end
                yield None


def conversations(row) -> list[list[dict]]:
    """Any of the three forms -> two conversations, ending in the chosen and the rejected answer."""
    require(isinstance(row, dict), "not a JSON object", Unusable)
    both = []
    for field in ("chosen", "rejected"):
        turns, prompt = row.get(field), row.get("prompt")
        turns = [{"role": "assistant", "content": turns}] if isinstance(turns, str) else turns
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        require(turns and isinstance(turns, list), f"no {field}, as text or messages", Unusable)
        if len(turns) == 1:  # the prompt stands apart
            require(isinstance(prompt, list), "no prompt, as text or messages", Unusable)
            turns = prompt + turns
        for turn in turns:
            text = turn.get("content") if isinstance(turn, dict) else None
            require(isinstance(text, str), "a message without text", Unusable)
            require(text.strip(), "an empty prompt or response", Unusable)
            require(text == text.encode(errors="replace").decode(), "not Unicode", Unusable)
        roles = [turn.get("role") for turn in turns]
        roles = roles[roles[0] == "system" :]
        alternating = roles and roles == ["user", "assistant"] * (len(roles) // 2)
        require(alternating, "wrong role order", Unusable)
        both.append([{key: turn[key] for key in ("role", "content")} for turn in turns])
    require(both[0][:-1] == both[1][:-1], "chosen and rejected have different prompts", Unusable)
    require(both[0] != both[1], "chosen equals rejected", Unusable)
    return both


def encode(row, number: int, tokenizer, stops: set[int], config: Config) -> Row:
    """Text to ids by the chat template, in one piece: what follows the prompt's ids is the
    response, up to its end token, which is lost if the response is cut. Control tokens typed by a
    person ("</s>") stay the text they are: only the template writes control tokens."""
    both, responses, bos = conversations(row), [], [tokenizer.bos_token_id]
    options = dict(tokenize=True, return_dict=False, sanitize_control_tokens=True)
    render = partial(tokenizer.apply_chat_template, **options)
    try:
        prompt, *wholes = render(both[0][:-1], add_generation_prompt=True), *map(render, both)
    except jinja2.TemplateError:
        raise Unusable("refused by the chat template") from None
    for ids in wholes:
        require(ids[: len(prompt)] == prompt, "the template rewrites its own prompt", Unusable)
        ids = ids[len(prompt) :]
        ends = [i for i, token in enumerate(ids, 1) if token in stops]
        ids = ids[: ends[-1]] if ends else [*ids, tokenizer.eos_token_id]
        require(len(ids) > 1, "nothing of a response is left", Unusable)
        responses.append(ids[: config.max_response])
    require(responses[0] != responses[1], "chosen equals rejected where they are cut", Unusable)
    if prompt[:1] != bos and tokenizer("a").input_ids[:1] == bos:
        prompt = bos + prompt  # the template left it to the tokenizer
    kept = bos if prompt[:1] == bos and len(prompt) > config.max_prompt else []
    prompt = kept + prompt[max(0, len(prompt) - config.max_prompt + len(kept)) :]
    return Row(number, *(array("i", ids) for ids in (prompt, *responses)))


def load_rows(source: str, tokenizer, stops, config: Config) -> tuple[list[Row], list[dict]]:
    """The usable rows of a source, and the others with the reason."""
    rows, dropped = [], []
    try:
        raw = list(read_raw(source, config))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SystemExit(f"cannot read {source} (.jsonl, .parquet, hub name): {error}") from None
    for number, row in enumerate(tqdm(raw, "reading", disable=dist.get_rank() > 0 or None), 1):
        try:
            rows.append(encode(row, number, tokenizer, stops, config))
        except Unusable as reason:
            dropped.append({"data": source, "row": number, "reason": str(reason)})
    return rows, dropped


def split_off(rows: list[Row], config: Config) -> tuple[list[Row], list[Row]]:
    """(rows to train on, held-out rows), apart at random, each in the data's order."""
    apart = random.Random(config.seed).sample(rows, min(len(rows) // 2, config.heldout))
    numbers = {row.number for row in apart}
    return [r for r in rows if r.number not in numbers], [r for r in rows if r.number in numbers]


# -------------------------------------------------------- processes
def start_processes() -> torch.device:
    """Joins torchrun's processes, or is a group of one."""
    gpu, index = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if gpu:
        torch.cuda.set_device(index)
    if not dist.is_initialized():
        alone = dict(store=dist.HashStore(), rank=0, world_size=1)
        group = {} if "WORLD_SIZE" in os.environ else alone
        patience = timedelta(hours=4)  # ranks wait for one another's samples and files
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=patience, **group)
    return torch.device("cuda", index) if gpu else torch.device("cpu")


def gather(value=None) -> list:
    """Every rank's value, in order. Waits for all of them."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def seed_of(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# -------------------------------------------------------- the model, and log pi(y|x)
Item = tuple[array, list[array]]  # a prompt's ids, and those of K responses to it


class Scorer(nn.Module):
    """A language model whose forward is log pi(y|x): the one place where anything is scored.

    Sharing writes [x, y+, y-, y'] in one row, so that the prompt is computed once: positions
    restart after x, and an additive mask hides the responses from one another."""

    def __init__(self, lm: nn.Module, sharing: bool = False, logits_chunk: int = 256):
        super().__init__()
        self.lm, self.sharing, self.logits_chunk = lm, sharing, logits_chunk

    def forward(self, items: list[Item]) -> Tensor:
        """B prompts with K responses each -> (B, K): fp32, nats summed over response tokens."""
        table, states_at, labels, lengths = lay_out(items, self.sharing)
        ids, segments, positions = table.to(self.lm.device).unbind(-1)  # (R, T)
        shared = dict(attention_mask=hide(segments), position_ids=positions) if self.sharing else {}
        states = self.lm.get_decoder()(input_ids=ids, use_cache=False, **shared).last_hidden_state
        states = states[states_at.to(ids.device).unbind()]  # (N, H), N response tokens in all
        chunks = zip(*(x.split(self.logits_chunk) for x in (states, labels.to(ids.device))))
        logps = torch.cat([checkpoint(self.head, *chunk, use_reentrant=False) for chunk in chunks])
        sums = torch.stack([response.sum() for response in logps.split(lengths)])
        return sums.view(len(items), -1).clone()  # a view would lose FSDP2's backward hook

    def head(self, states: Tensor, labels: Tensor) -> Tensor:  # logits live only in here
        return spac.token_logps(self.lm.get_output_embeddings()(states), labels)


def lay_out(items: list[Item], sharing: bool) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Rows of (id, segment, position) (R, T, 3), segment 0 the prompt, k the k-th response, -1 the
    padding; where the states stand that predict response tokens (2, N); these (N,); lengths."""
    rows, states_at, labels, lengths = [], [], [], []
    for prompt, responses in items:
        for group in [responses] if sharing else [[response] for response in responses]:
            row = [(token, 0, position) for position, token in enumerate(prompt)]
            for k, response in enumerate(group, 1):
                columns = [len(prompt) - 1, *range(len(row), len(row) + len(response) - 1)]
                states_at += [(len(rows), column) for column in columns]
                row += [(token, k, len(prompt) + i) for i, token in enumerate(response)]
                labels += response
                lengths.append(len(response))
            rows.append(row)
    longest = max(map(len, rows))
    table = torch.tensor([row + [(0, -1, 0)] * (longest - len(row)) for row in rows])
    return table, torch.tensor(states_at).T, torch.tensor(labels), lengths


def hide(segments: Tensor) -> Tensor:
    """(R, T) -> (R, 1, T, T), added to attention scores: a token sees what stands before it in the
    prompt and in its own response. Floats, as eager attention would add a bool as 0 or 1."""
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    seen = ((key == 0) | (key == query)).tril().unsqueeze(1)
    lowest = torch.finfo(torch.bfloat16).min  # a finite number in every precision
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, lowest)


def load_model(config: Config):
    """The language model and its tokenizer; a plan takes the model's shape alone."""
    if config.preset == "tiny":
        return CopyDigits().model(config.seed), CopyDigits().tokenizer()
    source = dict(zip(("pretrained_model_name_or_path", "revision"), pinned(config.model)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    shape = transformers.AutoConfig.from_pretrained(**source)
    for name in vars(shape):
        if name.endswith(("dropout", "pdrop")):  # pi and pi_t must be one function
            setattr(shape, name, 0.0)
    if not config.dry_run:
        return AutoModelForCausalLM.from_pretrained(**source, config=shape), tokenizer
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape), tokenizer


def shard(scorer: Scorer, device: torch.device) -> None:
    """fp32 masters; FSDP2 over several processes, and on GPUs, where it computes in bf16. A layer
    is a unit, the rest the root's, so that tied embeddings stay together."""
    gpu = dict(mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    layers = [m for m in scorer.modules() if isinstance(m, transformers.GradientCheckpointingLayer)]
    for unit in [*layers, scorer]:
        unit.to(device, torch.float32)
        if device.type == "cuda" or dist.get_world_size() > 1:
            policy = gpu if device.type == "cuda" else {}
            fully_shard(unit, reshard_after_forward=True, **policy)  # the root too: parameters()


@contextlib.contextmanager
def gathered(scorer: Scorer):
    """Whole weights on every rank and no gradient: ranks sample and score without waiting for one
    another. FSDP2 wants a forward of the root before the first time: check_model's."""
    units = [module for module in scorer.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    with torch.no_grad():
        yield
    for unit in units:
        unit.reshard()
        unit.set_reshard_after_forward(True, recurse=False)


@torch.no_grad()
def check_model(scorer: Scorer, row: Row) -> None:
    """Our log pi against the model's own logits; then whether one row may hold all responses."""
    limit = TOLERANCE[scorer.lm.device.type] * len(row.chosen) ** 0.5
    ours = scorer([(row.prompt, [row.chosen])]).item()
    with gathered(scorer):
        ids = torch.tensor([[*row.prompt, *row.chosen]], device=scorer.lm.device)
        logits = scorer.lm(ids).logits[:, len(row.prompt) - 1 : -1]
        own = spac.token_logps(logits, ids[:, len(row.prompt) :]).sum().item()
    require(abs(ours - own) <= limit, f"log pi {ours} is {own} by the model's own logits: its head "
            "is more than a matrix, which Scorer.head must learn first")  # fmt: skip
    window = getattr(scorer.lm.config, "sliding_window", None) or math.inf
    if scorer.lm.config._attn_implementation in ("sdpa", "eager") and ids.shape[1] <= window:
        scorer.sharing = True  # our mask overrules a window, and other attentions take none
        second = scorer([(row.prompt, [row.rejected, row.chosen])])[0, 1].item()
        scorer.sharing = abs(second - own) <= limit
    way = "share one row" if scorer.sharing else "take a row each: this attention cannot share one"
    say(f"the responses to a prompt {way}")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def hash_of_model(scorer: Scorer) -> str:
    digest = hashlib.sha256()
    for name, weight in scorer.named_parameters():
        bits = local(weight.detach()).cpu().view(-1).view(torch.uint8)
        digest.update(name.encode() + bits.numpy().tobytes())
    return hashlib.sha256("".join(gather(digest.hexdigest())).encode()).hexdigest()


# -------------------------------------------------------- a run, and files that survive a kill
@dataclasses.dataclass
class Run:
    config: Config
    out: Path
    scorer: Scorer
    tokenizer: transformers.PreTrainedTokenizerBase
    generation: GenerationConfig  # as the model came with it, for the rounds' folders
    stops: set[int]  # tokens that end a response
    rows: list[Row]
    heldout: list[Row]
    state: dict  # where the run stands; all of it is saved


def write(path: Path, *parts: bytes) -> None:
    """Whatever happens, there is the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def seal(path: Path, content: bytes) -> None:
    write(path, hashlib.sha256(content).hexdigest().encode(), b"\n", content)


def unseal(path: Path) -> bytes | None:
    """What was sealed; None where the file is damaged or missing."""
    digest, _, content = path.read_bytes().partition(b"\n") if path.exists() else (b"", b"", b"")
    return content if hashlib.sha256(content).hexdigest().encode() == digest else None


def named(path: Path):
    raise SystemExit(f"{path} is damaged or missing. {RESCUE}")


def append(path: Path, line: dict) -> None:
    if dist.get_rank() == 0:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def save_state(run: Run, optimizer=None) -> None:
    """Each rank writes its part, rank 0 then the page that makes them count; the old ones go."""
    with clock(run.state, "save"):
        folder, number, buffer = run.out / "state", run.state["saves"] + 1, io.BytesIO()
        parts = {
            "model": run.scorer.state_dict(),
            "optimizer": optimizer and optimizer.state_dict(),
        }
        torch.save(parts, buffer)
        seal(folder / f"{number}-{dist.get_rank()}", buffer.getbuffer())
        logs = {log: (run.out / log).stat().st_size for log in run.state["logs"]}
        run.state |= {"saves": number, "logs": logs}
        gather()
        if dist.get_rank() == 0:
            seal(folder / "page", json.dumps(run.state).encode())
            for old in folder.iterdir():
                if old.name != "page" and not old.name.startswith(f"{number}-"):
                    old.unlink()


def load_state(run: Run) -> dict | None:
    """Sets run.state, the weights and the logs to where the run stood; returns the optimizer's."""
    page, parts = run.out / "state" / "page", {}
    if page.exists():
        run.state |= json.loads(unseal(page) or named(page))
        path = page.with_name(f"{run.state['saves']}-{dist.get_rank()}")
        content = io.BytesIO(unseal(path) or named(path))
        parts = torch.load(content, weights_only=True, map_location="cpu")
        run.scorer.load_state_dict(parts["model"])
    gather()
    for log, size in run.state["logs"].items() if dist.get_rank() == 0 else []:
        with open(run.out / log, "ab") as file:  # lines after the saved state will come again
            require(file.tell() >= size, f"{log} lost lines that were saved. {RESCUE}")
            file.truncate(size)
    return parts.get("optimizer")


def save_round(run: Run) -> None:
    """OUT/round-N, a Hugging Face folder, in the precision that computed: bf16 on GPUs."""
    dtype, weights = torch.bfloat16 if torch.cuda.is_available() else torch.float32, {}
    for name, weight in run.scorer.lm.state_dict().items():  # a whole weight at a time
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if dist.get_rank() == 0:
            weights[name] = whole.to("cpu", dtype)
    if dist.get_rank() == 0:
        with torch.device("meta"):
            served = AutoModelForCausalLM.from_config(run.scorer.lm.config, dtype=dtype)
        served.load_state_dict(weights, assign=True)
        served.tie_weights()
        served.generation_config = run.generation
        folder = run.out / f"round-{run.state['round']}"
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        served.save_pretrained(temporary)
        run.tokenizer.save_pretrained(temporary)
        shutil.copy(run.out / "run.json", temporary)
        os.sync()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)


# -------------------------------------------------------- self-play: y' ~ pi_t, and log pi_t
class Played(NamedTuple):
    generated: list[int]  # the sampled ids themselves, never decoded and encoded again
    logps: list[float]  # log pi_t of chosen, rejected, generated


def sample(run: Run, prompts: list[array], seed: int) -> list[list[int]]:
    """One true sample y ~ pi(.|x) a prompt: all that would bend it is off, and nothing comes from
    the model's folder. An end token is there if it was sampled."""
    device, longest, lm = run.scorer.lm.device, max(map(len, prompts)), run.scorer.lm
    ids = torch.tensor([[0] * (longest - len(x)) + list(x) for x in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts], device=device)
    lm.generation_config = GenerationConfig()  # else it fills what is unset below
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0,
        max_new_tokens=run.config.max_response, eos_token_id=sorted(run.stops),
        pad_token_id=min(run.stops),
    )  # fmt: skip
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        whole = lm.eval().generate(ids, settings, attention_mask=mask, synced_gpus=False)
    drawn = whole[:, longest:].tolist()
    ends = [next((i for i, t in enumerate(y, 1) if t in run.stops), len(y)) for y in drawn]
    return [y[:end] for y, end in zip(drawn, ends)]


def play(run: Run, rows: list[Row], name: str) -> dict[int, Played]:
    """By row number. Batches are fixed and then dealt to the ranks; each has its seed, so that the
    number of ranks changes no y', and its file, which is made once and carries pi_t's hash."""
    size, rows = run.config.generate_batch, sorted(rows, key=lambda r: (len(r.prompt), r.number))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]  # alike in length
    paths = [run.out / "play" / name / f"{i:06d}" for i in range(len(batches))]

    def read(path: Path) -> dict | None:
        page = json.loads(unseal(path) or "{}")
        return page["rows"] if page.get("pi_t") == run.state["pi_t"] else None

    todo = [i for i, path in enumerate(paths) if read(path) is None]
    missing = f"{paths[todo[0]]} is damaged or gone, and so is pi_t. {RESCUE}" if todo else ""
    require(not todo or run.state["step"] == 0, missing)
    gather()  # all have looked before one writes
    with gathered(run.scorer):
        mine = todo[dist.get_rank() :: dist.get_world_size()]
        for i in tqdm(mine, f"playing {name}", disable=dist.get_rank() > 0 or None):
            require(not leaving.is_set(), LEFT)
            with clock(run.state, "generate"):
                seed = seed_of(run.config.seed, name, i)
                answers = sample(run, [row.prompt for row in batches[i]], seed)
                pairs = list(zip(batches[i], answers))
            with clock(run.state, "score"):
                items = [(row.prompt, [row.chosen, row.rejected, y]) for row, y in pairs]
                parts = range(0, len(items), run.config.micro_batch)
                logps = [run.scorer(items[j : j + run.config.micro_batch]).tolist() for j in parts]
            played = {row.number: (y, logp) for (row, y), logp in zip(pairs, sum(logps, []))}
            seal(paths[i], json.dumps({"pi_t": run.state["pi_t"], "rows": played}).encode())
    gather()
    return {int(number): Played(*p) for path in paths for number, p in read(path).items()}


# -------------------------------------------------------- training
COLUMNS = "loss preference critic accuracy margin logp_chosen logp_rejected logp_generated kl"


def losses(run: Run, rows: list[Row], played: dict[int, Played] | None) -> dict[str, Tensor]:
    """Of each pair, (B,): the loss, what the log shows, and how far log pi is from log pi_t.
    Without self-play it is the SFT's: nats per token of both responses."""
    items = [(row.prompt, [row.chosen, row.rejected]) for row in rows]
    if played is None:
        tokens = torch.tensor([sum(map(len, ys)) for _, ys in items])
        policy = run.scorer(items)
        return dict(loss=-policy.sum(1) / tokens.to(policy))
    items = [(x, [*ys, played[row.number].generated]) for row, (x, ys) in zip(rows, items)]
    policy, beta = run.scorer(items), run.config.beta  # (B, 3)
    opponent = torch.tensor([played[row.number].logps for row in rows]).to(policy)
    terms = spac.spac_loss(
        policy.unbind(1), opponent.unbind(1), beta, run.config.lam, CRITICS[run.config.critic]
    )
    h = (policy - opponent).detach()
    sizes = torch.tensor([[len(y) for y in ys] for _, ys in items]).to(h)
    ahead = h[:, 0] - h[:, 1]
    shown = [*terms, (ahead > 0).float(), beta * ahead, *policy.unbind(1), -h[:, 2]]  # y' ~ pi_t
    worst = dict(largest=(beta * h).abs().amax(1), gap=(h.abs() / sizes.sqrt()).amax(1))
    return dict(zip(COLUMNS.split(), shown)) | worst


def accumulate(run: Run, batch: list[Row], played: dict[int, Played] | None) -> list[dict]:
    """Adds the gradient of the mean loss over the GLOBAL batch, for any number of processes and any
    micro-batch. Returns losses() of every pair, on every rank."""
    world, size, values = dist.get_world_size(), run.config.micro_batch, []
    share = batch[dist.get_rank() :: world]
    for start in range(0, math.ceil(len(batch) / world), size):
        part = share[start : start + size] or batch[:1]  # FSDP2 needs every rank in every pass
        weight = world / len(batch) if start < len(share) else 0.0  # it averages over the ranks
        shown = losses(run, part, played)
        (shown["loss"].sum() * weight).backward()
        columns = zip(*(column.tolist() for column in shown.values()))
        told = [dict(zip(shown, pair), row=row.number) for row, pair in zip(part, columns)]
        values += told if weight else []
    return sum(gather(values), [])


def batches_of(run: Run) -> list[list[Row]]:
    """All steps of the round, in an order that (seed, round, epoch) decides; the last batch of an
    epoch may be smaller."""
    number, size, batches = run.state["round"], run.config.batch, []
    for epoch in range(run.config.epochs if number else run.config.sft_epochs):
        seed = seed_of(run.config.seed, "order", number, epoch)
        order = random.Random(seed).sample(run.rows, len(run.rows))
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return batches


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to 0."""
    warm = max(1, round(warmup * steps))
    angle = math.pi * max(0, step - warm) / max(1, steps - warm)
    return peak * min(1, (step + 1) / warm) * (1 + math.cos(angle)) / 2


def train(run: Run, played: dict[int, Played] | None, saved: dict | None) -> None:
    """The rest of a round, from step state["step"] on; saved is the optimizer's state there."""
    config, state, batches = run.config, run.state, batches_of(run)
    weights = [weight for weight in run.scorer.parameters() if weight.requires_grad]
    shards = [local(weight.detach()) for weight in weights]  # Adafactor knows no DTensor
    optimizer = OPTIMIZERS[config.optimizer]([x for x in shards if x.numel()], weight_decay=0.0)
    if saved:
        optimizer.load_state_dict(saved)
    names, peak = (COLUMNS.split(), config.lr) if played else (["loss"], config.sft_lr)
    if state["step"] < len(batches):
        say("round  step      lr    grad " + "".join(f"{n.split('_')[-1]:>11}" for n in names))
    run.scorer.train()  # which gradient checkpointing waits for; there is no dropout
    for step in range(state["step"], len(batches)):
        rate = learning_rate(step, len(batches), peak, config.warmup)
        with clock(state, "train"):
            run.scorer.zero_grad()
            values = accumulate(run, batches[step], played)
            norm = nn.utils.clip_grad_norm_(weights, config.clip)
            norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            check_step(run, values, norm)
            for shard, weight in zip(shards, weights):
                shard.grad = local(weight.grad)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        means = {name: fmean(pair[name] for pair in values) for name in names}
        event = {"event": "step" if played else "sft", "round": state["round"], "step": step}
        append(run.out / "log.jsonl", event | means | {"grad_norm": norm, "lr": rate})
        numbers = "".join(f"{mean:11.3f}" for mean in means.values())
        say(f"{state['round']:5} {step:5} {rate:.1e} {norm:7.3f} {numbers}")
        largest = max(pair.get("largest", 0.0) for pair in values)
        state |= {"step": step + 1, "largest": max(state["largest"], largest)}
        leave, last = any(gather(leaving.is_set())), step + 1 == len(batches)
        if leave or last or (step + 1) % config.checkpoint_every == 0:
            save_state(run, None if last else optimizer)
        require(not leave, LEFT)


def check_step(run: Run, values: list[dict], norm: float) -> None:
    """Loss and gradient are finite; and at step 0, pi = pi_t was scored as play() scored it."""
    where = f"round {run.state['round']} step {run.state['step']}"
    rows = sorted(p["row"] for p in values if not math.isfinite(p["loss"]))
    suspects = rows or sorted(pair["row"] for pair in values)
    require(not rows and math.isfinite(norm), f"{where}: the loss or its gradient is not finite, "
            f"at rows {suspects}. The last saved state stays")  # fmt: skip
    if run.state["round"] and run.state["step"] == 0:
        gap, limit = max(p["gap"] for p in values), TOLERANCE[run.scorer.lm.device.type]
        say(f"pi is pi_t to {gap:.1e} nats per root token, at most {limit}")
        require(gap <= limit, f"{where}: pi is not pi_t; were they scored the same way?")


# -------------------------------------------------------- what a person sees
@contextlib.contextmanager
def clock(state: dict, phase: str):
    """Adds to the round's seconds, and notes the peak memory, of a phase."""
    began, gpu = time.perf_counter(), torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    yield
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if gpu else whole
    state["seconds"][phase] = state["seconds"].get(phase, 0.0) + time.perf_counter() - began
    state["peak_bytes"][phase] = max(state["peak_bytes"].get(phase, 0), peak)


def evaluate(run: Run) -> None:
    """Answers the held-out prompts, else some of training, and logs what came as one round."""
    world, number = CopyDigits() if run.config.preset == "tiny" else None, run.state["round"]
    rows, told = run.heldout or run.rows[: run.config.generate_batch], []
    played = play(run, rows, f"heldout-{number}")
    for row in rows:
        y, (chosen, rejected, _) = played[row.number]
        prompt = run.tokenizer.decode(row.prompt, skip_special_tokens=True)
        response = run.tokenizer.decode(y[:-1] if y[-1] in run.stops else y)
        told.append({"length": len(y), "finished": y[-1] in run.stops})
        if run.heldout:  # a tie is half
            told[-1]["heldout_accuracy"] = ((chosen > rejected) + (chosen >= rejected)) / 2
        if world:
            told[-1]["reward"] = world.reward(prompt, response) / world.best
            told[-1]["outside"] = world.outside(response)
        if len(told) <= 4:
            say(f"    {prompt[-70:]!r} -> {response[:70]!r}")
            line = {"round": number, "row": row.number, "prompt": prompt, "response": response}
            append(run.out / "samples.jsonl", line)
    means = {name: fmean(one[name] for one in told) for name in told[0]}
    means["max_implied_reward"] = run.state["largest"]
    say(f"round {number}: " + "  ".join(f"{name} {mean:.3f}" for name, mean in means.items()))
    usage = {name: run.state[name] for name in ("seconds", "peak_bytes")}
    append(run.out / "log.jsonl", {"event": "round", "round": number} | means | usage)


def draw_curves(out: Path) -> None:
    """curves.png from log.jsonl: what each round's model is worth, and each term step by step."""
    from matplotlib import pyplot as plt

    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rounds, steps = ([e for e in events if e["event"] == kind] for kind in ("round", "step"))
    worth = [n for n in ("reward", "outside", "heldout_accuracy", "finished") if n in rounds[0]]
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
    for ax, drawn, label, names in (
        (axes[0, 0], rounds, "share, of each round's model", worth),
        (axes[0, 1], steps, "preference term (nats)", ["preference"]),
        (axes[1, 0], steps, "critic's term before 1 / lam (nats)", ["critic"]),
        (axes[1, 1], steps, "margin, KL(pi_t || pi) (nats)", ["margin", "kl"]),
    ):
        for name in names:
            ax.plot([event[name] for event in drawn], "o-" if drawn is rounds else "-", label=name)
        ax.set(ylabel=label, xlabel="round" if drawn is rounds else "step, all rounds")
        ax.legend(frameon=False)
    figure.savefig(buffer := io.BytesIO(), dpi=100)
    plt.close(figure)
    write(out / "curves.png", buffer.getvalue())


def plan(run: Run, dropped: list[dict]) -> int:
    """Says what will be done and what it takes; returns the bytes of disk."""
    config, rows, world = run.config, run.rows, dist.get_world_size()
    weights = sum(weight.numel() for weight in run.scorer.parameters())
    held = weights * (16 if config.optimizer == "adamw" else 8)  # fp32: see the top
    tokens = sum(map(len, [ids for row in rows for ids in row[1:]])) * config.epochs
    steps = math.ceil(len(rows) / config.batch) * config.epochs
    say(f"{len(rows)} pairs to train on, {len(run.heldout)} held out, {len(dropped)} dropped")
    for reason, count in Counter(line["reason"] for line in dropped).items():
        say(f"    {count} dropped: {reason}")
    require(rows, "no pair is left to train on: --help shows the forms of a pair")
    say(f"{config.rounds} rounds, each {len(rows)} samples, then {steps} steps of {config.batch} "
        f"pairs: {tokens / 1e6:.2f}e6 tokens and the samples'. {world} processes")  # fmt: skip
    say(f"{weights / 1e9:.4f}e9 parameters: {held / world / 1e9:.2f} GB a process with gradients "
        f"and {config.optimizer}, {weights / 5e8:.2f} GB more where a GPU plays")  # fmt: skip
    return 2 * held + config.rounds * 4 * weights


def claim(run: Run, dropped: list[dict], need: int) -> None:
    """Writes run.json, or refuses a folder that holds another run."""
    path, rows = run.out / "run.json", hashlib.sha256()
    for row in run.rows + run.heldout:
        rows.update(repr(row).encode())
    mine = {k: v for k, v in vars(run.config).items() if k not in ("out", "dry_run")}
    mine |= {"processes": dist.get_world_size(), "data_sha256": rows.hexdigest()}
    mine |= {"model_sha256": run.state["pi_t"]}
    try:
        held = json.loads(path.read_bytes())["run"] if path.exists() else mine
    except (ValueError, TypeError, KeyError):
        named(path)
    changed = [f"{k} was {held.get(k)}, is {v}" for k, v in mine.items() if held.get(k) != v]
    require(not changed, f"{run.out} holds another run ({'; '.join(changed)}): give another --out")
    gather()  # all have looked before one writes
    if dist.get_rank() == 0 and not path.exists():
        require(not (run.out / "state").exists(), f"{path} is gone, but not the run's state")
        run.out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run.out).free
        require(free > need, f"{run.out} has {free / 1e9:.3f} GB free and needs {need / 1e9:.3f}")
        resolved = getattr(run.scorer.lm.config, "_commit_hash", None)
        versions = {m.__name__: m.__version__ for m in (torch, transformers, datasets)}
        write(run.out / "dropped.jsonl", "".join(json.dumps(d) + "\n" for d in dropped).encode())
        page = {"run": mine, "model_commit": resolved, "versions": versions}
        write(path, json.dumps(page, indent=1).encode())


# -------------------------------------------------------- the story
def main(config: Config) -> None:
    device, out = start_processes(), Path(config.out)
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    transformers.utils.logging.disable_progress_bar()
    other = "; --preset mistral-7b takes a real model and your pairs"
    say(f"preset {config.preset}, in {out}" + other * (config.preset == "tiny"))

    # Where self-play starts, and what it learns from.
    lm, tokenizer = load_model(config)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    generation, end = lm.generation_config, lm.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    require(tokenizer.eos_token_id in stops, "the tokenizer has no end-of-sequence token")
    rows, dropped = load_rows(config.data, tokenizer, stops, config)
    rows, heldout = (rows, []) if config.heldout_data else split_off(rows, config)
    if config.heldout_data:
        heldout, more = load_rows(config.heldout_data, tokenizer, stops, config)
        dropped += more
    rows = rows[: config.rows or None]
    state = dict(round=0, step=0, saves=0, pi_t="", largest=0.0, seconds={}, peak_bytes={})
    state["logs"] = {"log.jsonl": 0, "samples.jsonl": 0}  # bytes of them that are saved
    run = Run(config, out, Scorer(lm), tokenizer, generation, stops, rows, heldout, state)
    need = plan(run, dropped)
    if config.dry_run:
        return

    # A new run, or the same one further on.
    shard(run.scorer, device)
    state["pi_t"] = hash_of_model(run.scorer)
    claim(run, dropped, need)
    saved = load_state(run)
    check_model(run.scorer, max(rows, key=lambda row: len(row.prompt) + len(row.chosen)))
    if device.type == "cuda":  # each layer is computed again in the backward pass
        lm.activation_checkpointing_enable({"use_reentrant": False})

    while state["round"] <= config.rounds:
        played = play(run, rows, f"round-{state['round']}") if state["round"] else None
        train(run, played, saved)
        if state["round"] or config.sft_epochs:
            save_round(run)
        state |= {"step": 0, "pi_t": hash_of_model(run.scorer)}
        evaluate(run)
        if dist.get_rank() == 0:
            draw_curves(out)
        saved, state["round"] = None, state["round"] + 1
        state |= {"largest": 0.0, "seconds": {}, "peak_bytes": {}}
        save_state(run)
    say(f"done: {out / f'round-{config.rounds}'}")


if __name__ == "__main__":
    config = parse()
    try:
        main(config)
    except (OSError, safetensors.SafetensorError) as error:
        again = f"{config.out} keeps what was saved: mend this and give the same command again"
        raise SystemExit(f"{error}\n{again}") from None
