"""The stacked trainer of tests/study_worlds.py is the trainer; its worlds are what they say."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study_worlds as study  # noqa: E402

spac, trainer = study.spac, study.trainer
COPY, STYLES = study.Copy(), study.Styles(300)


def models(*seeds):
    return [trainer.CopyDigits().model(seed) for seed in seeds]


def stack(*seeds):
    flat = torch.stack([study.flatten(model) for model in models(*seeds)])
    return 3 * flat  # far from uniform, as trained weights are


def unflatten(row, seed=0):
    """transformers' model with one row's weights."""
    model = models(seed)[0]
    keys = [f"{name}.weight" for _, names in study.WEIGHTS.values() for name in names]
    state = model.state_dict()
    sizes = [state[key].numel() for key in keys]
    parts = zip(keys, row.detach().split(sizes))
    model.load_state_dict({key: part.view(state[key].shape) for key, part in parts})
    return model


def batch(world, count, *seeds):
    drawn = [world.draw(count, torch.Generator().manual_seed(seed)) for seed in seeds]
    return [torch.stack(both) for both in zip(*drawn)]


@pytest.mark.parametrize("world", [COPY, STYLES], ids=["copy", "styles"])
def test_the_stacked_log_probabilities_are_those_of_transformers(world):
    flat, (x, y) = stack(1, 2, 3), batch(world, 40, 4, 5, 6)
    ours = study.logps(flat, world, x, y)
    for row, prompts, responses, found in zip(flat, x, y, ours):
        scorer = trainer.Scorer(unflatten(row))
        items = [(p.tolist(), pair.tolist()) for p, pair in zip(prompts, responses)]
        torch.testing.assert_close(found, scorer(items), atol=1e-5, rtol=1e-6)
        wrong = study.logps(flat.roll(1, 0), world, x, y)  # the control: a neighbour's weights
    assert (wrong - ours).abs().max() > 0.1


def test_what_follows_the_end_token_does_not_count():
    flat, (x, y) = stack(1), batch(COPY, 5, 2)
    y[..., 3] = COPY.end
    short = [(p.tolist(), [r[:4].tolist() for r in pair]) for p, pair in zip(x[0], y[0])]
    expected = trainer.Scorer(unflatten(flat[0]))(short)
    torch.testing.assert_close(study.logps(flat, COPY, x, y)[0], expected, atol=1e-5, rtol=1e-6)


def plain_loop(world, x, y, row, setting, g, critic):
    """One seed, transformers' model, the trainer's parts, no stack: the oracle of study.train."""
    s, model = study.BASE | setting, unflatten(row)
    scorer, order = trainer.Scorer(model), []
    weights = list(model.parameters())
    average = study.flatten(model)

    def score(items):
        return scorer([(p.tolist(), ys) for p, ys in items])

    for _ in range(s["rounds"]):
        count = s["steps"] * s["batch"]
        while len(order) < count:
            order += torch.randperm(len(x), generator=g).tolist()
        use, order = order[:count], order[count:]
        rows = list(range(len(x))) if count >= len(x) else use
        flat = study.flatten(model).unsqueeze(0)
        played = study.sample(flat, world, x[rows].unsqueeze(0), [g])[0].tolist()
        items, places = [], {}
        for place, (i, generated) in enumerate(zip(rows, played)):
            end = generated.index(world.end) + 1 if world.end in generated else None
            items.append((x[i], [*y[i].tolist(), generated[:end]]))
            places[i] = place
        with torch.no_grad():
            opponent = score(items)
        optimizer = trainer.OPTIMIZERS["adamw"](weights, weight_decay=0.0)
        for step in range(s["steps"]):
            part = use[step * s["batch"] : (step + 1) * s["batch"]]
            part = [places[i] for i in part]
            policy = score([items[i] for i in part])
            both = policy.unbind(1), opponent[part].unbind(1)
            loss, _, _ = spac.spac_loss(*both, s["beta"], s["lam"], critic)
            optimizer.zero_grad()
            loss.mean().backward()
            torch.nn.utils.clip_grad_norm_(weights, trainer.parse([]).clip)
            rate = trainer.learning_rate(step, s["steps"], s["lr"], trainer.parse([]).warmup)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            average.lerp_(study.flatten(model), 1 / (s["shares"][0] * s["rounds"] * s["steps"]))
    return study.flatten(model), average


@pytest.mark.parametrize("critic", ["linear", "smoothed"])
@pytest.mark.parametrize("world", [COPY, STYLES], ids=["copy", "styles"])
def test_a_run_of_one_seed_is_the_trainers(world, critic, monkeypatch):
    setting = dict(critic=critic, lam=4.0, lr=1e-3, rounds=2, steps=5, batch=16)
    x, y = study.pairs(world, 48, 1)
    monkeypatch.setitem(study.SFT, "steps", 60)
    flat, seen = study.supervised(world, 300, [7]), []

    def watch(now, averages):
        seen.append(averages[0.5].clone())

    g = torch.Generator().manual_seed(1)
    found = study.train(world, x[None], y[None], flat, setting, [g], watch)[-1]
    g, trained = torch.Generator().manual_seed(1), trainer.CRITICS[critic]
    last, average = plain_loop(world, x, y, flat[0], setting, g, trained)
    held, answers = batch(world, 100, 9)
    before, ours, theirs, ours_mean, theirs_mean = (
        study.logps(row.view(1, -1), world, held, answers)
        for row in (flat, found, last, seen[-1], average)
    )
    assert (ours - before).abs().max() > 0.3  # it moved
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours_mean, theirs_mean, atol=1e-3, rtol=0)
    # Where a gradient is all rounding, AdamW's step is a coin's: a few weights may differ.
    assert ((found[0] - last).abs() < 1e-5).float().mean() > 0.999
    g = torch.Generator().manual_seed(1)
    other = setting | {"lam": math.inf}  # the control: without the critic it ends elsewhere
    control = study.train(world, x[None], y[None], flat, other, [g], watch)[-1]
    wrong = study.logps(control, world, held, answers)
    assert (wrong - ours).abs().max() > 0.01


def test_a_seed_does_not_depend_on_its_neighbours():
    setting = dict(lam=4.0, rounds=2, steps=5, batch=8)
    start = stack(1, 2, 3) / 3
    whole = study.learn(STYLES, 300, setting, [1, 2, 3], start)
    alone = study.learn(STYLES, 300, setting, [2], start[1:2])
    torch.testing.assert_close(whole["last reward"][1], alone["last reward"][0], atol=1e-4, rtol=0)
    assert whole["last reward"][0] != whole["last reward"][1]


def test_samples_come_with_the_frequencies_of_the_softmax():
    """The largest of 48 deviations exceeds 5 standard errors with probability below 3e-5."""
    flat, count = stack(1, 2), 4000
    x = STYLES.draw(1, torch.Generator().manual_seed(1))[0].expand(2, count, 4)
    draws = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    first = study.sample(flat, STYLES, x, draws)[..., 0]
    positions, hidden, at, _ = study.layout(4, 1, 1)
    p = study.logits(flat, x[:, :1], positions, hidden, at).softmax(-1)[:, 0, 0]
    found = torch.nn.functional.one_hot(first, study.V).double().mean(1)
    z = (found - p) / (p * (1 - p) / count).sqrt()
    assert z.abs().max() < 5
    assert ((found - p.roll(1, 0)) / (p * (1 - p) / count).sqrt()).abs().max() > 5


def test_copy_is_the_trainers_world():
    """The share of right digits, .64, is off by 5 standard errors with probability below 1e-6."""
    x, y = COPY.draw(3000, torch.Generator().manual_seed(1))
    tokens, theirs = trainer.CopyDigits().tokenizer(), trainer.CopyDigits()
    for prompt, response in zip(x[:200], y[:200, 0]):
        text, answer = (tokens.decode(t, skip_special_tokens=True) for t in (prompt, response))
        ours = COPY.reward(prompt, response).item()
        assert ours == pytest.approx(theirs.reward(text.rstrip("="), answer))
        assert not theirs.outside(answer)
    right = (y[..., :6] == x[:, None, 1:7]).float().mean().item()
    assert abs(right - 0.64) < 5 * math.sqrt(0.64 * 0.36 / 36000)
    best = COPY.optimal(x)
    assert (COPY.reward(x, best) == COPY.best).all()


def test_styles_is_read_exactly():
    """Against 20,000 samples: 5 standard errors, failure below 1e-6."""
    x, _ = STYLES.draw(200, torch.Generator().manual_seed(1))
    flat, draws = stack(5), [torch.Generator().manual_seed(2)]
    read = STYLES.read(flat, x[None], None)
    y = study.sample(flat, STYLES, x.repeat(100, 1)[None], draws)
    rewards = STYLES.reward(x.repeat(100, 1), y[0]) / STYLES.best
    assert abs(read["reward"].item() - rewards.mean()) < 5 * rewards.std() / math.sqrt(20000)
    assert (STYLES.reward(x, STYLES.optimal(x)) == STYLES.best).all()


@pytest.mark.parametrize("world", [COPY, STYLES], ids=["copy", "styles"])
def test_the_certificate_adds_up_to_the_gap(world):
    """Within 5 standard errors: failure below 1e-6 a run."""
    x, y = (torch.stack(both) for both in zip(*(study.pairs(world, 300, seed) for seed in (1, 2))))
    policies = [stack(1, 2) / 3]
    for seed in (3, 5, 7):  # any policies of one support
        policies.append(policies[-1] + 0.2 * stack(seed, seed + 1) / 3)
    told = study.certificate(world, policies, x, y, 0.3, 7.0, [1, 2])
    means = {k: torch.tensor(v).mean(1) for k, v in told.items() if k != "error"}
    total, error = means["regret"] + means["doubt"] + means["eps"], torch.tensor(told["error"])
    assert ((total - means["gap"]).abs() < 5 * error).all()
    assert (means["eps"].abs() > 5 * error).all()  # the control: without a term it does not


def test_quick_states_every_claim_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "KEPT", tmp_path / "kept")
    monkeypatch.setitem(study.SFT, "steps", 20)
    monkeypatch.setattr(study, "POINTS", dict(study.POINTS))
    argv = ["study_worlds.py", "--quick", "--workers", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert study.main() == 0  # the certificate, a theorem, adds up
    first = (tmp_path / "worlds.json").read_bytes()
    claims = json.loads(first)["claims"]
    named = {row.split()[1] for row in study.EXPECTED.split("\n") if len(row.split()) > 5}
    assert set(claims) >= named - {"rare_doubted"}  # no rare style need be lucky on two seeds
    assert (tmp_path / "worlds.png").stat().st_size > 10000
    study.main()  # from what was kept
    assert (tmp_path / "worlds.json").read_bytes() == first


def test_a_lucky_style_is_one_that_won_all_or_all_but_one_of_three_or_more(monkeypatch):
    def fight(*results):  # (winner, loser) in styles
        chosen = torch.tensor([[[a + study.A, study.ZERO], [b + study.A, study.ZERO]]
                               for a, b in results])  # fmt: skip
        return None, chosen

    c, d, e, f = 2, 3, 4, 5
    games = [(c, 0), (c, 1), (c, 0), (d, 1), (d, 0), (1, d), (e, 0), (e, 0), (0, f), (1, f), (f, 0)]
    monkeypatch.setattr(study, "pairs", lambda world, n, seed: fight(*games, (f, f)))
    assert study.lucky(300, [1]).tolist() == [[True, True] + [False] * 6]


# -------------------------------------------------------- from tables to claims
def table(last, average, rare=0.5, error=0.05) -> dict:
    """Of three seeds, read twice in a run; last and average: the rewards at the end, by seed."""
    end = {"last": np.array(last), "average": np.array(average)}
    found = {f"{k} reward": np.stack([v * 0 + 0.3, v], 1) for k, v in end.items()}
    found |= {f"{k} outside": np.full((3, 2), 0.25) for k in end}
    found |= {f"{k} rare": np.full((3, 2, 8), rare) for k in end}
    gaps = [[0.5, 0.5], [0.6, 0.6], [0.7, 0.7]]
    terms = dict(regret=[0.1, 0.2, 0.3], doubt=[0.2, 0.25, 0.2], eps=[0.3, 0.25, 0.3])
    terms = {k: np.repeat(np.array(v)[:, None], 2, 1) for k, v in terms.items()}
    terms |= {"gap": np.array(gaps), "kl": np.array([[0.1, 0.2], [0.3, 0.1], [0.1, 0.1]])}
    return found | {"certificate": terms | {"error": np.full(3, error)}}


def test_an_interval_is_students():
    values = np.random.default_rng(0).normal(size=16)
    mean, low, high = study.interval(values)
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert [mean, low, high] == pytest.approx([values.mean(), known.low, known.high], rel=1e-12)


def test_claims_are_made_of_the_tables_as_their_words_say(monkeypatch):
    """Made-up tables: the best cell of a rival by each measure, SPAC with its other critic is no
    rival, means at 300 pairs and the interval's low from 1,000 on."""
    lucky = np.zeros((3, 8), bool)
    lucky[0, 2] = lucky[2, 5] = True
    monkeypatch.setattr(study, "lucky", lambda n, seeds: lucky)
    ours = table([0.5] * 3, [0.9, 0.8, 0.7], rare=0.02)
    dpo = [(dict(lr=1), table([0.95] * 3, [0.5, 0.6, 0.7], rare=0.9)),
           (dict(lr=2), table([0.4] * 3, [0.8, 0.75, 0.55], rare=0.2))]  # fmt: skip
    off = table([0.1] * 3, [0.7, 0.6, 0.5], error=0.02)
    methods = {study.OURS: [({}, ours)], study.OFF: [({}, off)], "DPO": dpo}
    methods[study.LINEAR] = [({}, table([1.0] * 3, [1.0] * 3))]
    points = [("styles", 300), ("styles", 1000), ("copy", 300)]
    claims, columns = study.judge(dict.fromkeys(points, methods), [1, 2, 3])
    value = {name: claim["value"] for name, claim in claims.items()}
    everywhere = [study.label(point) for point in points]
    assert set(value["critic_matters"]) == set(value["certificate_adds_up"]) == {*everywhere}
    half = stats.t.ppf(0.975, 2) * 0.05 / math.sqrt(3)  # of the leads .1, .05, .15
    leads = dict(zip(everywhere, (0.1, 0.1 - half, 0.1)))
    assert value["average_leads"] == pytest.approx(leads)
    assert value["average_beats_oracle_stop"] == pytest.approx(dict.fromkeys(everywhere, -0.15))
    assert value["critic_matters"] == pytest.approx(dict.fromkeys(everywhere, 0.2))
    assert value["rare_doubted"] == pytest.approx(dict.fromkeys(everywhere[:2], 0.1))
    assert value["certificate_adds_up"] == pytest.approx(dict.fromkeys(everywhere, 5.0))
    told = columns["copy-300"]["DPO"]
    assert (told["average"]["cell"], told["oracle stop"]["cell"]) == (dict(lr=2), dict(lr=1))
    assert told["last"]["reward"] == pytest.approx([0.95] * 3)
    assert columns["styles-300"]["lucky rare styles"]["count"] == 2


def test_a_rival_is_spac_without_what_it_lacks():
    at, cell = ("styles", 1000), dict(lr=3e-4, beta=0.3)
    known = study.at(at, c=0.8) | cell
    assert known["lam"] == pytest.approx(25.298221) and known["steps"] == study.POINTS[at]
    assert study.rival("proximal", at, cell) == known | dict(critic="proximal")
    assert study.rival("iterated DPO", at, cell) == known | dict(lam=math.inf)
    dpo = study.rival("DPO", at, cell)
    assert dpo == known | dict(lam=math.inf, rounds=1, steps=10 * known["steps"])
    assert study.rival("RPO", at, cell) == dpo | dict(sft=pytest.approx(0.3 / 25.298221))
