"""Bad input by the thousand: python tests/study_bad_rows.py --out results

Thousands of pairs, each broken in one known way (or in two), go through the trainer's reader. None
may crash it, none may pass that should not, and each is used or counted with its reason; then a
small model trains on what is left, by the command that anybody gives. Writes OUT/bad_rows.json,
which also shows the ids that control tokens typed by a person become. With a real tokenizer:

    python tests/study_bad_rows.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data PAIRS.jsonl
"""

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import toy_bandit as bandit  # noqa: E402
import train_mistral as tm  # noqa: E402

EXPECTED = """
theorem every_row_is_used_or_counted  crashes    0    0    rows that stop the reader
theorem every_row_is_used_or_counted  silent     0    0    rows neither used nor counted, or both
theorem every_row_is_used_or_counted  wrong      0    0    single faults with another fate or reason
theorem what_is_used_is_usable        unusable   0    0    too long, no end, equal, not the text
theorem typed_control_tokens          controls   0    0    typed tokens that became a control token
theorem the_command                   unlike     0    0    rows with another fate by the command
goal    faults_are_broad              reasons    9    99   different reasons for dropping a row
goal    faults_are_broad              used       .2   .9   share of the rows that was used
"""  # kind, claim, value, least and most expected, what it is
CONFIG = "--preset mistral-7b --rounds 1 --heldout 20 --max_prompt 24 --max_response 24 "
CONFIG = (CONFIG + "--batch 64 --micro_batch 16").split()
USED, HEAD = "used", 1000  # rows that the whole command is tried on


# -------------------------------------------------------- good rows, and a tokenizer for them


def good_rows(count: int, draw: random.Random) -> list[dict]:
    """Pairs of the shape of the ecosystem's: chats of one to five messages, answers of a word to
    some hundred, in several scripts."""
    words = "the a to of what how is naïve café 東京 ответ مرحبا नमस्ते 🙂 1,024 x**2 \n\n * `code`"
    words = words.split(" ")

    def text(longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, longest))) + draw.choice(".?!")

    rows = []
    for number in range(count):
        turns = [{"role": "user", "content": f"{number}: {text(60)}"}]
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            turns += [{"role": "assistant", "content": text(60)}]
            turns += [{"role": "user", "content": text(30)}]
        if draw.random() < 0.2:
            turns.insert(0, {"role": "system", "content": text(20)})
        answers = {"chosen": "Yes: " + text(200), "rejected": "No: " + text(100)}
        sides = {k: [{"role": "assistant", "content": v}] for k, v in answers.items()}
        rows.append({"prompt": turns} | sides)
    return rows


def byte_tokenizer():
    """Bytes as tokens, ChatML as template: what a small chat model has."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict(bos_token=special[1], eos_token=special[2], pad_token=special[2])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=special[:1], **names
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


# -------------------------------------------------------- faults: (name, its fate, how)


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


def set_side(side: str, value):
    return lambda row, draw: row | {side: value}


def set_text(side: str, change):
    """Changes the text of one message of a side."""

    def apply(row, draw):
        turns = [dict(turn) for turn in row[side]]
        turn = draw.choice(turns)
        turn["content"] = change(turn["content"], draw)
        return row | {side: turns}

    return apply


def set_turns(side: str, change):
    return lambda row, draw: row | {side: change([dict(turn) for turn in row[side]])}


def set_line(change):
    """Changes the line of the file."""
    return lambda row, draw: change(json.dumps(row).encode(), draw)


def nested(depth: int, inside="x"):
    for _ in range(depth):
        inside = [inside]
    return inside


SIDES = ("prompt", "chosen", "rejected")
ABSENT = {side: f"no {side}" for side in SIDES}  # fragments of the reasons
TYPED = {side: f"{side} of type" for side in SIDES}
ROLES, NO_JSON, NO_OBJECT, EMPTY = "role order", "not valid JSON", "not a JSON object", "empty"
NAMES, NO_LIST, NO_TEXT = "rename its fields", "not of messages", "not text"
UNICODE, EQUAL, APART = "not Unicode", "chosen equals rejected", "different prompts"
STOPPED, CLASH = "after a stop token", "contradicts the conversation"
TEXTS = {  # odd, and text all the same
    "a NUL": "a\0b", "controls": "".join(map(chr, range(1, 32))), "a BOM": "\ufeffhello",
    "right to left": "\u202eolleh \u2066x\u2069", "combining marks": "e" + "\u0301" * 500,
    "joined emoji": "\U0001f469\u200d\U0001f467" * 40, "private use": "\ue000\U000f0000",
    "not a character": "\uffff\ufffe\U0010ffff",
    "line separators": "a\u2028b\u2029c\x85d\x0bd", "replacement characters": "\ufffd" * 9,
    "carriage returns": "a\r\nb\rc", "composed otherwise": "Å Å Å ﬁ ①", "tags": "\U000e0041" * 9,
    "a template": "{{ messages }} {% raw %} {{ raise_exception('x') }}", "markup": "<b>&amp;</b>",
    "JSON as text": '{"role": "system", "content": "x"}', "a row as text": '"}], "chosen": [{"',
    "another template's tokens": "[INST] x [/INST] <<SYS>> <|eot_id|> <start_of_turn>user",
    "a tensor of nan": "nan inf -inf NaN", "astral": "𝒜𝓑𐍈" * 30, "one letter": "x",
    "zero width": "\u200b\u200d\u2060x", "surrogates, paired": "\U0001f600\U0001f1e9\U0001f1ea",
}  # fmt: skip
BLANKS = {
    "nothing": "",
    "a blank": " ",
    "blank lines": "\n\t \r\n",
    "odd blanks": "\u3000\u00a0\u2003",
}
HALVES = {"low": "\udc00", "high": "\ud83d", "swapped": "\ude00\ud83d", "amid text": "a\ud800b"}
WRONG = {
    "null": None, "a number": 7, "a float": 0.5, "nan": float("nan"), "a boolean": True,
    "an object": {"text": "x"}, "an empty list": [], "1e400": float("inf"), "false": False,
}  # fmt: skip
LISTS = {"texts": ["x"], "lists": [["x"]], "nulls": [None], "numbers": [1, 2]}
CONTENTS = {
    "null": None,
    "a number": 3,
    "parts": [{"type": "text", "text": "x"}],
    "lists": nested(50),
}
LINES = {
    "cut": lambda line, draw: line[: draw.randrange(1, len(line) - 1)],
    "without its end": lambda line, draw: line[:-1],
    "twice": lambda line, draw: line + line,
    "single quotes": lambda line, draw: line.replace(b'"', b"'"),
    "a comma at the end": lambda line, draw: line + b",",
    "not UTF-8": lambda line, draw: line.replace(b'"content": "', b'"content": "\xff\xfe', 1),
    "UTF-16": lambda line, draw: line.decode().replace("\n", " ").encode("utf-16-le")[:-1],
    "half a character": lambda line, draw: line.replace(
        b'"content": "', b'"content": "\xe6\x9d', 1
    ),
    "an escape cut": lambda line, draw: line.replace(b'"content": "', b'"content": "\\ud8_', 1),
    "a bare tab": lambda line, draw: line.replace(b'"content": "', b'"content": "\t', 1),
    "a comment": lambda line, draw: b"// " + line,
    "nothing": lambda line, draw: b"",
    "blanks": lambda line, draw: b" \t ",
    "NULs": lambda line, draw: bytes(64),
    "noise": lambda line, draw: draw.randbytes(200).replace(b"\n", b"").replace(b"\r", b""),
    "brackets": lambda line, draw: b"[" * 100_000,
    "braces": lambda line, draw: b'{"a":' * 50_000,
    "a long number": lambda line, draw: b"9" * 5000,
}
VALUES = {
    "a list": lambda line, draw: b"[" + line + b"]",
    "a text": lambda line, draw: json.dumps(line.decode()).encode(),
    "null": lambda line, draw: b"null",
    "a number": lambda line, draw: b"3.5",
}
HARMLESS = {
    "a BOM first": lambda line, draw: b"\xef\xbb\xbf" + line,
    "blanks around it": lambda line, draw: b"  " + line + b"\t ",
    "other keys": lambda line, draw: b'{"id": 1, "score": NaN, "x": {"y": [[]]}, ' + line[1:],
    "a key twice": lambda line, draw: b'{"prompt": 3, ' + line[1:],
    "deep beside it": lambda line, draw: b'{"x": ' + b"[" * 200 + b"]" * 200 + b", " + line[1:],
    "no escapes": lambda line, draw: json.dumps(json.loads(line), ensure_ascii=False).encode(),
}


def faults(control: list[str], stop: str) -> list[tuple]:
    """(name, the fate expected, row and generator -> row or line)."""
    found = [("none", USED, lambda row, draw: row)]
    for side in SIDES:

        def without(row, draw, side=side):
            return {k: v for k, v in row.items() if k != side}

        found += [(f"{side} missing", ABSENT[side], without)]
        for name, value in WRONG.items():
            fate = (TYPED if value else ABSENT)[side]
            found += [(f"{side} is {name}", fate, set_side(side, value))]
        for name, value in LISTS.items():
            found += [(f"{side} is a list of {name}", NO_LIST, set_side(side, value))]
        for name, blank in BLANKS.items():
            found += [(f"{side}: {name}", EMPTY, set_text(side, lambda t, d, b=blank: b))]
        for name, half in HALVES.items():
            spoil = set_text(side, lambda t, d, h=half: t + h + t)
            found += [(f"{side}: half a surrogate, {name}", UNICODE, spoil)]
        for name, value in CONTENTS.items():
            spoil = set_text(side, lambda t, d, v=value: v)
            fate = NO_TEXT if value else EMPTY
            found += [(f"{side}: a message's text is {name}", fate, spoil)]
        for name, odd in TEXTS.items():
            found += [(f"{side}: {name}", USED, set_text(side, lambda t, d, o=odd: o + t[:40]))]
        for token in control:
            spoil = set_text(side, lambda t, d, c=token: c + t[:30] + c + "\n" + c)
            fate = STOPPED if side != "prompt" and token == stop else USED
            found += [(f"{side}: {token} typed", fate, spoil)]
        found += [
            (f"{side}: 100,000 letters", USED, set_text(side, lambda t, d: t + "x y" * 33_334)),
            (f"{side}: 100,000 emoji", USED, set_text(side, lambda t, d: t[:9] + "🙂" * 100_000)),
            (f"{side}: no text", NAMES, set_turns(side, lambda m: m[:-1] + [{"role": "user"}])),
            (f"{side}: no role", NAMES, set_turns(side, lambda m: [{"content": "x"}, *m[1:]])),
        ]
        for role in ("tool", "System", "USER", "", "human", None, ["user"], {"user": 1}, "user "):
            change = set_turns(side, lambda m, r=role: [*m[:-1], m[-1] | {"role": r}])
            found += [(f"{side}: the role {role!r}", ROLES, change)]
    for role in ("user", "system"):
        for side in ("chosen", "rejected"):
            change = set_turns(side, lambda m, r=role: [m[0] | {"role": r}])
            found += [(f"{side}: the {role} answers", ROLES, change)]
    user, answer, system = (message(r, "x") for r in ("user", "assistant", "system"))
    whole = {"chosen": [user, answer], "rejected": [user, message("assistant", "y")]}
    found += [
        ("prompt ends with an answer", ROLES, set_turns("prompt", lambda m: [*m, answer])),
        ("two questions in a row", ROLES, set_turns("prompt", lambda m: [*m, user])),
        ("a system message last", ROLES, set_turns("prompt", lambda m: [*m, system])),
        ("two system messages", ROLES, set_turns("prompt", lambda m: [system, system, user])),
        ("only a system message", ROLES, set_side("prompt", [system])),
        ("a thousand messages", USED, set_side("prompt", [user, answer] * 500 + [user])),
        ("chosen is rejected", EQUAL, lambda row, draw: row | {"rejected": row["chosen"]}),
        ("equal where they are cut", EQUAL, lambda row, draw: row
         | {k: [message("assistant", "same " * 500 + k)] for k in ("chosen", "rejected")}),
        ("all as text", USED, lambda row, draw: {k: row[k][-1]["content"] for k in SIDES}),
        ("two whole conversations", USED, lambda row, draw: whole),
        ("two conversations and their prompt", USED, lambda row, draw: {"prompt": "x"} | whole),
        ("two conversations and another prompt", CLASH, lambda row, draw: {"prompt": "z"} | whole),
        ("a column that would speak", "not read: input", lambda row, draw: row | {"input": "z"}),
        ("a system column that clashes", ROLES, lambda row, draw: {"system": "z"} | {
            k: [system, *turns] for k, turns in whole.items()}),
        ("conversations that differ", APART, lambda row, draw: whole | {"chosen": [
            message("user", "other"), answer]}),
        ("a conversation and an answer", CLASH, lambda row, draw: row | {"chosen": [
            message("user", "other"), answer]}),
        ("one side of two lengths", APART, lambda row, draw: whole | {"chosen": [
            user, answer, user, answer]}),
        ("keys in capitals", ABSENT["chosen"], lambda row, draw: {
            k.upper(): v for k, v in row.items()}),
        ("an empty object", ABSENT["chosen"], lambda row, draw: {}),
    ]  # fmt: skip
    found += [(f"line: {name}", NO_JSON, set_line(change)) for name, change in LINES.items()]
    found += [(f"line: {name}", NO_OBJECT, set_line(change)) for name, change in VALUES.items()]
    found += [(f"line: {name}", USED, set_line(change)) for name, change in HARMLESS.items()]
    return found


def broken(rows: list[dict], kinds: list[tuple], count: int, draw: random.Random) -> list[tuple]:
    """(faults, the fate expected or None, line): each fault alone and as often as fits half of the
    rows, then two at a time."""
    found = []
    for i in range(count):
        row = draw.choice(rows)
        if i < max(len(kinds), count // 2):
            name, fate, change = kinds[i % len(kinds)]
            row, names = change(row, draw), [name]
        else:
            (first, _, change), (second, _, then) = draw.sample(kinds, 2)
            row, fate, names = change(row, draw), None, [first, second]
            with contextlib.suppress(TypeError, KeyError, AttributeError, IndexError, ValueError):
                row = then(row, draw)  # where the first left something to break
        found.append((names, fate, row if isinstance(row, bytes) else json.dumps(row).encode()))
    return found


# -------------------------------------------------------- what becomes of them


def read(path: str, tokenizer, config) -> tuple[list, list[dict]]:
    return tm.load_rows(path, tokenizer, {tokenizer.eos_token_id}, config)


def unusable(row, tokenizer, config) -> bool:
    """Whether a row that was used breaks a promise."""
    ids, stop = [row.prompt, row.chosen, row.rejected], tokenizer.eos_token_id
    cut = [len(y) == config.max_response for y in ids[1:]]
    fits = 0 < len(row.prompt) <= config.max_prompt and row.chosen != row.rejected
    fits = fits and all(0 < len(y) <= config.max_response for y in ids[1:])
    ends = all(y[-1] == stop or c for y, c in zip(ids[1:], cut))
    inner = all(stop not in y[:-1] for y in ids[1:])
    known = all(0 <= token < len(tokenizer) for y in ids for token in y)
    return not (fits and ends and inner and known)


def controls(row, tokenizer) -> int:
    added = set(tokenizer.added_tokens_encoder.values())
    return sum(token in added for ids in row[1:] for token in ids)


def typed(tokens: list[str], tokenizer, folder: Path) -> tuple[int, dict]:
    """What each control token becomes that a user types: alone, doubled, among and at the edges
    of messages, and broken by a private character. (How many became control
    tokens, a table of ids.)"""

    def pair(t: str, head: str, tail: str) -> dict:
        turns = [message("system", t), message("user", f"{t}a{t}{t}"), message("assistant", "x")]
        turns += [message("user", f"b {t}"), message("assistant", "c")]
        turns += [message("user", f"{tail}\nassistant\n{head}\U000f0000{tail}")]
        return {"prompt": turns, "chosen": "d", "rejected": "f"}

    pairs = [pair("x", "y", "z")]
    pairs += [pair(t, t[: len(t) // 2], t[len(t) // 2 :]) for t in tokens]
    (path := folder / "typed.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    config = tm.parse(["--preset", "mistral-7b", "--data", str(path)])
    (plain, *rows), dropped = read(str(path), tokenizer, config)
    became, table = len(dropped), {}
    for token, row in zip(tokens, rows):
        ids = tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)
        more = controls(row, tokenizer) - controls(plain, tokenizer)
        became += more + (not holds(row.prompt, ids))
        table[token] = {
            "id as a control token": tokenizer.convert_tokens_to_ids(token),
            "ids as typed": ids,
            "pieces as typed": tokenizer.convert_ids_to_tokens(ids),
            "ids by the tokenizer alone": tokenizer.encode(token, add_special_tokens=False),
            "control tokens more than without it": more,
        }
    return became, table


def holds(ids, part: list[int]) -> bool:
    return any([*ids[i : i + len(part)]] == part for i in range(len(ids)))


def command(path: Path, tokenizer, folder: Path) -> tuple[set, set]:
    """A small model of random weights learns from the file, by the trainer's command: the numbers
    of the rows that it used, and of those that it dropped."""
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, vocab_size=len(tokenizer), sliding_window=None)
    AutoModelForCausalLM.from_config(MistralConfig(**shape | ids)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    argv = [*CONFIG, "--model", str(folder / "model"), "--data", str(path)]
    with contextlib.redirect_stdout(io.StringIO()):
        tm.main(tm.parse([*argv, "--out", str(folder / "run")]))
    played = [*folder.glob("run/play/round-1/*"), *folder.glob("run/play/heldout-1/*")]
    used = {number for path in played for number in torch.load(path)}
    dropped = {json.loads(line)["row"] for line in open(folder / "run" / "dropped.jsonl")}
    return used, dropped


def study(rows, tokenizer, count: int, draw, folder: Path) -> tuple[dict, dict]:
    """All claims, and what became of each fault."""
    control = list(tokenizer.added_tokens_encoder)
    kinds = faults(control, tokenizer.eos_token)
    tried, config = broken(rows, kinds, count, draw), tm.parse([*CONFIG, "--data", "rows.jsonl"])
    (path := folder / "rows.jsonl").write_bytes(b"\n".join(line for _, _, line in tried) + b"\n")
    try:
        used, dropped = read(str(path), tokenizer, config)
        crashes = 0
    except Exception as error:  # the claim fails, and says how
        print(f"the reader stopped: {error!r}")
        used, dropped, crashes = [], [], 1
    fates = {row.number: USED for row in used} | {d["row"]: d["reason"] for d in dropped}
    silent = set(range(1, count + 1)) ^ set(fates)
    silent = len(silent) + len(used) + len(dropped) - len(fates)
    wrong, table = 0, {}
    for number, (names, expected, line) in enumerate(tried, 1):
        fate = fates.get(number, "lost")
        if expected and expected not in fate:
            wrong += 1
            print(f"row {number}, {names[0]}: {fate}, expected {expected}: {line[:200]}")
        if expected:
            cell = table.setdefault(names[0], Counter())
            cell[fate] += 1
    print(f"{len(used):,} of {count:,} rows used; dropped:")
    reasons = Counter(d["reason"] for d in dropped)
    for reason, n in reasons.most_common():
        print(f"{n:7,} {reason}")
    became, shown = typed(control, tokenizer, folder)
    (head := folder / "head.jsonl").write_bytes(b"\n".join(line for _, _, line in tried[:HEAD]))
    small = command(head, tokenizer, folder)
    unlike = len(small[0] ^ {row.number for row in used if row.number <= HEAD})
    unlike += len(small[1] ^ {d["row"] for d in dropped if d["row"] <= HEAD})
    results = {
        "every_row_is_used_or_counted": {"crashes": crashes, "silent": silent, "wrong": wrong},
        "what_is_used_is_usable": {"unusable": sum(unusable(r, tokenizer, config) for r in used)},
        "typed_control_tokens": {"controls": became},
        "the_command": {"unlike": unlike},
        "faults_are_broad": {"reasons": len(reasons), "used": len(used) / count},
    }
    runs = dict.fromkeys(results, count) | {
        "typed_control_tokens": len(control),
        "the_command": HEAD,
    }
    claims = {}
    for name, values in results.items():
        claims |= bandit.judge(name, values, runs[name], EXPECTED)
    two = Counter(fates.get(i, "lost") for i, (_, known, _) in enumerate(tried, 1) if not known)
    data = {"outcomes": {USED: len(used)} | dict(reasons.most_common())}
    data |= {"two_faults": dict(two.most_common()), "one_fault": table, "typed": shown}
    return claims, data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--out", default="out", help="folder for bad_rows.json")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and of the faults")
    parser.add_argument("--rows", type=int, default=3000, help="how many")
    parser.add_argument("--data", default="", help="a .jsonl of real pairs to break instead")
    parser.add_argument("--model", default="", help="folder or hub name of a real tokenizer")
    args = parser.parse_args()
    (out := Path(args.out)).mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    tm.start_processes()
    draw = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else byte_tokenizer()
    rows = [json.loads(x) for x in open(args.data)] if args.data else good_rows(300, draw)
    with tempfile.TemporaryDirectory() as folder:
        claims, data = study(rows, tokenizer, args.rows, draw, Path(folder))
    data["pairs"] = {"source": Path(args.data).name or "made here", "count": len(rows)}
    data["tokenizer"] = {"source": Path(args.model).name or "bytes", "tokens": len(tokenizer)}
    setting = {"seed": args.seed, "rows": args.rows, "command": " ".join(CONFIG)}
    return bandit.report(out, "bad_rows", claims, data, setting)


if __name__ == "__main__":
    sys.exit(main())
