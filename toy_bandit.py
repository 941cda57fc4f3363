"""SPAC's guarantee, checked on tabular contextual bandits: python toy_bandit.py

Preference pairs are really sampled, SPAC-T (spac.py) runs with an exact critic, and each claim of
theory.md is measured beside its bound; then SPAC meets its rivals. Prints a verdict for each claim
(FAIL: a violated theorem, exit status 1; MISSED: a goal not reached) and writes OUT/toy_bandit.json
with the figures drawn from it. X prompts, A responses; leading axes are independent runs; float64.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle, product
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
    meet: Tensor | float = 1.0  # (A, A): how readily two responses meet in a pair; 1: independently

    def regret(self, pi: Tensor) -> Tensor:
        """J(pi*) - J(pi). (...)"""
        return (self.rho * (self.reward.amax(-1) - (pi * self.reward).sum(-1))).sum(-1)

    def repeat(self, seeds: int) -> "Instance":
        """seeds independent copies along a new first axis: (seeds, ..., X, A)."""
        return Instance(*(t.expand(seeds, *t.shape) for t in self[:3]), *self[3:])


def random_instances(count: int, rng: np.random.Generator, X=2, A=5, R=2.0) -> Instance:
    """The stated law: rho uniform, mu(.|x) ~ Dirichlet(2, .., 2), r*(x, y) ~ Uniform[0, R]."""
    mu, reward = rng.dirichlet(np.full(A, 2.0), (count, X)), rng.uniform(0, R, (count, X, A))
    return Instance(torch.tensor(mu), torch.tensor(reward), torch.ones(count, X).double() / X, R)


def single_prompt(mu: list[float], reward: list[float], R=2.0) -> Instance:
    """One prompt: the smallest worlds in which a method can fail. mu in any unit."""
    mu, reward, rho = (torch.tensor(t, dtype=torch.float64) for t in ([mu], [reward], [1.0]))
    return Instance(mu / mu.sum(), reward, rho, R)


def rare(n: int, K: int) -> Instance:
    """K worthless responses, each met about twice in n pairs: chi2/2 = .75 whatever n and K."""
    return single_prompt([0.4, 0.6 - K / n] + [1 / n] * K, [1.0, 0.75] + [0.0] * K)


def leagues(n: int) -> Instance:
    """Two models' answers, compared within one model 20 times as readily as across. The better
    model's best answer is best of all; the weaker one's shines beside worse ones, eight rare."""
    world = single_prompt([1, 1, 1, 1 - 32 / n] + [4 / n] * 8, [1.0, 0.75, 0.5] + [0.0] * 9)
    better = torch.arange(12) < 2
    return world._replace(meet=torch.where(better == better.unsqueeze(-1), 1.0, 0.05).double())


def margins(t: Tensor) -> Tensor:
    """All differences t[a] - t[c]: (..., A) -> (..., A, A)."""
    return t.unsqueeze(-1) - t.unsqueeze(-2)


def sample_wins(world: Instance, n: int, rng: np.random.Generator) -> Tensor:
    """n labelled pairs (Eq. 1) as win counts (..., X, A, A), in one multinomial draw."""
    pairs = world.rho[..., None, None] * world.mu.unsqueeze(-1) * world.mu.unsqueeze(-2)
    pairs = pairs * world.meet
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
        assert bool((torch.as_tensor(lam) > 0).all()), "lam must be > 0: else psi is not convex"
        self.prompts, self.muhat = spac.data_policy(wins)
        weight = torch.as_tensor(lam, dtype=wins.dtype) / wins.sum((-3, -2, -1))
        self.wins = (wins * weight[..., None, None, None]).flatten(0, -3)  # (problems, A, A)
        self.f = torch.full_like(self.muhat, R / 2).flatten(0, -2)
        self.R, self.tolerance = R, tolerance

    def value(self, rows: Tensor, f: Tensor) -> Tensor:
        """What is minimised, at f (P, A), for the problems of these rows. (P,)"""
        return (self.v[rows] * f).sum(-1) - (self.wins[rows] * F.logsigmoid(margins(f))).sum((1, 2))

    def derivatives(self, rows: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return critic_derivatives(self.v[rows], f, self.wins[rows])

    def __call__(self, pi: Tensor) -> Tensor:
        self.v = (self.prompts.unsqueeze(-1) * (pi - self.muhat)).flatten(0, -2)  # Eq. 2: <v, f>
        f, todo = self.f.clone(), torch.arange(len(self.f))
        gap = torch.zeros_like(f[:, 0])
        for _ in range(200):
            gradient, curvature, value = self.derivatives(todo, f[todo])
            gap[todo] = (gradient * f[todo]).sum(-1) - self.R * gradient.clamp(max=0).sum(-1)
            unsolved = gap[todo] > self.tolerance
            todo = todo[unsolved]
            if not len(todo):
                break
            gradient, value = gradient[unsolved], value[unsolved]
            step = newton_step(f[todo], gradient, curvature[unsolved], self.R)
            reach = partial(self.value, todo)
            f[todo] = line_search(reach, f[todo], step, gradient, value, self.R)
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


def line_search(reach: Callable, f, step, gradient, value, R: float) -> Tensor:
    """Armijo's rule along the projected path, halving the steps that do not descend. (P, A)"""
    size = torch.ones_like(value).unsqueeze(-1)
    for _ in range(40):
        new = (f + size * step).clamp(0, R)
        rounding = 1e-13 * (1 + value.abs())
        failed = reach(new) > value + 1e-4 * (gradient * (new - f)).sum(-1) + rounding
        if not failed.any():
            break
        size = torch.where(failed.unsqueeze(-1), size / 2, size)
    return new


class ProximalCritic(Critic):
    """Eq. 39: f_t = argmin over the box of beta E log E_pi_t exp(f / beta) - E_muhat f + lam E(f).

    Its first term holds the policy that f_t leads to, pi_t+1: f_t answers what the actor will do,
    not what it did. beta: a number or (...), the inverse of the actor's step. As Critic otherwise.
    """

    def __init__(self, wins: Tensor, lam, R: float, beta, tolerance=1e-6):
        super().__init__(wins, lam, R, tolerance)
        beta = torch.as_tensor(beta, dtype=wins.dtype).unsqueeze(-1)
        self.beta = beta.expand(self.prompts.shape).reshape(-1, 1)
        self.weight = self.prompts.reshape(-1, 1)

    def __call__(self, pi: Tensor) -> Tensor:
        self.log_pi = pi.flatten(0, -2).log()
        return super().__call__(torch.zeros_like(pi))

    def partition(self, rows: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """log(pi_t exp(f / beta)) (P, A), and beta times the logarithm of its sum. (P,)"""
        logits = self.log_pi[rows] + f / self.beta[rows]
        sums = (self.weight * self.beta)[rows, 0] * logits.logsumexp(-1)
        return logits, sums

    def value(self, rows: Tensor, f: Tensor) -> Tensor:
        return super().value(rows, f) + self.partition(rows, f)[1]

    def derivatives(self, rows: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient, curvature, value = super().derivatives(rows, f)
        logits, sums = self.partition(rows, f)
        after = logits.softmax(-1)  # pi_t+1
        mass = self.weight[rows] * after
        spread = torch.diag_embed(mass) - mass.unsqueeze(-1) * after.unsqueeze(-2)
        curvature = curvature + spread / self.beta[rows].unsqueeze(-1)
        return gradient + mass, curvature, value + sums


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
    """(D) + (N) for pi*: no label enters, but all but the plain settings know r*. Each (...)."""

    eta: Tensor  # Eq. 11
    lam: Tensor  # Eq. 18
    regret: Tensor  # Reg_T, Eq. 11
    statistics: Tensor  # bounds Gamma, Eq. 17
    slack: Tensor  # 2 lam L / n bounds the critic's optimism, Eq. 22
    transfer: Tensor  # max rho / rhohat, Eq. 20
    bound: Tensor  # on J(pi*) - J(mixture); infinite where the data do not reach pi*
    classical: Tensor  # the same with the textbook's constants, Eq. 25
    coverage: Tensor  # C^ = v' G+ v, which tends to chi2/2, Eq. 5


def theorem(world: Instance, wins: Tensor, rounds: int, start=None, plain=False) -> Theorem:
    """SPAC-T's settings and bounds at delta = .05. plain: no reward, no comparator."""
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
    statistics, slack = norm / (4 * lam) + 2 * lam * L / n, 2 * lam * L / n
    divergence = -(prompts * torch.xlogy(target, start).sum(-1)).sum(-1)  # KL, Eq. 21
    price = torch.full_like(divergence, math.log(v.shape[-1])) if plain else divergence
    eta = (8 * price / (rounds * R * R)).sqrt().clamp(1e-12, 1e12)
    regret = divergence / (eta * rounds) + eta * R * R / 8
    cover = rank * (R * n).ceil().log() + 1 - log_delta
    transfer = (world.rho / prompts).nan_to_num(0.0, posinf=math.inf).amax(-1)
    classical = transfer * (regret + (2 * C_hat * cover / (kappa**2 * n)).sqrt())
    statistics, C_hat = (b.masked_fill(missed > 1e-8, math.inf) for b in (statistics, C_hat))
    bounds = transfer * (regret + statistics), classical
    unreached = ~(statistics.isfinite() & transfer.isfinite() & divergence.isfinite())
    bound, classical = (b.masked_fill(unreached, math.inf) for b in bounds)
    return Theorem(eta, lam, regret, statistics, slack, transfer, bound, classical, C_hat)


# -------------------------------------------------------- claims: expected first, then measured

EXPECTED = """
theorem bound_holds            violations       0     0      runs with error above their bound
theorem gamma_holds            runs             .95   1      runs obeying Eq. 17, least over n
goal    bound_tightness        T=600,n=3e3      1     15     bound / mean error, median instance
goal    bound_tightness        T=600,n=1e5      1     6      the same, 100,000 pairs
goal    bound_tightness        T=3000,n=3e3     1     20     the same, more rounds
goal    bound_tightness        T=3000,n=1e5     1     9      the same, more pairs and rounds
theorem pessimism_on_average   runs             .95   1      runs obeying Eq. 22 at every round
goal    rate_in_n              mixture          -.6   -.4    slope in n, worst gap; theory -1/2
goal    rate_in_n              last             -1    -.35   the same, last; doing nothing has 0
goal    rate_in_rounds         error/term       0     1      error over Reg_T, largest over T
theorem dpo_unseen_response    loss             0     1e-9   relative spread over DPO's minimisers
theorem dpo_unseen_response    least            0     .01    value of a minimiser, of 2
theorem dpo_unseen_response    largest          1.999 2      value of a minimiser, of 2
theorem dpo_rare_response      wrong,n=1e2      .21   .27    how often the wrong reward is likelier
theorem dpo_rare_response      wrong,n=1e6      .20   .26    the same, theory .240 and .229
theorem dpo_rare_response      loss/floor       1     3      DPO's least loss then / its floor
goal    baselines_fail         rivals           .05   1      least of DPO, IPO, greedy at n = 3e5
goal    baselines_fail         SPAC             0     .005   last iterate, either start, oracle
goal    baselines_fail         untuned          0     .05    by the theorem's or the plain rule
goal    single_policy_coverage error/start      0     .5     error over mu's own, K rare responses
goal    single_policy_coverage error/bound      0     1      largest over K, C fixed
goal    single_policy_coverage growth           0     1      of the error over that of the bound
goal    coverage_cost          error/start      0     .5     error over mu's own at C = 50
goal    coverage_cost          slope            0     .5     of the error in C, theory <=
goal    coverage_cost          frozen           2     100    error at C = 50: lam frozen / lam set
"""  # kind, claim, value, least and most expected, what it is


def judge(name: str, values: dict, runs: int, expected: str = EXPECTED) -> dict:
    """{name: verdict}: what was measured beside what was expected."""
    rows = [row.split(None, 5) for row in expected.splitlines() if row.split()[1:2] == [name]]
    limits = {key: [float(low), float(high)] for _, _, key, low, high, _ in rows}
    holds = all(low <= values[key] <= high for key, (low, high) in limits.items())
    verdict = {"holds": holds, "value": values, "limit": limits, "runs": runs}
    return {name: verdict | {"says": "; ".join(row[5] for row in rows), "kind": rows[0][0]}}


def panel(xlabel: str, x, lines: dict, ylabel="regret, J(pi*) - J(pi)", scale="log") -> dict:
    """A picture as data, for draw(). lines: {label: numbers, or at each point a tensor of runs,
    to be drawn as its mean with the mean's 95 % interval}."""
    drawn = {label: {"mean": line} for label, line in lines.items()}
    for label, line in lines.items():
        if torch.is_tensor(line[0]):
            means, spreads = (
                np.array([f(e).item() for e in line]) for f in (torch.mean, torch.std)
            )
            half = 1.96 * spreads / np.sqrt([e.numel() for e in line])
            band = {"mean": means, "low": means - half, "high": means + half}
            drawn[label] = {side: values.tolist() for side, values in band.items()}
    return {"xlabel": xlabel, "ylabel": ylabel, "x": x, "lines": drawn, "scale": scale}


def slope(x: list, errors: list[Tensor], rng: np.random.Generator) -> list[float]:
    """Log-log slope of the mean error in x, and its 95 % bootstrap interval over the runs."""
    draws = [e.numpy()[rng.integers(0, len(e), (1000, len(e)))].mean(1) for e in errors]
    means = np.array([[e.mean().item(), *d] for e, d in zip(errors, draws)])
    slopes = np.polyfit(np.log(x), np.log(means), 1)[0]
    return [float(slopes[0]), *np.quantile(slopes[1:], [0.025, 0.975]).tolist()]


def series(points: list[tuple[Instance, int, int]], rng: np.random.Generator) -> dict:
    """SPAC-T by the theorem at each point (worlds (seeds, instances), n, rounds): {name: list}."""
    rows = []
    for worlds, n, rounds in points:
        wins = sample_wins(worlds, n, rng)
        promise = theorem(worlds, wins, rounds)
        run = run_spac_t(worlds, wins, promise.lam, promise.eta, rounds)
        error, last, start = (worlds.regret(pi) for pi in (run.mixture, run.last, worlds.mu))
        bound = promise.bound + promise.transfer * run.gap.mean(0)  # Eq. 23, the certified gap
        reached = bound.isfinite()  # runs beyond the theorem's reach count for and against nothing
        best, lam = greedy(worlds.reward), promise.lam
        critic = Critic(wins, lam, worlds.R)
        values = (spac.critic_objective(best, f, wins, lam) for f in (worlds.reward, critic(best)))
        gamma = torch.sub(*values) + critic.gap  # Eq. 10, and no less than it
        bounds, classical, met = (
            b.where(reached, torch.nan).nanmean(0) for b in (bound, promise.classical, error)
        )
        row = {"n": n, "T": rounds, "runs": reached.sum(), "violations": (~(error <= bound)).sum()}
        row |= {"bound": bounds.mean(), "classical": classical.mean(), "start": start.mean()}
        row |= {"ratio": (bounds / met).median(), "classical_ratio": (classical / met).median()}
        row |= {"gamma": (gamma <= promise.statistics)[reached].double().mean()}
        row |= {"gamma_ratio": (gamma / promise.statistics).max(), "lam": lam.mean()}
        row |= {"below_start": (bounds < start[0]).sum(), "pointwise": run.pointwise.mean()}
        row |= {"pessimistic": (run.optimism <= promise.slack + run.gap).all(0).double().mean()}
        row |= {"no_slack": (run.optimism <= 1e-6).double().mean()}
        row |= {"regret_term": promise.regret.mean(), "statistics": promise.statistics.mean()}
        row = {key: float(value) for key, value in row.items()}
        rows.append(row | {"mixture": error, "last": last})
    return {key: [row[key] for row in rows] for key in rows[0]}


def guarantee(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 10, 17, 20, 22, 23 on 20 random instances: error, bound, pessimism."""
    ns = [300, 3000, 100_000] if quick else [300, 1000, 3000, 10_000, 30_000, 100_000]
    instances = random_instances(20, rng)
    plan = [(instances.repeat(5 if quick else 40), n, 600) for n in ns]
    plan += [(instances.repeat(5), n, 3000) for n in (3000, 100_000)]
    found = series(plan, rng)
    runs = int(sum(found["runs"]))
    names = ["T=600,n=3e3", "T=600,n=1e5", "T=3000,n=3e3", "T=3000,n=1e5"]
    ratios = dict(zip(names, (found["ratio"][i] for i in (ns.index(3000), -3, -2, -1))))
    claims = judge("bound_holds", {"violations": sum(found["violations"])}, runs)
    claims |= judge("gamma_holds", {"runs": min(found["gamma"])}, runs)
    claims |= judge("bound_tightness", ratios, runs)
    claims |= judge("pessimism_on_average", {"runs": min(found["pessimistic"])}, runs)
    names = {"classical": "classical bound", "bound": "bound, (D) + (N)", "start": "data policy"}
    names |= {"mixture": "SPAC-T, mixture", "last": "SPAC-T, last"}
    lines = {label: found[key][:-2] for key, label in names.items()}
    lines |= {label: [e.mean(1) for e in lines[label]] for label in lines if "SPAC" in label}
    numbers = {key: column for key, column in found.items() if key not in ("mixture", "last")}
    return claims, numbers | {"panels": [panel("preference pairs (n)", ns, lines)]}


def rates(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Slopes in T, and in n of the worst of fixed gaps, where doing nothing has slope 0."""
    ns = [100, 1000, 10_000] if quick else [100, 1000, 10_000, 100_000]
    gaps = [2 / 10 ** (k / 4) for k in range(9)]
    pairs = [single_prompt([0.2, 0.8], [1 + gap / 2, 1 - gap / 2]) for gap in gaps]
    worlds = Instance(*(torch.stack(column) for column in list(zip(*pairs))[:3]))
    in_n = series([(worlds.repeat(16 if quick else 40), n, n // 10) for n in ns], rng)
    Ts, worlds = [10, 30, 100, 300, 1000], random_instances(20, rng).repeat(4 if quick else 10)
    in_T = series([(worlds, 100_000, T) for T in Ts], rng)
    worst = {k: [e[:, e.mean(0).argmax()] for e in in_n[k]] for k in ("mixture", "last")}
    slopes = {key: slope(ns, errors, rng) for key, errors in worst.items()}
    values = {key: interval[0] for key, interval in slopes.items()}
    claims = judge("rate_in_n", values, int(sum(in_n["runs"])))
    ratios = [m.mean().item() / term for m, term in zip(in_T["mixture"], in_T["regret_term"])]
    claims |= judge("rate_in_rounds", {"error/term": max(ratios)}, int(sum(in_T["runs"])))
    lines = {"mixture": worst["mixture"], "last iterate": worst["last"]}
    lines |= {"slope -1/2": [2 / math.sqrt(n) for n in ns]}
    means = [m.mean(1) for m in in_T["mixture"]]
    terms = {"theory's term Reg_T": in_T["regret_term"], "mixture": means}
    panels = panel("pairs (n), the worst gap", ns, lines), panel("rounds (T)", Ts, terms)
    return claims, {"slopes": slopes | {"rounds": slope(Ts, means, rng)}, "panels": panels}


def dpo_failures(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 32: a response never seen, infinite data. Eq. 33: a rare bad response."""
    world = single_prompt([1, 1, 0], [2.0, 1.0, 0.0])
    reference = single_prompt([0.45, 0.45, 0.1], [0.0] * 3).mu
    proportions = world.mu.unsqueeze(-1) * world.mu.unsqueeze(-2) * margins(world.reward).sigmoid()
    q = torch.linspace(0.001, 1 / (1 + math.exp(-10)), 50, dtype=torch.float64)
    rest = (1 - q * (1 + math.exp(-10))).clamp(min=1e-16)
    family = torch.stack([q, q * math.exp(-10), rest], -1).unsqueeze(1)  # (50, 1, 3)
    h = (family / reference).log()
    pairs = proportions * spac.preference_term(h.unsqueeze(-1), h.unsqueeze(-2), 0.1)
    loss = pairs.sum((-3, -2, -1))
    values = 2 - world.regret(family)
    unseen = {"loss": (loss.max() / loss.min() - 1).item()}
    unseen |= {"least": values.min().item(), "largest": values.max().item()}
    claims = judge("dpo_unseen_response", unseen, len(q))

    table, (runs, rounds) = [], (1000, 500) if quick else (4000, 2000)
    for n in (100, 10_000, 1_000_000):
        gap = 1 / (2 * math.log(n / 2))
        world = single_prompt([(n - 1) / 2, (n - 1) / 2, 1], [0.5, 0.5 - gap, 0.0], R=1.0)
        wins = sample_wins(worlds := world.repeat(runs), n, rng)
        functions = torch.stack([world.reward, world.reward + torch.tensor([0.0, 0.0, 1.0])])
        lam = math.sqrt(n / (2 * slope_at(1.0) * math.log(2 / 0.05)))  # Eq. 15, plain rule
        critic = spac.FiniteCritic(functions, wins, lam)
        wrong = (critic.penalty.diff(dim=-1) < -1e-9 * lam / n).double().mean().item()
        betas = torch.logspace(-3, 3, 601, dtype=torch.float64)[:, None, None, None]
        losses = world.regret((world.mu.log() + functions / betas).softmax(-1))  # (beta, F)
        eta = math.sqrt(8 * math.log(2) / rounds)
        mix = spac.mixture(pi for pi, _ in spac.spac_t(worlds.mu, critic, eta, rounds))
        row = {"n": n, "wrong": wrong, "over_floor": losses[:, 1].min().item() * (1 + math.e) / gap}
        row |= {"dpo": (losses[:, 0] * (1 - wrong) + losses[:, 1] * wrong).min().item()}
        table.append(row | {"spac": worlds.regret(mix).mean().item()})
    value = {"wrong,n=1e2": table[0]["wrong"], "wrong,n=1e6": table[2]["wrong"]}
    value |= {"loss/floor": min(row["over_floor"] for row in table)}
    return claims | judge("dpo_rare_response", value, 3 * runs), {"rare": table}


# -------------------------------------------------------- rivals, on the same win counts


def reward_mle(wins: Tensor, R: float) -> Tensor:
    """The likeliest reward in the box: the critic with nothing to doubt. (..., X, A)"""
    return Critic(wins, wins.sum((-3, -2, -1)), R)(spac.data_policy(wins)[1])


def tilted(R: float, start: Callable, world: Instance, wins: Tensor, beta: Tensor) -> Tensor:
    """pi_ref exp(r / beta), r the likeliest reward: RLHF with a KL penalty. Where no box R limits
    the reward it is the minimiser of DPO's loss (arXiv 2305.18290)."""
    return (start(world).log() + reward_mle(wins, R) / beta[..., None, None]).softmax(-1)


def ipo(start: Callable, world: Instance, wins: Tensor, beta: Tensor) -> Tensor:
    """IPO's minimiser (arXiv 2310.12036): least squares of beta h's margins on +-1/2."""
    pairs = wins + wins.mT
    laplacian = torch.diag_embed(pairs.sum(-1)) - pairs
    wanted = (wins - wins.mT).sum(-1, keepdim=True) / 2
    reward = torch.linalg.pinv(laplacian, rtol=1e-12, hermitian=True) @ wanted
    return (start(world).log() + reward.squeeze(-1) / beta[..., None, None]).softmax(-1)


def chi_po(start: Callable, world: Instance, wins: Tensor, beta: Tensor) -> Tensor:
    """chi-PO's minimiser (arXiv 2407.13399): z + log z = (r - c) / beta with z = pi / pi_ref, the
    likeliest r with margins within 2R, and c, by bisection, such that pi sums to one."""
    ref, r = start(world), reward_mle(wins, 2 * world.R)
    low, high = (end(-1, keepdim=True) - beta[..., None, None] for end in (r.amin, r.amax))
    for _ in range(80):
        c = (low + high) / 2
        x = (r - c) / beta[..., None, None]
        log_z = torch.minimum(x, x.clamp(min=1).log())  # from above: Newton's steps only descend
        for _ in range(12):
            log_z = log_z - (log_z.exp() + log_z - x) / (log_z.exp() + 1)
        heavy = (ref * log_z.exp()).sum(-1, keepdim=True) > 1
        low, high = torch.where(heavy, c, low), torch.where(heavy, high, c)
    return (ref.log() + log_z).softmax(-1)


def fitted(start: Callable, world: Instance, wins: Tensor, beta, weight, steps) -> Tensor:
    """RPO (arXiv 2405.16436): DPO plus weight x supervised learning of the winner, by Adam on
    u = beta h. Weight 0 is DPO, stopped after some steps."""
    ref, (beta, weight, steps) = start(world), (t[..., None, None] for t in (beta, weight, steps))
    u = torch.zeros(wins.shape[:-1], dtype=wins.dtype, requires_grad=True)
    optimizer, share = torch.optim.Adam([u], lr=0.1), wins / wins.sum((-3, -2, -1), keepdim=True)
    schedule, kept = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400), u.detach()
    for k in range(int(steps.max())):
        optimizer.zero_grad()
        log_pi = (ref.log() + u / beta).log_softmax(-1)
        pair = spac.preference_term(u.unsqueeze(-1), u.unsqueeze(-2), 1.0)
        (share * (pair - (weight * beta * log_pi).unsqueeze(-1))).sum().backward()
        optimizer.step()
        schedule.step()
        kept = torch.where(k < steps, u.detach(), kept)
    return (ref.log() + kept / beta).softmax(-1)


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


def spac_by_rule(start: Callable, world: Instance, wins: Tensor, plain, rounds=300) -> Tensor:
    promise = theorem(world, wins, rounds, start(world), bool(plain.all()))
    return run_spac_t(world, wins, promise.lam, promise.eta, rounds, start(world)).last


STARTS = {"": lambda world: world.mu, " u": lambda world: world.mu * 0 + 1 / world.mu.shape[-1]}
BETAS = [(10 ** (k / 2),) for k in range(-8, 7)]
METHODS = {}  # name: the method, its grid
for u, start in STARTS.items():  # " u": from the uniform policy, as reference or start, not mu
    grid = list(product((0.3, 1.0, 3.0, 10.0), (1.0, 3.0, 10.0)))
    METHODS["SPAC" + u] = partial(spac_tuned, start), grid
    METHODS["SPAC theorem" + u] = partial(spac_by_rule, start), [(0,)]
    METHODS["SPAC plain" + u] = partial(spac_by_rule, start), [(1,)]
    METHODS["DPO" + u] = partial(tilted, 40.0, start), BETAS
    METHODS["IPO" + u] = partial(ipo, start), BETAS
    METHODS["chi-PO" + u] = partial(chi_po, start), BETAS
    grid = list(product((0.001, 0.01, 0.1), (0.01, 0.03, 0.1, 0.3, 1.0), (400,)))
    METHODS["RPO" + u] = partial(fitted, start), grid
    grid = list(product((0.001, 0.01, 0.1), (0.0,), (1, 3, 10, 30, 100)))
    METHODS["DPO stopped" + u] = partial(fitted, start), grid
METHODS |= {"RLHF + KL": (partial(tilted, 2.0, STARTS[""]), BETAS)}
METHODS |= {"RLHF greedy": (pessimistic_mle, [(0,)]), "pessimistic MLE": (pessimistic_mle, BETAS)}


def contest(points: list[tuple[Instance, int]], names, seeds: int, rng) -> tuple[dict, dict]:
    """The oracle rule: at each (world, n), on the same data, every method at the setting of its
    grid that is best on the true value. {name: [regrets (seeds,)]} and {name: [settings]}."""
    errors, settings = ({name: [] for name in names} for _ in range(2))
    for world, n in points:
        wins = sample_wins(world.repeat(seeds), n, rng)
        for name in names:
            method, grid = METHODS[name]
            shape = (len(grid), *wins.shape)
            hyper = torch.tensor(list(zip(*grid)), dtype=wins.dtype).unsqueeze(-1)
            hyper = hyper.expand(-1, -1, seeds)  # (hyper-parameters, settings, seeds)
            regrets = world.regret(method(world, wins.expand(shape), *hyper))
            best = int(regrets.mean(1).argmin())
            errors[name].append(regrets[best])
            settings[name].append(grid[best])
    return errors, settings


def rivals(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eight rare worthless responses: who is fooled?"""
    ns, seeds = ([300, 300_000], 12) if quick else ([300, 3000, 30_000, 300_000], 100)
    lines, settings = contest([(rare(n, 8), n) for n in ns], METHODS, seeds, rng)
    final = {name: line[-1].mean().item() for name, line in lines.items()}
    failing = [final[name] for name in ("DPO", "DPO u", "IPO", "IPO u", "RLHF greedy")]
    value = {"rivals": min(failing), "SPAC": max(final["SPAC"], final["SPAC u"])}
    rules = [final[name] for name in final if "theorem" in name or "plain" in name]
    value |= {"untuned": max(rules)}
    lines["bound"] = series([(rare(n, 8).repeat(seeds), n, 300) for n in ns], rng)["bound"]
    shown = {name: line for name, line in lines.items() if "theorem" not in name}
    far = {name: shown.pop(name) for name in list(shown) if name.endswith(" u")}
    places = "reference, start: mu", "reference, start: uniform (u)"
    panels = [panel(f"pairs (n); {at}", ns, part) for at, part in zip(places, (shown, far))]
    means = panel("", ns, lines)["lines"]
    claims = judge("baselines_fail", value, seeds * len(ns))
    return claims, {"settings": settings, "regrets": means, "panels": panels}


def coverage(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Against the number of rare responses at fixed C, and against C."""
    seeds, rounds, Ks = (12, 300, [1, 4, 16]) if quick else (100, 600, [1, 2, 4, 8, 16, 32])
    Cs = [0.5, 5, 50] if quick else [0.5, 1, 2, 5, 10, 20, 50]
    names = ("SPAC plain", "DPO", "IPO", "RLHF greedy")
    lines, _ = contest([(rare(3000, K), 3000) for K in Ks], names, seeds, rng)
    found = series([(rare(3000, K).repeat(seeds), 3000, rounds) for K in Ks], rng)
    ratios = [m.mean().item() / b for m, b in zip(found["mixture"], found["bound"])]
    value = {"error/bound": max(ratios), "growth": ratios[-1] / ratios[0]}
    value |= {"error/start": max(m.mean().item() for m in found["mixture"]) / found["start"][0]}
    claims = judge("single_policy_coverage", value, seeds * len(Ks))
    lines |= {"SPAC-T, mixture": found["mixture"], "bound": found["bound"]}
    panels = [panel("rare responses (K), C = .75", Ks, lines)]

    three = [single_prompt([1, C, C], [1.5, 1.0, 0.5]).repeat(seeds) for C in Cs]  # C = chi2/2
    found, frozen = series([(world, 30_000, rounds) for world in three], rng), []
    for world in three:
        wins = sample_wins(world, 30_000, rng)
        eta = theorem(world, wins, rounds).eta
        frozen.append(world.regret(run_spac_t(world, wins, found["lam"][0], eta, rounds).mixture))
    paid = {"SPAC-T, lam set": found["mixture"], "lam frozen at C = 1/2": frozen}
    value = {"slope": slope(Cs, found["mixture"], rng)[0]}
    value |= {"frozen": (frozen[-1].mean() / found["mixture"][-1].mean()).item()}
    value |= {"error/start": found["mixture"][-1].mean().item() / found["start"][-1]}
    claims |= judge("coverage_cost", value, seeds * len(Cs))
    theory = [found["statistics"][0] * math.sqrt(C / Cs[0]) for C in Cs]
    panels.append(panel("concentrability (C)", Cs, paid | {"theory, sqrt(C)": theory}))
    return claims, {"panels": panels}


def mechanism(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """One data set in which the rare response won: DPO's path, SPAC's path, the critic's belief."""
    world, names = rare(3000, 1), ["best", "common", "rare"]
    wins = sample_wins(world, 3000, rng)
    while wins[0, 2].sum() <= wins[0, :, 2].sum():  # until it won more pairs than it lost
        wins = sample_wins(world, 3000, rng)
    promise = theorem(world, wins, 300, plain=True)
    rounds = spac.spac_t(world.mu, Critic(wins, promise.lam, world.R), 3 * promise.eta, 300)
    policies, critics = (torch.cat(column) for column in zip(*rounds))
    betas = torch.logspace(1, -2, 100, dtype=torch.float64)
    dpo = tilted(40.0, STARTS[""], world, wins.expand(100, *wins.shape), betas[:, None])
    lines = {}
    for label, path in {"DPO, beta falling": dpo[:, 0, 0], "SPAC-T": policies}.items():
        across, up = path[:, 1] + path[:, 2] / 2, path[:, 2] * math.sqrt(3) / 2
        lines[label] = {"x": across.tolist(), "mean": up.tolist()}
    simplex = panel("", None, {}, "", "linear") | {"lines": lines, "corners": names}
    critics = critics - mean(world.mu, critics)
    beliefs = {name: critics[:60, a].tolist() for a, name in enumerate(names)}
    belief = panel("round (t)", list(range(1, 61)), beliefs, "critic f_t, centred", "linear")
    return {}, {"panels": [simplex, belief]}


# -------------------------------------------------------- pictures and the story

SPAC_BLUE, THEORY = "#0072B2", "#888888"
COLOURS = ["#D55E00", "#E69F00", "#009E73", "#8C564B", "#CC79A7", "#000000", "#882255", "#999933"]


def draw(path: Path, panels: list[dict]) -> None:
    """Every figure: lines, bands (the mean's 95 % interval) and labels where the lines end."""
    figure = Figure(figsize=(6.4 * len(panels), 4.4))
    figure.subplots_adjust(0.13 / len(panels), 0.12, 1 - 0.24 / len(panels), 0.97, wspace=0.6)
    for axis, spec in zip(np.ravel(figure.subplots(1, len(panels))), panels):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"])
        axis.set(xscale=spec["scale"], yscale=spec["scale"])
        logs, palette, ends = spec["scale"] == "log", cycle(COLOURS), {}
        floor = 1e-5 if logs else -math.inf  # where a log axis shows zeros
        for label, line in spec["lines"].items():
            x, low, high = line.get("x", spec["x"]), line.get("low"), line.get("high")
            theory = logs and not low
            colour = SPAC_BLUE if "SPAC" in label else THEORY if theory else next(palette)
            axis.plot(x, np.maximum(line["mean"], floor), "--" if theory else "-", color=colour)
            ends[label] = x[-1], max(line["mean"][-1], floor), colour
            if low:
                low, high = np.maximum(low, floor), np.maximum(high, floor)
                axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        if "corners" in spec:
            axis.set_axis_off()
            axis.plot([0, 1, 0.5, 0], [0, 0, 0.866, 0], color=THEORY, lw=0.8)
            axis.plot(line["x"][0], line["mean"][0], "ko", label="start")
            for name, x, y in zip(spec["corners"], (0, 1, 0.5), (-0.06, -0.06, 0.89)):
                axis.text(x, y, name, ha="center")
        axis.autoscale_view()
        below, aside = -math.inf, 9 * ("corners" in spec)  # above a path's end, beside the corner
        for label, (x, y, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
            right, middle = axis.transData.transform((x, y)) + (6 + 2 * aside, aside)
            below = max(middle, below + 14)
            figure.text(right, below, label, color=colour, va="center", transform=None)
    figure.savefig(path, dpi=100)


def report(out: Path, name: str, claims: dict, data: dict, setting: dict) -> int:
    """Print the verdicts, write OUT/name.json and its figures; the exit status."""
    versions = {"torch": torch.__version__, "numpy": np.__version__, "threads": 1}
    setting = setting | versions | {"python": platform.python_version()}
    result = {"claims": claims, "data": data, "setting": setting}
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, default=float) + "\n")
    for figure, found in data.items():
        if "panels" in found:
            draw(out / f"{figure}.png", found["panels"])
    for claim, verdict in claims.items():
        bad = "FAIL" if verdict["kind"] == "theorem" else "MISSED"
        print(f"{'ok' if verdict['holds'] else bad:8}{claim:26}{verdict['runs']:,} runs")
        for key, value in verdict["value"].items():
            low, high = verdict["limit"][key]
            print(f"{'':8}{key:18}{value:<12.4g}expected {low:g} to {high:g}")
    return any(v["kind"] == "theorem" and not v["holds"] for v in claims.values())


EXPERIMENTS = [rates, rivals, coverage, guarantee, dpo_failures, mechanism]


def run_experiment(index: int, seed: int, quick: bool) -> tuple[dict, dict]:
    torch.set_num_threads(1)  # faster than two on tensors this small; the second core runs another
    return EXPERIMENTS[index](quick, np.random.default_rng([seed, index]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="out", help="folder for the JSON and the figures")
    parser.add_argument("--seed", type=int, default=0, help="every random draw follows from it")
    parser.add_argument("--quick", action="store_true", help="every claim on fewer, shorter runs")
    config, claims, data = parser.parse_args(), {}, {}
    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        run = partial(run_experiment, seed=config.seed, quick=config.quick)
        results = pool.map(run, range(len(EXPERIMENTS)))
        for k, (experiment, (found, pictures)) in enumerate(zip(EXPERIMENTS, results), start=1):
            print(f"\r{k} of {len(EXPERIMENTS)} done ", end="", file=sys.stderr, flush=True)
            claims, data = claims | found, data | {experiment.__name__: pictures}
    print(file=sys.stderr)
    return report(out, "toy_bandit", claims, data, {"seed": config.seed, "quick": config.quick})


if __name__ == "__main__":
    sys.exit(main())
