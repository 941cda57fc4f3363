"""SPAC on causal language models: offline preference pairs in, aligned rounds out.

    python train_mistral.py                 a tiny Mistral whose true reward is known
    torchrun --nproc_per_node 8 train_mistral.py --preset mistral-7b --model .. --data .. --out OUT

Round t: play() draws a true sample y' ~ pi_t for every prompt and keeps log pi_t of (chosen,
rejected, y'); train() starts pi at pi_t and descends spac.spac_loss. Those numbers are all that is
left of pi_t: no second model is in memory. Round 0 is the start, or a short SFT. A pair is a line
{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}, or with lists of role/content messages for
texts, or with whole conversations as chosen and rejected. OUT gets round-N (Hugging Face folders),
log.jsonl, curves.png, samples.jsonl, dropped.jsonl (rows not used, and why), run.json, and what a
restart needs: after a kill, Ctrl-C or SIGTERM the same command goes on.

What fits where: fp32 master weights are sharded by FSDP2, GPUs compute in bf16. Bytes a parameter:
4 weights + 4 gradients + 8 for AdamW, next to none for Adafactor (row and column means). Mistral-7B
(7.24e9): AdamW 116 GB, 14.5 a card on 8; Adafactor 58 GB, one 80 GB card. While playing each card
holds bf16 weights besides, 14.5 GB; activations of 8k tokens, recomputed by layers, take 4 GB.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
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
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

import spac

CRITICS = {"smoothed": spac.smoothed_critic, "linear": spac.linear_critic}
FUSED = partial(torch.optim.AdamW, fused=True)  # one pass over the weights, on a CPU too
OPTIMIZERS = {"adamw": FUSED, "adafactor": torch.optim.Adafactor}
SFT_MODEL = "alignment-handbook/zephyr-7b-sft-full@ac6e600eefcce74f5e8bae1035d4f66019e93190"
PAIRS = "HuggingFaceH4/ultrafeedback_binarized"
TOLERANCE = {"cpu": 1e-4, "cuda": 0.05}  # of log pi in fp32, bf16: nats per root of its tokens
DAMAGED = "is damaged or missing. Go on from the last round in a new folder: --model OUT/round-N"
LEFT = "asked to stop: what is done is saved, the same command goes on from here"
leaving = []  # signals that asked to stop


def require(condition, problem: str, error=SystemExit):
    if not condition:
        raise error(problem)
    return condition


# -------------------------------------------------------- configuration
def option(tiny, mistral_7b, help: str, choices=None, above=0):
    about = {"tiny": tiny, "mistral-7b": mistral_7b, "help": help}
    return dataclasses.field(default=tiny, metadata=dict(about, choices=choices, above=above))


@dataclasses.dataclass(frozen=True)
class Config:
    """Each value in the presets tiny and mistral-7b (our choice, not the paper's; yours too)."""

    preset: str = option("tiny", "mistral-7b", "named defaults", ["tiny", "mistral-7b"])
    out: str = option("out/tiny", "out/mistral-7b", "folder of the run, new or to go on with")
    model: str = option("", SFT_MODEL, "where self-play starts: folder, or hub NAME[@REVISION]")
    data: str = option("", PAIRS, "pairs: .jsonl, .parquet, or hub NAME[@REVISION]")
    split: str = option("", "train_prefs", "split of hub data")
    rows: int = option(1000, 0, "train on the first ROWS usable rows; 0 is all", above=-1)
    heldout: int = option(500, 500, "rows held out, at most half: accuracy, samples", above=-1)
    heldout_data: str = option("", "", "such rows from another file instead")
    max_prompt: int = option(8, 512, "tokens of a prompt; a longer one loses its start", above=1)
    max_response: int = option(8, 512, "tokens of a response, y' too; a longer one is cut")
    rounds: int = option(5, 3, "rounds of self-play")
    epochs: int = option(2, 1, "passes over the pairs in a round")
    sft_epochs: int = option(10, 0, "supervised passes over both responses, as round 0", above=-1)
    sft_lr: float = option(3e-3, 1e-5, "learning rate of those")
    beta: float = option(0.3, 0.1, "1 / eta: reward per nat of log-ratio to pi_t")
    lam: float = option(5.0, 10.0, "weight of the data against the critic's doubt; inf: no critic")
    critic: str = option("smoothed", "smoothed", "the doubt: Eq. 30 or Eq. 29", list(CRITICS))
    optimizer: str = option("adamw", "adamw", "adafactor: lr is per weight RMS", list(OPTIMIZERS))
    lr: float = option(3e-4, 5e-7, "peak of warm-up and cosine, anew each round")
    warmup: float = option(0.1, 0.1, "share of a round's steps that warm up", above=-1)
    clip: float = option(1.0, 1.0, "largest gradient norm")
    batch: int = option(64, 128, "pairs a step, over all processes")
    micro_batch: int = option(64, 4, "pairs a forward pass of a process: memory, not the loss")
    generate_batch: int = option(250, 64, "prompts sampled together; each batch has its seed")
    checkpoint_every: int = option(50, 50, "steps between saved states")
    seed: int = option(0, 0, "of everything random", above=-1)
    dry_run: bool = option(False, False, "print the plan and touch nothing")


def parse(argv: list[str] | None = None) -> Config:
    style = dict(allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **style)
    fields = {field.name: field.metadata for field in dataclasses.fields(Config)}
    for name, about in fields.items():
        value = dict(type=type(about["tiny"]), choices=about["choices"])
        kind = dict(action="store_true") if name == "dry_run" else value
        text = "{help} [{tiny} | {mistral-7b}]".format_map(about)
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "tiny")
    config = Config(**{name: about[preset] for name, about in fields.items()} | given)
    if preset == "tiny" and (config.model or config.data):
        parser.error("tiny makes its own model and data: add --preset mistral-7b to use yours")
    for name, value in vars(config).items():
        if type(value) in (int, float) and not value > fields[name]["above"]:
            parser.error(f"--{name} must be above {fields[name]['above']}")
    return config


# -------------------------------------------------------- a world whose true reward is known
class CopyDigits:
    """Six digits, to be repeated. The data policy copies each with probability .6 and else writes
    a random digit. Letters, which the model could write, and other lengths it never does."""

    characters, best = "=0123456789abcdefghij", 3.0

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
        template = "{{ bos_token }}{% for m in messages %}{{ m.content }}"
        template += "{{ '=' if m.role == 'user' else eos_token }}{% endfor %}"
        special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    def model(self, seed: int):
        shape = transformers.MistralConfig(
            vocab_size=3 + len(self.characters), hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
            sliding_window=None, max_position_embeddings=64,
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


class Row(NamedTuple):
    number: int  # in its source, from 1
    prompt: array  # ids; the same for all responses, y' too
    chosen: array
    rejected: array
    generated: list[int] = ()  # y' ~ pi_t: the sampled ids, never decoded and encoded again
    logps: list[float] = ()  # log pi_t of chosen, rejected, generated


def pinned(source: str) -> tuple[str, str]:  # a name and its revision
    name, _, revision = (source, "", "") if os.path.exists(source) else source.partition("@")
    return name, revision or "main"


def conversations(row) -> list[list[dict]]:
    """A pair in any form, or a line of JSON -> two conversations, up to chosen and to rejected."""
    with contextlib.suppress(ValueError, RecursionError):  # then it stays what it is: no dict
        row = json.loads(row) if isinstance(row, bytes) else row
    require(isinstance(row, dict), "not a JSON object", ValueError)
    both = []
    for field in ("chosen", "rejected"):
        turns, prompt = row.get(field), row.get("prompt")
        turns = [{"role": "assistant", "content": turns}] if isinstance(turns, str) else turns
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        require(turns and isinstance(turns, list), f"no {field}, as text or messages", ValueError)
        if len(turns) == 1:  # the prompt stands apart
            require(isinstance(prompt, list), "no prompt, as text or messages", ValueError)
            turns = prompt + turns
        for turn in turns:
            text = turn.get("content") if isinstance(turn, dict) else None
            require(isinstance(text, str) and text.strip(), "an empty or no text", ValueError)
            require(text == text.encode(errors="replace").decode(), "not Unicode", ValueError)
        roles = [turn.get("role") for turn in turns]
        turn_about = ["user", "assistant"] * max(1, len(roles) // 2)
        require(roles[roles[0] == "system" :] == turn_about, "wrong role order", ValueError)
        both.append([{"role": r, "content": turn["content"]} for r, turn in zip(roles, turns)])
    require(both[0][:-1] == both[1][:-1], "chosen and rejected have different prompts", ValueError)
    return both


def encode(row, number: int, tokenizer, stops: set[int], config: Config) -> Row:
    """Text to ids by the chat template, in one piece: what follows the prompt's ids is the
    response, up to its end token, which is lost if it is cut. A "</s>" typed by a person stays
    text: only the template writes control tokens."""
    both, responses, bos = conversations(row), [], [tokenizer.bos_token_id]
    render = partial(tokenizer.apply_chat_template, return_dict=False, sanitize_control_tokens=True)
    prompt = render(both[0][:-1], add_generation_prompt=True)
    for whole in map(render, both):
        require(whole[: len(prompt)] == prompt, "the template rewrites its own prompt", ValueError)
        ids = whole[len(prompt) :]
        ends = [i for i, token in enumerate(ids, 1) if token in stops]
        ids = ids[: ends[-1]] if ends else [*ids, tokenizer.eos_token_id]
        require(len(ids) > 1, "nothing of a response is left", ValueError)
        responses.append(ids[: config.max_response])
    require(responses[0] != responses[1], "chosen equals rejected, or does once cut", ValueError)
    if prompt[:1] != bos and tokenizer("a").input_ids[:1] == bos:
        prompt = bos + prompt  # the template left it to the tokenizer
    kept = prompt[: prompt[:1] == bos]
    prompt = kept + prompt[len(kept) :][len(kept) - config.max_prompt :]
    return Row(number, *(array("i", ids) for ids in (prompt, *responses)))


def load_rows(source: str, tokenizer, stops, config: Config) -> tuple[list[Row], list[dict]]:
    """The usable rows of a .jsonl, .parquet or hub data set, and the others with the reason."""
    (name, revision), rows, dropped = pinned(source), [], []
    try:
        if config.preset == "tiny":
            raw = CopyDigits().pairs(config.rows + config.heldout, config.seed)
        elif source.endswith(".jsonl"):
            raw = Path(source).read_bytes().splitlines()
        elif source.endswith(".parquet"):
            raw = datasets.load_dataset("parquet", data_files=source, split="train")
        else:
            raw = datasets.load_dataset(name, revision=revision, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SystemExit(f"cannot read {source} (.jsonl, .parquet, hub name): {error}") from None
    for number, row in enumerate(tqdm(raw, "reading", disable=dist.get_rank() > 0 or None), 1):
        try:
            rows.append(encode(row, number, tokenizer, stops, config))
        except (ValueError, jinja2.TemplateError) as reason:  # a row is used, or it is counted
            dropped.append({"data": source, "row": number, "reason": str(reason)})
    return rows, dropped


# -------------------------------------------------------- processes
def start_processes() -> torch.device:
    """Joins torchrun's processes, or is a group of one."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: fewer faults, fewer holes
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
    dist.all_gather_object(values := [None] * dist.get_world_size(), value)
    return values


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def seed_of(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# -------------------------------------------------------- the model, and log pi(y|x)
class Scorer(nn.Module):
    """A language model whose forward is log pi(y|x): the one place where anything is scored.
    Sharing writes [x, y+, y-, y'] in one row, so that the prompt is computed once: positions
    restart after x, and an additive mask hides the responses from one another."""

    def __init__(self, lm: nn.Module, sharing: bool = False, logits_chunk: int = 128):
        super().__init__()
        self.lm, self.sharing, self.logits_chunk = lm, sharing, logits_chunk

    def forward(self, items: list[tuple]) -> Tensor:
        """B pairs (prompt, K responses) -> (B, K): fp32, in nats, summed over response tokens."""
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

    @contextlib.contextmanager
    def gathered(self):
        """Whole weights on every rank and no gradient: ranks sample and score without waiting for
        one another. FSDP2 wants a forward before the first time: check_model's."""
        units = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False)
            unit.unshard()
        with torch.no_grad():
            yield
        for unit in units:
            unit.set_reshard_after_forward(True)
            unit.reshard()

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for weight in self.parameters():
            digest.update(local(weight.detach()).cpu().view(-1).view(torch.uint8).numpy())
        return hashlib.sha256("".join(gather(digest.hexdigest())).encode()).hexdigest()


def lay_out(items: list[tuple], sharing: bool) -> tuple[Tensor, Tensor, Tensor, list[int]]:
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
    return ~seen * torch.finfo(torch.bfloat16).min  # a finite number in every precision


def load_model(config: Config):
    """The language model and its tokenizer; a plan takes the model's shape alone."""
    if config.preset == "tiny":
        return CopyDigits().model(config.seed), CopyDigits().tokenizer()
    name, revision = pinned(config.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    shape = transformers.AutoConfig.from_pretrained(name, revision=revision)
    for key in vars(shape):
        if key.endswith(("dropout", "pdrop")):  # pi and pi_t must be one function
            setattr(shape, key, 0.0)
    if config.dry_run:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(shape), tokenizer
    return AutoModelForCausalLM.from_pretrained(name, revision=revision, config=shape), tokenizer


def shard(scorer: Scorer, device: torch.device) -> None:
    """fp32 masters; FSDP2 over several processes, and on GPUs, where it computes in bf16. A layer
    is a unit, the rest the root's, so that tied embeddings stay together."""
    gpu = device.type == "cuda"
    mixed = dict(mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    layers = [m for m in scorer.modules() if isinstance(m, transformers.GradientCheckpointingLayer)]
    for unit in [*layers, scorer]:
        unit.to(device, torch.float32)
        if gpu or dist.get_world_size() > 1:  # the root too: whoever asks gets sharded parameters
            fully_shard(unit, reshard_after_forward=True, **mixed if gpu else {})


def local(tensor: Tensor) -> Tensor:  # this rank's part of it, the same memory
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# -------------------------------------------------------- a run, and files that survive a kill
def seal(path: Path, content, key: str = "") -> None:
    """Writes a file behind its sha256 and what it belongs to. A kill leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, buffer = path.with_name(path.name + ".tmp"), io.BytesIO()
    torch.save(content, buffer)
    with open(temporary, "wb") as file:
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
        file.writelines([f"{digest} {key}\n".encode(), buffer.getbuffer()])
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def unseal(path: Path, key: str = ""):
    """What was sealed and belongs to the key; None where the file is damaged or missing."""
    head, _, content = path.read_bytes().partition(b"\n") if path.exists() else (b"", b"", b"")
    if head == f"{hashlib.sha256(content).hexdigest()} {key}".encode():
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def lock(path: Path) -> bool:
    """Whether no other run holds it; then this one does, for as long as the process lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BlockingIOError):
        fcntl.lockf(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@dataclasses.dataclass
class Run:
    config: Config
    out: Path
    scorer: Scorer
    tokenizer: transformers.PreTrainedTokenizerBase
    stops: set[int]  # tokens that end a response
    rows: list[Row]
    heldout: list[Row]
    state: dict  # where the run stands; all of it is saved
    since: float = dataclasses.field(default_factory=time.perf_counter)  # charge() was last called

    def log(self, name: str, line: dict) -> None:
        self.state["logs"][name].append(line)
        if dist.get_rank() == 0:
            with open(self.out / name, "a") as file:
                file.write(json.dumps(line) + "\n")

    def charge(self, phase: str) -> None:
        """Adds the time since the last call to a phase's seconds, and notes its peak memory."""
        seconds, peaks, before = self.state["seconds"], self.state["peak_bytes"], self.since
        self.since = time.perf_counter()
        seconds[phase] = seconds.get(phase, 0.0) + self.since - before
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated() or host)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def open_folder(self, need: int) -> dict | None:
        """Begins in a new folder. In this run's own, sets weights, state and logs to where it stood
        and returns the optimizer's state. Refuses another run's."""
        page, rows, saved = self.out / "state" / "page", hashlib.sha256(), {}
        for row in self.rows + self.heldout:
            rows.update(repr(row).encode())
        mine = {k: v for k, v in vars(self.config).items() if k not in ("out", "dry_run")}
        mine |= {"processes": dist.get_world_size(), "data_sha256": rows.hexdigest()}
        self.state["run"] = mine = mine | {"model_sha256": self.state["pi_t"]}
        if page.exists() or (self.out / "log.jsonl").exists():
            held = require(unseal(page), f"{page} {DAMAGED}")
            pairs = [(k, held["run"].get(k), v) for k, v in mine.items()]
            changed = "; ".join(f"{k} was {a}, is {b}" for k, a, b in pairs if a != b)
            require(not changed, f"{self.out} holds another run ({changed}): use a new --out")
            self.state |= held
            say(f"going on in {self.out} from round {held['round']} step {held['step']}")
        if self.state["saves"]:
            part = page.with_name(f"{self.state['saves']}-{dist.get_rank()}")
            saved = require(unseal(part), f"{part} {DAMAGED}")
            self.scorer.load_state_dict(saved["model"])
        gather()  # all have looked before one writes
        if dist.get_rank() == 0:
            seal(page, self.state)
            free = math.inf if self.state["saves"] else shutil.disk_usage(self.out).free
            lack = f"{self.out} has {free / 1e9:.3f} GB free and needs {need / 1e9:.3f}"
            require(free > need, lack)
            about = {m.__name__: m.__version__ for m in (torch, transformers, datasets)}
            about["model_commit"] = getattr(self.scorer.lm.config, "_commit_hash", None)
            (self.out / "run.json").write_text(json.dumps(about | {"run": mine}, indent=1))
            for name, lines in self.state["logs"].items():  # lines of later steps come again
                (self.out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return saved.get("optimizer")

    def save_state(self, optimizer=None) -> None:
        """Each rank writes its part, rank 0 then the page that makes them count; old ones go."""
        folder, number = self.out / "state", self.state["saves"] + 1
        part = {"model": self.scorer.state_dict()}
        part["optimizer"] = optimizer and optimizer.state_dict()
        seal(folder / f"{number}-{dist.get_rank()}", part)
        self.state["saves"] = number
        self.charge("save")
        gather()
        if dist.get_rank() == 0:
            seal(folder / "page", self.state)
            for old in {*folder.glob("*-*")} - {*folder.glob(f"{number}-*")}:
                old.unlink()

    def save_round(self) -> None:
        """OUT/round-N, a Hugging Face folder, in the precision that computed: bf16 on GPUs."""
        whole, lm = StateDictOptions(full_state_dict=True, cpu_offload=True), self.scorer.lm
        weights = get_model_state_dict(lm, options=whole)  # empty but on rank 0
        if dist.get_rank() == 0:
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
            made_of = dict(config=lm.config, state_dict=weights, dtype=dtype)
            served = type(lm).from_pretrained(None, **made_of)
            served.generation_config = lm.generation_config
            folder = self.out / f"round-{self.state['round']}"
            temporary = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            served.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            shutil.copy(self.out / "run.json", temporary)
            os.sync()
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        self.charge("save")


# -------------------------------------------------------- self-play: y' ~ pi_t, and log pi_t
@torch.no_grad()
def check_model(run: Run) -> None:
    """Our log pi must be that of the model's own logits. May all responses share a row?"""
    scorer, row = run.scorer, max(run.rows, key=lambda row: len(row.prompt) + len(row.chosen))
    window = getattr(scorer.lm.config, "sliding_window", None) or math.inf  # our mask overrules it
    fits = run.config.max_prompt + run.config.max_response <= window
    fits = fits and scorer.lm.config._attn_implementation in ("sdpa", "eager")  # they take a mask
    ours, limit = scorer([(row.prompt, [row.chosen])]), TOLERANCE[scorer.lm.device.type]
    limit *= len(row.chosen) ** 0.5
    with scorer.gathered():
        ids = torch.tensor([[*row.prompt, *row.chosen]], device=scorer.lm.device)
        logits = scorer.lm(ids).logits[:, len(row.prompt) - 1 : -1]
    own = spac.token_logps(logits, ids[:, len(row.prompt) :]).sum()
    require(abs(ours - own) <= limit, f"log pi {ours.item()} is {own} by the model's own logits: "
            "its head is more than a matrix, which Scorer.head must learn first")  # fmt: skip
    scorer.sharing = fits
    beside = scorer([(row.prompt, [row.rejected, row.chosen])])[0, 1]
    scorer.sharing = fits and bool(abs(beside - own) <= limit)
    say("responses to a prompt " + ("share one row" if scorer.sharing else "take a row each"))


def sample(run: Run, prompts: list[array], seed: int) -> list[list[int]]:
    """One true sample y ~ pi(.|x) a prompt: all that would bend it is off, and nothing comes from
    the model's folder. An end token is there if it was sampled."""
    lm, longest = run.scorer.lm.eval(), max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(x)) + list(x) for x in prompts], device=lm.device)
    mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts])
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0,
        max_new_tokens=run.config.max_response, eos_token_id=[*run.stops], pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        theirs, lm.generation_config = lm.generation_config, GenerationConfig()  # fills gaps above
        whole = lm.generate(ids, settings, attention_mask=mask.to(ids), synced_gpus=False)
        lm.generation_config = theirs
    drawn = whole[:, longest:].tolist()
    ends = [next((i for i, t in enumerate(y, 1) if t in run.stops), len(y)) for y in drawn]
    return [y[:end] for y, end in zip(drawn, ends)]


def play(run: Run, rows: list[Row], name: str) -> list[Row]:
    """The rows with y' and its scores. Batches are fixed and then dealt to the ranks; each has its
    seed, so that the number of ranks changes no y', and its file, made once and good for pi_t."""
    size, pi_t, micro = run.config.generate_batch, run.state["pi_t"], run.config.micro_batch
    alike = sorted(rows, key=lambda row: (len(row.prompt), row.number))
    batches = [alike[i : i + size] for i in range(0, len(alike), size)]
    paths = [run.out / "play" / name / f"{i:06d}" for i in range(len(batches))]
    say(f"playing {name}: {len(rows)} prompts in {len(batches)} batches")
    with run.scorer.gathered():
        mine = range(dist.get_rank(), len(batches), dist.get_world_size())
        for i in tqdm(mine, f"playing {name}", disable=dist.get_rank() > 0 or None):
            if unseal(paths[i], pi_t):
                continue
            require(run.state["step"] == 0, f"{paths[i]} {DAMAGED}")  # and pi_t is no more
            require(not leaving, LEFT)
            answers = sample(run, [r.prompt for r in batches[i]], seed_of(run.config.seed, name, i))
            run.charge("generate")
            items = [(r.prompt, [r.chosen, r.rejected, y]) for r, y in zip(batches[i], answers)]
            logps = [run.scorer(items[j : j + micro]) for j in range(0, len(items), micro)]
            answered = zip(batches[i], answers, torch.cat(logps).tolist())
            seal(paths[i], {row.number: told for row, *told in answered}, pi_t)
            run.charge("score")
    gather()
    run.charge("wait")  # for the other ranks
    told = {number: both for path in paths for number, both in unseal(path, pi_t).items()}
    return [Row(*row[:4], *told[row.number]) for row in rows]


# -------------------------------------------------------- training
COLUMNS = "loss preference critic accuracy margin logp_chosen logp_rejected logp_generated kl"


def losses(run: Run, rows: list[Row]) -> dict[str, Tensor]:
    """Of each pair, (B,): the loss, what the log shows, and how far log pi is from log pi_t.
    Rows without y' have the SFT's: nats per token of both responses."""
    items = [(row.prompt, row[2:5] if row.logps else row[2:4]) for row in rows]
    policy, beta = run.scorer(items), run.config.beta  # (B, 3), or (B, 2)
    sizes = torch.tensor([[len(y) for y in ys] for _, ys in items]).to(policy)
    if not rows[0].logps:
        return dict(loss=-policy.sum(1) / sizes.sum(1))
    opponent = torch.tensor([row.logps for row in rows]).to(policy)
    critic, both = CRITICS[run.config.critic], (policy.unbind(1), opponent.unbind(1))
    terms = spac.spac_loss(*both, beta, run.config.lam, critic)
    h = (policy - opponent).detach()
    ahead = h[:, 0] - h[:, 1]
    shown = [*terms, (ahead > 0).float(), beta * ahead, *policy.unbind(1), -h[:, 2]]  # y' ~ pi_t
    worst = dict(largest=(beta * h).abs().amax(1), gap=(h.abs() / sizes.sqrt()).amax(1))
    return dict(zip(COLUMNS.split(), shown)) | worst


def accumulate(run: Run, batch: list[Row]) -> list[dict]:
    """Adds the gradient of the mean loss over the GLOBAL batch, however it is dealt to processes
    and micro-batches. Returns losses() of every pair, on every rank."""
    world, size, values = dist.get_world_size(), run.config.micro_batch, []
    share = batch[dist.get_rank() :: world]
    for start in range(0, math.ceil(len(batch) / world), size):
        part = share[start : start + size] or batch[:1]  # FSDP2 needs every rank in every pass
        weight = world / len(batch) if start < len(share) else 0.0  # it averages over the ranks
        shown = losses(run, part)
        (shown["loss"].sum() * weight).backward()
        columns = zip(*(column.tolist() for column in shown.values()))
        told = [dict(zip(shown, pair), row=row.number) for row, pair in zip(part, columns)]
        values += told if weight else []
    return sum(gather(values), [])


def batches_of(run: Run, rows: list[Row]) -> list[list[Row]]:
    """The steps of a round, in an order of (seed, round, epoch); an epoch's last may be smaller."""
    number, size, batches = run.state["round"], run.config.batch, []
    for epoch in range(run.config.epochs if number else run.config.sft_epochs):
        draw = random.Random(seed_of(run.config.seed, "order", number, epoch))
        order = draw.sample(rows, len(rows))
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return batches


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to 0."""
    warm = max(1, round(warmup * steps))
    angle = math.pi * max(0, step - warm) / max(1, steps - warm)
    return peak * min(1, (step + 1) / warm) * (1 + math.cos(angle)) / 2


def train(run: Run, rows: list[Row], saved: dict | None) -> None:
    """The rest of a round, from step state["step"] on; saved is the optimizer's state there."""
    config, state, batches = run.config, run.state, batches_of(run, rows)
    weights = [weight for weight in run.scorer.parameters() if weight.requires_grad]
    shards = [local(weight.detach()) for weight in weights]  # Adafactor knows no DTensor
    optimizer = OPTIMIZERS[config.optimizer]([x for x in shards if x.numel()], weight_decay=0.0)
    if saved:
        optimizer.load_state_dict(saved)
    names, peak = (COLUMNS.split(), config.lr) if state["round"] else (["loss"], config.sft_lr)
    if state["step"] < len(batches):
        say("round  step      lr    grad " + "".join(f"{n.split('_')[-1]:>11}" for n in names))
    run.scorer.train()  # which gradient checkpointing waits for; there is no dropout
    for step in range(state["step"], len(batches)):
        rate = learning_rate(step, len(batches), peak, config.warmup)
        run.scorer.zero_grad()
        values = accumulate(run, batches[step])
        norm = nn.utils.clip_grad_norm_(weights, config.clip)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        check_step(run, values, norm)
        for shard, weight in zip(shards, weights):
            shard.grad = local(weight.grad)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        run.charge("train")
        means = {name: fmean(pair[name] for pair in values) for name in names}
        event = dict(event="step" if state["round"] else "sft", round=state["round"], step=step)
        run.log("log.jsonl", event | means | {"grad_norm": norm, "lr": rate})
        numbers = "".join(f"{mean:11.3f}" for mean in means.values())
        say(f"{state['round']:5} {step:5} {rate:.1e} {norm:7.3f} {numbers}")
        largest = max(pair.get("largest", 0.0) for pair in values)
        state |= {"step": step + 1, "largest": max(state["largest"], largest)}
        leave, last = any(gather(leaving)), step + 1 == len(batches)
        if leave or last or (step + 1) % config.checkpoint_every == 0:
            run.save_state(None if last else optimizer)
        require(not leave, LEFT)


def check_step(run: Run, values: list[dict], norm: float) -> None:
    """Loss and gradient are finite; and at step 0, pi = pi_t was scored as play() scored it."""
    where = f"round {run.state['round']} step {run.state['step']}"
    bad = [pair["row"] for pair in values if not math.isfinite(pair["loss"])]
    rows = sorted(bad or [pair["row"] for pair in values])
    finite = not bad and math.isfinite(norm)
    require(finite, f"{where}: not finite at rows {rows}. The last saved state stays")
    if run.state["round"] and run.state["step"] == 0:
        gap, limit = max(pair["gap"] for pair in values), TOLERANCE[run.scorer.lm.device.type]
        say(f"pi is pi_t to {gap:.1e} nats per root token, at most {limit}")
        require(gap <= limit, f"{where}: pi is not pi_t; were they scored the same way?")


# -------------------------------------------------------- what a person sees
def evaluate(run: Run) -> None:
    """Answers the held-out prompts, else some of training, and logs what came as one round."""
    world, number, told = CopyDigits(), run.state["round"], []
    rows = run.heldout or run.rows[: run.config.generate_batch]
    for row in play(run, rows, f"heldout-{number}"):
        y, (chosen, rejected, _) = row.generated, row.logps
        finished = y[-1] in run.stops
        prompt = run.tokenizer.decode(row.prompt, skip_special_tokens=True)
        response = run.tokenizer.decode(y[: len(y) - finished])
        fact = {"length": len(y), "finished": finished}
        if run.heldout:  # a tie is half
            fact["heldout_accuracy"] = ((chosen > rejected) + (chosen >= rejected)) / 2
        if run.config.preset == "tiny":
            fact["reward"] = world.reward(prompt, response) / world.best
            fact["outside"] = world.outside(response)
        told.append(fact)
        if len(told) <= 4:
            say(f"    {prompt[-70:]!r} -> {response[:70]!r}")
            line = {"round": number, "row": row.number, "prompt": prompt, "response": response}
            run.log("samples.jsonl", line)
    means = {name: fmean(fact[name] for fact in told) for name in told[0]}
    means["max_implied_reward"] = run.state["largest"]
    say(f"round {number}: " + "  ".join(f"{name} {mean:.3f}" for name, mean in means.items()))
    spent = {name: run.state[name] for name in ("seconds", "peak_bytes")}
    run.log("log.jsonl", {"event": "round", "round": number} | means | spent)


def draw_curves(run: Run) -> None:
    """curves.png: what each round's model is worth, and each term of the loss step by step."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = {
        ("round", "share"): "reward outside heldout_accuracy finished",
        ("step", "preference term (nats)"): "preference",
        ("step", "critic's term before 1 / lam (nats)"): "critic",
        ("step", "margin, KL(pi_t || pi) (nats)"): "margin kl",
    }
    for ax, ((kind, label), names) in zip(figure.subplots(2, 2).flat, panels.items()):
        drawn = [line for line in run.state["logs"]["log.jsonl"] if line["event"] == kind]
        for name in [name for name in names.split() if name in drawn[0]]:
            ax.plot([line[name] for line in drawn], ".-", label=name)
        ax.set(xlabel=f"{kind}, from the start", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False)
    figure.savefig(run.out / "curves.png", dpi=100)


def plan(run: Run) -> int:
    """Says what will be done and what it takes; returns the bytes of disk."""
    config, world, dropped = run.config, dist.get_world_size(), run.state["logs"]["dropped.jsonl"]
    say(f"{len(run.rows)} pairs to train on, {len(run.heldout)} held out, {len(dropped)} dropped")
    for reason, count in Counter(line["reason"] for line in dropped).items():
        say(f"    {count} dropped: {reason}")
    require(run.rows, "no pair is left to train on: --help shows the forms of a pair")
    steps = math.ceil(len(run.rows) / config.batch) * config.epochs
    tokens = sum(len(ids) for row in run.rows for ids in row[1:4]) * config.epochs
    say(f"{config.rounds} rounds: {len(run.rows)} samples, then {steps} steps of {config.batch} "
        f"pairs; {tokens:,} tokens each and the samples', on {world} processes")  # fmt: skip
    weights = sum(weight.numel() for weight in run.scorer.parameters())
    held = weights * (16 if config.optimizer == "adamw" else 8)  # fp32: see the top
    say(f"{weights / 1e9:.4f}e9 parameters: {held / world / 1e9:.2f} GB a process with gradients "
        f"and {config.optimizer}, {weights / 5e8:.2f} GB more where a GPU plays")  # fmt: skip
    return 2 * held + config.rounds * 4 * weights


# -------------------------------------------------------- the story
def main(config: Config) -> None:
    device, out = start_processes(), Path(config.out)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: leaving.append(number))
    transformers.utils.logging.disable_progress_bar()
    say(f"preset {config.preset} (tiny: a world of ours, mistral-7b: your model, pairs), in {out}")
    free = config.dry_run or dist.get_rank() > 0 or lock(out / "lock")
    require(all(gather(free)), f"{out} is in use by another run: let it end, or use a new --out")

    # Where self-play starts, and what it learns from.
    try:
        lm, tokenizer = load_model(config)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        wanted = "a folder with weights, config.json, tokenizer, as OUT/round-1, or a hub name"
        raise SystemExit(f"cannot read --model {config.model} ({wanted}): {error}") from None
    end = lm.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    require(tokenizer.eos_token_id in stops, "the tokenizer has no end-of-sequence token")
    rows, dropped = load_rows(config.data, tokenizer, stops, config)
    if config.heldout_data:
        heldout, more = load_rows(config.heldout_data, tokenizer, stops, config)
        dropped += more
    else:
        draw, count = random.Random(config.seed), min(config.heldout, len(rows) // 2)
        heldout = sorted(draw.sample(rows, count))
        rows = [row for row in rows if row not in heldout]
    rows = rows[: config.rows or None]
    state = dict(round=0, step=0, saves=0, pi_t="", largest=0.0, seconds={}, peak_bytes={})
    state["logs"] = {"log.jsonl": [], "samples.jsonl": [], "dropped.jsonl": dropped}
    run = Run(config, out, Scorer(lm), tokenizer, stops, rows, heldout, state)
    need = plan(run)
    if config.dry_run:
        return

    # A new run, or the same one further on.
    shard(run.scorer, device)
    state["pi_t"] = run.scorer.sha256()
    saved = run.open_folder(need)
    check_model(run)
    if device.type == "cuda":  # each layer is computed again in the backward pass
        lm.activation_checkpointing_enable({"use_reentrant": False})
    run.charge("load")

    while state["round"] <= config.rounds:
        played = play(run, rows, f"round-{state['round']}") if state["round"] else rows
        train(run, played, saved)
        if state["round"] or config.sft_epochs:
            run.save_round()
        state |= {"step": 0, "pi_t": run.scorer.sha256()}
        evaluate(run)
        if state["round"] and dist.get_rank() == 0:
            draw_curves(run)
        saved, state["round"] = None, state["round"] + 1
        state |= {"largest": 0.0, "seconds": {}, "peak_bytes": {}}
        run.save_state()
    say(f"done: {out / f'round-{config.rounds}'}")


if __name__ == "__main__":
    try:
        main(parse())
        dist.destroy_process_group()  # or gloo's threads may outlive the interpreter, and abort it
    except OSError as error:
        raise SystemExit(f"{error}\nMend this, then the same command goes on") from None
