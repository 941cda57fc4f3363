"""SPAC on causal language models: offline preference pairs in, aligned rounds out.

    python train_mistral.py                 a tiny Mistral whose true reward is known, beside DPO
    torchrun --nproc_per_node 8 train_mistral.py --preset mistral-7b --model .. --data .. --out OUT

Round t: play() draws a true sample y' ~ pi_t for every prompt and keeps log pi_t of (chosen,
rejected, y'); train() starts pi at pi_t and descends spac.spac_loss. Those numbers are all that is
left of pi_t: no second model is in memory. Round 0 is the start, or a short SFT. This file, in the
order in which data flow:

    Config, parse           what can be set                      CopyDigits    tiny's world
    load_rows               pairs as text -> ids                 conversations, encode
    Scorer                  log pi(y|x), the one place           lay_out, hide
    load_model, shard       weights, over the cards
    Run                     where it stands, through any kill    seal, unseal
    check_model             is log pi the model's own?           own_logp
    play                    y' ~ pi_t, and log pi_t of all       sample
    train                   spac.spac_loss, step by step         losses, accumulate
    evaluate                what a round's weights are worth     judge, draw_curves
    plan, prepare, main     the story

A pair is a line {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}, or with lists of
role/content messages for texts, or with whole conversations as chosen and rejected. OUT gets
round-N and average (Hugging Face folders), log.jsonl, curves.png, samples.jsonl, dropped.jsonl
(rows not used, and why), run.json, and what a restart needs: after a kill, Ctrl-C or SIGTERM the
same command goes on.

What fits where: fp32 master weights are sharded by FSDP2; layers compute in bf16 (--bf16, on a GPU
by default) and once more in the backward pass (--recompute). Bytes a parameter over all cards: 4
weights, 4 gradients, 8 for AdamW, next to none for Adafactor. A card that plays holds all weights
in bf16 besides, and 17 GB of keys and values (128 rows of 1,024 tokens); one that trains 7 GB: a
layer, the head, activations of 8k tokens. Mistral-7B (7.24e9 parameters), GB a card:

    cards    play    train, Adafactor    train, AdamW
    1        61      65                  123
    4        39      21                  36
    8        35      14                  21

The averaged weights, 4 to 5 bytes a parameter, lie on the hosts. Rank 0 reads the weights (14.5 GB
of its host) and writes round-N (44). A saved state has 8 bytes a parameter, with AdamW 16, and two
lie on the disk while one replaces the other.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from array import array
from collections import Counter, OrderedDict
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import jinja2
import tokenizers
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, cache_utils
from transformers.utils import chat_template_utils as chats

import spac

CRITICS = {name: getattr(spac, f"{name}_critic") for name in ("smoothed", "linear", "proximal")}
OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, fused=True), "adafactor": torch.optim.Adafactor}
SFT_MODEL = "alignment-handbook/zephyr-7b-sft-full@ac6e600eefcce74f5e8bae1035d4f66019e93190"
PAIRS = "HuggingFaceH4/ultrafeedback_binarized"
TOLERANCE = {False: 1e-4, True: 0.1}  # of log pi in fp32, bf16: rms of nats / root of its tokens
GROWING = {cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer}  # by columns
CHUNK = 1024 if torch.cuda.is_available() else 128  # tokens whose logits are there at a time
LAM = 0.8  # times the root of the pairs: --lam by rule
ADAFACTOR = 50  # times AdamW's rate: its step is a share of a matrix's rms, .02 in a new model
FREE = {*"rounds micro_batch generate_tokens recompute checkpoint_every repeatable beside".split()}
DPO = "--out out/tiny-dpo --lam inf --rounds 1 --epochs 10 --lr 1e-3 --beta .03".split()
# as many steps as tiny's, at the best cell of DPO's grid on 1,000 such pairs (study_worlds.py)
DAMAGED = "is damaged or missing. Go on from the last round in a new folder: --model OUT/round-N"
LEFT = "asked to stop: what is done is saved, the same command goes on from here"
leaving = []  # signals that asked to stop


def require(condition, problem: str, error=SystemExit):
    if not condition:
        raise error(problem)
    return condition


expect = partial(require, error=ValueError)  # of a row, else it is dropped; of a model's folder


# -------------------------------------------------------- configuration
def option(tiny, mistral_7b, help: str, choices=None, above=0, most=1e300):
    about = {"tiny": tiny, "mistral-7b": mistral_7b, "help": help, "choices": choices}
    return dataclasses.field(default=tiny, metadata=about | {"above": above, "most": most})


@dataclasses.dataclass(frozen=True)
class Config:
    """Each value in the presets tiny and mistral-7b (our choice, not the paper's; yours too)."""

    preset: str = option("tiny", "mistral-7b", "toy world; your 7B, pairs", ["tiny", "mistral-7b"])
    out: str = option("out/tiny", "out/mistral-7b", "folder of the run, new or to go on with")
    model: str = option("", SFT_MODEL, "where self-play starts: folder, or hub NAME[@REVISION]")
    data: str = option("", PAIRS, "pairs: .json[l][.gz], .parquet, folder, hub NAME[@REVISION]")
    split: str = option("", "train_prefs", "split of a folder or of hub data")
    rows: int = option(1000, 0, "train on the first ROWS usable rows; 0 is all", above=-0.5)
    heldout: int = option(500, -1, "rows held out; -1: a tenth, at most 500", above=-1.5)
    heldout_data: str = option("", "", "such rows from another file instead")
    max_prompt: int = option(16, 512, "tokens of a prompt; a longer one loses its start", above=1)
    max_response: int = option(8, 512, "tokens of a response, y' too; a longer one is cut")
    rounds: int = option(10, 3, "rounds of self-play")
    epochs: int = option(1, 1, "passes over the pairs in a round")
    sft_epochs: int = option(10, 0, "supervised passes over both responses, as round 0", above=-0.5)
    sft_lr: float = option(3e-3, 1e-5, "learning rate of those")
    beta: float = option(0.3, 0.1, "1 / eta: reward per nat of log-ratio to pi_t")
    lam: float = option(None, None, f"weight of the data; inf: no critic; None: {LAM} x the root "
                        "of the pairs", most=math.inf)  # fmt: skip
    critic: str = option("smoothed", "smoothed", "the doubt: Eq. 30, 29, or 39", list(CRITICS))
    optimizer: str = option("adamw", "adamw", "adafactor: less memory", list(OPTIMIZERS))
    lr: float = option(1e-3, 5e-7, f"peak of warm-up and cosine; x {ADAFACTOR} for adafactor")
    warmup: float = option(0.1, 0.1, "share of a round's steps that warm up", above=-1e-9, most=1)
    clip: float = option(1.0, 1.0, "largest gradient norm")
    average: float = option(0.5, 0.5, "OUT/average: mean of this share of steps", above=-1e-9)
    batch: int = option(64, 128, "pairs a step, over all processes")
    micro_batch: int = option(64, 4, "pairs a forward pass of a process: memory, not the loss")
    generate_batch: int = option(250, 512, "prompts that share a seed and a file of samples")
    generate_tokens: int = option(65_536, 131_072, "prompts, responses sampled at a time: memory")
    checkpoint_every: int = option(50, 50, "steps between saved states")
    seed: int = option(0, 0, "of everything random", above=-0.5)
    bf16: bool = option(None, None, "layers compute in bf16; None: on a GPU")
    recompute: bool = option(None, None, "layers twice, to save memory; None: on a GPU")
    repeatable: bool = option(True, True, "GPU: a restart repeats each bit (if torch refuses: no-)")
    beside: str = option("", "", "folder of another run, drawn in curves.png too")
    dry_run: bool = option(False, False, "print the plan and touch nothing")


def parse(argv: list[str] | None = None) -> Config:
    style = dict(allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **style)
    fields = {field.name: field.metadata for field in dataclasses.fields(Config)}
    for field in dataclasses.fields(Config):
        kind = dict(type=field.type, choices=field.metadata["choices"])
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else kind
        text = "{help} [{tiny} | {mistral-7b}]".format_map(field.metadata)
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    preset, gpu = given.get("preset", "tiny"), torch.cuda.is_available()
    default = {k: about[preset] for k, about in fields.items()} | dict(bf16=gpu, recompute=gpu)
    if given.get("optimizer") == "adafactor":
        default |= {name: ADAFACTOR * default[name] for name in ("lr", "sft_lr")}
    config = Config(**default | given)
    if preset == "tiny" and (config.model or config.data):
        parser.error("tiny makes its own model and data: add --preset mistral-7b to use yours")
    if preset == "tiny" and (config.rows < 1 or config.heldout < 0):
        parser.error("tiny draws as many pairs as --rows and --heldout say: 1 and 0 at least")
    for name, value in vars(config).items():
        above, most = fields[name]["above"], fields[name]["most"]
        if type(value) in (int, float) and not above < value <= most:
            wanted = f"above {above}" if above >= 0 else f"{math.ceil(above)} or more"
            wanted += {1: " and at most 1", math.inf: ""}.get(most, " and finite")
            parser.error(f"--{name} {value}: it must be {wanted}")
    if config.beside and not last_round(config.beside):
        parser.error(f"--beside {config.beside} holds no run: its log.jsonl has no round")
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


# -------------------------------------------------------- processes
def start_processes() -> torch.device:
    """Joins torchrun's processes, or is a group of one."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: fewer faults, fewer holes
    gpu, index = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if gpu:
        torch.cuda.set_device(index)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False
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
    """Prints on rank 0. No terminal ends a run: neither one that is not UTF-8 nor one that left."""
    if dist.get_rank() == 0:
        letters = getattr(sys.stdout, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError):
            print(text.encode(letters, "backslashreplace").decode(letters), flush=True)


def seed_of(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# -------------------------------------------------------- what a row says
SPOKEN = "content reasoning_content reasoning thinking tool_calls function_call".split()  # in turns
UNREAD = "instruction input history context documents tools functions images image audio".split()
UNREAD += ["system_prompt", "system_message"]  # all would speak; the name for these is "system"


def parsed(row):
    """A line of JSON becomes what it says; what is no JSON stays what it is: no dict."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(row) if isinstance(row, bytes) else row
    return row


def messages(turns, role: str) -> list[dict]:
    """Text, or messages -> messages of non-empty Unicode text. Raises ValueError, with a reason."""
    cleaned = []
    for turn in [{"role": role, "content": turns}] if isinstance(turns, str) else turns or []:
        expect(isinstance(turn, dict), f"a list of {type(turn).__name__}, not of messages")
        said = {key: turn[key] for key in SPOKEN if turn.get(key)}
        named = "role" in turn and ("content" in turn or "tool_calls" in said)
        told = f"a message has {', '.join(map(str, turn))}"[:200]
        expect(named, f"{told}: rename its fields to role, content")
        text = said.setdefault("content", "")
        expect(isinstance(text, str), f"content of type {type(text).__name__}, not text")
        expect(text.strip() or "tool_calls" in said, "an empty text")
        expect(text == text.encode(errors="replace").decode(), "not Unicode")
        cleaned.append({"role": turn["role"]} | said)
    return cleaned


def conversations(row) -> list[list[dict]]:
    """A pair in any form, or a line of JSON -> two conversations, up to chosen and to rejected."""
    row, both = parsed(row), []
    expect(not isinstance(row, bytes), "not valid JSON")
    expect(isinstance(row, dict), "not a JSON object")
    unread = [name for name in UNREAD if row.get(name)]
    expect(not unread, f"columns that this trainer does not read: {', '.join(unread)}")
    lacking = "no {}, as text or messages; the row has " + ", ".join(sorted(map(str, row)))[:200]
    for name in ("system", "prompt", "chosen", "rejected"):
        form = type(row.get(name) or "").__name__
        expect(form in ("str", "list"), f"{name} of type {form}, not text or a list of messages")
    system = messages(row.get("system") or [], "system")
    for field in ("chosen", "rejected"):
        *before, answer = messages(row.get(field), "assistant") or [None]
        expect(answer, lacking.format(field))
        asked = messages(row.get("prompt") or [], "user") or before
        asked = system[: asked[:1] != system] + asked
        if before and asked[-len(before) :] != before:  # a whole conversation: is asked part of it?
            parts = [before[i : i + len(asked)] for i in range(len(before))]
            expect(asked in parts, "prompt or system contradicts the conversation")
            asked = before
        expect(asked, lacking.format("prompt"))
        roles = [turn["role"] for turn in [*asked, answer]]
        turn_about = ["user", "assistant"] * max(1, len(roles) // 2)
        odd = [f", {role!r}" for role in roles if role not in ("system", "user", "assistant")]
        found = f"wrong role order{''.join(odd[:1])}, not [system,] user, assistant, in turn"
        expect(roles[roles[0] == "system" :] == turn_about, found)
        both.append([*asked, answer])
    expect(both[0][:-1] == both[1][:-1], "chosen and rejected have different prompts")
    return both


# -------------------------------------------------------- from text to ids
PLAIN_TEMPLATE = (  # for a tokenizer without a chat template; the rounds are saved with it
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
BLANK = r"[\s\U000f0000\U000f0001]"  # white space, and the marks of mark_control_tokens


class Row(NamedTuple):
    number: int  # in its source, from 1
    prompt: array  # ids; the same for all responses, y' too
    chosen: array
    rejected: array
    generated: list[list[int]] = ()  # samples y' ~ pi_t: ids, never decoded and encoded again
    logps: list[float] = ()  # log pi_t of chosen, rejected, and each sample


def render(tokenizer, stops: set[int], now, turns: list[dict], **options) -> str:
    """The chat template's text, its clock now(format), with marks around control tokens that have
    to stay text: all that a person typed; an assistant's turn is what the model would write."""
    template, added = tokenizer.get_chat_template(), tokenizer.added_tokens_decoder.items()
    typed = {t.content for _, t in added if t.special or t.content in template} - {"\n", " "}
    never = {tokenizer.bos_token, tokenizer.pad_token} & typed  # in an answer, but as its end
    never -= {token.content for i, token in added if i in stops}
    marked = []
    for turn in turns:
        names = sorted(never if turn["role"] == "assistant" else typed, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        marked.append(chats.mark_control_tokens(turn, pattern))
    chats._compile_jinja_template(template).globals["strftime_now"] = now or datetime.now().strftime
    return tokenizer.apply_chat_template(marked, tokenize=False, **options)


def encode(row, number: int, tokenizer, stops: set[int], config: Config, now=None) -> Row:
    """Text to ids by the chat template. What follows the prompt's ids is the response, up to its
    first stop token, which is lost if it is cut. Raises ValueError where a text would be lost."""
    both, responses, bos = conversations(row), [], [tokenizer.bos_token_id]
    write = partial(render, tokenizer, stops, now)
    ids_of = partial(tokenizer, add_special_tokens=False, sanitize_control_tokens=True)

    def written(turn: dict, text: str) -> None:
        whole = re.sub(BLANK, "", turn["content"]) in re.sub(BLANK, "", text)
        expect(whole, f"the template does not write all of {turn['role']}'s text")

    *before, _ = both[0]
    asked = write(before, add_generation_prompt=True)
    prompt = ids_of(asked).input_ids
    for turn in before:  # it may leave out an assistant's old thoughts
        written(turn | ({"content": ""} if turn["role"] == "assistant" else {}), asked)
    for *_, answer in both:
        text, content = write([*before, answer]), answer["content"]
        ids, told = ids_of(text).input_ids, text.removeprefix(asked)
        expect(ids[: len(prompt)] == prompt, "the template rewrites its own prompt")
        written(answer, told)
        for key in answer.keys() - {"role", "content"}:
            used = write([*before, answer | {key: None}]) != text
            expect(used, f"the template does not write {key}")
        after = [content.partition(tokenizer.decode([stop]))[2] for stop in stops]
        expect(not any(map(str.strip, after)), "an answer goes on after a stop token")
        ids, rest = ids[len(prompt) :], told.rpartition(content.strip() or told)[2].strip()
        ends = [i for i, token in enumerate(ids, 1) if token in stops]
        expect(ends or not rest, f"the template ends an answer with {rest[:40]!r}, no stop token: "
                "name it in generation_config.json's eos_token_id")  # fmt: skip
        ids = ids[: ends[0]] if ends else [*ids, tokenizer.eos_token_id]
        expect(len(ids) > 1, "nothing of a response is left")
        responses.append(ids[: config.max_response])
    expect(responses[0] != responses[1], "chosen equals rejected, or does once cut")
    kept = bos if bos in (prompt[:1], tokenizer("a").input_ids[:1]) else []  # by either's habit
    prompt = kept + prompt[prompt[:1] == bos :][len(kept) - config.max_prompt :]
    return Row(number, *(array("i", ids) for ids in (prompt, *responses)))


# -------------------------------------------------------- rows
def pinned(source: str) -> tuple[str, str]:  # a name and its revision
    name, _, revision = (source, "", "") if os.path.exists(source) else source.partition("@")
    return name, revision or "main"


def unreadable(source: str, wanted: str, error: Exception) -> str:
    here, told = "", str(error)
    if not os.path.exists(source):  # then the hub was asked: its advice is for names
        here, told = "no such file or folder here; ", told.partition("\n")[0]
    return f"cannot read {source} ({here}{wanted}): {told}"


def read(source: str, config: Config):
    """The rows of a data set as they stand, dicts or lines."""
    (name, revision), path = pinned(source), Path(source)
    if config.preset == "tiny":
        return CopyDigits().pairs(config.rows + config.heldout, config.seed)
    if source.endswith(".jsonl"):
        return path.read_bytes().splitlines()  # each of its own form
    import datasets  # a second and memory that others need not spend

    kind = {".parquet": "parquet", ".json": "json", ".gz": "json"}.get(path.suffix)
    if kind:
        return datasets.load_dataset(kind, data_files=source, split="train")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(source)
        splits = saved if isinstance(saved, dict) else {config.split: saved}
        told = f"no split {config.split!r}, but {', '.join(splits)}: --split names one"
        return expect(splits.get(config.split), told)
    return datasets.load_dataset(name, revision=revision, split=config.split)


def load_rows(source: str, tokenizer, stops, config: Config, now=None) -> tuple[list[Row], list]:
    """The usable rows, and the others with the reason."""
    rows, dropped, columns = [], [], set()
    try:
        raw = read(source, config)
    except Exception as error:  # of many libraries
        wanted = "wanted: .jsonl[.gz], .json, .parquet, a saved data set's folder, or a hub name"
        raise SystemExit(unreadable(source, wanted, error)) from None
    for number, row in enumerate(tqdm(raw, "reading", disable=dist.get_rank() > 0 or None), 1):
        row = parsed(row)
        columns |= {*row} if isinstance(row, dict) else set()
        try:
            rows.append(encode(row, number, tokenizer, stops, config, now))
        except (ValueError, TypeError, jinja2.TemplateError) as reason:  # a row is used, or counted
            dropped.append({"data": source, "row": number, "reason": str(reason)})
    unread = sorted(map(str, columns - {"prompt", "chosen", "rejected", "system", *UNREAD}))
    if unread:
        say(f"columns not read: {', '.join(unread)}"[:200])
    return rows, dropped


# -------------------------------------------------------- log pi(y|x)
class Scorer(nn.Module):
    """A language model whose forward is log pi(y|x): the one place where anything is scored.
    Sharing writes [x, y+, y-, y'] in one row, so that the prompt is computed once: positions
    restart after x, and an additive mask hides the responses from one another."""

    def __init__(self, lm: nn.Module, sharing: bool = False, logits_chunk: int = CHUNK):
        super().__init__()
        self.lm, self.sharing, self.logits_chunk = lm, sharing, logits_chunk

    def forward(self, items: list[tuple]) -> Tensor:
        """B pairs (prompt, K responses) -> (B, K): fp32, in nats, summed over response tokens."""
        table, states_at, labels, lengths = lay_out(items, self.sharing)
        ids, segments, positions = table.to(self.lm.device).unbind(-1)  # (R, T)
        mask = hide(segments).to(self.lm.dtype) if self.sharing else None  # one for all layers
        shared = dict(attention_mask=mask, position_ids=positions) if self.sharing else {}
        body = self.lm.get_decoder()  # Llama 4's is the whole model, ModernBERT's the head
        body = self.lm.model if body is self.lm or isinstance(body, nn.Linear) else body
        states = body(input_ids=ids, use_cache=False, **shared).last_hidden_state
        states = states[states_at.to(ids.device).unbind()]  # (N, H), N response tokens in all
        chunks = zip(*(x.split(self.logits_chunk) for x in (states, labels.to(ids.device))))
        logps = torch.cat([checkpoint(self.head, *chunk, use_reentrant=False) for chunk in chunks])
        sums = torch.stack([response.sum() for response in logps.split(lengths)])
        return sums.view(len(items), -1).clone()  # a view would lose FSDP2's backward hook

    def head(self, states: Tensor, labels: Tensor) -> Tensor:  # logits live only in here
        head = self.lm.get_output_embeddings()
        return spac.token_logps(head(states.to(head.weight.dtype)), labels)  # Mamba's are fp32

    @contextlib.contextmanager
    def gathered(self):
        """Whole weights on every rank and no gradient: ranks sample and score without waiting for
        one another. FSDP2 wants a forward before the first time: check_model's. Its hooks,
        slow beside the work of a token, are put aside."""
        units = [module for module in self.modules() if isinstance(module, FSDPModule)]
        hooks = [(unit._forward_pre_hooks, unit._forward_hooks) for unit in units]
        for unit in units:
            unit.unshard()
            unit._forward_pre_hooks, unit._forward_hooks = OrderedDict(), OrderedDict()
        try:
            with torch.no_grad():
                yield
        finally:
            for unit, (before, after) in zip(units, hooks):
                unit._forward_pre_hooks, unit._forward_hooks = before, after
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


# -------------------------------------------------------- weights
def load_model(config: Config):
    """The language model and its tokenizer. A plan, and every rank but the first, take the model's
    shape alone. Raises ValueError for what is no whole causal language model."""
    if config.preset == "tiny":
        return CopyDigits().model(config.seed), CopyDigits().tokenizer()
    name, revision = pinned(config.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
    if not tokenizer.chat_template:
        say("the tokenizer has no chat template: turns are written as user: and assistant:")
        tokenizer.chat_template = PLAIN_TEMPLATE
    shape = transformers.AutoConfig.from_pretrained(name, revision=revision)
    quantized = getattr(shape, "quantization_config", None)
    expect(not quantized, "its weights are quantized, and bf16 or fp32 are needed")
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(shape)
    kind, kinds = type(lm).__name__, shape.architectures
    expect(kind in (kinds or [kind]), f"it is a {kinds}, and {kind} is needed")
    with contextlib.suppress(OSError):  # a folder may have none
        lm.generation_config = GenerationConfig.from_pretrained(name, revision=revision)
    if config.dry_run or dist.get_rank() > 0:
        return lm, tokenizer
    wish = dict(config=shape, output_loading_info=True, ignore_mismatched_sizes=True)  # named
    lm, told = AutoModelForCausalLM.from_pretrained(name, revision=revision, **wish)
    lacking = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
    expect(not lacking, f"it lacks, or has in another shape, {', '.join(lacking)}")
    broken = [name for name, weight in lm.named_parameters() if not weight.isfinite().all()]
    expect(not broken, f"{broken[:1]} is not finite")
    return lm, tokenizer


def compute(config: Config, forward, *args, **kwargs):
    """A layer's forward: with bf16 on inputs of bf16 (FSDP2 sees to its weights), with recompute
    kept as its inputs alone until the backward pass."""

    def cast(x):
        if isinstance(x, tuple):  # the sines and cosines of positions; what else layers share stays
            return tuple(map(cast, x))
        return x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x

    if config.bf16:
        args, kwargs = cast(args), {name: cast(x) for name, x in kwargs.items()}
    if config.recompute and torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def shard(scorer: Scorer, device: torch.device, config: Config) -> None:
    """fp32 masters of rank 0's weights, a layer at a time: FSDP2 over several processes, and with
    bf16, in which layers then compute. A layer is a unit, the rest the root's, so that tied
    embeddings stay together. No dropout: training needs gradients, and no training mode."""
    torch.use_deterministic_algorithms(config.repeatable and device.type == "cuda")
    layers = [m for m in scorer.modules() if isinstance(m, transformers.GradientCheckpointingLayer)]
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = {"mp_policy": mixed} if config.bf16 else {}
    if next(scorer.parameters()).is_meta:
        scorer.lm.to_empty(device="cpu").tie_weights()  # pages that nobody touches take no memory
    for unit in [*layers, scorer.eval()]:
        unit.to(device, torch.float32)
        if unit is not scorer:
            unit.forward = partial(compute, config, unit.forward)
        for tensor in [*unit.parameters(), *unit.buffers()]:
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.detach(), 0)
        if config.bf16 or dist.get_world_size() > 1:  # who asks the root gets sharded parameters
            fully_shard(unit, reshard_after_forward=True, **policy)


def local(tensor: Tensor) -> Tensor:  # this rank's part of it, the same memory
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def least(lm: nn.Module, *names: str) -> float:
    """The smallest limit that the config of any module sets under one of these names."""
    configs = {id(c): c for m in lm.modules() if (c := getattr(m, "config", None))}.values()
    limits = [getattr(config, name, None) for config in configs for name in names]
    return min([x for x in limits if isinstance(x, int) and x > 0], default=math.inf)


# -------------------------------------------------------- files that survive a kill
@contextlib.contextmanager
def writing(path: Path):
    """Libraries have names of their own for a full disk: all become an OSError with the path."""
    try:
        yield
    except Exception as error:
        raise OSError(f"No space left, or another fault, in writing {path}: {error}") from None


def seal(path: Path, content, key: str = "") -> None:
    """Writes a file, then its sha256 and what it belongs to. A kill leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with writing(temporary):
        torch.save(content, temporary)
    with open(temporary, "r+b") as file:
        file.write(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {key}".encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def unseal(path: Path, key: str = ""):
    """What was sealed and belongs to the key; None where the file is damaged or missing."""
    if path.exists():
        sha256, size = hashlib.sha256(), path.stat().st_size - len(f"{'':64} {key}")
        with open(path, "rb") as file:
            for start in range(0, size, 2**24):
                sha256.update(file.read(min(2**24, size - start)))
            if file.read() == f"{sha256.hexdigest()} {key}".encode():
                return torch.load(path, weights_only=True, map_location="cpu", mmap=True)


def lock(path: Path) -> bool:
    """Whether no other run holds it; then this one does, for as long as the process lives."""
    import fcntl  # which Windows lacks: there the module imports, and trains nothing

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BlockingIOError):
        fcntl.lockf(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


# -------------------------------------------------------- a run, and where it stands
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
    average: list[Tensor] = ()  # this rank's part of the averaged weights: fp32, on its host
    since: float = dataclasses.field(default_factory=time.perf_counter)  # charge() was last called

    def log(self, name: str, line: dict) -> None:
        self.state["logs"][name].append(line)
        if dist.get_rank() == 0:
            with open(self.out / name, "a") as file:
                file.write(json.dumps(line) + "\n")

    def charge(self, phase: str) -> None:
        """Adds the time since the last call to a phase's seconds, and notes its peak memory."""
        from resource import RUSAGE_SELF, getrusage  # as fcntl

        seconds, peaks, before = self.state["seconds"], self.state["peak_bytes"], self.since
        self.since = time.perf_counter()
        seconds[phase] = seconds.get(phase, 0.0) + self.since - before
        host = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated() or host)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def open_folder(self, held: dict | None, need: int) -> dict | None:
        """Begins in a new folder. In this run's own, whose page says held, sets weights, state and
        logs to where it stood and returns the optimizer's state. Refuses another run's."""
        page, rows, saved = self.out / "state" / "page", hashlib.sha256(), {}
        for row in self.rows + self.heldout:
            rows.update(repr(row[:4]).encode())
        mine = {k: v for k, v in vars(self.config).items() if k not in ("out", "dry_run")}
        mine |= {"processes": dist.get_world_size()}
        mine |= {"data_sha256": rows.hexdigest(), "model_sha256": self.state["pi_t"]}
        if held:
            free = FREE | (set() if any(self.out.glob("play/*/*")) else {"generate_batch"})
            words = {"data_sha256": "other rows", "model_sha256": "other weights"}
            was = [(k, held["run"].get(k), v) for k, v in mine.items() if k not in free]
            changed = "; ".join(words.get(k, f"{k} was {a}, is {b}") for k, a, b in was if a != b)
            require(not changed, f"{self.out} holds another run ({changed}): use a new --out")
            self.state |= held
            say(f"going on in {self.out} from round {held['round']} step {held['step']}")
        self.state["run"] = mine
        if self.state["saves"]:
            part = page.with_name(f"{self.state['saves']}-{dist.get_rank()}")
            saved = require(unseal(part), f"{part} {DAMAGED}")
            self.scorer.load_state_dict(saved["model"])
            self.average = saved["average"]
        gather()  # all have looked before one writes
        if dist.get_rank() == 0:
            free = math.inf if self.state["saves"] else shutil.disk_usage(self.out).free
            require(free > need, f"{self.out} has {free / 1e9:.3f} GB free, needs {need / 1e9:.3f}")
            seal(page, self.state)
            about = {m.__name__: m.__version__ for m in (torch, transformers)}
            about["model_commit"] = getattr(self.scorer.lm.config, "_commit_hash", None)
            (self.out / "run.json").write_text(json.dumps(about | {"run": mine}, indent=1))
            for name, lines in self.state["logs"].items():  # lines of later steps come again
                (self.out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return saved.get("optimizer")

    def save_state(self, optimizer: dict | None = None) -> None:
        """Each rank writes its part, rank 0 then the page that makes them count; old ones go."""
        folder, number = self.out / "state", self.state["saves"] + 1
        part = {"model": self.scorer.state_dict(), "average": self.average, "optimizer": optimizer}
        seal(folder / f"{number}-{dist.get_rank()}", part)
        self.state["saves"] = number
        self.charge("save")
        gather()
        if dist.get_rank() == 0:
            seal(folder / "page", self.state)
            for old in {*folder.glob("*-*")} - {*folder.glob(f"{number}-*")}:
                old.unlink()

    def save_model(self, name: str) -> None:
        """OUT/NAME, a Hugging Face folder, in the precision that computed."""
        whole, lm = StateDictOptions(full_state_dict=True, cpu_offload=True), self.scorer.lm
        weights = get_model_state_dict(lm, options=whole)  # empty but on rank 0
        if dist.get_rank() == 0:
            dtype = torch.bfloat16 if self.config.bf16 else torch.float32
            made_of = dict(config=lm.config, state_dict=weights, dtype=dtype)
            served = type(lm).from_pretrained(None, **made_of)
            served.generation_config = lm.generation_config
            folder, temporary = self.out / name, self.out / f"{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            with writing(temporary):
                served.save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
            shutil.copy(self.out / "run.json", temporary)
            os.sync()
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        self.charge("save")


# -------------------------------------------------------- is log pi the model's own?
def own_logp(lm: nn.Module, prompt, response) -> Tensor:
    """log pi(y|x) by the model's own logits; the first token's as generate() sees them."""
    ids, start = torch.tensor([[*prompt, *response]], device=lm.device), len(prompt)
    logits = [lm(ids[:, :start]).logits[:, -1:], lm(ids).logits[:, start:-1]]
    return spac.token_logps(torch.cat(logits, 1), ids[:, start:]).sum()


@torch.no_grad()
def check_model(run: Run) -> None:
    """On the rows most likely to differ: is our log pi the model's own? And may all responses to a
    prompt share a row? Decided once, for that changes the last bits of every score."""
    scorer, lm, limit = run.scorer, run.scorer.lm, TOLERANCE[bool(run.config.bf16)]
    sizes = [lambda row: sum(map(len, row[1:4])), lambda row: len(row.prompt)]
    rows = [min(run.rows, key=sizes[0]), *(max(run.rows, key=size) for size in sizes)]
    items = [(row.prompt, [row.chosen, row.rejected]) for row in rows]
    roots = torch.tensor([[len(y) ** 0.5 for y in ys] for _, ys in items])
    apart = scorer(items)
    with scorer.gathered():
        own = torch.tensor([[own_logp(lm, x, y) for y in ys] for x, ys in items]).to(apart)
        require(own.isfinite().all(), "the model's own log pi is not finite")

        def gap(ours) -> float:  # rms, nats per root token
            return float(((ours - own) / roots.to(own)).square().mean().sqrt())

        told = f"log pi {apart[0, 0]} is {own[0, 0]} by the model's own logits: it looks ahead, or "
        told += "its head is more than a matrix, which Scorer.head must learn first"
        require(gap(apart) <= limit, told)
        if "sharing" not in run.state:
            fits = lm.config._attn_implementation in ("sdpa", "eager")  # they take a mask
            longest = max(len(row.prompt) for row in run.rows) + run.config.max_response
            fits &= longest <= least(lm, "sliding_window", "attention_chunk_size", "window_size")
            scorer.sharing, beside = True, math.inf
            with contextlib.suppress(Exception):  # a model that takes no mask of ours
                beside = gap(scorer(items))
            run.state["sharing"] = all(gather(fits and beside <= limit))  # an odd rank decides
    scorer.sharing = run.state["sharing"]
    rows = "its responses share" if scorer.sharing else "each of its responses take"
    say(f"scoring: a prompt and {rows} a row")


# -------------------------------------------------------- self-play: y' ~ pi_t, and log pi_t
def decode(lm: nn.Module, texts: list[list[int]], width: int, cache):
    """Logits of what follows each text, (B, V), and the cache. With a cache, left-padded to width
    and of all tokens but each text's last, the last alone is computed."""
    width = width if cache else max(map(len, texts))
    new, takes = 1 if cache else width, inspect.signature(lm.forward).parameters
    ids = torch.tensor([[0] * (new - len(x)) + x[-new:] for x in texts], device=lm.device)
    place = (torch.arange(width) - torch.tensor([[width - len(x)] for x in texts])).to(ids)
    more = dict(attention_mask=(place >= 0).long(), position_ids=place.clamp(min=0)[:, -new:])
    more |= dict(next_sequence_length=new, cache=cache, is_first_iteration=not cache)
    inputs = lm.prepare_inputs_for_generation(ids, use_cache=True, logits_to_keep=1, **more)
    told = lm(**{name: value for name, value in inputs.items() if name in takes})
    return told.logits[:, -1], told.get("cache")


def join(cache, new, columns: int):
    """The cache, with the rows of a new one: keys and values, left-padded to so many columns."""
    for layer, more in zip(cache.layers, new.layers) if cache else ():
        for kind in ("keys", "values"):
            old, add = getattr(layer, kind)[:, :, -columns:], getattr(more, kind)
            add = nn.functional.pad(add, (0, 0, old.shape[2] - add.shape[2], 0))
            setattr(layer, kind, torch.cat([old, add]))
        layer.cumulative_length = columns  # a sliding window counts what it has seen
    return cache


@torch.no_grad()
def sample(run: Run, prompts: list[array], seed: int) -> list[list[int]]:
    """One true sample y ~ pi(.|x) a prompt, from the logits alone; an end token is there if it was
    drawn. A token is where the cumulative pi passes a uniform number of the row's own, so that no
    company changes what a row says: who has ended leaves, and who waits takes the place."""
    lm, longest, texts = run.scorer.lm.eval(), max(map(len, prompts)), [[*x] for x in prompts]
    room = min(run.config.max_response, least(lm, "max_position_embeddings") - longest)
    places = max(1, run.config.generate_tokens // (longest + room))
    chances = [random.Random(seed_of(seed, i)) for i in range(len(prompts))]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the longest come first
    rows, cache, width = [], None, 0
    while waiting or rows:
        free, layers = places - len(rows), getattr(cache, "layers", ())
        grows = all(type(layer) in GROWING and layer.is_initialized for layer in layers)
        new = waiting[-free:] if not rows or (grows and free > places // 8) else []
        waiting, now = waiting[: len(waiting) - len(new)], new or rows
        logits, fresh = decode(lm, [texts[i] for i in now], width, None if new else cache)
        columns = max((len(texts[i]) - 1 for i in rows), default=0)
        cache, fresh = join(cache, fresh, columns) if new and rows else fresh, None
        mass = (logits.float().softmax(-1) * 2.0**50).long().cumsum(-1)  # whole numbers: exact in
        totals = mass[:, -1].tolist()  # any order of adding, and small enough for a float
        require(min(totals) > 0, "a logit of the model is not finite")
        passed = [[int(chances[i].random() * total)] for i, total in zip(now, totals)]
        tokens = torch.searchsorted(mass, mass.new_tensor(passed), right=True).flatten().tolist()
        for i, token in zip(now, tokens):
            texts[i].append(token)
        rows = rows + new
        width = max(len(texts[i]) for i in rows) if new else width + 1  # columns, one to be decoded
        full = [len(texts[i]) == len(prompts[i]) + room for i in rows]
        going = [k for k, i in enumerate(rows) if not full[k] and texts[i][-1] not in run.stops]
        if cache and 0 < len(going) < len(rows):
            cache.reorder_cache(torch.tensor(going, device=lm.device))
        rows, cache = [rows[k] for k in going], cache if going else None
    return [text[len(x) :] for text, x in zip(texts, prompts)]


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
            prompts, seed = [row.prompt for row in batches[i]], seed_of(run.config.seed, name, i)
            answers = [[y] for y in sample(run, prompts, seed)]
            run.charge("generate")
            items = [(r.prompt, [r.chosen, r.rejected, *ys]) for r, ys in zip(batches[i], answers)]
            logps = [run.scorer(items[j : j + micro]) for j in range(0, len(items), micro)]
            answered = zip(batches[i], answers, torch.cat(logps).tolist())
            seal(paths[i], {row.number: told for row, *told in answered}, pi_t)
            run.charge("score")
    gather()
    run.charge("wait")  # for the other ranks
    told = {number: both for path in paths for number, both in unseal(path, pi_t).items()}
    return [Row(*row[:4], *told[row.number]) for row in rows]


# -------------------------------------------------------- the loss of a batch
COLUMNS = "loss preference critic accuracy margin logp_chosen logp_rejected logp_generated kl"


def losses(run: Run, rows: list[Row]) -> dict[str, Tensor]:
    """Of each pair, (B,): the loss, what the log shows, and how far log pi is from log pi_t.
    Rows without y' have the SFT's: nats per token of both responses."""
    items = [(row.prompt, [row.chosen, row.rejected, *row.generated]) for row in rows]
    policy, beta = run.scorer(items), run.config.beta  # (B, 2 + y' a prompt)
    sizes = torch.tensor([[len(y) for y in ys] for _, ys in items]).to(policy)
    if not rows[0].logps:
        return dict(loss=-policy.sum(1) / sizes.sum(1))
    opponent = torch.tensor([row.logps for row in rows]).to(policy)
    terms, critic = [], CRITICS[run.config.critic]
    for k in range(2, policy.shape[1]):  # the mean over y'
        both = [(*logps[:, :2].unbind(1), logps[:, k]) for logps in (policy, opponent)]
        terms.append(torch.stack(spac.spac_loss(*both, beta, run.config.lam, critic)))
    h = (policy - opponent).detach()
    ahead, drawn = h[:, 0] - h[:, 1], policy[:, 2:].mean(1)
    shown = [*torch.stack(terms).mean(0), (ahead > 0).float(), beta * ahead]
    shown += [policy[:, 0], policy[:, 1], drawn, -h[:, 2:].mean(1)]
    worst = dict(largest=(beta * h).abs().amax(1), gap=(h.square() / sizes).mean(1))
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


# -------------------------------------------------------- the steps of a round
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
    horizon = config.average * config.rounds * len(batches)  # of the averaged weights, in steps
    if state["round"] and horizon and not run.average:
        run.average = [shard.to("cpu", copy=True) for shard in shards]  # pi_1's
    for k, mean in enumerate(run.average):  # pinned memory is quick to reach from a card
        run.average[k] = mean.pin_memory() if torch.cuda.is_available() else mean
    names, peak = (COLUMNS.split(), config.lr) if state["round"] else (["loss"], config.sft_lr)
    name, total = f"round {state['round']}/{config.rounds}", len(batches)
    if state["step"] < total:
        titles = "".join(f"{n.split('_')[-1]:>11}" for n in names)
        say(f"{name:12} step    left      lr    grad {titles}")
    began, first = time.perf_counter(), state["step"]
    for step in range(first, total):
        rate = learning_rate(step, total, peak, config.warmup)
        values = accumulate(run, batches[step])  # forward and backward
        norm = nn.utils.clip_grad_norm_(weights, config.clip)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        check_step(run, values, norm)
        for shard, weight in zip(shards, weights):
            shard.grad = local(weight.grad)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for mean, shard in zip(run.average, shards):  # the averaged weights follow
            mean.copy_(mean.to(shard.device).lerp_(shard, min(1, 1 / horizon)))
        for tensor in (*shards, *weights):  # no gradient outlives its step
            tensor.grad = None
        run.charge("train")
        means = {name: fmean(pair[name] for pair in values) for name in names}
        event = dict(event="step" if state["round"] else "sft", round=state["round"], step=step)
        event |= means | {"grad_norm": norm, "lr": rate}
        run.log("log.jsonl", event | ({"noise": state["noise"]} if state["round"] else {}))
        last, tenth = step + 1 == total, math.ceil(total / 10)
        if state["round"] or last or step % tenth == 0:
            left = (time.perf_counter() - began) / (step + 1 - first) * (total - step - 1)
            said = f"{name:12}{step + 1:>5}/{total} {timedelta(seconds=round(left))} {rate:.1e}"
            say(f"{said} {norm:7.3f} " + "".join(f"{mean:11.3f}" for mean in means.values()))
        largest = max(pair.get("largest", 0.0) for pair in values)
        state |= {"step": step + 1, "largest": max(state["largest"], largest)}
        leave = any(gather(leaving))
        if leave or last or (step + 1) % config.checkpoint_every == 0:
            run.save_state(None if last else optimizer.state_dict())
        require(not leave, LEFT)


def check_step(run: Run, values: list[dict], norm: float) -> None:
    """Loss and gradient are finite; and at step 0, pi = pi_t was scored as play() scored it. What
    is left of a difference there is the noise in every margin of this round."""
    where = f"round {run.state['round']} step {run.state['step']}"
    bad = [pair["row"] for pair in values if not math.isfinite(pair["loss"])]
    rows = sorted(bad or [pair["row"] for pair in values])
    finite = not bad and math.isfinite(norm)
    require(finite, f"{where}: not finite at rows {rows}. The last saved state stays")
    if run.state["round"] and run.state["step"] == 0:
        gap, limit = fmean(p["gap"] for p in values) ** 0.5, TOLERANCE[bool(run.config.bf16)]
        noise = run.state["noise"] = fmean(pair["margin"] ** 2 for pair in values) ** 0.5
        told = f"log pi is as in play to {gap:.1e} nats / sqrt(tokens), at most {limit}"
        say(f"{told}; margins to {noise:.1e}")
        require(gap <= limit, f"{where}: pi is not pi_t; were they scored the same way?")


# -------------------------------------------------------- what a person sees
def swap(run: Run) -> None:
    """The averaged weights and the model's change places."""
    weights = [weight.detach() for weight in run.scorer.parameters() if weight.requires_grad]
    for shard, mean in zip(map(local, weights), run.average):
        last = shard.clone()
        shard.copy_(mean)
        mean.copy_(last)
    run.state["pi_t"] = run.scorer.sha256()


def evaluate(run: Run) -> None:
    """Logs what a round's last weights, and the averaged ones, are worth."""
    number, spent = run.state["round"], {k: run.state[k] for k in ("seconds", "peak_bytes")}
    means = judge(run, f"heldout-{number}")
    if run.average:
        swap(run)
        run.save_model("average")
        means |= {f"average_{k}": v for k, v in judge(run, f"average-{number}").items()}
        swap(run)
    took = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in spent["seconds"].items())
    peak = max(spent["peak_bytes"].values(), default=0) / 1e9
    say(f"round {number}: {took}; peak {peak:.2f} GB")
    means["max_implied_reward"] = run.state["largest"]
    run.log("log.jsonl", {"event": "round", "round": number} | means | spent)
    if number and dist.get_rank() == 0:
        draw_curves(run)


def judge(run: Run, name: str) -> dict:
    """Means over answers to the held-out prompts, else to some of training. Shows four of them."""
    world, number, told = CopyDigits(), run.state["round"], []
    rows = run.heldout or run.rows[: run.config.generate_batch]
    for row in play(run, rows, name):
        y, ahead = row.generated[0], row.logps[0] - row.logps[1]
        first = run.state["first"].setdefault(row.number, ahead)  # under pi_1
        finished = y[-1] in run.stops
        prompt = run.tokenizer.decode(row.prompt, skip_special_tokens=True)
        response = run.tokenizer.decode(y[: len(y) - finished])
        fact = {"length": len(y), "finished": finished}
        if run.heldout:  # a tie is half
            leads = {"heldout_accuracy": ahead, "heldout_implied": ahead - first}
            fact |= {measure: ((x > 0) + (x >= 0)) / 2 for measure, x in leads.items()}
        if run.config.preset == "tiny":
            fact["reward"] = world.reward(prompt, response) / world.best
            fact["outside"] = world.outside(response)
        told.append(fact)
        if len(told) <= 4:
            cut = [".." * (len(text) > 70) for text in (prompt, response)]
            say(f"    {cut[0]}{prompt[-70:]!r} -> {response[:70]!r}{cut[1]}")
            line = {"round": number, "row": row.number, "prompt": prompt, "response": response}
            run.log("samples.jsonl", line | {"of": name.partition("-")[0]})
    means = {fact: fmean(one[fact] for one in told) for fact in told[0]}
    say(f"{name}: " + "  ".join(f"{fact} {mean:.3f}" for fact, mean in means.items()))
    return means


def last_round(folder: str) -> dict | None:
    """The newest of a run's logged rounds; a line that is still being written does not count."""
    log = Path(folder) / "log.jsonl"
    lines = [parsed(line) for line in log.read_bytes().splitlines()] if log.exists() else []
    return next((x for x in lines[::-1] if isinstance(x, dict) and x.get("event") == "round"), None)


def draw_curves(run: Run) -> None:
    """curves.png: what each round's weights are worth, and the terms of the loss at each step."""
    from matplotlib.figure import Figure  # 24 MiB that no other rank needs

    logged, other = run.state["logs"]["log.jsonl"], run.config.beside
    rounds, steps = ([x for x in logged if x["event"] == kind] for kind in ("round", "step"))
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    ax, *others = figure.subplots(2, 2).flat
    fact = next(name for name in ("reward", "heldout_implied", "finished") if name in rounds[-1])
    ax.set(xlabel="round", ylabel=f"{fact} (1: the best)")
    for key, width, which in ((f"average_{fact}", 3, "averaged"), (fact, 1, "last")):
        if key in rounds[-1]:  # without --average there is no averaged one
            curve = [line.get(key, math.nan) for line in rounds]
            ax.plot(curve, "o-", color="#0072B2", lw=width, label=f"{which} weights")
        if other and key in (end := last_round(other)):
            label = f"{Path(other).name}'s end, {which} weights"
            ax.axhline(end[key], color="#D55E00", ls="--", lw=width, label=label)
    for ax, names in zip(others, ("preference", "critic", "margin kl")):
        for name, color in zip(names.split(), ("#444444", "#AA8800")):
            ax.plot([line[name] for line in steps], lw=1, label=name, color=color)
        ax.set(xlabel="step, from round 1 on", ylabel="nats")
    for ax in figure.axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False, ncols=2, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(run.out / "curves.png", dpi=100)


# -------------------------------------------------------- the plan
def plan(run: Run) -> int:
    """Says what will be done and refuses rows the model cannot read; returns the bytes of disk."""
    config, world, dropped = run.config, dist.get_world_size(), run.state["logs"]["dropped.jsonl"]
    say(f"{len(run.rows)} pairs to train on, {len(run.heldout)} held out, {len(dropped)} dropped")
    first = {line["reason"]: line["row"] for line in dropped[::-1]}
    for reason, count in Counter(line["reason"] for line in dropped).most_common(20):
        say(f"    {count} dropped, first row {first[reason]}: {reason}")
    require(run.rows, "no pair is left to train on: --help shows the forms of a pair")
    for name, part in (("prompts", slice(1, 2)), ("pairs", slice(1, 4))):
        known = {repr(row[part]) for row in run.rows}
        count = sum(repr(row[part]) in known for row in run.heldout)
        if count:
            say(f"    {count} of the held-out {name} are among those to train on")
    full = sum(len(row.prompt) >= config.max_prompt for row in run.rows)
    long = sum(len(y) >= config.max_response for row in run.rows for y in row[2:4])
    if full or long:
        say(f"    cut, if longer: {full} prompts at --max_prompt, {long} answers at --max_response")
    size, lm = min(config.batch, len(run.rows)), run.scorer.lm
    steps = math.ceil(len(run.rows) / config.batch) * config.epochs
    tokens = sum(len(ids) for row in run.rows for ids in row[1:4]) * config.epochs
    say(f"{config.rounds} rounds: {len(run.rows)} samples, then {steps} steps of {size} pairs; "
        f"{tokens:,} tokens a round, and the samples'; processes: {world}")  # fmt: skip
    if config.data and steps < 20:
        wish = max(1, len(run.rows) * config.epochs // 20)
        say(f"    {steps} steps a round are few: lower --batch, to {wish}, or raise --epochs")
    if config.data and steps <= config.checkpoint_every:
        say("    saved states: one a round; a lower --checkpoint_every saves within a round too")
    if config.data and len(run.heldout) > len(run.rows) / 4:
        say("    more than a fifth of the pairs is held out: lower --heldout")
    room, known = least(lm, "max_position_embeddings"), len(lm.get_input_embeddings().weight)
    for row in run.rows + run.heldout:
        need, token = len(row.prompt) + max(1, *map(len, row[2:4])), max(map(max, row[1:4]))
        told = f"row {row.number} takes {need} positions and the model has {room}: "
        require(need <= room, told + "lower --max_prompt or --max_response")
        told = f"row {row.number} has the token {token} {run.tokenizer.decode([token])!r} and the "
        require(token < known, told + f"model {known} rows: take the tokenizer that came with it")
    weights = sum(weight.numel() for weight in run.scorer.parameters())
    state, training = (12, 16) if config.optimizer == "adamw" else (4, 8)  # bytes: see the top
    averages = 1 if config.average else 0  # in each saved state, and in a folder
    folders = (config.rounds + 1 + averages) * (2 if config.bf16 else 4)
    disk = (2 * (state + 4 * averages) + folders) * weights
    say(f"{weights:,} parameters: {training * weights / world / 1e9:.3g} GB a process with their "
        f"gradients and {config.optimizer}; in bf16 {weights / 5e8:.3g} more to play; besides, "
        f"activations and libraries. Disk: {disk / 1e9:.3g} GB")  # fmt: skip
    return disk


# -------------------------------------------------------- the story
def prepare(config: Config, began: str) -> Run:
    """Where self-play starts, and what it learns from; began: when, for templates that tell it."""
    lm = tokenizer = problem = None
    try:
        lm, tokenizer = load_model(config)
    except Exception as error:  # of many libraries
        wanted = "--model is a folder with weights and tokenizer, as OUT/round-1, or a hub name"
        problem = unreadable(config.model, wanted, error)
    problem = next(filter(None, gather(problem)), None)  # rank 0 alone reads the weights
    require(not problem, problem)
    end = lm.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    require(tokenizer.eos_token_id in stops, "the tokenizer has no end-of-sequence token")
    load = partial(load_rows, tokenizer=tokenizer, stops=stops, config=config)
    now = datetime.fromisoformat(began).strftime
    rows, dropped = load(config.data, now=now)
    if config.heldout_data:
        heldout, more = load(config.heldout_data, now=now)
        dropped += more
    else:
        wish = min(500, len(rows) // 10) if config.heldout < 0 else config.heldout
        if wish > (most := len(rows) // 2):
            say(f"--heldout {wish} is more than half of the usable rows: {most} are held out")
        heldout = sorted(random.Random(config.seed).sample(rows, min(wish, most)))
        out_of_training = {row.number for row in heldout}
        rows = [row for row in rows if row.number not in out_of_training]
    rows = rows[: config.rows or None]
    if config.lam is None:
        config = dataclasses.replace(config, lam=round(LAM * math.sqrt(len(rows)), 2))
    state = dict(round=0, step=0, saves=0, pi_t="", largest=0.0, noise=0.0, began=began, first={})
    state["logs"] = {"log.jsonl": [], "samples.jsonl": [], "dropped.jsonl": dropped}
    state |= {"seconds": {}, "peak_bytes": {}}
    return Run(config, Path(config.out), Scorer(lm), tokenizer, stops, rows, heldout, state)


def main(config: Config) -> None:
    device, out, held = start_processes(), Path(config.out), None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: leaving.append(number))
    transformers.utils.logging.disable_progress_bar()
    if config.preset == "tiny":  # the same bits on any number of cores
        torch.set_num_threads(1)
    world = f"{config.model}, pairs of {config.data}" if config.data else "a world of ours"
    say(f"{world}, on {device.type} in {'bf16' if config.bf16 else 'fp32'}, in {out}")
    free = config.dry_run or dist.get_rank() > 0 or lock(out / "lock")
    require(all(gather(free)), f"{out} is in use by another run: let it end, or use a new --out")
    page = out / "state" / "page"
    if page.exists() or (out / "log.jsonl").exists():
        held = require(unseal(page), f"{page} {DAMAGED}")
    run = prepare(config, gather(held["began"] if held else datetime.now().isoformat())[0])
    need = plan(run)
    if config.dry_run:
        return
    shard(run.scorer, device, config)
    state = run.state
    state["pi_t"] = run.scorer.sha256()
    saved = run.open_folder(held, need)  # a new run, or the same one further on
    check_model(run)
    run.charge("load")

    while state["round"] <= config.rounds:
        played = play(run, run.rows, f"round-{state['round']}") if state["round"] else run.rows
        train(run, played, saved)
        run.save_model(f"round-{state['round']}")
        state |= {"step": 0, "pi_t": run.scorer.sha256()}
        evaluate(run)
        saved, state["round"] = None, state["round"] + 1
        state |= {"largest": 0.0, "seconds": {}, "peak_bytes": {}}
        run.save_state()
    averaged = f"{out / 'average'} (averaged weights), " if run.average else ""
    say(f"done: {averaged}{out}/round-{state['round'] - 1} (the last ones); more --rounds go on")


if __name__ == "__main__":
    try:
        config = parse()
        if len(sys.argv) == 1:  # the story: DPO beside SPAC
            main(parse(DPO))
            config = dataclasses.replace(config, beside=parse(DPO).out)
        main(config)
        dist.destroy_process_group()  # or gloo's threads may outlive the interpreter, and abort it
    except OSError as error:
        raise SystemExit(f"{error}\nMend this, then the same command goes on") from None
