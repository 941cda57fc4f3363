"""leaderboard.py on result files in the harness's shape; each claim has a control that fails it.

Oracles: a real result (REAL, below), counts of discordant pairs, the shell, plain arithmetic.
What needs the harness itself is leaderboard.py --check, kept in results/leaderboard_check.txt.
"""

import copy
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import leaderboard as lb  # noqa: E402

# What lm_eval 0.4.13 wrote of a 135M model on six made-up rows of GSM8K, without what describes
# the machine, the tokenizer and the task's text.
REAL = json.loads("""{
 "results": {"gsm8k": {"name": "gsm8k", "alias": "gsm8k", "sample_len": 6,
   "exact_match,strict-match": 0.8333333333333334,
   "exact_match_stderr,strict-match": 0.16666666666666669,
   "exact_match,flexible-extract": 0.8333333333333334,
   "exact_match_stderr,flexible-extract": 0.16666666666666669}},
 "group_subtasks": {},
 "configs": {"gsm8k": {"task": "gsm8k", "dataset_path": "openai/gsm8k", "num_fewshot": 5,
   "output_type": "generate_until", "generation_kwargs": {
    "until": ["Question:", "</s>", "<|im_end|>"], "do_sample": false, "temperature": 0.0}}},
 "versions": {"gsm8k": 3.0}, "n-shot": {"gsm8k": 5},
 "higher_is_better": {"gsm8k": {"exact_match": true}},
 "n-samples": {"gsm8k": {"original": 6, "effective": 6}},
 "config": {"model": "hf", "model_args": {"pretrained": "smol/round-1", "dtype": "bfloat16"},
  "model_num_parameters": 134515008, "model_dtype": "torch.bfloat16", "model_revision": "main",
  "model_sha": "", "batch_size": "8", "batch_sizes": [], "use_cache": null, "limit": null,
  "bootstrap_iters": 100000, "gen_kwargs": {}, "random_seed": 0, "numpy_seed": 1234,
  "torch_seed": 1234, "fewshot_seed": 1234},
 "git_hash": null, "date": 1795558386.7919095, "transformers_version": "5.24.0",
 "lm_eval_version": "0.4.13", "upper_git_hash": null, "eot_token_id": 2, "max_length": 8192,
 "task_hashes": {"gsm8k": "acb513fbf150d1ac416781c8f033efef484e8bca9a10f114502641221bdc07d4"},
 "model_source": "hf", "model_name": "smol/round-1", "model_name_sanitized": "smol__round-1",
 "system_instruction": null, "system_instruction_sha": null, "fewshot_as_multiturn": null,
 "chat_template": null, "chat_template_sha": null,
 "total_evaluation_time_seconds": "50.12346833399988"}""")
# And the rows of its samples file, both filters, without question, prompt and answer.
REAL_ROWS = [
    {"doc_id": i, "filter": kind, "metrics": ["exact_match"], "exact_match": float(i > 0)}
    for kind in ("strict-match", "flexible-extract")
    for i in range(6)
]
ALL = {name: task.questions for name, task in lb.TASKS.items()}
FEW = {name: 114 for name in lb.TASKS}  # questions, for those tests that need answers


def write(folder, data, rows=None, stamp="2026-11-24T22-13-56.919191"):
    """As the harness: results_TIME.json in a folder named after the model, samples beside it."""
    place = folder / data["model_name_sanitized"]
    place.mkdir(parents=True, exist_ok=True)
    (place / f"results_{stamp}.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
    for part, kept in (rows or {}).items():
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (place / f"samples_{part}_{stamp}.jsonl").write_text(text, encoding="utf-8")
    return place / f"results_{stamp}.json"


def result(name, value=0.5, error=0.01, questions=ALL, date=1.0):
    """REAL, turned into another task's: MMLU has 57 tasks and, in results only, their group."""
    task, data = lb.TASKS[name], copy.deepcopy(REAL)
    config = data["configs"].pop("gsm8k") | {"num_fewshot": task.shots}
    numbers = {"name": name, task.metric: value, task.stderr: error}
    each = [f"mmlu_{i}" for i in range(57)] if name == "mmlu" else [name]
    rest, size = divmod(questions[name], len(each))[::-1]
    data["results"] = {part: dict(numbers) for part in [*each, name]}
    data["configs"] = {part: copy.deepcopy(config) for part in each}
    sizes = {part: size + (i < rest) for i, part in enumerate(each)}
    data["n-samples"] = {part: {"original": n, "effective": n} for part, n in sizes.items()}
    data["task_hashes"] = {part: f"prompts of {part}" for part in each}
    return data | {"date": date}


def answers(data, name, right):
    """The samples files' rows: one for each question, right or not in turn."""
    metric, kind = lb.TASKS[name].metric.split(",")
    right, rows = iter(right), {}
    for part, n in data["n-samples"].items():
        rows[part] = [
            {"doc_id": i, "filter": kind, metric: float(next(right))} for i in range(n["effective"])
        ]
    return rows


def six(folder, value=0.5, change=None, leave=(), logged=None):
    """A folder with all tasks but those left out; change: edits each task's data in place."""
    for i, name in enumerate(lb.TASKS):
        data = result(name, value, questions=FEW if logged else ALL)
        if change:
            change(name, data)
        rows = answers(data, name, logged[name]) if logged else None
        if logged:
            data["results"][name][lb.TASKS[name].metric] = statistics.mean(logged[name])
        if name not in leave:
            write(folder, data, rows, stamp=f"2026-11-24T22-13-5{i}.000000")
    return folder


def printed(capsys, *folders):
    code = lb.main([str(folder) for folder in folders])
    return code, *capsys.readouterr()


# ------------------------------------------------------------------------- numbers


def test_a_real_result_is_read_as_the_harness_printed_it(tmp_path):
    write(tmp_path, REAL, {"gsm8k": REAL_ROWS})
    scores, wrong, older = lb.read(tmp_path, ALL | {"gsm8k": 6})
    score = scores["gsm8k"]
    assert (f"{score.value:.2f}", f"{score.error:.2f}") == ("83.33", "16.67")
    assert statistics.mean(score.answers.values()) == pytest.approx(score.value)
    assert len(score.answers) == 6 and len(wrong) == 5 and not older
    other = copy.deepcopy(REAL)  # control: the other filter is not read
    other["results"]["gsm8k"]["exact_match,flexible-extract"] = 1.0
    flexible = [row | {"exact_match": 1.0} for row in REAL_ROWS[6:]]
    write(tmp_path, other, {"gsm8k": REAL_ROWS[:6] + flexible})
    assert lb.read(tmp_path, ALL | {"gsm8k": 6})[0]["gsm8k"] == score
    other["results"]["gsm8k"]["exact_match,strict-match"] = 1.0
    write(tmp_path, other)
    assert lb.read(tmp_path, ALL | {"gsm8k": 6})[0]["gsm8k"].value == 100


def test_the_average_is_the_mean_of_six_independent_scores(tmp_path, capsys):
    values = dict(zip(lb.TASKS, (0.6, 0.8, 0.6, 0.4, 0.75, 0.35)))

    def change(name, data):
        data["results"][name][lb.TASKS[name].metric] = values[name]

    code, out, err = printed(capsys, six(tmp_path / "base", change=change))
    last = out.splitlines()[1].split()[-2:]
    assert last == ["58.33", f"±{math.sqrt(6) / 6:.2f}"] and code == 0 and not err
    values["gsm8k"] = 0.41  # control: another score, another average
    assert (
        printed(capsys, six(tmp_path / "base", change=change))[1].splitlines()[1].split()[-2]
        == "59.33"
    )


def test_a_paired_error_counts_the_discordant_answers_only(tmp_path, capsys):
    rng = random.Random(0)
    base = {name: [rng.random() < 0.6 for _ in range(114)] for name in lb.TASKS}
    ours = {name: [r ^ (rng.random() < 0.1) for r in rows] for name, rows in base.items()}
    six(tmp_path / "base", logged=base)
    six(tmp_path / "round-1", logged=ours)
    scores = [lb.read(tmp_path / name, FEW)[0] for name in ("base", "round-1")]
    for name in lb.TASKS:
        gained = sum(o and not b for o, b in zip(ours[name], base[name]))
        lost = sum(b and not o for o, b in zip(ours[name], base[name]))
        n = 114
        slow = 100 * math.sqrt((gained + lost - (gained - lost) ** 2 / n) / (n - 1) / n)
        gain, error, paired = lb.difference(scores[1][name], scores[0][name])
        assert (
            paired
            and error == pytest.approx(slow)
            and gain == pytest.approx(100 * (gained - lost) / n)
        )
        mixed = copy.deepcopy(scores[1][name])  # control: the same answers to other questions
        keys = list(mixed.answers)
        mixed.answers = dict(zip(keys, rng.sample(list(mixed.answers.values()), n)))
        assert lb.difference(mixed, scores[0][name])[1] > 1.5 * slow
    lines, problems = lb.table([tmp_path / "base", tmp_path / "round-1"], FEW)
    assert not problems and "~" not in lines[3] and lines[3].count("±") == 7


def test_without_the_answers_a_difference_takes_the_runs_for_independent(tmp_path, capsys):
    folders = six(tmp_path / "base", 0.5), six(tmp_path / "round-1", 0.52)
    code, out, _ = printed(capsys, *folders)
    cells = out.splitlines()[3].split()
    assert cells[2:4] == ["+2.00", f"~{math.sqrt(2):.2f}"] and out.count("~") == 7 and code == 0
    six(tmp_path / "round-1", 0.49)  # control; and the second round against the base, not this
    lines = printed(capsys, *folders, six(tmp_path / "round-2", 0.51))[1].splitlines()
    assert [lines[3].split()[2], lines[5].split()[2]] == ["-1.00", "+1.00"]


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", lb.TASKS)
def test_there_is_no_average_without_all_six_and_the_missing_one_is_named(tmp_path, capsys, name):
    folders = six(tmp_path / "base"), six(tmp_path / "round-1", leave=[name])
    code, out, err = printed(capsys, *folders)
    base, ours, gains = out.splitlines()[1:4]
    assert code == 1 and ours.endswith("refused") and gains.endswith("refused")
    assert f"round-1: {name} is missing: --tasks {name} --num_fewshot {lb.TASKS[name].shots}" in err
    assert not base.endswith("refused") and err.count("missing") == 1  # control: the whole row


def limited(name, data):
    for counts in data["n-samples"].values():
        counts["effective"] = 2


def lost_subject(name, data):
    if name == "mmlu":
        del data["configs"]["mmlu_0"]


def other_shots(name, data):
    if name == "arc_challenge":
        data["configs"][name]["num_fewshot"] = 0


def one_subject_other_shots(name, data):
    if name == "mmlu":
        data["configs"]["mmlu_56"]["num_fewshot"] = 0


def put(place, key, value):
    def change(name, data):
        (data[place] if place else data)[key] = value

    return change


def score_of(name, key, value):
    def change(task, data):
        if task == name:
            data["results"][name][key] = value

    return change


def drawn(name, data):
    for config in data["configs"].values():
        config["generation_kwargs"]["do_sample"] = True


@pytest.mark.parametrize(
    "change, said",
    [
        (limited, "gsm8k: 2 of 1319 questions: score it without --limit"),
        (lost_subject, "mmlu: 56 of 57 subjects: score it by --tasks mmlu alone"),
        (other_shots, "arc_challenge: few-shot [0], not 25: use --num_fewshot 25"),
        (one_subject_other_shots, "mmlu: few-shot [0, 5], not 5: use --num_fewshot 5"),
        (put("", "chat_template", "{{x}}"), "score it without --apply_chat_template"),
        (put("", "system_instruction", "Be nice."), "score it without --apply_chat_template"),
        (put("config", "gen_kwargs", {"temperature": 0.7}), "score it without --gen_kwargs"),
        (drawn, "score it without --gen_kwargs"),
        (score_of("mmlu", "acc_stderr,none", "N/A"), "mmlu: acc_stderr,none is N/A, not a number"),
        (score_of("mmlu", "acc,none", math.nan), "mmlu: acc,none is nan, not a number"),
        (score_of("hellaswag", "acc_norm,none", None), "hellaswag: acc_norm,none is None"),
    ],
)
def test_a_score_that_is_not_the_leaderboards_is_not_shown(tmp_path, capsys, change, said):
    code, out, err = printed(capsys, six(tmp_path / "base", change=change))
    assert code == 1 and said in err and out.splitlines()[1].endswith("refused")
    assert " - " in out.splitlines()[1]
    code, out, err = printed(capsys, six(tmp_path / "other"))  # control: nothing changed
    assert code == 0 and not err and "refused" not in out


@pytest.mark.parametrize(
    "change, said",
    [
        (put("", "lm_eval_version", "0.4.11"), "harness"),
        (put("config", "model_dtype", "torch.float32"), "precision"),
        (put("config", "fewshot_seed", 7), "few-shot seed"),
        (lambda name, data: data["task_hashes"].update({name: "x", "mmlu_3": "x"}), "prompts"),
    ],
)
def test_unlike_scores_are_not_subtracted(tmp_path, capsys, change, said):
    base, same = six(tmp_path / "base"), six(tmp_path / "same")
    code, out, err = printed(capsys, base, same, six(tmp_path / "round-1", change=change))
    assert code == 1 and f"round-1: gsm8k: not the base's {said}: score both alike" in err
    ours, gains = out.splitlines()[4:6]
    assert not ours.endswith("refused") and gains.split()[2:] == ["-"] * 6 + ["refused"]
    assert err.count("round-1: ") == 6 and "same: " not in err  # control: the like one


def test_unknown_prompts_are_no_difference(tmp_path, capsys):
    def unlogged(name, data):
        data["task_hashes"] = {}

    code, out, err = printed(capsys, six(tmp_path / "base"), six(tmp_path / "r", change=unlogged))
    assert code == 0 and not err and "refused" not in out


# --------------------------------------------------------------------------- files


def test_of_several_results_the_newest_is_used_and_said(tmp_path, capsys):
    folder = six(tmp_path / "base", 0.5)
    again = result("winogrande", 0.7, date=2.0)  # its name sorts first, its date is later
    write(folder, again, stamp="2020-01-01T00-00-00.000000")
    code, out, _ = printed(capsys, folder)
    assert "70.00 ±1.00" in out.splitlines()[1] and code == 0
    assert (
        "base: winogrande was scored 2 times, used is results_2020-01-01T00-00-00.000000.json"
        in out
    )
    write(folder, again | {"date": 0.0}, stamp="2020-01-01T00-00-00.000000")  # control
    out = printed(capsys, folder)[1]
    assert "70.00" not in out and "used is results_2026-11-24T22-13-54.000000.json" in out


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    file = write(tmp_path, REAL)
    lb.read(tmp_path, ALL)  # control: whole
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(SystemExit, match="results_.*is damaged .*delete it and score again"):
        lb.read(tmp_path, ALL)
    file.write_text(json.dumps({"results": {}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="has no config, configs, date, n-samples: not lm_eval's"):
        lb.read(tmp_path, ALL)


def test_answers_that_were_cut_off_are_named(tmp_path):
    log = {name: [i % 2 for i in range(114)] for name in lb.TASKS}
    for folder in ("base", "round-1"):
        six(tmp_path / folder, logged=log)
    folders = [tmp_path / "base", tmp_path / "round-1"]
    lb.table(folders, FEW)  # control: whole
    file = next((tmp_path / "round-1").rglob("samples_gsm8k*"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(SystemExit, match="samples_gsm8k.* is damaged .*delete it and score again"):
        lb.table(folders, FEW)


def test_two_models_in_one_folder_are_refused(tmp_path):
    write(tmp_path, REAL)
    write(tmp_path, REAL, stamp="2026-11-25T00-00-00.000000")
    lb.read(tmp_path, ALL)  # control: one model twice
    write(tmp_path, REAL | {"model_name": "round-2", "model_name_sanitized": "round-2"})
    with pytest.raises(SystemExit, match="holds round-2, smol/round-1: give each its own"):
        lb.read(tmp_path, ALL)


def test_an_empty_folder_and_no_folder_name_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit, match=re.escape(lb.COMMAND)):
        lb.read(tmp_path, ALL)
    write(tmp_path, REAL)
    lb.read(tmp_path, ALL)  # control
    with pytest.raises(SystemExit) as stopped:
        lb.main([])
    assert stopped.value.code == 2 and "the base's first" in capsys.readouterr().err


# ------------------------------------------------------------- command and harness


def asked_of(command, folder):
    """(model, task, shots, output) of each lm_eval that the shell starts."""
    (folder / "bin").mkdir()
    stub = folder / "bin" / "lm_eval"
    stub.write_text('#!/bin/sh\necho "$*" >> calls\n')
    stub.chmod(0o755)
    for n in (1, 2):
        (folder / "OUT" / f"round-{n}").mkdir(parents=True)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-c", command], cwd=folder, env=os.environ | {"PATH": path}, check=True)
    pattern = r"pretrained=(\S+),dtype=bfloat16 --tasks (\S+) --num_fewshot (\S+) .*_path (\S+)$"
    return re.findall(pattern, (folder / "calls").read_text(), re.M)


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
def test_the_command_scores_every_folder_on_every_task_with_its_few_shot_number(tmp_path):
    leaderboard = dict(
        arc_challenge=25, hellaswag=10, mmlu=5, truthfulqa_mc2=0, winogrande=5, gsm8k=5
    )
    expected = [
        (model, task, str(shots), f"scores/{model.split('/')[-1]}")
        for model in ("MODEL", "OUT/round-1", "OUT/round-2")
        for task, shots in leaderboard.items()
    ]
    assert asked_of(lb.COMMAND, tmp_path) == expected
    (tmp_path / "control").mkdir()
    assert asked_of(lb.COMMAND.replace("c2:0", "c2:5"), tmp_path / "control") != expected
    assert "chat_template" not in lb.COMMAND and "gen_kwargs" not in lb.COMMAND


def test_help_tells_how_to_score_and_readme_says_the_same(capsys):
    def commands(text):
        joined = re.sub(r"\s*\\\n\s*", " ", text)
        return re.findall(r"^for m in .*lm_eval .*$", joined, re.M)

    with pytest.raises(SystemExit):
        lb.main(["--help"])
    assert commands(capsys.readouterr().out) == [lb.COMMAND]
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert set(commands(readme)) <= {lb.COMMAND}
    assert f"lm_eval[hf]=={lb.HARNESS}" in readme or "lm_eval[" not in readme
    assert commands("for m in x; do \\\n    lm_eval run; done") == [
        "for m in x; do lm_eval run; done"
    ]


def test_a_check_without_the_harness_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit, match=re.escape(lb.INSTALL)):
        lb.main(["--check"])


def test_a_check_tells_a_group_that_lost_its_subjects(capsys):
    whole = {f"mmlu_{i}": (5, {"acc,none"}) for i in range(57)}
    assert lb.compare("mmlu", whole, []) and capsys.readouterr().out.endswith("ok\n")  # control
    for held in ({"mmlu": (5, {"acc,none"})}, whole | {"mmlu_0": (0, {"acc,none"})}, {}):
        assert not lb.compare("mmlu", held, [])
        assert "must be 57 of 57" in capsys.readouterr().out
    assert not lb.compare("gsm8k", {"gsm8k": (5, {"exact_match,flexible-extract"})}, [])
