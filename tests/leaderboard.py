"""The six tasks of the Open LLM Leaderboard v1: base and rounds side by side.

    python tests/leaderboard.py scores/BASE scores/round-1 scores/round-2 ...

Each argument is what lm_eval got as --output_path for one model; the first is the base. A row is
a model's scores in percent with standard errors; below it stand the differences from the base.
With --log_samples on both sides a difference's error is paired, question by question; without, it
is marked ~ and takes the two runs for independent, which is nearly always too wide. A difference
of less than twice its error is noise.

Where a folder holds a task several times the newest result is used, and said. A score is shown
only if it is what its column says: every question, the few-shot number, no chat template, greedy.
It is compared only under the base's harness, precision and prompts. Whatever is missing or
different is named; that row then has no average, and the exit code is 1.
"""

import argparse
import contextlib
import io
import json
import math
import shlex
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np

HARNESS = "0.4.13"
INSTALL = f'pip install "lm_eval[hf]=={HARNESS}"'


@dataclass(frozen=True)
class Task:
    column: str
    shots: int
    metric: str  # the harness's "metric,filter"
    questions: int
    parts: int = 1  # the harness's tasks behind this one: MMLU's subjects

    @property
    def stderr(self) -> str:
        return self.metric.replace(",", "_stderr,")


# By the harness's names. GSM8K's strict match, "#### number", is what the leaderboard counted.
TASKS = {
    "arc_challenge": Task("ARC", 25, "acc_norm,none", 1172),
    "hellaswag": Task("HellaSwag", 10, "acc_norm,none", 10042),
    "mmlu": Task("MMLU", 5, "acc,none", 14042, 57),
    "truthfulqa_mc2": Task("TruthfulQA", 0, "acc,none", 817),
    "winogrande": Task("Winogrande", 5, "acc,none", 1267),
    "gsm8k": Task("GSM8K", 5, "exact_match,strict-match", 1319),
}

# Task by task, not by the harness's group openllm: 0.4.12 and 0.4.13 lose MMLU's subjects in it
# and crash (--check shows it), 0.4.11 asks for a data set by a name that datasets 5 refuses.
RUN = (
    "lm_eval run --model hf --model_args pretrained={model},dtype=bfloat16 --tasks {task} "
    "--num_fewshot {shots} --batch_size 8 --log_samples --output_path {out}"
)
COMMAND = (
    "for m in MODEL OUT/round-*; do for t in "
    + " ".join(f"{name}:{task.shots}" for name, task in TASKS.items())
    + "; do "
    + RUN.format(model="$m", task="${t%:*}", shots="${t#*:}", out="scores/$(basename $m)")
    + "; done; done"
)


@dataclass
class Score:
    value: float  # percent, like error and answers
    error: float
    setting: dict  # what must agree before two scores are subtracted; None where unknown
    answers: dict  # (part, question) -> percent; empty without --log_samples


# ------------------------------------------------------- the files of the harness


def parsed(text: bytes, file: Path) -> dict:
    """What a file, or one of its lines, says. A scoring that was killed may leave half of it."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise SystemExit(f"{file} is damaged ({error}): delete it and score again") from None


def load(file: Path) -> dict:
    """A results file of the harness."""
    data = parsed(file.read_bytes(), file)
    missing = {"results", "configs", "n-samples", "config", "date"} - set(data)
    if missing:
        raise SystemExit(f"{file} has no {', '.join(sorted(missing))}: not lm_eval's, move it away")
    return data


def parts(name: str, held) -> list[str]:
    """Of the harness's tasks held, those behind name: MMLU's subjects, else the task itself."""
    return [t for t in held if t == name or name == "mmlu" and t.startswith("mmlu_")]


def samples(name: str, data: dict, file: Path):
    """(part, row) of what --log_samples kept beside a results file; nothing if a part lacks it."""
    date = file.stem.removeprefix("results_")
    kept = {t: file.with_name(f"samples_{t}_{date}.jsonl") for t in parts(name, data["configs"])}
    if all(path.exists() for path in kept.values()):
        for part, path in kept.items():
            for line in path.read_bytes().splitlines():
                yield part, parsed(line, path)


def faults(name: str, data: dict, questions: int) -> list[str]:
    """Why the score of name in a results file is not the leaderboard's; empty if it is."""
    task, result, found = TASKS[name], data["results"][name], []
    configs = {part: data["configs"][part] for part in parts(name, data["configs"])}
    shots = sorted({config["num_fewshot"] for config in configs.values()})
    if shots != [task.shots]:
        found.append(f"few-shot {shots}, not {task.shots}: use --num_fewshot {task.shots}")
    if len(configs) != task.parts:
        found.append(f"{len(configs)} of {task.parts} subjects: score it by --tasks {name} alone")
    scored = sum(data["n-samples"][part]["effective"] for part in configs)
    if scored != questions:
        found.append(f"{scored} of {questions} questions: score it without --limit")
    if data.get("chat_template") or data.get("system_instruction"):
        found.append("chat template or system prompt: score it without --apply_chat_template")
    drawn = [c for c in configs.values() if (c.get("generation_kwargs") or {}).get("do_sample")]
    if drawn or data["config"].get("gen_kwargs"):
        found.append("not the task's own greedy generation: score it without --gen_kwargs")
    for key in (task.metric, task.stderr):
        if not isinstance(result.get(key), int | float) or not math.isfinite(result[key]):
            found.append(f"{key} is {result.get(key)}, not a number: use {INSTALL}")
    return found


def read(folder: Path, questions: dict[str, int]) -> tuple[dict[str, Score], list, list]:
    """One model's scores by task, what is wrong, and what was passed over."""
    files = [(load(file), file) for file in folder.rglob("results_*.json")]
    if not files:
        raise SystemExit(f"no results_*.json in {folder}; score the model first:\n{COMMAND}")
    models = sorted({str(data.get("model_name")) for data, _ in files})
    if len(models) > 1:
        raise SystemExit(f"{folder} holds {', '.join(models)}: give each its own --output_path")
    files.sort(key=lambda pair: pair[0]["date"])
    scores, wrong, older = {}, [], []
    for name, task in TASKS.items():
        holding = [pair for pair in files if name in pair[0]["results"]]
        if not holding:
            wrong.append(f"{name} is missing: --tasks {name} --num_fewshot {task.shots}")
            continue
        data, file = holding[-1]
        if len(holding) > 1:
            older.append(f"{name} was scored {len(holding)} times, used is {file.name}")
        if found := faults(name, data, questions[name]):
            wrong += [f"{name}: {fault}" for fault in found]
            continue
        hashes = [data.get("task_hashes", {}).get(part) for part in parts(name, data["configs"])]
        setting = {
            "harness": data.get("lm_eval_version"),
            "precision": data["config"].get("model_dtype"),
            "few-shot seed": data["config"].get("fewshot_seed"),
            "prompts": hashes if all(hashes) else None,  # hashed with --log_samples only
        }
        metric, kind = task.metric.split(",")
        rows = [pair for pair in samples(name, data, file) if pair[1]["filter"] == kind]
        answers = {(part, row["doc_id"]): 100 * row[metric] for part, row in rows}
        value, error = (100 * data["results"][name][key] for key in (task.metric, task.stderr))
        scores[name] = Score(value, error, setting, answers)
    return scores, wrong, older


# --------------------------------------------------------------------- the table


def unlike(score: Score, base: Score) -> list[str]:
    """The settings that differ: only like scores may be subtracted."""
    pairs = {key: (value, base.setting[key]) for key, value in score.setting.items()}
    return [key for key, pair in pairs.items() if None not in pair and pair[0] != pair[1]]


def difference(score: Score, base: Score) -> tuple[float, float, bool]:
    """score - base, its standard error, and whether that is paired."""
    gain = score.value - base.value
    if not score.answers or score.answers.keys() != base.answers.keys():
        return gain, math.hypot(score.error, base.error), False
    gains = np.array([score.answers[key] - base.answers[key] for key in base.answers])
    return gain, float(gains.std(ddof=1) / math.sqrt(len(gains))), True


def average(cells: list[tuple]) -> tuple[float, float, bool]:
    """The mean of independent (value, error, paired), one for each task."""
    values, errors, paired = zip(*cells)
    return sum(values) / len(cells), math.hypot(*errors) / len(cells), all(paired)


def row(label: str, cells: dict[str, tuple], form: str) -> str:
    """A line of the table; cells: (value, error, paired) by task, all of them or no average."""
    columns = [cells.get(name) for name in TASKS]
    columns.append(average(columns) if None not in columns else None)
    shown = [f"{c[0]:{form}} {'±' if c[2] else '~'}{c[1]:.2f}" if c else "-" for c in columns]
    shown[-1] = shown[-1] if columns[-1] else "refused"
    return f"{label:16}" + "".join(f"{text:>14}" for text in shown)


def table(folders: list[Path], questions: dict[str, int]) -> tuple[list[str], list[str]]:
    """The lines to print, and what is wrong; questions: how many each task has."""
    heads = [f"{task.column} {task.shots}" for task in TASKS.values()] + ["average"]
    lines = [" " * 16 + "".join(f"{head:>14}" for head in heads)]
    remarks, problems, base = [], [], None
    for folder in folders:
        scores, wrong, older = read(folder, questions)
        label, found = folder.resolve().name, scores.items()
        lines.append(row(label, {name: (s.value, s.error, True) for name, s in found}, ".2f"))
        if base is not None:
            gains = {}
            for name in [name for name in scores if name in base]:
                if keys := unlike(scores[name], base[name]):
                    wrong.append(f"{name}: not the base's {', '.join(keys)}: score both alike")
                else:
                    gains[name] = difference(scores[name], base[name])
            lines.append(row("  - base", gains, "+.2f"))
        base = scores if base is None else base
        remarks += [f"{label}: {text}" for text in older]
        problems += [f"{label}: {text}" for text in wrong]
    return lines + remarks, problems


# -------------------------------------------------------- the installed harness


def stand_in(path: str, name: str | None = None, **_):
    """In place of load_dataset: rows in the shape of the six data sets, each with one MARK."""
    import datasets

    four, truth = ["1", "2", "3", "4"], {"choices": ["1", "2"], "labels": [1, 0]}
    rest = {
        "ai2_arc": {"choices": {"text": four, "label": ["A", "B", "C", "D"]}, "answerKey": "B"},
        "hellaswag": {"ctx_a": "is", "ctx_b": "of", "endings": four, "label": "1"},
        "mmlu": {"choices": four, "answer": 1},
        "truthful_qa": {"best_answer": "1", "correct_answers": ["1"], "incorrect_answers": ["2"]}
        | {"mc1_targets": truth, "mc2_targets": truth},
        "winogrande": {"option1": "1", "option2": "2", "answer": "1"},
        "gsm8k": {"answer": "So it is 3.\n#### 3"},
    }[path.split("/")[-1]]

    def rows(number: int, kind: str):
        texts = [f"MARK {kind} {i}" for i in range(number)]
        return datasets.Dataset.from_list(
            [{"question": t, "activity_label": t, "sentence": f"{t} _ is", **rest} for t in texts]
        )

    solved, asked = rows(40, "solved"), rows(2, "asked")
    return datasets.DatasetDict(train=solved, dev=solved, validation=asked, test=asked)


@contextlib.contextmanager
def offline():
    """The harness on the stand-in rows, without its talk."""
    talk = io.StringIO()
    with mock.patch("datasets.load_dataset", stand_in):
        with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
            yield


def harness(line: str) -> str:
    """Runs a command line of the installed lm_eval offline; what it died of, or nothing."""
    from lm_eval.__main__ import cli_evaluate

    with offline(), mock.patch.object(sys, "argv", shlex.split(line)):
        try:
            cli_evaluate()
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def compare(name: str, held: dict[str, tuple[int, set]], wrong: list[str]) -> bool:
    """Prints what is held of one of the six; held: {harness's task: (few-shot, metrics)}."""
    task, mine = TASKS[name], [held[t] for t in parts(name, held)]
    shots, metrics = sorted({s for s, _ in mine}), sorted(set().union(*(m for _, m in mine)))
    if (len(mine), shots) != (task.parts, [task.shots]) or task.metric not in metrics:
        wrong = [*wrong, f"must be {task.parts} of {task.parts}, [{task.shots}], {task.metric}"]
    found = f"{len(mine):2} of {task.parts:2} few-shot {shots} {' '.join(metrics)}"
    print(f"  {name:15}{found}: {'; '.join(wrong) or 'ok'}")
    return not wrong


def check(model: str | None) -> bool:
    """Prints what the installed harness makes of its group openllm and of README's command."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SystemExit(f"the harness is not installed ({error}): {INSTALL}") from None
    packages = ("lm_eval", "transformers", "datasets", "torch")
    print(", ".join(f"{package} {version(package)}" for package in packages))
    if version("lm_eval") != HARNESS:
        raise SystemExit(f"README's command is for lm_eval {HARNESS}: {INSTALL}")
    run = RUN if model else RUN.replace("--model hf", "--model dummy")

    print("\nThe group openllm, as the harness loads it:")
    with offline():
        tasks = TaskManager().load(["openllm"])["tasks"]
    held = {}
    for t, task in tasks.items():
        filters = [each["name"] for each in task.config.filter_list or [{"name": "none"}]]
        metrics = {f"{metric},{kind}" for metric in task.aggregation() for kind in filters}
        held[t] = task.config.num_fewshot, metrics
    whole = all([compare(name, held, []) for name in TASKS])
    for t in [t for t in held if not any(parts(name, [t]) for name in TASKS)]:
        print(f"  {t:15}none of the six, few-shot [{held[t][0]}] {' '.join(held[t][1])}")
    with tempfile.TemporaryDirectory() as out:
        line = run.replace("--num_fewshot {shots} ", "")
        died = harness(line.format(model=model, task="openllm", out=out))
    print("  lm_eval run --tasks openllm:", died or "runs")
    print("  Use it." if whole and not died else "  Do not use it. README's command does not.")

    print(f"\nREADME's command, {'that model' if model else 'random answers'}, stand-in rows:")
    right = []
    for name, task in TASKS.items():
        with tempfile.TemporaryDirectory() as out:
            wrong = [harness(run.format(model=model, task=name, shots=task.shots, out=out))]
            held = {}
            for file in Path(out).rglob("results_*.json"):
                data = load(file)
                wrong += faults(name, data, 2 * task.parts)
                first = [row["arguments"]["gen_args_0"] for _, row in samples(name, data, file)]
                if {str(prompt).count("MARK") for prompt in first} != {task.shots + 1}:
                    wrong.append("the prompts hold another number of examples")
                for t in parts(name, data["configs"]):
                    metrics = {k for k in data["results"][t] if "," in k and "_stderr" not in k}
                    held[t] = data["configs"][t]["num_fewshot"], metrics
        right.append(compare(name, held, [text for text in wrong if text]))
    return all(right)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"To score MODEL, the base, and the rounds in OUT: {INSTALL}\n\n{COMMAND}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="*", type=Path, help="the base's scores, then the rounds'")
    parser.add_argument(
        "--check",
        action="store_true",
        help="with the harness installed: run the command below on a few made-up rows, offline, "
        "and print the few-shot numbers and metrics met, and those of the harness's group openllm; "
        "answers are random, or those of the one model folder given",
    )
    config = parser.parse_args(arguments)
    if config.check:
        if len(config.folders) > 1:
            parser.error("--check takes one model folder, or none")
        return 0 if check(str(config.folders[0]) if config.folders else None) else 1
    if not config.folders:
        parser.error("name the folders, the base's first; --help tells how to score")
    lines, problems = table(config.folders, {name: task.questions for name, task in TASKS.items()})
    print("\n".join(lines))
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
