"""The study of a real model with a known reward measures what it says it measures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import study_smollm2 as study
import torch
from matplotlib.image import imread
from scipy import stats

import train_mistral as tm


def test_plain_words_have_at_most_four_letters():
    assert study.plain("I see the large animals") == 3 / 5
    assert study.plain("don't!") == 0  # five letters and signs
    assert study.plain("12 + 3") == 0 and study.words("a b-c 7") == ["a", "b", "c"]


def test_gains_are_paired_by_prompt_and_have_a_95_percent_interval():
    start, after = ["a bigger house"] * 3 + ["a b"], ["a b c"] * 3 + ["a bigger"]
    found = study.facts(after, start)
    gains = np.array([2 / 3] * 3 + [-1 / 2])
    low, high = stats.norm.interval(0.95, gains.mean(), stats.sem(gains))
    assert found["gain"] == pytest.approx([gains.mean(), low, high], abs=1e-4)
    assert found["plain"] == pytest.approx(3.5 / 4) and found["words"] == 11 / 4
    assert study.facts(start, start)["gain"] == [0, 0, 0]
    with pytest.raises(ValueError):
        study.facts(start, start[:2])  # control: other prompts are no pairs


def test_answers_are_those_of_the_round_in_the_order_of_the_rows(tmp_path):
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    told = {3: [[[7, 8]], [0.0]], 1: [[[9]], [0.0]]}
    tm.seal(tmp_path / "play/heldout-2/000000", {3: told[3]}, "key")
    tm.seal(tmp_path / "play/heldout-2/000001", {1: told[1]}, "key")
    assert study.answers(tmp_path, "heldout", 2, Tokenizer()) == ["9", "7 8"]
    assert study.answers(tmp_path, "average", 2, Tokenizer()) == []


def test_the_study_labels_the_models_own_answers_by_their_true_reward(tmp_path, monkeypatch):
    lm, tokenizer = tm.CopyDigits().model(0), tm.CopyDigits().tokenizer()
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i:03}", "chosen": "1", "rejected": "2"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(study, "plain", lambda text: float("a" in text))
    path = study.pairs_of(str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), 30, tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [f"{i:03}" for i in range(30)]
    ahead = [("a" in line["chosen"]) - ("a" in line["rejected"]) for line in lines]
    assert min(ahead) == 0 < max(ahead)  # 20 nats: the better one wins
    monkeypatch.setattr(study, "plain", lambda text: 0.0)
    path.unlink()
    study.pairs_of(str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), 30, tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert min(("a" in x["chosen"]) - ("a" in x["rejected"]) for x in lines) < 0  # control
    assert torch.is_grad_enabled()


def test_the_picture_is_drawn_from_the_record_beside_it(tmp_path):
    kept = Path(__file__).parents[1] / "results/smollm2"
    data = json.loads((kept / "summary.json").read_text())["data"]
    study.draw(data, tmp_path / "again.png")
    again, there = (imread(path) for path in (tmp_path / "again.png", kept / "reward.png"))
    assert again.shape == there.shape and (abs(again - there).max(-1) > 0.02).mean() < 1e-3
    data["SPAC"]["heldout"][-1]["plain"] += 0.02  # control
    study.draw(data, tmp_path / "other.png")
    assert (abs(imread(tmp_path / "other.png") - there).max(-1) > 0.02).mean() > 1e-3


def test_help_says_what_is_needed():
    command = [sys.executable, study.__file__, "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--model" in said and "plain words" in said
