"""The trainer loses nothing: python tests/study_kills.py --out results

Tiny runs are killed (kill -9) in every phase, before every kind of file operation and inside
writes, on one process and under torchrun on two, in fp32 and in bf16 with recomputed layers; told
to leave (SIGTERM); given damaged files, other arguments, a full disk, a folder that cannot be
written; and cut in two, a torchrun launcher on each side. Each is started again with the same
command, and must end as the run that nothing interrupted, to the bit. Writes OUT/kills.json. Linux;
the disks need the right to mount a tmpfs.
"""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import toy_bandit as bandit  # noqa: E402
import train_mistral as tm  # noqa: E402

TRAINER = str(ROOT / "train_mistral.py")
SHORT = "--rows 60 --heldout 16 --rounds 2 --epochs 1 --sft_epochs 2 --generate_batch 16 "
SHORT = (SHORT + "--batch 16 --checkpoint_every 2 --seed 5").split()  # one pair of it is dropped
WAYS = {"fp32": SHORT, "bf16, recomputed": [*SHORT[:-1], "6", "--bf16", "--recompute"]}
PATIENCE = 600  # seconds after which a process counts as hung

EXPECTED = """
theorem kills        unlike          0 0  kill -9 anywhere: runs not bit-equal to a straight one
theorem kills        repeated        0 0  lines or rows that stand twice after the restart
theorem kills        missed          0 0  phases and file operations that no kill reached
theorem sigterm      unlike          0 0  SIGTERM saves and leaves: runs not bit-equal in the end
theorem sigterm      lost            0 0  runs that computed again what they had logged
theorem damage       used            0 0  damaged files that changed what the run left
theorem damage       unnamed         0 0  stops that do not name the file, or with a traceback
goal    at_rest      unseen          0 0  damage to files no restart reads: neither named nor remade
theorem refusals     accepted        0 0  another argument, data file or world size, not refused
theorem refusals     unshown         0 0  refusals that do not show the difference
theorem disk         unclear         0 0  full disks, locked folders: no clear error, or a traceback
theorem disk         unlike          0 0  runs not bit-equal once there was room again
theorem launchers    hung            0 0  half of a two-launcher job outlives the other half
theorem launchers    unlike          0 0  such jobs not bit-equal after a restart
"""  # kind, claim, value, least and most expected, what it is

PHASES = {  # what may be struck, and the function of train_mistral.py that is running then
    "start": "open_folder", "SFT": "accumulate", "generation": "sample", "scoring": "forward",
    "training": "accumulate", "checkpoint": "save_state", "round's save": "save_model",
    "held-out answers": "evaluate", "curves": "draw_curves", "any moment": "main",
}  # fmt: skip


LAUNCHERS = [  # side, what is killed, in which phase, at which call
    (1, "worker", "training", 5), (0, "worker", "generation", 4), (1, "side", "training", 3),
    (0, "side", "SFT", 3), (1, "launcher", "training", 2), (0, "launcher", "scoring", 3),
]  # fmt: skip


class Moment(NamedTuple):
    """When to strike, and how."""

    where: str  # a phase, or an operation on a file such as "fsync state/page.tmp"
    count: int  # the how manieth of this process
    part: float = 0.5  # of the phase's usual duration; of the bytes, for a write
    rank: int = 0
    deed: str = "kill"  # the rank; "all": and all else; "launcher": that alone; "term"; "fill"


# -------------------------------------------------------- inside the struck process


class Watch:
    """Counts the phases and file operations of the trainer, and strikes at a moment."""

    def __init__(self, moment: Moment | None, usual: float, out: Path, note: Path):
        mine = moment and int(os.environ.get("RANK", 0)) == moment.rank
        self.moment, self.usual, self.out, self.note = moment if mine else None, usual, out, note
        self.seen, self.seconds, self.inside = Counter(), Counter(), []
        self.fsync, os.fsync = os.fsync, self.torn_fsync
        sys.addaudithook(self.operation)

    def is_now(self, where: str) -> bool:
        self.seen[where] += 1
        return self.moment is not None and self.moment[:2] == (where, self.seen[where])

    def strike(self, delay: float = 0.0) -> None:
        """From outside, as a real kill comes, where there is time to wait for."""
        deed, launcher, me = self.moment.deed, os.getppid(), os.getpid()
        if deed == "fill":
            return self.fill(self.moment.part)
        siblings = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        victims = {"all": [launcher, *map(int, siblings)], "launcher": [launcher]}
        victims = victims.get(deed, [launcher if deed == "term" and "RANK" in os.environ else me])
        if delay and os.fork():
            return
        time.sleep(delay)
        if not delay or os.getppid() == me:  # else the phase's end has struck already
            self.note.touch()
            for victim in victims:
                os.kill(victim, signal.SIGTERM if deed == "term" else signal.SIGKILL)
        if delay:
            os._exit(0)

    def fill(self, left: float) -> None:
        """Another program takes the disk, but for some bytes."""
        self.note.touch()
        free = shutil.disk_usage(self.out.parent).free
        with contextlib.suppress(OSError), open(self.out.parent / "ballast", "wb") as ballast:
            ballast.write(bytes(max(0, free - int(left))))

    def watched(self, name: str, function):
        """The trainer's function of that name, with its entries counted and a moment to strike."""

        def inner(*args, **kwargs):
            if name == "accumulate":
                phase = "training" if args[0].state["round"] else "SFT"
            elif name == "forward":
                phase = "scoring" if "play" in self.inside else ""
            else:
                phase = next((p for p, f in PHASES.items() if f == name), "")
            self.inside.append(name)
            began, now = time.perf_counter(), phase and self.is_now(phase)
            if now:
                self.strike(self.moment.part * self.usual)
            try:
                return function(*args, **kwargs)
            finally:
                self.inside.pop()
                self.seconds[phase] += time.perf_counter() - began
                if now and self.moment.deed not in ("fill", "term") and not self.note.exists():
                    self.strike()

        return inner

    def within(self, path) -> str:
        """A path in the run's folder, numbers as N; else ""."""
        if not isinstance(path, str | bytes | os.PathLike):
            return ""
        path = Path(os.path.abspath(os.fsdecode(path)))
        inside = path.is_relative_to(self.out.absolute())
        return re.sub(r"\d+", "N", str(path.relative_to(self.out.absolute()))) if inside else ""

    def operation(self, event: str, args: tuple) -> None:
        """sys.addaudithook: strikes before an operation, or with half a line written."""
        changing = {"os.rename": 0, "os.remove": 0, "os.mkdir": 0, "shutil.rmtree": 0}
        changing |= {"shutil.copyfile": 1}
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            word, place = ("append" if "a" in args[1] else "open"), args[0]
        elif event in changing:
            word, place = event.split(".")[1], args[changing[event]]
        else:
            return
        name = self.within(place)
        if name and self.is_now(f"{word} {name}"):
            if word == "append":
                file = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(file, b'{"event": "step", "round": 1, "st')
            self.strike()

    def torn_fsync(self, file: int) -> None:
        """os.fsync, where a part of the bytes may be all that came to be written."""
        name = self.within(os.readlink(f"/proc/self/fd/{file}"))
        if name and self.is_now(f"fsync {name}"):
            os.ftruncate(file, int(self.moment.part * os.fstat(file).st_size))
            self.strike()
        self.fsync(file)


def worker(argv, moment, usual, said, note, user=None) -> None:
    """`python train_mistral.py ARGV`, watched; what it counted is written to note.json."""
    if said:
        with open(said, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    if user:
        os.setgroups([]), os.setgid(user), os.setuid(user)
    out = Path(argv[argv.index("--out") + 1])
    record, watch = usual < 0, Watch(moment, usual, out, Path(note))
    sys.argv, trainer = [TRAINER, *argv], {"__name__": "__main__", "__file__": TRAINER}
    *body, start = ast.parse(Path(TRAINER).read_text()).body  # what only a command does comes last
    exec(compile(ast.Module(body, []), TRAINER, "exec"), trainer)
    for name in {*PHASES.values(), "play"}:
        owner = next((c for c in (trainer["Scorer"], trainer["Run"]) if name in vars(c)), None)
        if owner:
            setattr(owner, name, watch.watched(name, getattr(owner, name)))
        else:
            trainer[name] = watch.watched(name, trainer[name])
    exec(compile(ast.Module([start], []), TRAINER, "exec"), trainer)
    if record:
        usual = {p: watch.seconds[p] / n for p, n in watch.seen.items() if p in PHASES}
        path = f"{note}-{os.environ.get('RANK', 0)}.json"
        Path(path).write_text(json.dumps({"seen": watch.seen, "usual": usual}))


# -------------------------------------------------------- outside


@dataclasses.dataclass
class Bench:
    """Where runs are started, and what an uninterrupted one looks like, by world size."""

    rng: random.Random
    argv: list[str]
    straight: dict[int, dict]
    counts: dict[int, list[dict]]  # by world size and rank: {"seen": .., "usual": ..}
    started: int = 0

    def launch(self, argv, processes=1, moment=None, user=None, record=False):
        """Runs it to its end; (exit code, what it said, whether the moment came)."""
        note, said = Path("note"), Path("said")
        note.unlink(missing_ok=True), said.unlink(missing_ok=True)
        usual = -1.0 if record else 0.0
        if moment and moment.where in PHASES:
            usual = self.counts[processes][moment.rank]["usual"][moment.where]
        if processes == 1:
            task = (argv, moment, usual, str(said.absolute()), str(note.absolute()), user)
            process = get_context("fork").Process(target=worker, args=task)
            process.start()
            process.join(PATIENCE)
            code = process.exitcode
            process.kill()
        else:
            code = self.torchrun(argv, ["--standalone", "--nproc_per_node", "2"], moment, usual)
        self.started += 1
        return (-99 if code is None else code), said.read_text(errors="replace"), note.exists()

    def torchrun(self, argv, options, moment, usual) -> int | None:
        process = start_torchrun(argv, options, moment, usual, "said")
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def start_torchrun(argv, options, moment, usual, said) -> subprocess.Popen:
    task = json.dumps([argv, moment, usual, "", os.path.abspath("note")])
    command = [sys.executable, "-m", "torch.distributed.run", *options, __file__, "--worker", task]
    with open(said, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def workers() -> list[int]:
    """The ranks that torchrun has started and that still work."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            here = os.readlink(path / "cwd") == os.getcwd() and b"--worker" in words
            if here and b"torch.distributed.run" not in words:
                found.append(int(path.name))
    return found


def end(process: subprocess.Popen) -> None:
    """The launcher and its workers, if any is left."""
    for left_over in [process.pid, *workers()]:
        with contextlib.suppress(OSError):
            os.kill(left_over, signal.SIGKILL)
    process.wait()


def sealed(content: bytes):
    """What the trainer sealed in a file."""
    return torch.load(io.BytesIO(content), weights_only=True)


def left(out: Path) -> dict[str, object]:
    """All that a run leaves, but for clock times, memory and the count of saved states."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name, content = str(path.relative_to(out)), path.read_bytes()
        if name == "log.jsonl":
            content = [json.loads(line) for line in content.splitlines()]
            for event in content:
                event.pop("seconds", None), event.pop("peak_bytes", None)
        elif name == "state/page":
            page = sealed(content)
            fleeting = "seconds peak_bytes logs saves began".split()
            content = {key: value for key, value in page.items() if key not in fleeting}
        elif name.startswith("state/"):  # the tensors; DTensor's pickle holds a salted hash
            whole = zipfile.ZipFile(io.BytesIO(content))
            content = b"".join(whole.read(one) for one in whole.namelist() if "/data/" in one)
        name = re.sub(r"state/\d+", "state/N", name)
        plain = isinstance(content, list | dict)
        found[name] = content if plain else hashlib.sha256(content).hexdigest()
    return found


def require_clean(code: int, said: str) -> None:
    if code:
        raise SystemExit(f"an uninterrupted run failed:\n{said}")


def unlike(out: Path, straight: dict) -> list[str]:
    """The files in which a run differs from an uninterrupted one."""
    try:
        mine = left(out)
    except Exception as error:  # a damaged file may be unreadable in any way
        return [f"unreadable: {error}"]
    return sorted(name for name in mine | straight if mine.get(name) != straight.get(name))


def repeated(out: Path) -> int:
    """Steps, rounds, samples and played rows that stand twice."""
    keys = []
    for name in ("log.jsonl", "samples.jsonl"):
        for line in map(json.loads, open(out / name)):
            keys.append((name, *(line.get(key) for key in ("event", "round", "step", "row", "of"))))
    for path in out.glob("play/*/*"):
        keys += [(path.parent.name, row) for row in sealed(path.read_bytes())]
    return len(keys) - len(set(keys))


def tell(number, total, text: str) -> None:
    print(f"{number:4} of {total}  {text}", flush=True)


# -------------------------------------------------------- kills


def plan(bench: Bench, processes: int, each: int, sites: int | None) -> list[Moment]:
    """each moments in every phase, and one before or inside so many kinds of file operation."""
    moments, rng, counts = [], bench.rng, bench.counts[processes]
    files = [name for name in counts[0]["seen"] if name not in PHASES]
    for where in [*PHASES] * each + rng.sample(files, len(files))[:sites]:
        rank = rng.choice([r for r in range(processes) if where in counts[r]["seen"]])
        count = rng.randint(1, counts[rank]["seen"][where])
        deed = rng.choice(["kill", "kill", "all"]) if processes > 1 else "kill"
        moments.append(Moment(where, count, rng.random(), rank, deed))
    return rng.sample(moments, len(moments))


def kills(bench: Bench, moments: list[Moment], processes: int) -> tuple[Counter, dict]:
    """Kills a run at one moment after another, at most three times, starts it again after each,
    and compares its end. A moment that what was left of a run did not reach waits for a new one."""
    queue, values, table, struck = list(moments), Counter(unlike=0, repeated=0, missed=0), {}, []
    total, number = len(moments), 0
    while queue or struck:
        out = Path(f"kill{processes}-{bench.started}")
        argv, struck = [*bench.argv, "--out", str(out)], []
        while True:
            moment = queue[0] if queue and len(struck) < 3 else None
            code, said, came = bench.launch(argv, processes, moment)
            if not (moment and came):
                break
            struck.append(queue.pop(0))
        if queue and not struck:
            values["missed"] += 1
            struck = [queue.pop(0)]
        differs = unlike(out, bench.straight[processes])
        twice = repeated(out) if code == 0 else 0
        values += Counter(unlike=bool(differs or code), repeated=twice)
        for moment in struck:
            number += 1
            kind = moment.where if moment.where in PHASES else moment.where.split()[0]
            cell = table.setdefault(kind, {"kills": 0, "survived": 0, "where": []})
            cell["kills"] += 1
            cell["survived"] += not (differs or code or twice)
            who = "" if processes == 1 else f", {moment.deed} from rank {moment.rank}"
            end = "as if nothing had happened" if not differs else f"DIFFERS in {differs}"
            tell(number, total, f"{moment.where}, call {moment.count}{who}: {end}")
            if moment.where not in PHASES:
                cell["where"] = sorted({*cell["where"], moment.where.split(" ", 1)[1]})
        if differs or code:
            print(f"exit {code}\n{said[-2000:]}")
        else:
            shutil.rmtree(out)
        struck = []
    return values, table


def sigterm(bench: Bench, processes: int, each: int) -> tuple[Counter, dict]:
    """The run leaves by itself, all that it had logged and played is kept, and it goes on."""
    values, table = Counter(unlike=0, lost=0), {}
    phases = [p for p in PHASES if p not in ("any moment", "start")]
    for phase in [phase for phase in phases for _ in range(each)]:
        out = Path(f"term{processes}-{bench.started}")
        argv, seen = [*bench.argv, "--out", str(out)], bench.counts[processes][0]["seen"][phase]
        moment = Moment(phase, bench.rng.randint(1, seen), bench.rng.random(), 0, "term")
        code, said, _ = bench.launch(argv, processes, moment)
        log, times = (out / "log.jsonl").read_bytes(), made(out)
        again, _, _ = bench.launch(argv, processes)
        kept = (out / "log.jsonl").read_bytes().startswith(log)
        kept = kept and times.items() <= made(out).items()
        differs = unlike(out, bench.straight[processes])
        values += Counter(unlike=bool(differs or again), lost=not kept)
        cell = table.setdefault(phase, {"told": 0, "went on": 0})
        cell["told"] += 1
        cell["went on"] += kept and not differs
        number, then = sum(c["told"] for c in table.values()), differs or "then as it should"
        tell(number, each * len(phases), f"SIGTERM in {phase}: exit {code}, kept {kept}, {then}")
    return values, table


def made(out: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in out.glob("play/*/*")}


# -------------------------------------------------------- damage, other arguments


def damages(content: bytes, rng: random.Random):
    """(what was done, the damaged file's content or None for a file that is gone)."""
    size = len(content)
    for name, at in (("first", 0), ("random", rng.randrange(size)), ("last", size - 1)):
        yield f"{name} byte flipped", content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    for name, at in (("empty", 0), ("cut in the middle", size // 2), ("one byte short", size - 1)):
        yield name, content[:at]
    yield "its second half zeros", content[: size // 2] + bytes(size - size // 2)
    yield "gone", None


def damage(bench: Bench) -> tuple[Counter, dict, int]:
    """Every kind of file of a run that was killed in round 2, damaged in eight ways: the restart
    names it, or makes it again. What no restart reads ("at rest") it may only leave alone."""
    base, values, table, tried, files = Path("base"), Counter(), {}, 0, {}
    bench.launch([*SHORT, "--out", str(base)], 1, Moment("training", 7))
    for path in sorted(path for path in base.rglob("*") if path.is_file()):
        name = str(path.relative_to(base))
        if name == "lock":  # an empty file
            continue
        files[re.sub(r"(^round-|heldout-|state/|/)\d+", r"\1N", name)] = name
    for kind, name in files.items():
        for what, content in damages((base / name).read_bytes(), bench.rng):
            out, tried = Path(f"damage-{bench.started}"), tried + 1
            shutil.copytree(base, out)
            (out / name).unlink() if content is None else (out / name).write_bytes(content)
            code, said, _ = bench.launch([*SHORT, "--out", str(out)])
            differs = unlike(out, bench.straight[1])
            fate = "remade" if not differs else "at rest" if differs == [name] else "used"
            if code:
                fate = "named" if name in said and "Traceback" not in said else "unnamed"
            values[fate] += 1
            table.setdefault(kind, {})[what] = fate
            if fate in ("used", "unnamed"):
                print(f"{kind}, {what}: exit {code}, differs in {differs}\n{said[-600:]}")
            shutil.rmtree(out)
        fates = Counter(table[kind].values())
        tell(len(table), len(files), f"{kind}: " + ", ".join(f"{n} {f}" for f, n in fates.items()))
    return values, table, tried


def others() -> dict[str, list[str]]:
    """For each argument that may not change another value, as an option."""
    changed = {"critic": "linear", "optimizer": "adafactor", "split": "other"}
    skip = {"preset", "out", "model", "data", "dry_run", *tm.FREE}
    given = vars(tm.parse(SHORT))
    for name, value in given.items():
        if type(value) in (int, float):
            changed[name] = type(value)(value * 2 or 1)
    changed |= {"heldout_data": "other.jsonl"}
    return {name: [f"--{name}", str(v)] for name, v in changed.items() if name not in skip}


def own_model(folder: Path, seed: int) -> None:
    tm.CopyDigits().model(seed).save_pretrained(folder)
    tm.CopyDigits().tokenizer().save_pretrained(folder)


def refusals(bench: Bench) -> tuple[Counter, dict]:
    """Under the same --out: each other argument; another world size; the same paths, but another
    row, another weight."""
    values, table = Counter(accepted=0, unshown=0), {}
    out = ["--out", "refuse"]
    bench.launch([*SHORT, *out], 1, Moment("training", 2))
    pairs = [json.dumps(pair) for pair in tm.CopyDigits().pairs(30, 0)]
    Path("other.jsonl").write_text("\n".join(pairs))
    Path("pairs.jsonl").write_text("\n".join(pairs))
    own_model(Path("model"), 0)
    yours = "--preset mistral-7b --model model --data pairs.jsonl --rounds 1 --heldout 4".split()
    yours += ["--batch", "8", "--out", "yours"]
    code, said, _ = bench.launch(yours)
    require_clean(code, said)
    tasks = {name: ([*SHORT, *out, *option], name) for name, option in others().items()}
    tasks |= {"world size": ([*SHORT, *out], "processes")}
    tasks |= {"a row of the data": (yours, "other rows"), "a weight": (yours, "other weights")}
    for task, (argv, key) in tasks.items():
        if task == "a row of the data":
            Path("pairs.jsonl").write_text(
                "\n".join(pairs).replace('"chosen": "', '"chosen": "1', 1)
            )
        if task == "a weight":
            Path("pairs.jsonl").write_text("\n".join(pairs))
            own_model(Path("model"), 1)
        before = sizes(Path(argv[-1] if task in ("a row of the data", "a weight") else "refuse"))
        code, said, _ = bench.launch(argv, 2 if task == "world size" else 1)
        after = sizes(Path(argv[-1] if task in ("a row of the data", "a weight") else "refuse"))
        shown = re.findall(rf"{key} was [^;)]*, is [^;)]*|{key}(?=[;)])", said)
        values += Counter(accepted=code == 0 or before != after, unshown=not shown)
        table[task] = shown[0] if shown else "not shown"
        tell(len(table), len(tasks) + 1, f"{task}: exit {code}, {table[task]}")
    beside = [*SHORT, "--out", "beside"]
    task = (beside, None, 0.0, os.path.abspath("first"), os.path.abspath("other note"))
    first = get_context("fork").Process(target=worker, args=task)
    first.start()
    while first.is_alive() and not Path("beside/log.jsonl").exists():
        time.sleep(0.01)
    code, said, _ = bench.launch(beside)
    first.join(PATIENCE)
    spoilt = first.exitcode or code == 0 or unlike(Path("beside"), bench.straight[1])
    shown = re.findall("in use", said)
    values += Counter(accepted=bool(spoilt), unshown=not shown)
    table["the same command, beside it"] = shown[0] if shown else "not shown"
    tell(
        len(table), len(tasks) + 1, f"the same command at work: exit {code}, {shown or said[-200:]}"
    )
    return values, table


def sizes(folder: Path) -> dict:
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


# -------------------------------------------------------- disks


@contextlib.contextmanager
def tmpfs(kilobytes: int):
    """A disk of that size, as a folder."""
    folder = Path(tempfile.mkdtemp(dir="."))
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,mode=755", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mended(bench, argv, out, values, table, task, mend, moment=None, user=None) -> None:
    """One trouble: the run stops with a clear error; mended, it ends as it should."""
    code, said, _ = bench.launch(argv, 1, moment, user)
    clear = code == 0 or ("Traceback" not in said and str(out.parent) in said)
    words = "No space left|GB free|Permission denied|Read-only file system|Not a directory"
    cause = "enough room" if code == 0 else " ".join(re.findall(words, said)[:1])
    saved = (out / "state" / "page").exists()
    mend()
    again, more, _ = bench.launch(argv)
    differs = unlike(out, bench.straight[1])
    values += Counter(unclear=not (clear and cause), unlike=bool(differs or again))
    table[task] = {"cause": cause or "none", "clear": clear, "went on": not (differs or again)}
    tell(len(table), "..", f"{task}: {cause or said[-300:]!r}, state kept {saved}, "
         f"{differs or 'then as it should'}")  # fmt: skip
    if again:
        print(more[-600:])


def disks(bench: Bench, fills: int) -> tuple[Counter, dict]:
    values, table, rng = Counter(unclear=0, unlike=0), {}, bench.rng
    for kilobytes in (64, 512, 2048, 4096, 8192):  # too small from the start, or not
        with tmpfs(kilobytes) as disk:
            grow = ["mount", "-o", "remount,size=16m", str(disk)]
            argv = [*SHORT, "--out", str(disk / "run")]
            mended(bench, argv, disk / "run", values, table, f"a disk of {kilobytes} KiB",
                   lambda grow=grow: subprocess.run(grow, check=True))  # fmt: skip
    for phase in [p for p in PHASES if p != "any moment"] * fills:  # others fill it meanwhile
        count = rng.randint(1, bench.counts[1][0]["seen"][phase])
        room = int(1000 * 1000 ** rng.random()) * (rng.random() < 0.8)
        with tmpfs(8192) as disk:
            argv = [*SHORT, "--out", str(disk / "run")]
            moment = Moment(phase, count, room, 0, "fill")
            task = f"{room} bytes left in {phase} {count}"
            mended(
                bench, argv, disk / "run", values, table, task, (disk / "ballast").unlink, moment
            )
    for phase in ("no run yet", "SFT", "training"):  # then it cannot be written
        with tmpfs(8192) as disk:
            argv = [*SHORT, "--out", str(disk / "run")]
            if phase in PHASES:
                bench.launch(argv, 1, Moment(phase, 4))
            for mode in ("ro", "rw"):
                subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)
                if mode == "ro":
                    back = ["mount", "-o", "remount,rw", str(disk)]
                    mended(bench, argv, disk / "run", values, table, f"read-only disk, {phase}",
                           lambda back=back: subprocess.run(back, check=True))  # fmt: skip
    return values, table


def locked(bench: Bench, values: Counter, table: dict) -> None:
    """Folders that this user may not write, before a run and within one."""
    user = 65534 if os.getuid() == 0 else None
    for phase in ("no run yet", "SFT", "training"):
        folder = Path(f"locked-{phase}".replace(" ", "-"))
        folder.mkdir()
        argv = [*SHORT, "--out", str(folder / "run")]
        if phase in PHASES:
            bench.launch(argv, 1, Moment(phase, 4))
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)

        def unlock(folder=folder):
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)

        mended(bench, argv, folder / "run", values, table, f"locked folder, {phase}", unlock,
               user=user)  # fmt: skip
    Path("file").write_text("")
    mended(bench, [*SHORT, "--out", "file/run"], Path("file/run"), values, table,
           "a file in the folder's place", Path("file").unlink)  # fmt: skip


# -------------------------------------------------------- two launchers, as on two machines


def launchers(bench: Bench, cases: list[tuple]) -> tuple[Counter, dict]:
    """A torchrun a side, one rendezvous. A worker, a side, or a launcher alone is killed; the same
    command is given again at once, and again when all is quiet."""
    values, table = Counter(hung=0, unlike=0), {}
    for side, victim, phase, count in cases:
        out = Path(f"sides-{side}-{victim}")
        argv = [*SHORT, "--out", str(out)]
        deed = {"worker": "kill", "side": "all", "launcher": "launcher"}[victim]
        usual = bench.counts[2][side]["usual"][phase]
        codes, seconds = both(argv, Moment(phase, count, bench.rng.random(), side, deed), usual)
        alive = len(workers())
        ended = f"exits {codes}, the last after {seconds:.0f} s, workers left {alive}"
        if alive:  # they may not be disturbed by a second job in their folder
            codes_beside, _ = both(argv)
            ended += f", then {codes_beside}"
        deadline = time.monotonic() + PATIENCE
        while workers() and time.monotonic() < deadline:
            time.sleep(0.5)
        hung = None in codes or bool(workers())
        again, _ = both(argv)
        differs = unlike(out, bench.straight[2])
        values += Counter(hung=hung, unlike=bool(differs or any(again) or repeated(out)))
        table[f"{victim} {side} killed in {phase}"] = {"hung": hung, "went on": not differs}
        then = differs or "then as it should"
        tell(len(table), len(cases), f"{victim} {side} in {phase}: {ended}; {then}")
    for path in (Path("side0"), Path("side1")) if values["hung"] + values["unlike"] else ():
        print(path.read_text()[-3000:])
    return values, table


def both(argv, moment=None, usual=0.0) -> tuple[list, float]:
    """Both launchers to their ends; exit codes, and seconds from the first end to the last."""
    Path("note").unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "job"]
    meet += ["--rdzv_endpoint", f"127.0.0.1:{port}"]
    sides = [start_torchrun(argv, meet, moment, usual, f"side{side}") for side in range(2)]
    first, began = None, time.monotonic()
    while None in [side.poll() for side in sides] and time.monotonic() - began < PATIENCE:
        if not first and any(side.poll() is not None for side in sides):
            first = time.monotonic()
        time.sleep(0.1)
    codes, seconds = [side.poll() for side in sides], time.monotonic() - (first or began)
    for side in sides:
        side.kill()
        side.wait()
    return codes, seconds


def prepare(rng: random.Random, argv: list[str]) -> Bench:
    """Uninterrupted runs on one process and on two, which count what there is to strike."""
    bench = Bench(rng, argv, {}, {})
    tm.CopyDigits().model(0)  # imports what each fork would, one of them a user without a right
    tm.CopyDigits().tokenizer().apply_chat_template([{"role": "user", "content": "1"}])  # to it
    for processes in (1, 2):
        out = Path(f"straight{processes}")
        code, said, _ = bench.launch([*argv, "--out", str(out)], processes, record=True)
        require_clean(code, said)
        bench.straight[processes] = left(out)
        counted = [Path(f"note-{rank}.json") for rank in range(processes)]
        bench.counts[processes] = [json.loads(path.read_text()) for path in counted]
    return bench


def study(rng: random.Random, quick: bool) -> tuple[dict, dict]:
    """All claims, and what each trouble came to."""
    claims, data = {}, {}

    def judge(name: str, results: list[tuple[Counter, dict]], runs: int, parts: list[str]):
        values = sum((value for value, _ in results), Counter())
        keys = [row.split()[2] for row in EXPECTED.splitlines() if row.split()[1:2] == [name]]
        values = {key: values[key] for key in keys}
        claims.update(bandit.judge(name, values, runs, EXPECTED))
        data[name] = dict(zip(parts, (table for _, table in results)))

    killed, told, parts = [], [], []
    for way, argv in reversed(WAYS.items()):  # what comes below takes the first
        Path(way).mkdir(mode=0o755)
        os.chdir(way)  # one within the other; the last one's are left for what follows
        bench = prepare(rng, argv)
        moments = {1: plan(bench, 1, 2, None), 2: plan(bench, 2, 1, 4)}
        if quick:
            moments = {1: moments[1][:3]}
        killed += [kills(bench, moments[n], n) for n in moments]
        told += [] if quick else [sigterm(bench, n, 1) for n in moments]
        parts += [f"{way}, {n} process{'es by torchrun' * (n - 1)}" for n in moments]
    runs = sum(cell["kills"] for _, table in killed for cell in table.values())
    judge("kills", killed, runs, parts)
    if quick:
        return claims, data
    runs = sum(cell["told"] for _, table in told for cell in table.values())
    judge("sigterm", told, runs, parts)
    values, table, tried = damage(bench)
    values["unseen"] = values["at rest"]
    judge("damage", [(values, table)], tried, ["files"])
    judge("at_rest", [(values, {})], tried, [])
    values, table = refusals(bench)
    judge("refusals", [(values, table)], len(table), ["changed"])
    values, table = disks(bench, 2)
    locked(bench, values, table)
    judge("disk", [(values, table)], len(table), ["troubles"])
    values, table = launchers(bench, LAUNCHERS)
    judge("launchers", [(values, table)], len(table), ["cases"])
    return claims, data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="out", help="folder for kills.json")
    parser.add_argument("--seed", type=int, default=0, help="which moments are struck")
    parser.add_argument(
        "--quick", action="store_true", help="three kills of each way, and nothing else"
    )
    config = parser.parse_args()
    (out := Path(config.out).resolve()).mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        os.chdir(folder)
        claims, data = study(random.Random(config.seed), config.quick)
        os.chdir("/")
    return bandit.report(out, "kills", claims, data, {"seed": config.seed, "run": WAYS})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        task = json.loads(sys.argv[2])
        task[1] = task[1] and Moment(*task[1])
        worker(*task)
    else:
        sys.exit(main())
