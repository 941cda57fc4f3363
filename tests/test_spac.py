"""spac.py beside independent oracles: loops over pairs and tokens, closed forms, scipy.

Each claim has a negative control: the same oracle with a sign flipped or a term dropped must not
agree.
"""

import inspect
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, special

sys.path.insert(0, str(Path(__file__).parents[1]))
import spac  # noqa: E402

CRITICS = {"smoothed": spac.smoothed_critic, "linear": spac.linear_critic}
BETA, LAM = 0.3, 2.5


@pytest.fixture
def rng():
    return np.random.default_rng(1312)


def double(array):
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def random_logps(rng, count=40):
    """policy and opponent, each (chosen, rejected, generated), as (3, count) arrays."""
    opponent = rng.normal(-60, 15, (3, count))
    return opponent + rng.normal(0, 4, (3, count)), opponent


def loss_of(policy, opponent, *hyper):
    return [
        t.numpy() for t in spac.spac_loss(tuple(double(policy)), tuple(double(opponent)), *hyper)
    ]


def log_sigmoid(u: float) -> float:
    return -math.log1p(math.exp(-u)) if u > 0 else u - math.log1p(math.exp(u))


# -------------------------------------------------------- the loss


def slow_loss(policy, opponent, beta, lam, critic):
    """Eq. 28 to 31 with math, one pair at a time: (loss, preference, critic)."""
    rows = []
    for p, q in zip(policy.T, opponent.T):
        won, lost, own = (beta * (a - b) for a, b in zip(p, q))
        preference = -log_sigmoid(won - lost)
        doubts = {
            "linear": own - (won + lost) / 2,
            "smoothed": -(log_sigmoid(won - own) + log_sigmoid(lost - own)) / 2,
            "no baseline": own,
            "half a baseline": own - won,
            "flipped": (won + lost) / 2 - own,
            "no half": -(log_sigmoid(won - own) + log_sigmoid(lost - own)),
            "only chosen": -log_sigmoid(won - own),
            "of the mean": -log_sigmoid((won + lost) / 2 - own),
        }
        rows.append((preference + doubts[critic] / lam, preference, doubts[critic]))
    return np.array(rows).T


@pytest.mark.parametrize("critic", CRITICS)
def test_the_loss_and_its_parts_equal_a_loop_over_the_pairs(rng, critic):
    """Eq. 28 to 31; six other forms of the critic, and three of the loss, do not."""
    policy, opponent = random_logps(rng)
    found = loss_of(policy, opponent, BETA, LAM, CRITICS[critic])
    assert np.allclose(found, slow_loss(policy, opponent, BETA, LAM, critic), rtol=1e-12, atol=0)
    others = {"linear", "smoothed", "no baseline", "half a baseline", "flipped", "no half"}
    for spoilt in (others | {"only chosen", "of the mean"}) - {critic}:
        assert not np.allclose(found, slow_loss(policy, opponent, BETA, LAM, spoilt), rtol=1e-3)
    for p, q, beta, lam in (
        (policy[[1, 0, 2]], opponent[[1, 0, 2]], BETA, LAM),  # preferred and other exchanged
        (opponent, policy, BETA, LAM),  # policy and opponent exchanged
        (policy, opponent, BETA, 1 / LAM),  # lam on the other side
    ):
        assert not np.allclose(found[0], slow_loss(p, q, beta, lam, critic)[0], rtol=1e-3)


def test_the_default_critic_is_the_smoothed_one(rng):
    policy, opponent = random_logps(rng)
    found = loss_of(policy, opponent, BETA, LAM)
    assert np.array_equal(found, loss_of(policy, opponent, BETA, LAM, spac.smoothed_critic))
    assert not np.allclose(found, loss_of(policy, opponent, BETA, LAM, spac.linear_critic))
    assert list(inspect.signature(spac.spac_loss).parameters)[:4] == [
        "policy",
        "opponent",
        "beta",
        "lam",
    ]


def test_a_policy_that_is_its_opponent_has_the_stated_losses(rng):
    """log 2 (1 + 1/lam), log 2, log 2; linear log 2, log 2, 0; a policy that moved has not."""
    policy, opponent = random_logps(rng, 9)
    for beta, lam in ((0.1, 10.0), (3.0, 0.5), (0.01, 1.0)):
        start, two = loss_of(opponent, opponent, beta, lam), math.log(2)
        assert np.allclose(start, [[two * (1 + 1 / lam)] * 9, [two] * 9, [two] * 9], rtol=1e-14)
        linear = loss_of(opponent, opponent, beta, lam, spac.linear_critic)
        assert np.allclose(linear, [[two] * 9, [two] * 9, [0] * 9], rtol=1e-14)
        assert np.abs(loss_of(policy, opponent, beta, lam)[0] - start[0]).min() > 1e-6


@pytest.mark.parametrize("critic", CRITICS)
def test_a_shift_that_is_common_to_a_prompt_cancels(rng, critic):
    """log Z(x) in all three log-ratios changes nothing; without the baseline it would."""
    policy, opponent = random_logps(rng)
    shift = rng.normal(0, 5, policy.shape[1])
    before = loss_of(policy, opponent, BETA, LAM, CRITICS[critic])
    after = loss_of(policy + shift, opponent, BETA, LAM, CRITICS[critic])
    assert np.allclose(before, after, rtol=1e-9, atol=1e-12)
    bare = [slow_loss(p, opponent, BETA, LAM, "no baseline")[2] for p in (policy, policy + shift)]
    assert np.allclose(bare[1] - bare[0], BETA * shift) and np.abs(shift).min() > 1e-3


@pytest.mark.parametrize("critic", CRITICS)
def test_the_gradient_equals_central_differences(rng, critic):
    """In all six arguments; the gradient of the loss at twice lam does not."""
    policy, opponent = random_logps(rng, 7)
    leaves = [double(row).requires_grad_() for row in (*policy, *opponent)]

    def total(x):
        x = x.reshape(6, 7)
        return slow_loss(x[:3], x[3:], BETA, LAM, critic)[0].sum()

    flat, step = np.concatenate([policy, opponent]).ravel(), 1e-5
    differences = [
        (total(flat + step * e) - total(flat - step * e)) / (2 * step) for e in np.eye(42)
    ]
    for lam, equal in ((LAM, True), (2 * LAM, False)):
        loss = spac.spac_loss(tuple(leaves[:3]), tuple(leaves[3:]), BETA, lam, CRITICS[critic])[0]
        gradient = torch.stack(torch.autograd.grad(loss.sum(), leaves)).numpy().ravel()
        assert np.allclose(gradient, differences, atol=1e-7) == equal


def test_the_smoothed_critic_has_half_the_linear_ones_slope_at_the_start_and_not_elsewhere(rng):
    """By differences: smoothed at lam is tangent to linear at 2 lam, only at policy = opponent."""

    def slopes(critic, at, step=1e-5):
        return np.array(
            [
                (slow_loss(at + step * e, 0 * at, BETA, 1, critic)[2].sum()) / (2 * step)
                - (slow_loss(at - step * e, 0 * at, BETA, 1, critic)[2].sum()) / (2 * step)
                for e in np.eye(3)[:, :, None]
            ]
        )

    def own_slopes(critic, at):
        leaves = tuple(double(row).requires_grad_() for row in at)
        doubt = spac.spac_loss(leaves, tuple(double(0 * at)), BETA, 1.0, critic)[2]
        return torch.stack(torch.autograd.grad(doubt.sum(), leaves)).numpy().ravel()

    start, away = np.zeros((3, 1)), np.array([[2.0], [-1.0], [4.0]])
    for at, halved in ((start, True), (away, False)):
        smoothed, linear = (own_slopes(critic, at) for critic in CRITICS.values())
        assert np.allclose(smoothed, slopes("smoothed", at), atol=1e-8)
        assert np.allclose(linear, BETA * np.array([-0.5, -0.5, 1]))
        assert np.allclose(smoothed, linear / 2) == halved
    assert not np.allclose(own_slopes(spac.smoothed_critic, start), linear)  # half, not the whole


def test_an_infinite_lam_is_dpo_value_and_gradient(rng):
    """-beta sigmoid(-margin) on chosen, its negative on rejected, none on y'; lam = 50 is not."""
    policy, opponent = random_logps(rng, 30)
    leaves = tuple(double(row).requires_grad_() for row in policy)
    margin = BETA * (policy[0] - opponent[0] - policy[1] + opponent[1])
    pull = BETA * special.expit(-margin)
    closed = np.stack([-pull, pull, 0 * pull])
    for lam, equal in ((math.inf, True), (50.0, False)):
        for critic in CRITICS.values():
            loss, _, doubt = spac.spac_loss(leaves, tuple(double(opponent)), BETA, lam, critic)
            gradient = torch.stack(torch.autograd.grad(loss.sum(), leaves)).numpy()
            assert np.allclose(loss.detach(), -special.log_expit(margin), rtol=1e-12) == equal
            assert np.allclose(gradient, closed, rtol=1e-12, atol=1e-16) == equal
            assert doubt.isfinite().all()  # still reported


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_ten_thousand_nats_overflow_nothing(dtype):
    """Losses and gradients stay finite at the tails, with their asymptotic values."""
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        leaves = tuple(torch.full((1,), 1e4 * s, dtype=dtype, requires_grad=True) for s in signs)
        zero = tuple(torch.zeros(1, dtype=dtype) for _ in signs)
        loss, preference, doubt = spac.spac_loss(leaves, zero, 1.0, 1.0)
        won, lost, own = (1e4 * s for s in signs)
        tail = {0: math.log(2)}
        assert preference.item() == pytest.approx(tail.get(lost - won, max(0, lost - won)))
        expected = sum(tail.get(own - h, max(0, own - h)) for h in (won, lost)) / 2
        assert doubt.item() == pytest.approx(expected, rel=1e-6)
        gradient = torch.autograd.grad(loss.sum(), leaves)
        assert loss.isfinite() and all(g.isfinite() for g in gradient)
    naive = -(1 / (1 + torch.exp(torch.tensor(1e4, dtype=dtype)))).log()
    assert naive.isinf()  # the control: sigmoid, then log


def test_the_loss_keeps_fp32_and_fp64_and_refuses_what_is_coarser(rng):
    policy, opponent = random_logps(rng, 5)
    for dtype in (torch.float32, torch.float64):
        p, q = (tuple(double(rows).to(dtype)) for rows in (policy, opponent))
        assert [part.dtype for part in spac.spac_loss(p, q, BETA, LAM)] == [dtype] * 3
        assert [part.shape for part in spac.spac_loss(p, q, BETA, LAM)] == [(5,)] * 3
    wide = loss_of(policy, opponent, BETA, LAM)[0]
    narrow = spac.spac_loss(*(tuple(double(r).float()) for r in (policy, opponent)), BETA, LAM)[0]
    assert np.abs(narrow.numpy() - wide).max() < 1e-4
    bf16 = [double(rows).bfloat16().double().numpy() for rows in (policy, opponent)]
    assert np.abs(loss_of(*bf16, BETA, LAM)[0] - wide).max() > 1e-2  # why it is refused
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        for spoilt in range(6):
            rows = [double(row) for row in (*policy, *opponent)]
            rows[spoilt] = rows[spoilt].to(dtype)
            with pytest.raises(ValueError, match="fp32 or fp64, got torch"):
                spac.spac_loss(tuple(rows[:3]), tuple(rows[3:]), BETA, LAM)


def test_bad_arguments_of_the_loss_are_named():
    good = (torch.zeros(4),) * 3
    nan, inf = math.nan, math.inf
    for beta in (0, -0.1, nan, -inf):
        with pytest.raises(ValueError, match="beta must be > 0"):
            spac.spac_loss(good, good, beta, LAM)
    with pytest.raises(ValueError, match="beta must be finite"):
        spac.spac_loss(good, good, inf, LAM)
    for lam in (0, -1.0, nan, -inf, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="lam must be > 0"):
            spac.spac_loss(good, good, BETA, lam)
    for count in (2, 4):
        for pair in (((torch.zeros(4),) * count, good), (good, (torch.zeros(4),) * count)):
            with pytest.raises(ValueError, match=r"\(chosen, rejected, generated\)"):
                spac.spac_loss(*pair, BETA, LAM)
    for shape in ((5,), (4, 1), (1, 4), ()):
        for spoilt in range(6):
            rows = [torch.zeros(4)] * 6
            rows[spoilt] = torch.zeros(shape)
            with pytest.raises(ValueError, match=r"one shape \(B,\)"):
                spac.spac_loss(tuple(rows[:3]), tuple(rows[3:]), BETA, LAM)
    for shape in ((4, 1), ()):  # equal shapes, none of them (B,)
        with pytest.raises(ValueError, match=r"one shape \(B,\)"):
            spac.spac_loss((torch.zeros(shape),) * 3, (torch.zeros(shape),) * 3, BETA, LAM)
    assert torch.isfinite(spac.spac_loss(good, good, BETA, inf)[0]).all()  # the controls: allowed
    assert spac.spac_loss((torch.zeros(0),) * 3, (torch.zeros(0),) * 3, BETA, LAM)[0].shape == (0,)


# -------------------------------------------------------- log-probabilities of responses


def slow_token_logps(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """One position at a time: logit of the label less the logarithm of the sum of exponentials."""
    out = np.zeros(labels.shape)
    for where in np.ndindex(*labels.shape):
        row = [float(value) for value in logits[where]]
        top = max(row)
        out[where] = row[labels[where]] - top - math.log(sum(math.exp(v - top) for v in row))
    return out


@pytest.mark.parametrize("shape", [(), (3,), (4, 6), (2, 3, 4)])
def test_token_log_probabilities_equal_a_loop_over_positions(rng, shape):
    """Any leading axes; labels moved by one position give others."""
    logits, labels = rng.normal(0, 3, (*shape, 11)), rng.integers(0, 11, shape)
    found = spac.token_logps(double(logits), torch.tensor(labels))
    assert found.shape == shape and found.dtype == torch.float64
    assert np.allclose(found, slow_token_logps(logits, labels), rtol=1e-12)
    if shape:
        moved = np.roll(labels, 1, -1)
        assert not np.allclose(found, slow_token_logps(logits, moved))


def test_coarse_logits_are_raised_to_fp32_before_the_softmax(rng):
    """bf16 in, fp32 out, exact for the logits as given; a softmax in bf16 is off by 1e-2."""
    logits, labels = rng.normal(0, 4, (5, 7, 300)), torch.tensor(rng.integers(0, 300, (5, 7)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        given = double(logits).to(dtype)
        found = spac.token_logps(given, labels)
        exact = slow_token_logps(given.double().numpy(), labels.numpy())
        assert found.dtype == torch.float32 and np.abs(found.numpy() - exact).max() < 2e-5
    coarse = double(logits).bfloat16()
    within = coarse.log_softmax(-1).gather(-1, labels[..., None])[..., 0].double()
    exact = slow_token_logps(coarse.double().numpy(), labels.numpy())
    assert np.abs(within.numpy() - exact).max() > 1e-2
    summed = spac.sequence_logps(coarse, labels, torch.ones(5, 7))
    assert summed.dtype == torch.float32 and np.abs(summed.numpy() - exact.sum(1)).max() < 1e-4


def test_huge_logits_overflow_nothing():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]])
    found = spac.token_logps(logits, torch.tensor([1, 2]))
    assert torch.allclose(found, torch.tensor([-2e4, -math.log(3)]), rtol=1e-3)
    assert logits.exp().isinf().any()  # the control


def test_the_gradient_of_a_tokens_log_probability_is_one_hot_less_softmax(rng):
    logits, labels = rng.normal(0, 2, (3, 4, 6)), rng.integers(0, 6, (3, 4))
    leaf = double(logits).requires_grad_()
    spac.token_logps(leaf, torch.tensor(labels)).sum().backward()
    closed = np.eye(6)[labels] - special.softmax(logits, -1)
    assert np.allclose(leaf.grad, closed, atol=1e-12)
    assert not np.allclose(leaf.grad, np.eye(6)[labels])  # the normaliser left out


WILD = [-100, -1, 10**9, 6]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_sequence_log_probabilities_sum_the_responses_tokens_only(rng, mask_dtype):
    """Against a loop, masked labels wild; with mask ignored, shifted or averaged, others."""
    logits, labels = rng.normal(0, 2, (8, 9, 6)), rng.integers(0, 6, (8, 9))
    mask = rng.uniform(size=(8, 9)) < 0.5
    mask[np.arange(8), rng.integers(0, 9, 8)] = True
    per_token = slow_token_logps(logits, labels)
    expected = [sum(per_token[b, t] for t in range(9) if mask[b, t]) for b in range(8)]
    wild = np.where(mask, labels, rng.choice(WILD, labels.shape))
    found = spac.sequence_logps(
        double(logits), torch.tensor(wild), torch.tensor(mask).to(mask_dtype)
    )
    assert found.shape == (8,) and np.allclose(found, expected, rtol=1e-12)
    for spoilt in (
        per_token.sum(1),
        (per_token * ~mask).sum(1),
        (per_token * np.roll(mask, 1, 1)).sum(1),
        (per_token * mask).sum(1) / mask.sum(1),  # divided by length
    ):
        assert not np.allclose(found, spoilt)


def test_a_response_twice_as_long_has_the_sum_not_the_mean(rng):
    logits, labels = double(rng.normal(size=(2, 5, 6))), torch.tensor(rng.integers(0, 6, (2, 5)))
    once = spac.sequence_logps(logits, labels, torch.ones(2, 5))
    twice = spac.sequence_logps(
        torch.cat([logits, logits], 1), torch.cat([labels, labels], 1), torch.ones(2, 10)
    )
    assert torch.allclose(twice, 2 * once) and not torch.allclose(twice, once)


def test_no_gradient_reaches_the_prompt_or_the_padding(rng):
    """Exactly zero at masked positions, one-hot less softmax at the others."""
    logits, labels = rng.normal(0, 2, (4, 5, 6)), rng.integers(0, 6, (4, 5))
    mask = np.tril(np.ones((4, 5), bool))
    leaf = double(logits).requires_grad_()
    wild = torch.tensor(np.where(mask, labels, -100))
    spac.sequence_logps(leaf, wild, torch.tensor(mask)).sum().backward()
    closed = (np.eye(6)[labels] - special.softmax(logits, -1)) * mask[..., None]
    assert np.allclose(leaf.grad, closed, atol=1e-12) and (leaf.grad.numpy()[~mask] == 0).all()
    assert np.abs(leaf.grad.numpy()[mask]).max(1).min() > 0


def test_bad_arguments_of_the_log_probabilities_are_named():
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    for bad in (torch.zeros(2, 4, 5), torch.zeros(2, 3), torch.zeros(3, 2, 5)):
        with pytest.raises(ValueError, match="do not fit labels"):
            spac.token_logps(bad, labels)
        with pytest.raises(ValueError, match="do not fit labels"):
            spac.sequence_logps(bad, labels, torch.ones(2, 3))
    for mask in (torch.ones(2, 4), torch.ones(3, 2), torch.ones(3), torch.ones(2, 3, 1)):
        with pytest.raises(ValueError, match=r"need \(B, T\)"):
            spac.sequence_logps(logits, labels, mask)
    with pytest.raises(ValueError, match=r"need \(B, T\)"):
        spac.sequence_logps(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), torch.ones(3))
    empty = torch.tensor([[1, 1, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="drop rows without response tokens"):
        spac.sequence_logps(logits, labels, empty)
    with pytest.raises((RuntimeError, IndexError)):  # a wild label inside the response is no token
        spac.sequence_logps(logits, labels - 100, torch.ones(2, 3))
    spac.sequence_logps(logits, labels, torch.ones(2, 3))  # the control: nothing raised


# -------------------------------------------------------- tables


def random_triples(rng, X=4, A=3, n=60):
    """(prompt, preferred, other): ties included, the last prompt never met, one response unseen."""
    x, won, lost = rng.integers(0, X - 1, n), *rng.integers(0, A, (2, n))
    won[x == 0] %= A - 1  # the last response of prompt 0 is never drawn
    lost[x == 0] %= A - 1
    triples = list(zip(x, won, lost))
    assert any(w == l for _, w, l in triples)
    return triples


def counted(triples, X=4, A=3):
    wins = np.zeros((X, A, A))
    for x, won, lost in triples:
        wins[x, won, lost] += 1
    return wins


def slow_psi(pi, f, triples, baseline=(0.5, 0.5), ties=True):
    """(L, E) of Eq. 2 and 3, triple by triple."""
    value = fit = 0.0
    n = len(triples)
    for x, won, lost in triples:
        if not ties and won == lost:
            continue
        expected = sum(p * v for p, v in zip(pi[x], f[x]))
        value += (expected - baseline[0] * f[x, won] - baseline[1] * f[x, lost]) / n
        fit -= log_sigmoid(f[x, won] - f[x, lost]) / n
    return value, fit


def test_the_data_policy_counts_prompts_and_pools_both_responses(rng):
    """Against counting by hand, ties and an unmet prompt included; winners alone give another."""
    batches = [random_triples(rng) for _ in range(5)]
    wins = double([counted(triples) for triples in batches])
    prompts, muhat = spac.data_policy(wins)
    assert prompts.shape == (5, 4) and muhat.shape == (5, 4, 3)
    winners_differ = 0
    for triples, p, m in zip(batches, prompts.numpy(), muhat.numpy()):
        for x in range(4):
            drawn = [y for t in triples if t[0] == x for y in t[1:]]
            assert p[x] == pytest.approx(len(drawn) / (2 * len(triples)))
            shares = [drawn.count(a) / max(1, len(drawn)) for a in range(3)]
            assert np.allclose(m[x], shares)
            winners = [t[1] for t in triples if t[0] == x]
            winner_shares = [winners.count(a) / max(1, len(winners)) for a in range(3)]
            winners_differ += not np.allclose(m[x], winner_shares)
        assert p.sum() == pytest.approx(1) and p[3] == 0 and (m[3] == 0).all() and m[0, 2] == 0
    assert winners_differ >= 10
    _, one_pair = spac.data_policy(double(counted([(2, 0, 1)])))
    assert np.array_equal(one_pair, [[0, 0, 0], [0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]])


def test_objective_and_parts_equal_sums_over_triples(rng):
    """Eq. 2, 3, 4 for batches of runs and a lam each; four spoilt sums do not."""
    batches = [random_triples(rng) for _ in range(6)]
    wins = double([counted(triples) for triples in batches])
    pi, f = rng.dirichlet(np.ones(3), (6, 4)), rng.uniform(0, 2, (6, 4, 3))
    lam = rng.uniform(0.1, 5, 6)
    args = double(pi), double(f), wins
    value, fit = spac.relative_value(*args), spac.data_fit(args[1], wins)
    slow = np.array([slow_psi(*run) for run in zip(pi, f, batches)])
    assert np.allclose(value, slow[:, 0], atol=1e-12) and np.allclose(fit, slow[:, 1], atol=1e-12)
    psi = slow[:, 0] + lam * slow[:, 1]
    assert np.allclose(spac.critic_objective(*args, double(lam)), psi, atol=1e-12)
    each = [spac.critic_objective(*(t[k] for t in args), float(lam[k])).item() for k in range(6)]
    assert np.allclose(each, psi, atol=1e-12)  # one run at a time, lam a number
    swapped = [[(x, lost, won) for x, won, lost in triples] for triples in batches]
    assert not np.allclose(fit, [slow_psi(*run)[1] for run in zip(pi, f, swapped)])
    assert not np.allclose(fit, [slow_psi(*run, ties=False)[1] for run in zip(pi, f, batches)])
    for baseline in ((1, 0), (0, 0), (-0.5, -0.5)):
        spoilt = [slow_psi(*run, baseline)[0] for run in zip(pi, f, batches)]
        assert not np.allclose(value, spoilt)
    assert not np.allclose(slow[:, 0] + slow[:, 1] / lam, psi)


def test_the_objective_is_linear_in_the_policy_and_blind_to_shifts(rng):
    """Its gradient in f is v + lam grad E, by differences; the unmet prompt has none."""
    triples, lam = random_triples(rng), 1.7
    wins, pi = double(counted(triples)), double(rng.dirichlet(np.ones(3), 4))
    f = double(rng.uniform(0, 2, (4, 3))).requires_grad_()
    (gradient,) = torch.autograd.grad(spac.critic_objective(pi, f, wins, lam), f)

    def psi(flat, lam=lam):
        value, fit = slow_psi(pi.numpy(), flat.reshape(4, 3), triples)
        return value + lam * fit

    at = f.detach().numpy().ravel()
    differences = optimize.approx_fprime(at, psi, 1e-6)
    assert np.allclose(gradient.flatten(), differences, atol=1e-5)
    assert not np.allclose(differences, optimize.approx_fprime(at, psi, 1e-6, -lam), atol=1e-5)
    assert (gradient[3] == 0).all() and torch.allclose(gradient.sum(-1), torch.zeros(4).double())
    shifted = spac.critic_objective(pi, f + double(rng.normal(size=(4, 1))), wins, lam)
    assert torch.allclose(shifted, spac.critic_objective(pi, f, wins, lam))
    other = double(rng.dirichlet(np.ones(3), 4))
    parts = [spac.critic_objective(p, f, wins, lam) for p in (pi, other, 0.3 * pi + 0.7 * other)]
    assert torch.allclose(parts[2], 0.3 * parts[0] + 0.7 * parts[1])


def test_a_thousand_identical_pairs_weigh_as_one(rng):
    """Nothing depends on n but shares: wins times 1,000 leaves value and fit as they are."""
    wins = double(counted(random_triples(rng)))
    pi, f = double(rng.dirichlet(np.ones(3), 4)), double(rng.uniform(0, 2, (4, 3)))
    for scale, equal in ((1000, True), (1 + wins.mT, False)):
        same = torch.allclose(
            spac.critic_objective(pi, f, wins, 2.0), spac.critic_objective(pi, f, scale * wins, 2.0)
        )
        assert same == equal


def test_bad_lam_of_the_objective_and_bad_eta_of_the_game_are_named(rng):
    wins = double([counted(random_triples(rng))] * 2)
    pi = torch.full((2, 4, 3), 1 / 3).double()
    for lam in (0.0, -1, math.nan, torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="lam must be > 0"):
            spac.critic_objective(pi, pi, wins, lam)
    for eta in (0.0, -1, math.nan, torch.tensor([[[1.0]], [[-1.0]]])):
        with pytest.raises(ValueError, match="eta must be > 0"):
            list(spac.spac_t(pi, lambda p: p, eta, 3))
    with pytest.raises(ValueError, match="at least one policy"):
        spac.mixture([])
    spac.critic_objective(pi, pi, wins, torch.tensor([1.0, 2.0]))  # the control


# -------------------------------------------------------- actor, mixture, the game


def slow_mirror(pi, f, eta):
    out = np.zeros_like(pi)
    for where in np.ndindex(*pi.shape[:-1]):
        weights = [p * math.exp(eta * v) for p, v in zip(pi[where], f[where])]
        out[where] = np.array(weights) / sum(weights)
    return out


def test_the_actors_step_reweights_by_exponentials(rng):
    """Eq. 8 by loops; a flipped sign, another eta or a forgotten pi gives another policy."""
    pi, f, eta = rng.dirichlet(np.ones(5), (3, 4)), rng.uniform(0, 2, (3, 4, 5)), 0.8
    found = spac.mirror_step(double(pi), double(f), eta)
    assert np.allclose(found, slow_mirror(pi, f, eta), rtol=1e-12)
    for spoilt in ((pi, -f, eta), (pi, f, 1 / eta), (np.ones_like(pi), f, eta), (pi, 2 * f, eta)):
        assert not np.allclose(found, slow_mirror(*spoilt), rtol=1e-3)
    etas = rng.uniform(0.1, 2, 3)
    each = [slow_mirror(*run) for run in zip(pi, f, etas)]
    assert np.allclose(spac.mirror_step(double(pi), double(f), double(etas)[:, None, None]), each)


def test_the_actors_step_maximises_gain_less_relative_entropy(rng):
    """Eq. 8 as scipy's maximiser of eta <q, f> - KL(q || pi); KL the other way is another."""
    for _ in range(20):
        pi, f, eta = rng.dirichlet(np.full(4, 2.0)), rng.uniform(0, 2, 4), rng.uniform(0.2, 3)

        def solve(objective, pi=pi):
            return special.softmax(optimize.minimize(objective, np.log(pi), tol=1e-12).x)

        def forward(logits, pi=pi, f=f, eta=eta):
            q = special.softmax(logits)
            return special.rel_entr(q, pi).sum() - eta * q @ f

        def backward(logits, pi=pi, f=f, eta=eta):
            q = special.softmax(logits)
            return special.rel_entr(pi, q).sum() - eta * q @ f

        found = spac.mirror_step(double(pi), double(f), eta).numpy()
        assert np.allclose(found, solve(forward), atol=1e-5)
        assert np.abs(found - solve(backward)).max() > 1e-4


def test_the_actors_step_ignores_shifts_and_keeps_zeros(rng):
    pi, f = rng.dirichlet(np.ones(5), 4), rng.uniform(0, 2, (4, 5))
    pi[:, 2] = 0
    pi /= pi.sum(1, keepdims=True)
    found = spac.mirror_step(double(pi), double(f), 3.0)
    shifted = spac.mirror_step(double(pi), double(f + rng.normal(0, 100, (4, 1))), 3.0)
    assert torch.allclose(found, shifted) and (found[:, 2] == 0).all()
    one = spac.mirror_step(double(pi), double(f + rng.normal(0, 1, (4, 5))), 3.0)
    assert not torch.allclose(found, one)  # a shift of single responses does count


def test_no_step_size_makes_the_actors_step_overflow_or_lose_its_mass(rng):
    """Not even where the highest f lies outside the policy's support; exp(eta f) alone would."""
    pi, f = rng.dirichlet(np.ones(5), 40), rng.uniform(0, 2, (40, 5))
    for unseen in (None, 2):
        if unseen is not None:
            pi[:, unseen] = 0
            pi /= pi.sum(1, keepdims=True)
            assert (f.argmax(1) == unseen).sum() > 3
        for eta in (1e3, 1e6):
            with np.errstate(divide="ignore"):
                logits = np.log(pi) + eta * f
            far = spac.mirror_step(double(pi), double(f), eta)
            assert (eta * double(f)).exp().isinf().any()
            assert np.allclose(far, special.softmax(logits, 1), atol=1e-10)


def test_the_mixture_is_the_mean_of_the_policies_and_leaves_them_alone(rng):
    """Eq. 9 of lists and generators; the last policy, or a mean without the first, is another."""
    policies = [double(rng.dirichlet(np.ones(3), (2, 4))) for _ in range(7)]
    before = [pi.clone() for pi in policies]
    found = spac.mixture(pi for pi in policies)
    assert np.allclose(found, np.mean([pi.numpy() for pi in policies], 0), atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip(policies, before))
    only = spac.mixture(policies[:1])
    assert torch.equal(only, policies[0]) and only.data_ptr() != policies[0].data_ptr()
    assert not torch.allclose(found, policies[-1])
    assert not torch.allclose(found, torch.stack(policies[1:]).mean(0))


def test_the_game_alternates_critic_and_actor_from_the_start(rng):
    """Eq. 7, 8: pairs, order and number as by hand; an actor who moves first plays another game."""
    start = rng.dirichlet(np.ones(3), 2)
    target, asked = rng.uniform(0, 2, (2, 3)), []

    def reply(pi):  # any function of the policy
        return target - pi**2

    def critic(pi):
        asked.append(pi)
        return double(reply(pi.numpy()))

    played = list(spac.spac_t(double(start), critic, 0.7, 5))
    assert len(played) == len(asked) == 5
    pi, early = start, slow_mirror(start, reply(start), 0.7)
    for found, f in played:
        assert np.allclose(found, pi, atol=1e-14) and np.allclose(f, reply(pi), atol=1e-14)
        assert not np.allclose(found, early, atol=1e-3)
        pi, early = slow_mirror(pi, reply(pi), 0.7), slow_mirror(early, reply(early), 0.7)
    assert torch.equal(played[0][0], double(start))
    assert list(spac.spac_t(double(start), lambda pi: pi, 0.7, 0)) == []
    endless = spac.spac_t(double(start), lambda pi: pi, 0.7, 10**9)
    assert torch.equal(next(endless)[0], double(start))  # lazy: a round is played when asked for


# -------------------------------------------------------- a finite class


def test_the_finite_critic_answers_with_the_minimiser_of_the_objective(rng):
    """Eq. 7 by brute force over members and triples; lam on the other term picks others."""
    functions = rng.uniform(0, 2, (12, 4, 3))
    batches = [random_triples(rng) for _ in range(8)]
    wins = double([counted(triples) for triples in batches])
    lam, others = rng.uniform(0.05, 5, 8), 0
    for lams in (lam, 0.8):
        critic = spac.FiniteCritic(
            double(functions), wins, lams if isinstance(lams, float) else double(lams)
        )
        for _ in range(5):
            pi = rng.dirichlet(np.ones(3), (8, 4))
            found = critic(double(pi))
            for k, each in enumerate(np.broadcast_to(lams, 8)):
                parts = np.array([slow_psi(pi[k], f, batches[k]) for f in functions])
                best = (parts[:, 0] + each * parts[:, 1]).argmin()
                assert np.array_equal(found[k], functions[best])
                others += (each * parts[:, 0] + parts[:, 1]).argmin() != best
                others += (-parts[:, 0] + each * parts[:, 1]).argmin() != best
    assert others > 20


def test_the_finite_critics_penalty_is_lam_times_the_fit_in_full_precision(rng):
    """To 1e-12, also when lam is a number that fp32 cannot hold."""
    functions = rng.uniform(0, 2, (6, 4, 3))
    triples = random_triples(rng)
    wins = double(counted(triples))
    fits = np.array([slow_psi(np.full((4, 3), 1 / 3), f, triples)[1] for f in functions])
    for lam in (0.1, 1 / 3, double(0.1)):
        penalty = spac.FiniteCritic(double(functions), wins, lam).penalty
        assert np.allclose(penalty, float(lam) * fits, rtol=1e-12, atol=0)
    assert not np.allclose(np.float32(0.1) * fits, 0.1 * fits, rtol=1e-12, atol=0)  # the control
    with pytest.raises(ValueError, match="lam must be > 0"):
        spac.FiniteCritic(double(functions), wins, -0.1)


def test_a_single_run_needs_no_leading_axes(rng):
    functions, triples = double(rng.uniform(0, 2, (5, 4, 3))), random_triples(rng)
    critic = spac.FiniteCritic(functions, double(counted(triples)), 0.7)
    *_, (pi, f) = spac.spac_t(double(rng.dirichlet(np.ones(3), 4)), critic, 0.5, 4)
    values = [spac.critic_objective(pi, g, double(counted(triples)), 0.7) for g in functions]
    assert torch.equal(f, functions[torch.stack(values).argmin()])
    assert not torch.equal(f, functions[torch.stack(values).argmax()])


def test_the_module_needs_torch_and_nothing_else():
    """And prints nothing; a name from elsewhere would be an import."""
    source = Path(spac.__file__).read_text()
    lines = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert lines and all(line.split()[1].split(".")[0] == "torch" for line in lines)


# -------------------------------------------------------- the proximal critic


def random_wins(rng, X, A):
    """Counts of the pairs at each prompt in which the second index beat the third, none at one."""
    wins = rng.poisson(3, (X, A, A)).astype(float)
    wins[-1, 0] = 0
    return wins


def test_the_proximal_critic_is_dpo_and_supervised_learning_of_both_responses(rng):
    """Eq. 39 by the loop, value and gradient; of the winner alone (RPO), or of y', it is not."""
    policy, opponent = random_logps(rng)
    found = loss_of(policy, opponent, BETA, LAM, spac.proximal_critic)
    h = BETA * (policy - opponent)
    preference = np.array([-log_sigmoid(m) for m in h[0] - h[1]])
    for doubt, equal in ((-(h[0] + h[1]) / 2, True), (-h[0], False), (h[2] - h[0], False)):
        expected = preference + doubt / LAM, preference, doubt
        assert np.allclose(found, expected, rtol=1e-12, atol=1e-12) == equal
    start = loss_of(opponent, opponent, BETA, LAM, spac.proximal_critic)
    assert np.allclose(start.pop(), 0) and np.allclose(start, math.log(2))
    leaves = tuple(double(row).requires_grad_() for row in policy)
    loss = spac.spac_loss(leaves, tuple(double(opponent)), BETA, LAM, spac.proximal_critic)[0]
    won, lost, own = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    assert own is None and torch.allclose(won + lost, torch.full_like(won, -BETA / LAM))
    linear = spac.spac_loss(leaves, tuple(double(opponent)), BETA, LAM, spac.linear_critic)[0]
    assert torch.autograd.grad(linear.sum(), leaves)[2].all()  # the control: y' matters there


def test_the_proximal_loss_in_policies_is_the_proximal_objective_in_rewards(rng):
    """Eq. 39: beta E log E_pi_t exp(f / beta) - E_muhat f + lam E(f), for any shift of f; in loops
    over the pairs. With the linear critic, or beta doubled, the two differ."""
    wins, pi_t = random_wins(rng, 3, 4), rng.dirichlet(np.ones(4), 3)
    pi, beta, lam = rng.dirichlet(np.ones(4), 3), 0.4, 2.3
    f = beta * np.log(pi / pi_t) + rng.normal(size=(3, 1))
    n, objective, losses = wins.sum(), lam * spac.data_fit(double(f), double(wins)).item(), {}
    for x, won, lost in np.ndindex(*wins.shape):
        partition = beta * math.log(pi_t[x] @ np.exp(f[x] / beta))
        objective += wins[x, won, lost] / n * (partition - (f[x, won] + f[x, lost]) / 2)
    for name, b in itertools.product(("proximal_critic", "linear_critic"), (beta, 2 * beta)):
        total = 0.0
        for x, won, lost in np.ndindex(*wins.shape):
            rows = [[double([np.log(p[x, y])]) for y in (won, lost, 0)] for p in (pi, pi_t)]
            loss = spac.spac_loss(*map(tuple, rows), b, lam, getattr(spac, name))[0]
            total += lam * wins[x, won, lost] / n * loss.item()
        losses[name, b] = total
    assert losses.pop(("proximal_critic", beta)) == pytest.approx(objective, rel=1e-10)
    assert all(abs(other - objective) > 1e-3 for other in losses.values())


# -------------------------------------------------------- the certificate


def psi_by_pairs(pi, f, wins, lam):
    """Eq. 2 to 4 of one run, pair by pair."""
    value, n = 0.0, wins.sum()
    for x, won, lost in np.ndindex(*wins.shape):
        relative = pi[x] @ f[x] - (f[x, won] + f[x, lost]) / 2
        value += wins[x, won, lost] / n * (relative - lam * log_sigmoid(f[x, won] - f[x, lost]))
    return value


def test_the_certificate_adds_up_to_the_gap_whatever_the_policies(rng):
    """Eq. 36, 37 for random policies and comparators, greedy ones too; any term dropped, it does
    not, and neither for other policies than the gap is of."""
    for trial in range(100):
        T, beta, lam = rng.integers(1, 6), rng.uniform(0.05, 3), rng.uniform(0.1, 20)
        wins, reward = double(random_wins(rng, 3, 4)), double(rng.uniform(0, 2, (3, 4)))
        policies = [
            double(rng.dirichlet(np.full(4, 0.7), 3)).clamp(min=1e-12) for _ in range(T + 1)
        ]
        policies = [pi / pi.sum(-1, keepdim=True) for pi in policies]
        best = double(rng.dirichlet(np.ones(4), 3))
        if trial % 2:
            best = double(np.eye(4)[reward.argmax(-1)])
        prompts, _ = spac.data_policy(wins)

        def value(pi, prompts=prompts, reward=reward):
            return (prompts * (pi * reward).sum(-1)).sum()

        terms = spac.certificate(policies, beta, best, reward, wins, lam)
        gap = (value(best) - sum(map(value, policies[:-1])) / T).item()
        assert list(terms) == ["travel", "steps", "doubt", "inexact"]
        total, size = sum(terms.values()).item(), max(abs(t.item()) for t in terms.values())
        assert abs(total - gap) < 1e-12 * (1 + size)
        assert all(abs(term.item()) > 1e-9 for term in terms.values())
        others = (value(best) - sum(map(value, policies[1:])) / T).item()
        assert abs(total - others) > 1e-9


def test_each_term_of_the_certificate_equals_its_definition(rng):
    """Pair by pair and by scipy's relative entropy, in batches; with lam or beta changed, not."""
    T, beta = 3, 0.7
    wins, reward = (
        np.stack([random_wins(rng, 2, 3) for _ in range(4)]),
        rng.uniform(0, 2, (4, 2, 3)),
    )
    policies, best = rng.dirichlet(np.ones(3), (T + 1, 4, 2)), rng.dirichlet(np.ones(3), (4, 2))
    lam = rng.uniform(1, 5, 4)
    args = list(double(policies)), beta, double(best), double(reward), double(wins)
    found = spac.certificate(*args, double(lam))
    for k in range(4):
        rho = wins[k].sum((1, 2)) / wins[k].sum()

        def kl(p, q, rho=rho):
            return rho @ special.rel_entr(p, q).sum(-1)

        pi = policies[:, k]
        critics = [beta * np.log(pi[t + 1] / pi[t]) for t in range(T)]
        psi = [
            [psi_by_pairs(p, f, wins[k], lam[k]) for f in (*critics, reward[k])]
            for p in (best[k], *pi)
        ]
        expected = {
            "travel": beta / T * (kl(best[k], pi[0]) - kl(best[k], pi[T])),
            "steps": beta / T * sum(kl(pi[t], pi[t + 1]) for t in range(T)),
            "doubt": np.mean([psi[0][T] - psi[0][t] for t in range(T)]),
            "inexact": np.mean([psi[1 + t][t] - psi[1 + t][T] for t in range(T)]),
        }
        for name, term in expected.items():
            assert found[name][k].item() == pytest.approx(term, rel=1e-9, abs=1e-12)
    other = spac.certificate(*args, double(2 * lam))
    assert not torch.allclose(other["doubt"], found["doubt"], rtol=1e-3)
    halved = spac.certificate(args[0], beta / 2, *args[2:], double(lam))
    assert torch.allclose(2 * halved["steps"], found["steps"])
    assert not torch.allclose(2 * halved["inexact"], found["inexact"], rtol=1e-3)
