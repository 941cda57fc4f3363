"""Each patch in tests/changes applies, is small, runs by the command in its header, and changes
what it says: a control shows that the code as it stands does not do that."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
PATCHES = sorted((ROOT / "tests/changes").glob("*.patch"))
SOURCES = ("spac.py", "toy_bandit.py", "train_mistral.py")
MOST_LINES = 25
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git applies the patches")


def copy_of_the_code(folder: Path, patch: str | None = None) -> Path:
    """The three sources in a folder of their own, changed by a patch of tests/changes."""
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    if patch:
        file = ROOT / f"tests/changes/{patch}.patch"
        subprocess.run(["git", "apply", file], cwd=folder, check=True)
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings |= {"PYTHONPATH": str(folder)}  # where a test may leave a stand-in
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)


def command_of(patch: str) -> list[str]:
    """The words behind "python" in the indented lines of a patch's header."""
    header = (ROOT / f"tests/changes/{patch}.patch").read_text().partition("\ndiff --git")[0]
    (block,) = re.findall(r"(?:^    .*\n?)+", header, re.M)
    line = block.replace("\\\n", " ").strip()
    quoted = re.fullmatch(r'python -c "(.*)"', line)
    return ["-c", re.sub(r"\s+", " ", quoted[1])] if quoted else line.split()[1:]


def output_of(folder: Path, words: list[str]) -> str:
    done = run(folder, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def loaded(folder: Path, name: str):
    """A module of the changed code, beside the one that stands: no seconds for imports."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}.{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The code as it stands, after the run that the patches' commands also make."""
    folder = copy_of_the_code(tmp_path_factory.mktemp("plain"))
    output_of(folder, command_of("frozen_backbone"))
    return folder


def moved(folder: Path) -> set[str]:
    """Weights in which round 1 differs from round 0."""
    rounds = [load_file(folder / f"out/changed/round-{n}/model.safetensors") for n in range(2)]
    return {name for name in rounds[0] if not rounds[0][name].equal(rounds[1][name])}


def test_every_patch_has_a_test_below_and_few_lines():
    tests = Path(__file__).read_text()
    assert len(PATCHES) == 8
    for path in PATCHES:
        text = path.read_text()
        changed = re.findall(r"^[+-](?!\+\+ |-- )", text, re.M)
        assert 0 < len(changed) <= MOST_LINES, path.name
        assert f'(tmp_path, "{path.stem}")' in tests, path.name
        assert max(map(len, text.partition("\ndiff")[2].splitlines())) <= 101, path.name


def test_spins_loss_reads_no_label(tmp_path, plain):
    """log pi(y-) no longer changes the loss; the run reaches its end."""

    def loss(folder, rejected):
        logps = torch.zeros(1), torch.tensor([rejected]), torch.ones(1)
        start = (torch.zeros(1),) * 3
        return loaded(folder, "spac").spac_loss(logps, start, 1.0, math.inf)[0].item()

    changed = copy_of_the_code(tmp_path, "spin_loss")
    assert loss(changed, 0.0) == loss(changed, 2.0) == pytest.approx(math.log(1 + math.e), abs=1e-6)
    assert loss(plain, 0.0) != loss(plain, 2.0)
    output_of(changed, command_of("spin_loss"))
    log = [json.loads(line) for line in open(changed / "out/changed/log.jsonl")]
    world = loaded(plain, "train_mistral").CopyDigits()
    worth = [world.reward(pair["prompt"], pair["chosen"]) for pair in world.pairs(4000, 9)]
    assert abs(log[-1]["average_reward"] - sum(worth) / 12000) < 0.08  # it imitates the winners


def test_another_world_rewards_another_answer(tmp_path, plain):
    changed = copy_of_the_code(tmp_path, "sorting_world")
    world, copying = (loaded(folder, "train_mistral").CopyDigits() for folder in (changed, plain))
    assert world.reward("210543=", "012345") == copying.reward("210543=", "210543") == 3.0
    assert world.reward("210543=", "210543") < 3.0 > copying.reward("210543=", "012345")
    assert "done: " in output_of(changed, command_of("sorting_world"))
    for here in (world, copying):  # of the best: .6 + .4 / 10, s.d. .006
        rewards = [here.reward(p["prompt"], p[k]) for p in here.pairs(500, 0)
                   for k in ("chosen", "rejected")]  # fmt: skip
        assert 0.6 < sum(rewards) / 3000 < 0.68


def test_a_critic_of_another_class_learns_as_well(tmp_path, plain):
    """On three responses, whose rewards stand on its grid. The data policy's regret is .9."""
    changed = copy_of_the_code(tmp_path, "level_critic")
    words = command_of("level_critic")
    regrets = [float(output_of(folder, words).split()[-1]) for folder in (changed, plain)]
    assert max(regrets) < 0.01 and regrets[0] != regrets[1]


def test_your_own_kind_of_row_is_read_or_counted(tmp_path, plain):
    """Without the change all rows are dropped, and the run says so."""
    changed = copy_of_the_code(tmp_path, "scored_answers")
    rows = [
        {"question": f"{i}+{i}=", "answers": ["1", str(2 * i), "0"], "scores": [1, 5, 0]}
        for i in range(12)
    ]
    rows += [{"question": "1", "answers": ["2", "3"], "scores": [1, 1]}]
    rows += [{"question": "1", "answers": "2", "scores": [1]}]
    for folder in (changed, plain):
        lines = "\n".join(map(json.dumps, rows))
        (folder / "YOURS.jsonl").write_text(lines)
    shutil.copytree(plain / "out", changed / "out", dirs_exist_ok=True)
    words = command_of("scored_answers")
    said = output_of(changed, words)
    assert "1 dropped, first row 13: no answer is better" in said
    assert "1 dropped, first row 14: answers or scores" in said
    stopped = run(plain, *words)
    assert stopped.returncode and "no pair is left" in stopped.stderr


def test_two_samples_stand_beside_each_pair(tmp_path, plain):
    changed = copy_of_the_code(tmp_path, "two_samples")
    assert "done: " in output_of(changed, command_of("two_samples"))
    drawn = {}
    for folder in (changed, plain):
        pages = [torch.load(path) for path in (folder / "out/changed/play/round-1").iterdir()]
        drawn[folder] = [both for page in pages for both in page.values()]
    assert all(len(ys) == 2 and len(logps) == 4 for ys, logps in drawn[changed])
    assert any(ys[0] != ys[1] for ys, _ in drawn[changed])
    assert all(len(ys) == 1 and len(logps) == 3 for ys, logps in drawn[plain])


BOARD = """
import json, sys, types
class SummaryWriter:
    def __init__(self, folder): self.folder = folder
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def add_scalar(self, *line):
        with open("board.jsonl", "a") as file: file.write(json.dumps(line) + "\\n")
sys.modules["torch.utils.tensorboard"] = types.ModuleType("tensorboard")
sys.modules["torch.utils.tensorboard"].SummaryWriter = SummaryWriter
"""


def test_a_board_gets_every_number_of_the_log(tmp_path, plain):
    """Into a stand-in for TensorBoard, which the tests do not install."""
    changed = copy_of_the_code(tmp_path, "tensorboard")
    (changed / "sitecustomize.py").write_text(BOARD)
    output_of(changed, command_of("tensorboard"))
    log = [json.loads(line) for line in open(changed / "out/changed/log.jsonl")]
    drawn = {tuple(json.loads(line)) for line in open(changed / "board.jsonl")}
    assert ("rounds/reward", log[-1]["reward"], 1) in drawn
    steps = [line for line in log if line["event"] == "step"]
    assert steps and all(("steps of round 1/loss", e["loss"], e["step"]) in drawn for e in steps)
    assert not (plain / "board.jsonl").exists()


def test_lora_moves_each_matrix_by_a_low_rank(tmp_path, plain):
    pytest.importorskip("peft")
    changed = copy_of_the_code(tmp_path, "lora")
    shutil.copytree(plain / "out", changed / "out")
    world = "import json, train_mistral as t; pairs = t.CopyDigits().pairs(60, 3); "
    world += "open('PAIRS.jsonl', 'w').write('\\n'.join(map(json.dumps, pairs)))"
    output_of(changed, ["-c", world])
    output_of(changed, command_of("lora"))
    start = load_file(changed / "out/changed/round-0/model.safetensors")
    end = load_file(changed / "out/lora/round-1/model.safetensors")
    assert start.keys() == end.keys()
    ranks = {
        n: torch.linalg.matrix_rank(end[n] - w, rtol=1e-3) for n, w in start.items() if w.ndim > 1
    }
    learnt = {name: int(rank) for name, rank in ranks.items() if rank}
    assert learnt and max(learnt.values()) <= 8 and all("_proj" in name for name in learnt)
    whole = [load_file(plain / f"out/changed/round-{k}/model.safetensors") for k in range(2)]
    name = "model.layers.0.mlp.up_proj.weight"  # control: without it more than eight
    assert torch.linalg.matrix_rank(whole[1][name] - whole[0][name], rtol=1e-3) > 8


def test_a_frozen_backbone_moves_one_layer(tmp_path, plain):
    changed = copy_of_the_code(tmp_path, "frozen_backbone")
    output_of(changed, command_of("frozen_backbone"))
    names = moved(changed)
    assert names and all(name.startswith("model.layers.1.") for name in names)
    assert len(moved(plain)) > len(names)
