"""SPAC's guarantee, checked on tabular contextual bandits: python toy_bandit.py

Preference pairs are really sampled, SPAC-T really runs (spac.py), its critic is solved to a
certified gap, and each claim of theory.md is measured beside its bound; then SPAC meets its rivals.
Prints a verdict for each claim and writes OUT/toy_bandit.json with the figures drawn from it. FAIL
marks a violated theorem (exit status 1), MISSED a goal that was not reached.

Shapes: X prompts, A responses; leading axes are independent runs. All in float64.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import spac

# -------------------------------------------------------- worlds and their data


class Instance(NamedTuple):
    """A bandit whose reward is known. mu, reward: (..., X, A); rho: (..., X)."""

    mu: Tensor  # data policy
    reward: Tensor  # true reward r*, in [0, R]
    rho: Tensor  # prompt distribution
    R: float = 2.0

    def regret(self, pi: Tensor) -> Tensor:
        """J(pi*) - J(pi). (...)"""
        return (self.rho * (self.reward.amax(-1) - (pi * self.reward).sum(-1))).sum(-1)

    def repeat(self, seeds: int) -> "Instance":
        """seeds independent copies along a new first axis: (seeds, ..., X, A)."""
        return Instance(*(t.expand(seeds, *t.shape) for t in self[:3]), self.R)


def random_instances(count: int, rng: np.random.Generator, X=2, A=5, R=2.0) -> Instance:
    """The stated law: rho uniform, mu(.|x) ~ Dirichlet(2, .., 2), r*(x, y) ~ Uniform[0, R]."""
    mu = rng.dirichlet(np.full(A, 2.0), (count, X))
    reward, rho = rng.uniform(0, R, (count, X, A)), np.full((count, X), 1 / X)
    return Instance(*(torch.tensor(t) for t in (mu, reward, rho)), R)


def single_prompt(mu: list[float], reward: list[float], R=2.0) -> Instance:
    """One prompt: the smallest worlds in which a method can fail. mu in any unit."""
    mu, reward, rho = (torch.tensor(t, dtype=torch.float64) for t in ([mu], [reward], [1.0]))
    return Instance(mu / mu.sum(), reward, rho, R)


def rare(n: int, K: int) -> Instance:
    """K worthless responses, each met about twice in n pairs: chi2/2 = .75 whatever n and K."""
    return single_prompt([0.4, 0.6 - K / n] + [1 / n] * K, [1.0, 0.75] + [0.0] * K)


def margins(t: Tensor) -> Tensor:
    """All differences t[a] - t[c]: (..., A) -> (..., A, A)."""
    return t.unsqueeze(-1) - t.unsqueeze(-2)


def sample_wins(world: Instance, n: int, rng: np.random.Generator) -> Tensor:
    """n labelled pairs (Eq. 1) as win counts (..., X, A, A), in one multinomial draw."""
    pairs = world.rho[..., None, None] * world.mu.unsqueeze(-1) * world.mu.unsqueeze(-2)
    law = (2 * pairs * margins(world.reward).sigmoid()).flatten(-3).numpy()  # 2: winner drawn
    counts = rng.multinomial(n, law / law.sum(-1, keepdims=True))  # first or second
    return torch.tensor(counts).double().view(pairs.shape)


def greedy(score: Tensor) -> Tensor:
    """The policy that takes the best response, the first of equals. (..., X, A)"""
    return F.one_hot(score.argmax(-1), score.shape[-1]).to(score.dtype)


def mean(weights: Tensor, f: Tensor) -> Tensor:
    return (weights * f).sum(-1, keepdim=True)


# -------------------------------------------------------- the exact critic


class Critic:
    """Eq. 7: f_t = argmin of psi(pi_t, .) over the box [0, R]^(X x A), for many runs at once.

    Projected Newton, warm-started from the last round's answer; runs and prompts are independent
    problems, and those already solved drop out. self.gap (...) certifies the last answer: psi at f
    exceeds the minimum by at most the Frank-Wolfe gap <g, f> - min over the box of <g, .>.
    wins: (..., X, A, A); lam: a number or (...); tolerance: on each prompt's gap, in reward.
    """

    def __init__(self, wins: Tensor, lam, R: float, tolerance=1e-6):
        self.prompts, self.muhat = spac.data_policy(wins)
        weight = torch.as_tensor(lam, dtype=wins.dtype) / wins.sum((-3, -2, -1))
        self.wins = (wins * weight[..., None, None, None]).flatten(0, -3)  # (problems, A, A)
        self.f = torch.full_like(self.muhat, R / 2).flatten(0, -2)
        self.R, self.tolerance = R, tolerance

    def __call__(self, pi: Tensor) -> Tensor:
        v = (self.prompts.unsqueeze(-1) * (pi - self.muhat)).flatten(0, -2)  # Eq. 2 is <v, f>
        f, gap, todo = self.f.clone(), torch.zeros_like(v[:, 0]), torch.arange(len(v))
        for _ in range(200):
            gradient, curvature, value = critic_derivatives(v[todo], f[todo], self.wins[todo])
            gap[todo] = (gradient * f[todo]).sum(-1) - self.R * gradient.clamp(max=0).sum(-1)
            unsolved = gap[todo] > self.tolerance
            todo = todo[unsolved]
            if not len(todo):
                break
            gradient, value, problem = (
                gradient[unsolved],
                value[unsolved],
                (v[todo], self.wins[todo]),
            )
            step = newton_step(f[todo], gradient, curvature[unsolved], self.R)
            f[todo] = line_search(*problem, f[todo], step, gradient, value, self.R)
        self.f, self.gap = f, gap.view(pi.shape[:-1]).sum(-1)
        return f.view(pi.shape)


def critic_derivatives(v: Tensor, f: Tensor, wins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient (P, A), curvature (P, A, A) and value (P,) of <v, f> - sum wins log sigmoid."""
    p, pairs = margins(f).sigmoid(), wins + wins.mT
    weights = pairs * p * (1 - p)
    curvature = torch.diag_embed(weights.sum(-1)) - weights
    value = (v * f).sum(-1) - (wins * p.log()).sum((-2, -1))
    return v + (pairs * p - wins).sum(-1), curvature, value


def newton_step(f: Tensor, gradient: Tensor, curvature: Tensor, R: float) -> Tensor:
    """Newton's step within the face of the box that the gradient does not leave. (P, A)"""
    edge = 1e-9 * R
    held = ((f <= edge) & (gradient > 0)) | ((f >= R - edge) & (gradient < 0))
    curvature = curvature.masked_fill(held.unsqueeze(-1) | held.unsqueeze(-2), 0.0)
    # psi ignores shifts and unseen responses: a small ridge, and no step longer than the box
    ridge = 1e-6 * curvature.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True) + 1e-14
    curvature = curvature + torch.diag_embed(torch.where(held, 1.0, ridge))
    step = torch.linalg.solve(curvature, -gradient.masked_fill(held, 0.0))
    return step * (R / step.abs().amax(-1, keepdim=True).clamp(min=R))


def line_search(v, wins, f, step, gradient, value, R: float) -> Tensor:
    """Armijo's rule along the projected path, halving the steps that do not descend. (P, A)"""
    size = torch.ones_like(value).unsqueeze(-1)
    for _ in range(40):
        new = (f + size * step).clamp(0, R)
        reached = (v * new).sum(-1) - (wins * F.logsigmoid(margins(new))).sum((-2, -1))
        rounding = 1e-13 * (1 + value.abs())
        failed = reached > value + 1e-4 * (gradient * (new - f)).sum(-1) + rounding
        if not failed.any():
            break
        size = torch.where(failed.unsqueeze(-1), size / 2, size)
    return new


class Run(NamedTuple):
    """What a run of SPAC-T leaves. Policies (..., X, A), the rest (rounds, ...)."""

    mixture: Tensor
    last: Tensor
    gap: Tensor  # certified gap of the critic, the eps_t of Eq. 23
    optimism: Tensor  # L(pi_t, f_t) - L(pi_t, r*), see Eq. 22
    pointwise: Tensor  # share of the table at which f_t, centred on the data, is <= r*


def run_spac_t(world: Instance, wins: Tensor, lam, eta, rounds: int, start=None) -> Run:
    """SPAC-T with the exact critic; from the data policy unless start (..., X, A) is given."""
    critic, trace = Critic(wins, lam, world.R), []
    prompts, muhat = spac.data_policy(wins)
    eta = torch.as_tensor(eta, dtype=wins.dtype)[..., None, None]
    start = (world.mu if start is None else start).expand(muhat.shape)

    def watched():
        for pi, f in spac.spac_t(start, critic, eta, rounds):
            excess = f - world.reward
            excess = excess - mean(muhat, excess)
            optimism = (prompts * (pi * excess).sum(-1)).sum(-1)
            trace.append((critic.gap, optimism, (excess <= 1e-9).double().mean((-2, -1))))
            watched.last = pi
            yield pi

    mixture = spac.mixture(watched())
    return Run(mixture, watched.last, *(torch.stack(column) for column in zip(*trace)))


# -------------------------------------------------------- the theorem: settings and bounds


def slope_at(R: float) -> float:
    """kappa = sigmoid'(R), the least slope of Bradley-Terry's sigmoid on [-R, R]."""
    return 1 / (4 * math.cosh(R / 2) ** 2)


def curvature(a: Tensor, R: float) -> Tensor:
    """Eq. 16: c(a), the least D(a, b) / (a - b)^2 over |b| <= R, reached at b = R sign(a)."""
    m, d = (R + a.abs()) / 2, ((R - a.abs()) / 2).clamp(min=1e-5)  # D/d^2 is flat near d = 0
    return torch.log1p((torch.sinh(d / 2) / torch.cosh(m / 2)) ** 2) / (4 * d * d)


class Theorem(NamedTuple):
    """(D) + (N) for pi*, from prompts and responses alone; each (...)."""

    eta: Tensor  # Eq. 11
    lam: Tensor  # Eq. 18
    regret: Tensor  # Reg_T, Eq. 11
    statistics: Tensor  # bounds Gamma, Eq. 17
    slack: Tensor  # 2 lam L / n bounds the critic's optimism, Eq. 22
    transfer: Tensor  # max rho / rhohat, Eq. 20
    bound: Tensor  # on J(pi*) - J(mixture); infinite where the data do not reach pi*
    classical: Tensor  # the same with the textbook's constants, Eq. 25


def theorem(world: Instance, wins: Tensor, rounds: int, start=None, plain=False) -> Theorem:
    """SPAC-T's settings and bounds at delta = .05. plain: lam from n, R and rank G alone."""
    R, kappa, n, log_delta = world.R, slope_at(world.R), wins.sum((-3, -2, -1)), math.log(0.05)
    prompts, muhat = spac.data_policy(wins)
    target, start = greedy(world.reward), world.mu if start is None else start
    v = prompts.unsqueeze(-1) * (target - muhat)
    pairs = (wins + wins.mT) / n[..., None, None, None]
    weights = torch.stack([pairs * curvature(margins(world.reward), R), pairs])
    A, G = blocks = torch.diag_embed(weights.sum(-1)) - weights  # one block a prompt
    inverses = torch.linalg.pinv(blocks, rtol=1e-12, hermitian=True)
    norm, C_hat = torch.einsum("...xa,k...xac,...xc->k...", v, inverses, v)  # v'A+v, v'G+v
    missed = (torch.einsum("...ab,...bc,...c->...a", A, inverses[0], v) - v).abs().amax((-2, -1))
    identity = torch.eye(v.shape[-1], dtype=v.dtype)
    L = torch.linalg.slogdet(identity + inverses[0] @ G / 16).logabsdet.sum(-1) / 2 - log_delta
    rank = (inverses[1] @ G).diagonal(dim1=-2, dim2=-1).sum((-2, -1))
    guess = 4 / kappa, rank / 2 * math.log(1 + 1 / (4 * kappa)) - log_delta  # Eq. 19, C = 1
    lam_norm, lam_L = guess if plain else (norm.clamp(min=1e-12), L)
    lam = (lam_norm * n / (8 * lam_L)).sqrt()
    slack = 2 * lam * L / n
    statistics = norm / (4 * lam) + slack
    divergence = torch.xlogy(target, target) - torch.xlogy(target, start)
    divergence = (prompts * divergence.sum(-1)).sum(-1)  # Eq. 21
    eta = (8 * divergence / (rounds * R * R)).sqrt().clamp(min=1e-12)
    regret = divergence / (eta * rounds) + eta * R * R / 8
    cover = rank * (R * n).ceil().log() + 1 - log_delta
    classical = regret + (2 * C_hat * cover / (kappa**2 * n)).sqrt()
    transfer = (world.rho / prompts).amax(-1)
    unreached = (missed > 1e-8) | ~transfer.isfinite()
    bound = (transfer * (regret + statistics)).masked_fill(unreached, math.inf)
    return Theorem(eta, lam, regret, statistics, slack, transfer, bound, transfer * classical)


# -------------------------------------------------------- claims: expected first, then measured

EXPECTED = {  # claim: kind, limit (a number: at most; a list: an interval), what the value is
    "bound_holds": ("theorem", 0, "runs whose error exceeds the bound (each may, with chance .05)"),
    "bound_tightness": (
        "goal",
        {"T=600 n=3e3": 15, "T=600 n=1e5": 6, "T=3000 n=3e3": 20, "T=3000 n=1e5": 9},
        "bound / mean error, median of 20 random instances",
    ),
    "pessimism_on_average": (
        "theorem",
        [0.95, 1],
        "runs within Eq. 22 at all rounds, least over n",
    ),
    "rate_in_n": (
        "goal",
        {"mixture": [-0.6, -0.4], "last": [-1, -0.35]},
        "log-log slope of the error on the hardest gap, 1/sqrt(n); theory -1/2",
    ),
    "rate_in_rounds": ("goal", 1, "largest mean error / Reg_T over T = 10 to 1,000"),
    "concentrability_exact": (
        "theorem",
        {"unequal": 1e-9, "largest": 1 + 1e-9, "counter_example": [2.249999, 2.250001]},
        "|C/(chi2/2) - 1| where equal; largest C/(chi2/2) elsewhere; C/a^2, where chi2/2 gives 3",
    ),
    "dpo_unseen_response": (
        "theorem",
        {"loss_spread": 1e-9, "least_value": 0.01, "largest_value": [1.999, 2]},
        "DPO's minimisers under infinite data: relative spread of their loss; values of at most 2",
    ),
    "dpo_rare_response": (
        "theorem",
        {"wrong_at_1e2": [0.21, 0.27], "wrong_at_1e6": [0.20, 0.26], "loss_over_floor": [1, 3]},
        "how often the wrong reward is likelier; DPO's least loss then over the proven floor",
    ),
    "baselines_fail": (
        "goal",
        {"best of DPO, IPO, greedy": [0.05, 1], "SPAC": 0.005, "SPAC untuned": 0.05},
        "error at n = 300,000, all at their oracle best; SPAC's last iterate from either start",
    ),
    "single_policy_coverage": (
        "goal",
        {"error / bound": 1, "growth / bound's growth": 1},
        "K = 1 to 32 rare responses at one C: largest ratio; growth from K = 1 to 32",
    ),
    "coverage_cost": (
        "goal",
        {"slope": 0.6, "frozen / theorem": [2, 100]},
        "log-log slope of the error in C (theory: at most 1/2); lam frozen over lam set, at C = 50",
    ),
}


def judge(name: str, value, runs: int) -> dict:
    """{name: verdict}, what was measured beside what was expected."""
    kind, limit, says = EXPECTED[name]
    pairs = [(value[k], limit[k]) for k in limit] if isinstance(limit, dict) else [(value, limit)]
    spans = [(v, *(lim if isinstance(lim, list) else (-math.inf, lim))) for v, lim in pairs]
    verdict = {"holds": all(low <= v <= high for v, low, high in spans), "value": value}
    return {name: verdict | {"limit": limit, "runs": runs, "says": says, "kind": kind}}


def summary(errors: list[Tensor]) -> dict:
    """A line of a figure: at each point the mean over its runs, and that mean's 95 % interval."""
    means = [e.mean().item() for e in errors]
    half = [1.96 * e.std().item() / math.sqrt(e.numel()) for e in errors]
    low, high = ([m + s * h for m, h in zip(means, half)] for s in (-1, 1))
    return {"mean": means, "low": low, "high": high}


def panel(xlabel: str, x, lines: dict, ylabel="regret, J(pi*) - J(pi)", **style) -> dict:
    """A picture as data, for draw(): {label: list of numbers, or tensors of runs at each point}."""
    lines = {k: summary(v) if torch.is_tensor(v[0]) else {"mean": v} for k, v in lines.items()}
    return {"xlabel": xlabel, "ylabel": ylabel, "x": x, "lines": lines, **style}


def slope(x: list, errors: list[Tensor], rng: np.random.Generator) -> list[float]:
    """Log-log slope of the mean error in x, and its 95 % bootstrap interval over the runs."""
    draws = [e.numpy()[rng.integers(0, len(e), (1000, len(e)))].mean(1) for e in errors]
    means = np.array([[e.mean().item(), *d] for e, d in zip(errors, draws)])
    slopes = np.polyfit(np.log(x), np.log(means), 1)[0]
    return [float(slopes[0]), *np.quantile(slopes[1:], [0.025, 0.975]).tolist()]


def series(points: list[tuple[Instance, int, int]], rng: np.random.Generator) -> dict:
    """SPAC-T by the theorem at each point (worlds (seeds, ...), n, rounds): {name: list}."""
    rows = []
    for worlds, n, rounds in points:
        wins = sample_wins(worlds, n, rng)
        promise = theorem(worlds, wins, rounds)
        run = run_spac_t(worlds, wins, promise.lam, promise.eta, rounds)
        error, last, start = (worlds.regret(pi) for pi in (run.mixture, run.last, worlds.mu))
        bound = promise.bound + promise.transfer * run.gap.mean(0)  # Eq. 23, the certified gap
        reached = bound.isfinite()  # runs beyond the theorem's reach count for and against nothing
        bounds, classical = (
            torch.where(reached, b, torch.nan).nanmean(0) for b in (bound, promise.classical)
        )
        row = {"n": n, "T": rounds, "runs": reached.sum(), "violations": (error > bound).sum()}
        row |= {"bound": bounds.mean(), "classical": classical.mean(), "start": start.mean()}
        row |= {"ratio": (bounds / error.mean(0)).median(), "lam": promise.lam.mean()}
        row |= {"classical_ratio": (classical / error.mean(0)).median()}
        row |= {"below_start": (bounds < start[0]).sum(), "pointwise": run.pointwise.mean()}
        row |= {"pessimistic": (run.optimism <= promise.slack + 1e-6).all(0).double().mean()}
        row |= {"no_slack": (run.optimism <= 1e-6).double().mean()}
        row |= {"regret_term": promise.regret.mean(), "statistics": promise.statistics.mean()}
        runs = {
            "mixture": error.view(len(error), -1).mean(1),
            "last": last.view(len(last), -1).mean(1),
        }
        rows.append({key: float(value) for key, value in row.items()} | runs)
    return {key: [row[key] for row in rows] for key in rows[0]}


def guarantee(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 10, 17, 20, 22, 23 on 20 random instances: error, bound, pessimism."""
    instances, ns = random_instances(20, rng), [300, 1000, 3000, 10_000, 30_000, 100_000]
    plan = [(instances.repeat(9 if quick else 40), n, 600) for n in ns]
    plan += [(instances.repeat(5), n, 1000 if quick else 3000) for n in (3000, 100_000)]
    found = series(plan, rng)
    runs = int(sum(found["runs"]))
    ratios = dict(zip(EXPECTED["bound_tightness"][1], (found["ratio"][i] for i in (2, 5, 6, 7))))
    claims = judge("bound_holds", int(sum(found["violations"])), runs)
    claims |= judge("bound_tightness", ratios, runs)
    claims |= judge("pessimism_on_average", min(found["pessimistic"]), runs)
    names = {"classical": "classical bound", "bound": "bound, (D) + (N)", "start": "data policy"}
    names |= {"mixture": "SPAC-T, mixture", "last": "SPAC-T, last"}
    lines = {label: found[key][:6] for key, label in names.items()}
    numbers = {key: column for key, column in found.items() if key not in ("mixture", "last")}
    return claims, numbers | {"panels": [panel("preference pairs (n)", ns, lines)]}


def rates(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Slopes in n, on the gap that is hardest for each n, and in T."""
    ns, points = [round(10 ** (k / 2)) for k in range(4, 9 if quick else 11)], []
    for n in ns:
        gap = 2 / math.sqrt(0.2 * n)
        world = single_prompt([0.2, 0.8], [1 + gap / 2, 1 - gap / 2])
        points.append((world.repeat(24 if quick else 100), n, max(200, n // 5)))
    in_n = series(points, rng)
    Ts, worlds = [10, 30, 100, 300, 1000], random_instances(20, rng).repeat(4 if quick else 10)
    in_T = series([(worlds, 100_000, T) for T in Ts], rng)
    slopes = {key: slope(ns, in_n[key], rng) for key in ("mixture", "last")}
    runs, values = int(sum(in_n["runs"])), {key: s[0] for key, s in slopes.items()}
    claims = judge("rate_in_n", values, runs)
    ratios = [m.mean().item() / term for m, term in zip(in_T["mixture"], in_T["regret_term"])]
    claims |= judge("rate_in_rounds", max(ratios), int(sum(in_T["runs"])))
    slopes["rounds"] = slope(Ts, in_T["mixture"], rng)
    guide = {"slope -1/2": [2 / math.sqrt(n) for n in ns]}
    lines = {"mixture": in_n["mixture"], "last iterate": in_n["last"]} | guide
    panels = [panel("pairs (n), gap 2/sqrt(.2 n)", ns, lines)]
    lines = {"theory's term Reg_T": in_T["regret_term"], "mixture": in_T["mixture"]}
    return claims, {"slopes": slopes, "panels": [*panels, panel("rounds (T)", Ts, lines)]}


def coverage_supremum(world: Instance, pi: Tensor, steps=3000) -> Tensor:
    """C(pi) from its definition (Eq. 5), by projected gradients in mu's metric. (...)

    The ratio ignores the length of g = f - r*, so g ranges over the cone that the box spans at r*;
    for either sign, sup L(g)^2 / |g|^2 = 2 max (+-L(g) - |g|^2 / 2).
    """
    w, values = (pi - world.mu) / world.mu, []
    low = torch.where(world.reward <= 0, 0.0, -math.inf)
    high = torch.where(world.reward >= world.R, 0.0, math.inf)
    for sign in (1, -1):
        g = torch.zeros_like(w)
        for _ in range(steps):
            g = torch.maximum(torch.minimum(mean(world.mu, g) + sign * w / 2, high), low)
        terms = world.mu * (sign * w * g - (g - mean(world.mu, g)) ** 2)
        values.append((world.rho * terms.sum(-1)).sum(-1))
    return 2 * torch.maximum(*values)


def concentrability(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 12: the supremum C(pi) against chi2/2, with rewards inside and on the edge of the box."""

    def ratio(world, pi):
        chi2 = (world.rho * ((pi - world.mu) ** 2 / world.mu).sum(-1)).sum(-1)
        return coverage_supremum(world, pi) / (chi2 / 2)

    inside = random_instances(count := 30 if quick else 100, rng)
    face = torch.tensor(rng.uniform(size=inside.reward.shape))  # half of the rewards at 0 or R
    reward = inside.reward.masked_fill(face < 0.25, 0.0).masked_fill(face > 0.75, inside.R)
    edged, pi = inside._replace(reward=reward), torch.tensor(rng.dirichlet(np.ones(5), (count, 2)))
    equal, between = torch.cat([ratio(inside, pi), ratio(edged, greedy(reward))]), ratio(edged, pi)
    counter, a = single_prompt([1, 1, 1], [0.0, 2.0, 0.0]), 0.2
    shift = torch.tensor([[-a, 0.0, a]], dtype=torch.float64)
    value = {"unequal": (equal - 1).abs().max().item(), "largest": between.max().item()}
    value |= {"counter_example": coverage_supremum(counter, counter.mu + shift).item() / a**2}
    return judge("concentrability_exact", value, 3 * count), {"least": between.min().item()}


def dpo_failures(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 32: a response never seen, infinite data. Eq. 33: a rare bad response."""
    world = single_prompt([1, 1, 0], [2.0, 1.0, 0.0])
    reference = single_prompt([0.45, 0.45, 0.1], [0.0] * 3).mu
    proportions = world.mu.unsqueeze(-1) * world.mu.unsqueeze(-2) * margins(world.reward).sigmoid()
    q = torch.linspace(0.001, 1 / (1 + math.exp(-10)), 50, dtype=torch.float64)
    rest = (1 - q * (1 + math.exp(-10))).clamp(min=1e-16)
    family = torch.stack([q, q * math.exp(-10), rest], -1).unsqueeze(1)  # (50, 1, 3)
    loss = mean_loss(LOSSES["DPO"], family, reference, proportions, world.R, 0.1)
    values = 2 - world.regret(family)
    unseen = {"loss_spread": (loss.max() / loss.min() - 1).item()}
    unseen |= {"least_value": values.min().item(), "largest_value": values.max().item()}
    claims = judge("dpo_unseen_response", unseen, len(q))

    table, (runs, rounds) = [], (1000, 500) if quick else (4000, 2000)
    for n in (100, 10_000, 1_000_000):
        gap = 1 / (2 * math.log(n / 2))
        world = single_prompt([(n - 1) / 2, (n - 1) / 2, 1], [0.5, 0.5 - gap, 0.0], R=1.0)
        wins = sample_wins(worlds := world.repeat(runs), n, rng)
        functions = torch.stack([world.reward, world.reward + torch.tensor([0.0, 0.0, 1.0])])
        lam = math.sqrt(n / (2 * slope_at(1.0) * math.log(2 / 0.05)))  # Eq. 15, plain rule
        critic = spac.FiniteCritic(functions, wins, lam)
        right, other = critic.penalty.unbind(-1)
        wrong = (other < right - 1e-9 * lam / n).double().mean().item()
        betas = torch.logspace(-3, 3, 601, dtype=torch.float64)[:, None, None, None]
        losses = world.regret((world.mu.log() + functions / betas).softmax(-1))  # (beta, F)
        eta = math.sqrt(8 * math.log(2) / rounds)
        mix = spac.mixture(pi for pi, _ in spac.spac_t(worlds.mu, critic, eta, rounds))
        row = {"n": n, "wrong": wrong, "over_floor": losses[:, 1].min().item() * (1 + math.e) / gap}
        row |= {"dpo": (losses[:, 0] * (1 - wrong) + losses[:, 1] * wrong).min().item()}
        table.append(row | {"spac": worlds.regret(mix).mean().item()})
    value = {"wrong_at_1e2": table[0]["wrong"], "wrong_at_1e6": table[2]["wrong"]}
    value |= {"loss_over_floor": min(row["over_floor"] for row in table)}
    return claims | judge("dpo_rare_response", value, 3 * runs), {"rare": table}


# -------------------------------------------------------- rivals, on the same win counts

LOSSES = {  # of each ordered pair (winner, loser), (..., X, A, A); h = log(pi / pi_ref) (..., X, A)
    "DPO": lambda h, log_pi, R, beta: -F.logsigmoid(margins(beta * h)),  # arXiv 2305.18290
    "IPO": lambda h, log_pi, R, beta: (margins(beta * h) - 1 / 2) ** 2,  # 2310.12036, times beta^2
    "chi-PO": lambda h, log_pi, R, beta: (
        -F.logsigmoid(  # arXiv 2407.13399
            margins(beta * (h.clamp(max=30).exp() + h)).clamp(-2 * R, 2 * R)
        )
    ),
    "RPO": lambda h, log_pi, R, beta, weight: (  # arXiv 2405.16436
        LOSSES["DPO"](h, log_pi, R, beta) - (weight * beta * log_pi).unsqueeze(-1)
    ),
}


def mean_loss(loss: Callable, pi: Tensor, ref: Tensor, wins: Tensor, R: float, *hyper) -> Tensor:
    pairs = wins * loss((pi / ref).log(), pi.log(), R, *hyper)
    return pairs.sum((-3, -2, -1)) / wins.sum((-3, -2, -1))


def descend(objective: Callable, h: Tensor, optimizer: Callable, steps: int) -> Tensor:
    """steps of optimizer([h]) on objective(h) (...), summed over independent runs."""
    h = h.clone().requires_grad_()
    optimizer = optimizer([h])
    for _ in range(steps):
        optimizer.zero_grad()
        objective(h).sum().backward()
        optimizer.step()
    return h.detach()


def fitted(loss: Callable, start: Callable, world: Instance, wins: Tensor, *hyper) -> Tensor:
    """The policy that minimises a margin loss, from its reference: Adam on logits. (..., X, A)"""
    ref, hyper = start(world), [h[..., None, None] for h in hyper]
    logits, adam = ref.log().expand(wins.shape[:-1]), partial(torch.optim.Adam, lr=0.1)

    def objective(h):
        return mean_loss(loss, h.softmax(-1), ref, wins, world.R, *hyper)

    return descend(objective, logits, adam, 400).softmax(-1)


def reward_mle(wins: Tensor, R: float) -> Tensor:
    """The likeliest reward in the box: the critic with nothing to doubt. (..., X, A)"""
    return Critic(wins, wins.sum((-3, -2, -1)), R)(spac.data_policy(wins)[1])


def rlhf_greedy(world: Instance, wins: Tensor, _: Tensor) -> Tensor:
    return greedy(reward_mle(wins, world.R))


def rlhf_kl(world: Instance, wins: Tensor, beta: Tensor) -> Tensor:
    return (world.mu.log() + reward_mle(wins, world.R) / beta[..., None, None]).softmax(-1)


def pessimistic_mle(world: Instance, wins: Tensor, width: Tensor) -> Tensor:
    """Zhu et al. 2023: greedy in the reward less an elliptical bonus around muhat."""
    pairs, identity = wins + wins.mT, torch.eye(wins.shape[-1], dtype=wins.dtype)
    inverse = torch.linalg.inv(torch.diag_embed(pairs.sum(-1)) - pairs + identity)
    z = identity - spac.data_policy(wins)[1].unsqueeze(-2)
    bonus = torch.einsum("...ab,...bc,...ac->...a", z, inverse, z).sqrt()
    return greedy(reward_mle(wins, world.R) - width[..., None, None] * bonus)


def spac_tuned(start: Callable, world: Instance, wins: Tensor, lam, eta, rounds=150) -> Tensor:
    """SPAC-T's last iterate; lam in sqrt(n), eta in sqrt(8 log A / T) / R."""
    lam = lam * wins.sum((-3, -2, -1)).sqrt()
    eta = eta * math.sqrt(8 * math.log(wins.shape[-1]) / rounds) / world.R
    return run_spac_t(world, wins, lam, eta, rounds, start(world)).last


def spac_by_rule(start: Callable, world: Instance, wins: Tensor, plain, rounds=600) -> Tensor:
    promise = theorem(world, wins, rounds, start(world), bool(plain.all()))
    return run_spac_t(world, wins, promise.lam, promise.eta, rounds, start(world)).last


STARTS = {"": lambda world: world.mu, " u": lambda world: world.mu * 0 + 1 / world.mu.shape[-1]}
BETAS = [(b,) for b in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)]
METHODS = {"RLHF greedy": (rlhf_greedy, [(0,)]), "RLHF + KL": (rlhf_kl, BETAS)}
METHODS |= {"pessimistic MLE": (pessimistic_mle, BETAS)}
for u, start in STARTS.items():  # " u": from the uniform policy, as reference or start, not mu
    grid = list(product((0.3, 1.0, 3.0, 10.0), (1.0, 3.0, 10.0)))
    METHODS["SPAC" + u] = partial(spac_tuned, start), grid
    METHODS["SPAC theorem" + u] = partial(spac_by_rule, start), [(0,)]
    METHODS["SPAC plain" + u] = partial(spac_by_rule, start), [(1,)]
    for name in ("DPO", "IPO", "chi-PO"):
        METHODS[name + u] = partial(fitted, LOSSES[name], start), BETAS
    grid = list(product((0.03, 0.1, 0.3), (0.003, 0.01, 0.03, 0.1)))
    METHODS["RPO" + u] = partial(fitted, LOSSES["RPO"], start), grid


def sweep(name: str, world: Instance, wins: Tensor) -> tuple[Tensor, tuple]:
    """The oracle rule: regrets (seeds,) of the best setting on the true value, and the setting."""
    method, grid = METHODS[name]
    hyper = [torch.tensor(h, dtype=wins.dtype).unsqueeze(-1) for h in zip(*grid)]
    shape = (len(grid), *wins.shape)
    policies = method(world, wins.expand(shape), *(h.expand(shape[:2]) for h in hyper))
    regrets = world.regret(policies)
    best = int(regrets.mean(1).argmin())
    return regrets[best], grid[best]


def contest(points: list[tuple[Instance, int]], names, seeds: int, rng) -> tuple[dict, dict]:
    """Every method on the same data at each (world, n): {name: [regrets]}, {name: [settings]}."""
    errors, settings = {name: [] for name in names}, {name: [] for name in names}
    for world, n in points:
        wins = sample_wins(world.repeat(seeds), n, rng)
        for name in names:
            regrets, setting = sweep(name, world, wins)
            errors[name].append(regrets)
            settings[name].append(setting)
    return errors, settings


def rivals(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eight rare worthless responses: who is fooled?"""
    ns, seeds = [300, 3000, 30_000, 300_000], 24 if quick else 100
    lines, settings = contest([(rare(n, 8), n) for n in ns], METHODS, seeds, rng)
    final = {name: line[-1].mean().item() for name, line in lines.items()}
    failing = [final[name] for name in ("DPO", "DPO u", "IPO", "IPO u", "RLHF greedy")]
    value = {"best of DPO, IPO, greedy": min(failing), "SPAC": max(final["SPAC"], final["SPAC u"])}
    value |= {"SPAC untuned": max(e for name, e in final.items() if name.startswith("SPAC "))}
    lines["bound"] = series([(rare(n, 8).repeat(seeds), n, 600) for n in ns], rng)["bound"]
    data = {"settings": settings, "panels": [panel("preference pairs (n)", ns, lines)]}
    return judge("baselines_fail", value, seeds * len(ns)), data


def coverage(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Against the number of rare responses at fixed C, and against C."""
    seeds, Ks, Cs = 24 if quick else 100, [1, 2, 4, 8, 16, 32], [0.5, 1, 2, 5, 10, 20, 50]
    names = ("SPAC plain", "DPO", "IPO", "RLHF greedy")
    lines, _ = contest([(rare(3000, K), 3000) for K in Ks], names, seeds, rng)
    found = series([(rare(3000, K).repeat(seeds), 3000, 600) for K in Ks], rng)
    ratios = [m.mean().item() / b for m, b in zip(found["mixture"], found["bound"])]
    value = {"error / bound": max(ratios), "growth / bound's growth": ratios[-1] / ratios[0]}
    claims = judge("single_policy_coverage", value, seeds * len(Ks))
    lines |= {"SPAC-T, mixture": found["mixture"], "bound": found["bound"]}
    panels = [panel("rare responses (K), C = .75", Ks, lines)]

    three = [single_prompt([1, C, C], [1.5, 1.0, 0.5]).repeat(seeds) for C in Cs]  # C = chi2/2
    found, frozen = series([(world, 3000, 600) for world in three], rng), []
    for world in three:
        wins = sample_wins(world, 3000, rng)
        eta = theorem(world, wins, 600).eta
        frozen.append(world.regret(run_spac_t(world, wins, found["lam"][0], eta, 600).mixture))
    paid = {"lam by the theorem": found["mixture"], "lam frozen at C = 1/2": frozen}
    value = {"slope": slope(Cs, found["mixture"], rng)[0]}
    value |= {"frozen / theorem": (frozen[-1].mean() / found["mixture"][-1].mean()).item()}
    claims |= judge("coverage_cost", value, seeds * len(Cs))
    theory = [found["statistics"][0] * math.sqrt(C / Cs[0]) for C in Cs]
    panels.append(panel("concentrability (C)", Cs, paid | {"theory, sqrt(C)": theory}))
    return claims, {"panels": panels}


def mechanism(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """One data set in which the rare response won: DPO's path, SPAC's path, the critic's belief."""
    world = single_prompt([0.4, 0.599, 0.001], [1.0, 0.75, 0.0])
    wins = sample_wins(world, 3000, rng)
    while wins[0, 2].sum() <= wins[0, :, 2].sum():  # until it won more pairs than it lost
        wins = sample_wins(world, 3000, rng)
    promise, h, dpo_path = theorem(world, wins, 300, plain=True), world.mu.log(), []
    rounds = spac.spac_t(world.mu, Critic(wins, promise.lam, world.R), 3 * promise.eta, 300)
    policies, critics = (torch.cat(column) for column in zip(*rounds))
    descent = partial(torch.optim.SGD, lr=100.0)

    def objective(h):
        return mean_loss(LOSSES["DPO"], h.softmax(-1), world.mu, wins, world.R, 0.1)

    for _ in range(150):
        dpo_path.append(h.softmax(-1)[0])
        h = descend(objective, h, descent, 1)
    lines = {}
    for label, path in {"DPO": torch.stack(dpo_path), "SPAC-T": policies}.items():
        across, up = path[:, 1] + path[:, 2] / 2, path[:, 2] * math.sqrt(3) / 2
        lines[label] = {"x": across.tolist(), "mean": up.tolist()}
    simplex = {"corners": ["best", "common", "rare"], "x": None, "lines": lines}
    critics = critics - mean(world.mu, critics)
    beliefs = {name: critics[:, a].tolist() for a, name in enumerate(simplex["corners"])}
    belief = panel("round (t)", list(range(1, 301)), beliefs, "critic f_t, centred", scale="linear")
    return {}, {"panels": [simplex, belief]}


# -------------------------------------------------------- pictures and the story

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888"]


def draw(path: Path, panels: list[dict]) -> None:
    """Every figure: lines, bands (the mean's 95 % interval), labels at the lines' ends."""
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axis, spec in zip(np.ravel(figure.subplots(1, len(panels))), panels):
        ends, floor = {}, 1e-5  # zeros are drawn on the lower edge of a log axis
        for (label, line), colour in zip(spec["lines"].items(), COLOURS * 2):
            x, y = line.get("x", spec["x"]), np.array(line["mean"])
            axis.plot(x, y.clip(floor), color=colour, lw=3 if label.startswith("SPAC") else 1.5)
            if "low" in line:
                axis.fill_between(
                    x,
                    np.clip(line["low"], floor, None),
                    line["high"],
                    color=colour,
                    alpha=0.2,
                    lw=0,
                )
            ends[label] = x[-1], y[-1], colour
        if "corners" in spec:
            for name, corner in zip(spec["corners"], [(0, 0), (1, 0), (0.5, 0.87)]):
                axis.annotate(name, corner)
        else:
            axis.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"])
            axis.set(xscale=spec.get("scale", "log"), yscale=spec.get("scale", "log"))
        axis.spines[["top", "right"]].set_visible(False)
        for label, (x, y, colour) in ends.items():
            axis.annotate(label, (x, y), color=colour)
    figure.savefig(path, dpi=120)


EXPERIMENTS = [rivals, coverage, rates, guarantee, concentrability, dpo_failures, mechanism]


def run_experiment(index: int, seed: int, quick: bool) -> tuple[dict, dict]:
    torch.set_num_threads(1)  # faster than two on tensors this small; the second core runs another
    return EXPERIMENTS[index](quick, np.random.default_rng([seed, index]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="out", help="folder for the JSON and the figures")
    parser.add_argument("--seed", type=int, default=0, help="every random draw follows from it")
    parser.add_argument("--quick", action="store_true", help="every claim on fewer, shorter runs")
    config, claims, data = parser.parse_args(), {}, {}
    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(run_experiment, i, config.seed, config.quick)
            for i in range(len(EXPERIMENTS))
        ]
        for experiment, job in zip(EXPERIMENTS, jobs):
            found, data[experiment.__name__] = job.result()
            claims |= found
            for name, verdict in found.items():
                print(name, verdict)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    setting = vars(config) | versions
    result = {"claims": claims, "data": data, "setting": setting}
    (out / "toy_bandit.json").write_text(json.dumps(result, indent=1, default=float))
    for name, found in data.items():
        if "panels" in found:
            draw(out / f"{name}.png", found["panels"])


if __name__ == "__main__":
    main()
