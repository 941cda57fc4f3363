"""SPAC's guarantee, checked on tabular contextual bandits: python toy_bandit.py

Preference pairs are really sampled, SPAC (spac.py) runs with an exact critic, and the theorems of
theory.md are measured beside their bounds; SPAC meets its rivals. Prints a verdict for each claim
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
    features: Tensor | None = None  # (X, A, d): rewards are features theta; None: any table

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


def hedge(n: int, K=4) -> Instance:
    """Opposite interests in one unknown: response 3 is worth u_k here, and there b - u_k.
    Response 2 is worth b / 4 everywhere. Few pairs, as many whatever n, tell about each u_k. Two
    more prompts of each k are decoys: response 3 is worthless. theta = (b, u_1.., decoys' own)."""
    features = torch.zeros(K, 4, 3, 3 * K + 1, dtype=torch.float64)
    features[:, :, 1, 0], features[:, 1, 2, 0] = 0.25, 1.0
    k = torch.arange(K)
    features[k, 0, 2, 1 + k], features[k, 1, 2, 1 + k] = 1.0, -1.0
    features[k, 2, 2, 1 + K + 2 * k] = features[k, 3, 2, 2 + K + 2 * k] = 1.0
    features, theta = features.flatten(0, 1), torch.tensor([1.6] + [0.8] * K + [0.0] * 2 * K)
    mu = torch.tensor([0.5, 0.5 - 4 * K / n, 4 * K / n]).double().expand(4 * K, 3)
    rho = torch.full((4 * K,), 0.25 / K).double()
    return Instance(mu, features @ theta.double(), rho, 2.0, features)


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


# Where prompts share features (X, A, d) all of them are one block, in the coordinates theta.


def table(features: Tensor | None, theta: Tensor) -> Tensor:
    """f = features theta: (..., 1, d) -> (..., X, A). Without features theta is the table."""
    return theta if features is None else torch.einsum("xad,...ud->...xa", features, theta)


def in_theta(features: Tensor | None, v: Tensor) -> Tensor:
    """The same direction v of tables (..., X, A) in theta: (..., 1, d)."""
    return v if features is None else torch.einsum("xad,...xa->...d", features, v).unsqueeze(-2)


def laplacian(features: Tensor | None, weights: Tensor) -> Tensor:
    """Sum of weights z z' over pairs: (..., X, A, A) -> one block a prompt, or (..., 1, d, d)."""
    blocks = torch.diag_embed(weights.sum(-1)) - weights
    if features is None:
        return blocks
    return torch.einsum("xad,...xac,xce->...de", features, blocks, features).unsqueeze(-3)


# -------------------------------------------------------- the exact critic


class Critic:
    """Eq. 7: f_t = argmin of psi(pi_t, .) over the box [0, R]^(X x A), for many runs at once.

    Projected Newton, warm-started from the last round's answer; runs and prompts are independent
    problems, and those already solved drop out. self.gap (...) certifies the last answer: psi at f
    exceeds the minimum by at most the Frank-Wolfe gap <g, f> - min over the box of <g, .>.
    wins: (..., X, A, A); lam: a number or (...); tolerance: on each problem's gap, in reward.
    With features (X, A, d), Eq. 41: over f = features theta, theta in the box low + [0, R]^d. All
    prompts share theta: each run is one problem then.
    """

    def __init__(self, wins: Tensor, lam, R: float, tolerance=1e-6, features=None, low=0.0):
        assert bool((torch.as_tensor(lam) > 0).all()), "lam must be > 0: else psi is not convex"
        self.prompts, self.muhat = spac.data_policy(wins)
        tables = torch.eye(wins.shape[-1], dtype=wins.dtype).unsqueeze(0)
        self.features = tables if features is None else features  # (prompts of a problem, A, d)
        self.z = (self.features.unsqueeze(-2) - self.features.unsqueeze(-3)).flatten(0, 2)
        self.zz = (self.z.unsqueeze(-1) * self.z.unsqueeze(-2)).flatten(1)
        weight = torch.as_tensor(lam, dtype=wins.dtype) / wins.sum((-3, -2, -1))
        self.wins = (wins * weight[..., None, None, None]).reshape(-1, len(self.z))  # (P, pairs)
        self.f = torch.full((len(self.wins), self.z.shape[-1]), R / 2, dtype=wins.dtype)  # (P, d)
        self.R, self.low, self.tolerance = R, low, tolerance

    def table(self, f: Tensor) -> Tensor:
        """The functions of the prompts of each problem: (P, d) -> (P, prompts, A)."""
        return torch.einsum("xad,pd->pxa", self.features, f + self.low)

    def doubt(self, rows: Tensor, f: Tensor):
        """The relative value, <v, f>: its value (P,), gradient and curvature (both broadcast)."""
        return (self.v[rows] * f).sum(-1), self.v[rows], 0.0

    def value(self, rows: Tensor, f: Tensor) -> Tensor:
        """The objective at f (P, d), of the problems in these rows. (P,)"""
        margins = (f + self.low) @ self.z.T
        return self.doubt(rows, f)[0] - (self.wins[rows] * F.logsigmoid(margins)).sum(-1)

    def derivatives(self, rows: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient (P, d), curvature (P, d, d) and value (P,) of the objective."""
        wins, p = self.wins[rows], ((f + self.low) @ self.z.T).sigmoid()
        value, gradient, curvature = self.doubt(rows, f)
        gradient = gradient - (wins * (1 - p)) @ self.z
        curvature = curvature + ((wins * p * (1 - p)) @ self.zz).unflatten(-1, f.shape[-1:] * 2)
        return gradient, curvature, value - (wins * p.log()).sum(-1)

    def __call__(self, pi: Tensor) -> Tensor:
        v = (self.prompts.unsqueeze(-1) * (pi - self.muhat)).view(-1, *self.features.shape[:2])
        self.v = torch.einsum("xad,pxa->pd", self.features, v)  # Eq. 2 is <v, f>
        f, gap, todo = self.f.clone(), torch.zeros_like(self.f[:, 0]), torch.arange(len(v))
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
        self.f, self.gap = f, gap.view(*pi.shape[:-2], -1).sum(-1)
        return self.table(f).view(pi.shape)


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
    """Eq. 39: beta E log E_pi_t exp(f / beta) - E_muhat f takes the place of the relative value.

    It holds the policy that f leads to, pi_t+1: this critic answers what the actor will do, not
    what it did. beta: a number or (...), the inverse of the actor's step. As Critic otherwise.
    """

    def __init__(self, wins: Tensor, lam, R: float, beta, **options):
        super().__init__(wins, lam, R, **options)
        shape = (-1, len(self.features), 1)
        beta = torch.as_tensor(beta, dtype=wins.dtype).unsqueeze(-1)
        self.beta = beta.expand(self.prompts.shape).reshape(shape)
        self.weight = self.prompts.reshape(shape)

    def __call__(self, pi: Tensor) -> Tensor:
        self.log_pi = pi.log().view(-1, *self.features.shape[:2])
        return super().__call__(torch.zeros_like(pi))

    def doubt(self, rows: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient, _ = super().doubt(rows, f)  # of -E_muhat f
        beta, weight = self.beta[rows], self.weight[rows]
        logits = self.log_pi[rows] + self.table(f) / beta  # (P, prompts, A)
        value = value + (weight * beta * logits.logsumexp(-1, keepdim=True)).sum((1, 2))
        after = logits.softmax(-1)  # pi_t+1
        mass = weight * after
        spread = torch.diag_embed(mass) - mass.unsqueeze(-1) * after.unsqueeze(-2)
        spread = spread / beta.unsqueeze(-1)
        curvature = torch.einsum("xad,pxac,xce->pde", self.features, spread, self.features)
        return value, gradient + torch.einsum("xad,pxa->pd", self.features, mass), curvature


class Run(NamedTuple):
    """What a run of SPAC-T leaves. Policies (..., X, A), the rest (rounds, ...)."""

    mixture: Tensor
    last: Tensor
    gap: Tensor  # certified gap of the critic, the eps_t of Eq. 37
    optimism: Tensor  # L(pi_t, f_t) - L(pi_t, r*), see Eq. 22
    pointwise: Tensor  # share of the table at which f_t, centred on the data, is <= r*


def run_spac_t(world: Instance, wins: Tensor, lam, eta, rounds: int) -> Run:
    """SPAC-T from world.mu with the exact critic; lam, eta: numbers or (...)."""
    critic, trace = Critic(wins, lam, world.R, features=world.features), []
    prompts, muhat = spac.data_policy(wins)
    eta = torch.as_tensor(eta, dtype=wins.dtype)[..., None, None]

    def watched():
        for pi, f in spac.spac_t(world.mu.expand(muhat.shape), critic, eta, rounds):
            excess = f - world.reward
            excess = excess - mean(muhat, excess)
            optimism = (prompts * (pi * excess).sum(-1)).sum(-1)
            trace.append((critic.gap, optimism, (excess <= 1e-9).double().mean((-2, -1))))
            watched.last = pi
            yield pi

    mixture = spac.mixture(watched())
    return Run(mixture, watched.last, *(torch.stack(column) for column in zip(*trace)))


def run_proximal(world: Instance, wins: Tensor, lam, beta=0.1, rounds=10) -> Tensor:
    """Proximal SPAC (Eq. 40) from world.mu: its last policy, whose Psi no round has lowered."""
    pi = world.mu.expand(wins.shape[:-1])
    critic = ProximalCritic(wins, lam, world.R, beta, features=world.features)
    for _ in range(rounds):
        pi = spac.mirror_step(pi, critic(pi), 1 / beta)
    return pi


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
    v = in_theta(world.features, prompts.unsqueeze(-1) * (target - muhat))
    pairs = (wins + wins.mT) / n[..., None, None, None]
    weights = torch.stack([pairs * curvature(margins(world.reward), R), pairs])
    A, G = blocks = laplacian(world.features, weights)
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
    price = torch.full_like(divergence, math.log(wins.shape[-1])) if plain else divergence
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


def assured(world: Instance, wins: Tensor, lam: Tensor, pi: Tensor) -> Tensor:
    """Eq. 45: what pi gains over the data's responses at least, at the prompts met. No reward is
    used; true of all pi and lam at once with probability .95 over the labels. (...)"""
    n, critic = wins.sum((-3, -2, -1)), Critic(wins, lam, world.R, features=world.features)
    least = spac.critic_objective(pi, critic(pi), wins, lam) - critic.gap
    G = laplacian(world.features, (wins + wins.mT) / n[..., None, None, None])
    rank = torch.linalg.matrix_rank(G, hermitian=True, rtol=1e-12).sum(-1)
    L = rank / 2 * math.log(1 + 1 / (2 * slope_at(world.R))) - math.log(0.05)
    fit = spac.data_fit(reward_mle(world, wins, world.R), wins)
    return least - lam * (fit + 2 * L / n)


# -------------------------------------------------------- claims: expected first, then measured

EXPECTED = """
theorem bound_holds            violations       0     0      runs with error above their bound
theorem gamma_holds            runs             .95   1      runs obeying Eq. 17, least over n
goal    bound_tightness        T=600,n=3e3      1     15     bound / mean error, median instance
goal    bound_tightness        T=600,n=1e5      1     6      the same, 100,000 pairs
goal    bound_tightness        T=3000,n=3e3     1     20     the same, more rounds
goal    bound_tightness        T=3000,n=1e5     1     9      the same, more pairs and rounds
theorem pessimism_on_average   runs             .95   1      runs obeying Eq. 22 at every round
theorem dpo_unseen_response    loss             0     1e-9   relative spread over DPO's minimisers
theorem dpo_unseen_response    least            0     .01    value of a minimiser, of 2
theorem dpo_unseen_response    largest          1.999 2      value of a minimiser, of 2
theorem dpo_rare_response      wrong,n=1e2      .21   .27    how often the wrong reward is likelier
theorem dpo_rare_response      wrong,n=1e6      .20   .26    the same, theory .240 and .229
theorem dpo_rare_response      loss/floor       1     3      DPO's least loss then / its floor
goal    baselines_fail         rivals           .05   1      least of DPO, IPO, greedy at n = 3e5
goal    baselines_fail         SPAC             0     .005   last iterate, oracle
goal    baselines_fail         untuned          0     .05    by any of three rules
goal    baselines_fail         win_share        0     .005   shrunk at its best: this world is easy
goal    baselines_fail         share,sure       .05   .25    where the best is common: theory .136
goal    baselines_fail         SPAC,sure        0     .015   by any of three rules there, n = 3e5
goal    shared_evidence        rivals           .05   1      least of all but SPAC and RPO, n = 3e5
goal    shared_evidence        untuned          0     .01    SPAC by any of three rules
goal    shared_evidence        RPO              0     .01    was expected to fail as well: it wins
goal    shared_evidence        Gamma/rivals     0     1      what Gamma's bound promises / rivals
theorem lower_bound            regret/floor     1     1e3    least mean of methods told no reward
goal    coverage_cost          slope            .3    .7     of the error in C, known; theory 1/2
goal    coverage_cost          plain            3     100    plain rule / C known, at C = 500
goal    coverage_cost          no_C             0     2      rule of Eq. 45 / C known, largest
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
            means = np.array([e.mean().item() for e in line])
            half = 1.96 * np.array([e.std().item() / math.sqrt(e.numel()) for e in line])
            band = {"mean": means, "low": means - half, "high": means + half}
            drawn[label] = {side: values.tolist() for side, values in band.items()}
    return {"xlabel": xlabel, "ylabel": ylabel, "x": x, "lines": drawn, "scale": scale}


def slope(x: list, errors: list[Tensor], rng: np.random.Generator) -> list[float]:
    """Log-log slope of the mean error in x, and its 95 % bootstrap interval over the runs."""
    draws = [e.numpy()[rng.integers(0, len(e), (1000, len(e)))].mean(1) for e in errors]
    means = np.array([[e.mean().item(), *d] for e, d in zip(errors, draws)])
    slopes = np.polyfit(np.log(x), np.log(means), 1)[0]
    return [float(slopes[0]), *np.quantile(slopes[1:], [0.025, 0.975]).tolist()]


def series(points: list[tuple[Instance, list[int], int]], rng: np.random.Generator) -> dict:
    """SPAC-T by the theorem at each point (worlds (seeds, instances), ns, rounds), its ns played
    side by side. {name: one entry an n}."""
    rows = []
    for worlds, ns, rounds in points:
        wins = torch.stack([sample_wins(worlds, n, rng) for n in ns])  # (ns, seeds, instances, ..)
        promise = theorem(worlds, wins, rounds)
        run = run_spac_t(worlds, wins, promise.lam, promise.eta, rounds)
        error, last, start = (worlds.regret(pi) for pi in (run.mixture, run.last, worlds.mu))
        bound = promise.bound + promise.transfer * run.gap.mean(0)  # Eq. 23, the certified gap
        reached = bound.isfinite()  # runs beyond the theorem's reach count for and against nothing
        best, lam = greedy(worlds.reward).expand(wins.shape[:-1]), promise.lam
        critic = Critic(wins, lam, worlds.R)
        values = (spac.critic_objective(best, f, wins, lam) for f in (worlds.reward, critic(best)))
        gamma = torch.sub(*values) + critic.gap  # Eq. 10, and no less than it
        columns = bound, promise.classical, error
        bounds, classical, met = (c.where(reached, torch.nan).nanmean(1) for c in columns)
        runs, count = (1, 2), reached.sum((1, 2))
        row = {"n": ns, "T": [rounds] * len(ns), "start": [start.mean()] * len(ns)}
        row |= {"runs": count, "violations": (~(error <= bound)).sum(runs)}
        row |= {"bound": bounds.mean(1), "ratio": (bounds / met).nanmedian(1).values}
        row |= {"classical_ratio": (classical / met).nanmedian(1).values}
        row |= {"gamma": ((gamma <= promise.statistics) & reached).sum(runs) / count}
        row |= {"gamma_ratio": (gamma / promise.statistics).amax(runs)}
        row |= {"pointwise": run.pointwise.mean((0, 2, 3)), "classical": classical.mean(1)}
        row |= {"pessimistic": (run.optimism <= promise.slack + run.gap).all(0).double().mean(runs)}
        row |= {"no_slack": (run.optimism <= 1e-6).double().mean((0, 2, 3))}
        row |= {f"{k}_term": getattr(promise, k).mean(runs) for k in ("regret", "statistics")}
        row = {key: [float(value) for value in column] for key, column in row.items()}
        rows.append(row | {"mixture": list(error), "last": list(last)})
    return {key: sum((row[key] for row in rows), []) for key in rows[0]}


def guarantee(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 10, 17, 20, 22, 23 on random instances: error, bound, pessimism."""
    ns = [300, 3000, 100_000] if quick else [300, 1000, 3000, 10_000, 30_000, 100_000]
    instances = random_instances(20 if quick else 60, rng)
    plan = [(instances.repeat(5 if quick else 14), ns, 600)]
    plan += [(instances.repeat(3), [3000, 100_000], 3000)]
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

    table, (runs, rounds) = [], (4000, 500 if quick else 2000)
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


def reward_mle(world: Instance, wins: Tensor, R: float) -> Tensor:
    """The likeliest reward in a box of side R: the critic with nothing to doubt. (..., X, A)"""
    low = (world.R - R) / 2  # the box has the middle of the true class
    critic = Critic(wins, wins.sum((-3, -2, -1)), R, features=world.features, low=low)
    return critic(spac.data_policy(wins)[1])


def tilted(R: float, world: Instance, wins: Tensor, beta: Tensor) -> Tensor:
    """pi_ref exp(r / beta), r the likeliest reward: RLHF with a KL penalty. Where no box R limits
    the reward it is the minimiser of DPO's loss (arXiv 2305.18290)."""
    return (world.mu.log() + reward_mle(world, wins, R) / beta[..., None, None]).softmax(-1)


def ipo(world: Instance, wins: Tensor, beta: Tensor) -> Tensor:
    """IPO's minimiser (arXiv 2310.12036): least squares of beta h's margins on +-1/2."""
    wanted = in_theta(world.features, (wins - wins.mT).sum(-1) / 2)
    G = laplacian(world.features, wins + wins.mT)
    theta = (torch.linalg.pinv(G, rtol=1e-12, hermitian=True) @ wanted.unsqueeze(-1)).squeeze(-1)
    return (world.mu.log() + table(world.features, theta) / beta[..., None, None]).softmax(-1)


def fitted(world: Instance, wins: Tensor, beta, weight, steps) -> Tensor:
    """RPO (arXiv 2405.16436): DPO plus weight x beta x supervised learning of the winner, by
    Adam at a falling rate on u = beta h. Weight 0 is DPO, stopped after some steps."""
    beta, weight, steps = (t[..., None, None] for t in (beta, weight, steps))
    share = wins / wins.sum((-3, -2, -1), keepdim=True)
    won, met = share.sum(-1), share.sum((-2, -1)).unsqueeze(-1)
    theta = torch.zeros_like(in_theta(world.features, won + 0 * beta))
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)  # moments of the gradient
    for k in range(int(steps.max())):
        u = table(world.features, theta)
        doubted = share * margins(u).sigmoid().mT  # of each pair, the chance of the other label
        excess = met * (world.mu.log() + u / beta).softmax(-1) - won  # of pi over the winners
        gradient = in_theta(world.features, doubted.sum(-2) - doubted.sum(-1) + weight * excess)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        scale = (second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
        move = 0.05 * (1 + math.cos(math.pi * k / 400)) * first / (1 - 0.9 ** (k + 1)) / scale
        theta = torch.where(k < steps, theta - move, theta)
    return (world.mu.log() + table(world.features, theta) / beta).softmax(-1)


def pessimistic_mle(world: Instance, wins: Tensor, width: Tensor) -> Tensor:
    """Zhu et al. 2023, a bar for each response: greedy in the reward less its elliptical bonus."""
    phi = torch.eye(wins.shape[-1]).double()[None] if world.features is None else world.features
    G = laplacian(world.features, wins + wins.mT)
    inverse = torch.linalg.inv(G + torch.eye(G.shape[-1], dtype=G.dtype))
    z = phi - spac.data_policy(wins)[1].unsqueeze(-2) @ phi  # beyond the data's mean
    bonus = (z @ inverse * z).sum(-1).sqrt()
    return greedy(reward_mle(world, wins, world.R) - width[..., None, None] * bonus)


def win_share(world: Instance, wins: Tensor, strength: Tensor, pooled: Tensor) -> Tensor:
    """Greedy in the share of pairs won, shrunk towards its mean, 1/2, as by so many drawn pairs.
    pooled: over prompts, by the response's place."""
    won, met = wins.sum(-1), (wins + wins.mT).sum(-1)
    strength, pooled = strength[..., None, None], pooled[..., None, None] > 0
    won, met = (torch.where(pooled, t.sum(-2, keepdim=True), t) for t in (won, met))
    return greedy((won + strength / 2) / (met + strength))


def spac_tuned(world: Instance, wins: Tensor, lam, eta, rounds=150) -> Tensor:
    """SPAC-T's last iterate; lam in sqrt(n), eta in sqrt(8 log A / T) / R."""
    lam, wins = lam * wins.sum((-3, -2, -1)).sqrt(), wins.expand(*lam.shape, *wins.shape[-3:])
    eta = eta * math.sqrt(8 * math.log(wins.shape[-1]) / rounds) / world.R
    return run_spac_t(world, wins, lam, eta, rounds).last


def spac_by_rule(world: Instance, wins: Tensor, plain) -> Tensor:
    """The proximal form with lam of Eq. 18, or by the plain rule, which does not know C."""
    return run_proximal(world, wins, theorem(world, wins, 1, plain=bool(plain.all())).lam)


def spac_without_c(world: Instance, wins: Tensor, *_) -> Tensor:
    """Eq. 45: of the proximal policies at several lam, that of which most is assured."""
    scales = 2.0 ** torch.arange(-2, 7).double().view(-1, *[1] * (wins.ndim - 3))
    lam, wins = theorem(world, wins, 1, plain=True).lam * scales, wins.expand(9, *wins.shape)
    policies = run_proximal(world, wins, lam)
    best = assured(world, wins, lam, policies).argmax(0, keepdim=True)
    return policies.take_along_dim(best[..., None, None], 0).squeeze(0)


BETAS = [(10 ** (k / 2),) for k in range(-8, 7)]
METHODS = {  # name: the method, its grid
    "SPAC": (spac_tuned, list(product((0.3, 1.0, 3.0), (3.0, 10.0)))),
    "SPAC theorem": (spac_by_rule, [(0,)]),
    "SPAC plain": (spac_by_rule, [(1,)]),
    "SPAC no C": (spac_without_c, [(0,)]),
    "DPO": (partial(tilted, 40.0), BETAS),
    "DPO stopped": (fitted, list(product((0.001, 0.01, 0.1), (0.0,), (1, 3, 10, 30, 100)))),
    "IPO": (ipo, BETAS),
    "RPO": (fitted, list(product((0.001, 0.01, 0.1), (0.01, 0.03, 0.1, 0.3, 1.0), (400,)))),
    "RLHF + KL": (partial(tilted, 2.0), BETAS),
    "RLHF greedy": (pessimistic_mle, [(0,)]),
    "pessimistic MLE": (pessimistic_mle, BETAS),
    "win share": (win_share, list(product([10**k for k in range(-1, 7)], (0, 1)))),
}


def contest(points: list, names, seeds: int, rng, uniform=False) -> tuple[dict, dict]:
    """The oracle rule: at each (world, n), on the same data, every method at the setting of its
    grid that is best on the true value; of several worlds (...), where it does worst. uniform: mu
    is said to be uniform, as start or reference. {name: [regrets (seeds, ...)], [settings]}."""
    errors, settings = ({name: [] for name in names} for _ in range(2))
    for world, n in points:
        wins = sample_wins(world.repeat(seeds), n, rng).unsqueeze(0)
        told = world._replace(mu=world.mu * 0 + 1 / world.mu.shape[-1]) if uniform else world
        for name in names:
            method, grid = METHODS[name]
            hyper = torch.tensor(list(zip(*grid)), dtype=wins.dtype)  # (hyper-parameters, settings)
            hyper = hyper[(..., *[None] * (wins.ndim - 4))].expand(-1, -1, *wins.shape[1:-3])
            regrets = world.regret(method(told, wins, *hyper))  # (settings, seeds, ...)
            best = int(regrets.mean(1).view(len(grid), -1).amax(-1).argmin())
            errors[name].append(regrets[best])
            settings[name].append(grid[best])
    return errors, settings


def rivals(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Who is fooled by rare bad responses, by shared evidence, by a best that is common?"""
    ns, seeds = ([300, 300_000], 12) if quick else ([300, 3000, 30_000, 300_000], 60)
    worlds = {"rare": [rare(n, 8) for n in ns], "hedge": [hedge(n) for n in ns]}
    found = {w: contest(list(zip(worlds[w], ns)), METHODS, seeds, rng) for w in worlds}
    rules = [name for name in METHODS if name.startswith("SPAC ")]
    cautious = ["DPO stopped", "pessimistic MLE", "win share"]
    sure = [(single_prompt([n - 1, 1], [1.0, 0.0]), n) for n in ns]
    found["sure"] = contest(sure, rules + cautious, 5 * seeds, rng)
    lines, settings = ({world: pair[k] for world, pair in found.items()} for k in (0, 1))
    regrets = {w: {k: [e.mean().item() for e in of[k]] for k in of} for w, of in lines.items()}
    last, shared, sure = ({k: means[-1] for k, means in regrets[w].items()} for w in found)
    value = {"rivals": min(last[name] for name in ("DPO", "IPO", "RLHF greedy"))}
    value |= {"SPAC": last["SPAC"], "untuned": max(last[name] for name in rules)}
    value |= {"win_share": last["win share"], "SPAC,sure": max(sure[name] for name in rules)}
    value |= {"share,sure": float(np.mean(regrets["sure"]["win share"]))}
    claims = judge("baselines_fail", value, 6 * seeds * len(ns))
    others = min(shared[name] for name in METHODS if name[:3] not in ("SPA", "RPO"))
    value = {"rivals": others, "untuned": max(shared[name] for name in rules)}
    wins = sample_wins((world := worlds["hedge"][-1]).repeat(seeds), ns[-1], rng)
    promise = theorem(world, wins, 1).statistics
    value |= {"Gamma/rivals": promise[promise.isfinite()].mean().item() / others}
    claims |= judge("shared_evidence", value | {"RPO": shared["RPO"]}, seeds * len(ns))
    shown, panels = ["SPAC plain", "RPO", "DPO stopped", "win share", "DPO"], []
    for w, title in (("rare", "rare responses"), ("hedge", "shared evidence")):
        panels.append(panel(f"pairs (n), {title}", ns, {k: lines[w][k] for k in shown}))
    return claims, {"settings": settings, "regrets": regrets, "panels": panels}


def two_worlds(C: float, n: int, R=2.0) -> Instance:
    """Eq. 44: nobody can say which of two responses, of probability p each, is better; the third
    is common, and worthless. chi2/2 = C for both. (2 worlds, 1 prompt, 3 responses)"""
    p = 1 / (2 * C + 1)
    gap = 1 / math.sqrt(9 * slope_at(R) * n * p)
    pair = [single_prompt([p, p, 1 - 2 * p], [R - gap, r, 0.0], R) for r in (R - 2 * gap, R)]
    return Instance(*(torch.stack(column) for column in list(zip(*pair))[:3]), R)


def price(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 44, 45: the larger regret of two worlds, against C and n, and the floor of them all."""
    Cs, ns = [5, 15, 50, 150, 500], [3000, 10_000, 30_000, 100_000, 300_000]
    Cs, ns, seeds = (Cs[::2], ns[::2], 50) if quick else (Cs, ns, 200)
    points = [(C, 30_000) for C in Cs] + [(50, n) for n in ns]
    names = ("SPAC theorem", "SPAC plain", "SPAC no C", "RLHF greedy", "pessimistic MLE")
    found, _ = contest([(two_worlds(C, n), n) for C, n in points], names, seeds, rng)
    lines = {name: [e[:, e.mean(0).argmax()] for e in found[name]] for name in names}
    floor = [math.sqrt(2 * C / slope_at(2) / n) / (12 * math.e) for C, n in points]
    errors = torch.stack([torch.stack(line) for line in lines.values()])  # (names, points, seeds)
    least = (errors[1:].mean(-1) / torch.tensor(floor)).min().item()  # the first knows r*
    claims = judge("lower_bound", {"regret/floor": least}, seeds * len(points))
    known, plain, free = errors.mean(-1)[:3]
    value = {"slope": slope(Cs, lines["SPAC theorem"][: len(Cs)], rng)[0]}
    value |= {"plain": (plain / known)[len(Cs) - 1].item(), "no_C": (free / known).max().item()}
    lines["SPAC theorem (r*)"] = lines.pop("SPAC theorem")
    lines["lower bound"], cut = floor, len(Cs)
    in_C, in_n = {k: v[:cut] for k, v in lines.items()}, {k: v[cut:] for k, v in lines.items()}
    panels = [panel("coverage (C), n = 30,000", Cs, in_C), panel("pairs (n), C = 50", ns, in_n)]
    return claims | judge("coverage_cost", value, seeds * len(points)), {"panels": panels}


# -------------------------------------------------------- pictures and the story

COLOURS = {  # a method has one colour in every picture
    "SPAC": "#0072B2", "SPAC theorem": "#56B4E9", "SPAC no C": "#1A237E", "RPO": "#009E73",
    "SPAC-T, last": "#56B4E9", "DPO": "#D55E00", "DPO stopped": "#E69F00", "win share": "#7B5FC4",
    "pessimistic MLE": "#882255", "RLHF greedy": "#000000", "IPO": "#A65628",
    "data policy": "#999933", "proximal": "#17BECF", "SPAC without critic": "#CC79A7",
}  # fmt: skip
OTHERS, THEORY = ["#E377C2", "#2F4F2F", "#5F6B3A", "#C49C6B", "#5A6B8C"], "#888888"


def draw(path: Path, panels: list[dict]) -> None:
    """Every figure: lines, bands (the mean's 95 % interval) and labels where the lines end."""
    figure = Figure(figsize=(6.4 * len(panels), 4.4))
    figure.subplots_adjust(0.13 / len(panels), 0.12, 1 - 0.24 / len(panels), 0.97, wspace=0.6)
    for axis, spec in zip(np.ravel(figure.subplots(1, len(panels))), panels):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(xlabel=spec["xlabel"], xscale=spec["scale"], yscale=spec["scale"])
        logs, others, ends = spec["scale"] == "log", cycle(OTHERS), {}
        floor = 1e-5 if logs else -math.inf  # where a log axis shows zeros
        least = min(np.min(line.get("low") or line["mean"]) for line in spec["lines"].values())
        axis.set_ylabel(spec["ylabel"] + " (1e-5: that or less)" * bool(least < floor))
        for label, line in spec["lines"].items():
            x, low, high = spec["x"], line.get("low"), line.get("high")
            theory = logs and not low
            known = max((name for name in COLOURS if label.startswith(name)), key=len, default="")
            colour = COLOURS.get(known) or (THEORY if theory else next(others))
            axis.plot(x, np.maximum(line["mean"], floor), "--" if theory else "-", color=colour)
            ends[label] = x[-1], max(line["mean"][-1], floor), colour
            if low:
                low, high = np.maximum(low, floor), np.maximum(high, floor)
                axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        axis.autoscale_view()
        below = -math.inf
        for label, (x, y, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
            right, middle = axis.transData.transform((x, y)) + (6, 0)
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


EXPERIMENTS = [rivals, guarantee, price, dpo_failures]


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
