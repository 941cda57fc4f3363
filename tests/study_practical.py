"""From SPAC-T to what a network can run: python tests/study_practical.py --out results

On the tables of toy_bandit.py, where everything is known: is chi2/2 the concentrability (Eq. 12)?
Is a practical step SPAC-T's step (Eq. 26, 27)? Which parts of the practical form matter, and which
term of the certificate (Eq. 36, 37) says so? Do the proximal form (Eq. 40) and a linear class where
every prompt is new (Eq. 41) keep their promises? How fast do errors fall? Who succeeds from another
start? Writes OUT/practical.json and its figures.
"""

import argparse
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import spac  # noqa: E402
import toy_bandit as bandit  # noqa: E402

EXPECTED = """
theorem concentrability_exact  deviation        0     1e-9   |C/(chi2/2) - 1| where they must agree
theorem concentrability_exact  largest          0     1.0001 C/(chi2/2) elsewhere
theorem concentrability_exact  counter-example  2.249 2.251  C/a^2, where chi2/2 gives 3
theorem change_of_variables    optimum          0     1e-6   one step's optimal value / SPAC-T's - 1
theorem certificate            identity         0     1e-9   sum of the terms less the gap, largest
goal    certificate_reads      inexact,1-step   .5    2      the critic's error / gap, mediocre, 3e3
goal    certificate_reads      travel,eta-x-1   3     30     KL travelled / the base's: ten times
goal    certificate_reads      steps/Hoeffding  0     .2     KL spent over eta R^2 / 8, smoothed
goal    certificate_reads      inexact,smoothed -1    .05    the critic's error there, smoothed
theorem proximal               fall             0     1e-9   of Psi in a round, beyond its gap
theorem proximal               violations       0     0      policies beyond Eq. 40, any round
goal    proximal_pays          error/SPAC-T     0     1      10 rounds / 600 rounds' mixture
theorem linear_class           violations       0     0      runs with error above Eq. 41's bound
theorem linear_class           tables           0     0      share of runs that tables can bound
goal    linear_class_learns    bound            0     1      at the largest n, of R = 2
goal    linear_class_learns    error            0     .1     of the mixture there
goal    linear_class_learns    tables/linear    3     1e3    errors there, tables: one pair a prompt
goal    rate_in_n              mixture          -.6   -.4    slope in n, worst gap; theory -1/2
goal    rate_in_n              last             -1    -.35   the same, last; doing nothing has 0
goal    rate_in_rounds         error/term       0     1      error over Reg_T, largest over T
goal    single_policy_coverage error/start      0     .5     error over mu's own, K rare responses
goal    single_policy_coverage error/bound      0     1      largest over K, C fixed
goal    single_policy_coverage growth           0     1      of the error over that of the bound
goal    any_start              SPAC             0     .005   n = 3e5, from uniform, rare responses
goal    any_start              rules            0     .05    the same, largest of three rules
goal    any_start              rivals           .05   1      the same, least of DPO, IPO, chi-PO
goal    policies_not_bars      policy           0     .01    one bar for the policy; hedge, n = 3e5
goal    what_makes_it_work     base             0     .02    error at n = 300,000, rare responses
goal    what_makes_it_work     box-10R          .02   1      the same, critic in [0, 10 R]
goal    what_makes_it_work     no-baseline      .1    1      the same, critic beta h(y') alone
goal    what_makes_it_work     one-step         .1    1      one gradient step, mediocre winner
goal    function_approximation log-linear       0     .5     last error at n = 2,000 over tabular's
goal    function_approximation finite/bound     0     1      mixture's error over its bound, largest
"""  # kind, claim, value, least and most expected, what it is


def practical_loss(pi: Tensor, wins: Tensor, beta: float, lam, critic, pi_t: Tensor) -> Tensor:
    """The mean of Eq. 31 over the pairs and over y' ~ pi_t, exactly. pi, pi_t: (..., X, A). (...)

    Either critic of spac.py is a mean over the pair, so it needs only the pooled responses.
    """
    h = pi.log() - pi_t.log()  # Eq. 26
    prompts, muhat = spac.data_policy(wins)
    pair = wins * spac.preference_term(h.unsqueeze(-1), h.unsqueeze(-2), beta)
    response, generated = h.unsqueeze(-1), h.unsqueeze(-2)
    doubt = critic(response, response, generated, beta) * pi_t.unsqueeze(-2)
    preference = pair.sum((-3, -2, -1)) / wins.sum((-3, -2, -1))
    return preference + (prompts * (muhat * doubt.sum(-1)).sum(-1)).sum(-1) / lam


def without_baseline(h_chosen, h_rejected, h_generated, beta: float) -> Tensor:
    """The critic's term without the pair: another algorithm (theory.md, section 8)."""
    return beta * h_generated + 0 * h_chosen


def descend(objective, h: Tensor, optimizer, steps: int, box=math.inf) -> Tensor:
    """steps of optimizer([h]) on objective(h), summed over independent runs, h in [0, box]."""
    h = h.clone().requires_grad_()
    optimizer = optimizer([h])
    for _ in range(steps):
        optimizer.zero_grad()
        objective(h).sum().backward()
        optimizer.step()
        if box < math.inf:
            h.data.clamp_(0, box)
    return h.detach()


def practical_step(pi_t: Tensor, setting: tuple, box: float, optimizer, steps: int) -> Tensor:
    """pi_{t+1} from pi_t; setting: (wins, beta, lam, critic); box bounds max h - min h (Eq. 27)."""

    def policy(h):
        return (pi_t.log() + h).softmax(-1).clamp(min=1e-300)

    def objective(h):
        return practical_loss(policy(h), *setting, pi_t)

    start = torch.full_like(pi_t, min(box, 1e3) / 2)  # pi_t itself: a shift of h is nothing
    return policy(descend(objective, start, optimizer, steps, box))


def coverage_supremum(world: bandit.Instance, pi: Tensor, steps=3000) -> Tensor:
    """C(pi) from its definition (Eq. 5), by projected gradients in mu's metric. (...)

    The ratio ignores the length of g = f - r*, so g ranges over the cone that the box spans at r*;
    for either sign, sup L(g)^2 / |g|^2 = 2 max (+-L(g) - |g|^2 / 2). A lower bound in general; it
    has converged where mu is not too small, as here.
    """
    w, values = (pi - world.mu) / world.mu, []
    low = torch.where(world.reward <= 0, 0.0, -math.inf)
    high = torch.where(world.reward >= world.R, 0.0, math.inf)
    for sign in (1, -1):
        g = torch.zeros_like(w)
        for _ in range(steps):
            g = torch.maximum(torch.minimum(bandit.mean(world.mu, g) + sign * w / 2, high), low)
        terms = world.mu * (sign * w * g - (g - bandit.mean(world.mu, g)) ** 2)
        values.append((world.rho * terms.sum(-1)).sum(-1))
    return 2 * torch.maximum(*values)


def concentrability(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 12: the supremum C(pi) against chi2/2, with rewards inside and on the edge of the box."""

    def ratio(world, pi):
        chi2 = (world.rho * ((pi - world.mu) ** 2 / world.mu).sum(-1)).sum(-1)
        return coverage_supremum(world, pi) / (chi2 / 2)

    inside = bandit.random_instances(count := 30 if quick else 100, rng)
    face = torch.tensor(rng.uniform(size=inside.reward.shape))  # half of the rewards at 0 or R
    reward = inside.reward.masked_fill(face < 0.25, 0.0).masked_fill(face > 0.75, inside.R)
    edged, pi = inside._replace(reward=reward), torch.tensor(rng.dirichlet(np.ones(5), (count, 2)))
    equal, between = (
        torch.cat([ratio(inside, pi), ratio(edged, bandit.greedy(reward))]),
        ratio(edged, pi),
    )
    counter, a = bandit.single_prompt([1, 1, 1], [0.0, 2.0, 0.0]), 0.2
    shift = a * torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64)
    value = {"deviation": (equal - 1).abs().max().item(), "largest": between.max().item()}
    value |= {"counter-example": coverage_supremum(counter, counter.mu + shift).item() / a**2}
    return bandit.judge("concentrability_exact", value, 3 * count, EXPECTED), {
        "least": between.min()
    }


def change_of_variables(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 26, 27: from pi_4, the boxed step's least loss against psi(pi_4, f_4) / lam."""
    world, eta, lam = bandit.random_instances(4 if quick else 20, rng), 0.3, 4.0
    wins = bandit.sample_wins(world, 200, rng)
    critic = bandit.Critic(wins, lam, world.R, 1e-10)
    *_, (pi_t, f) = spac.spac_t(world.mu, critic, eta, 4)
    setting = wins, 1 / eta, lam, spac.linear_critic
    momentum = partial(torch.optim.SGD, lr=2 * eta**2, momentum=0.9)
    pi = practical_step(pi_t, setting, world.R * eta, momentum, 5000)
    theirs = spac.critic_objective(pi_t, f, wins, lam) / lam
    gap = (practical_loss(pi, *setting, pi_t) / theirs - 1).abs().max().item()
    return bandit.judge("change_of_variables", {"optimum": gap}, len(wins), EXPECTED), {}


# -------------------------------------------------------- what makes it work

ADAM = partial(torch.optim.Adam, lr=0.1)
NETWORK = {"steps": 40, "optimizer": ADAM}
ABLATION = {  # row: what differs from the base, and why it matters
    "base": ({}, "Linear critic in the box [0, R], solved exactly, eta 10 times the theorem's."),
    "box 10 R": ({"box": 10}, "Doubt has no limit: the critic's favourite jumps, and pi with it."),
    "eta x 1": ({"eta": 1}, "Safe, and slow: 60 rounds are too few for so small a step."),
    "eta x 100": ({"eta": 100}, "Each round jumps to the critic's favourite and back."),
    "1 gradient step": (
        {"steps": 1},
        "At pi = pi_t the preference gradient counts net wins; it never fits r*.",
    ),
    "40 gradient steps": ({"steps": 40}, "Enough of the way to the critic's minimiser."),
    "Adam, 10 steps": ({"steps": 10, "optimizer": ADAM}, "The same, sooner."),
    "Adam, 40 steps": (
        NETWORK,
        "The critic is nearly solved: within 3 times the base's error.",
    ),
    "no box": (
        NETWORK | {"box": math.inf},
        "Few inner steps from h = 0 are a soft box: here they suffice.",
    ),
    "smoothed": (
        NETWORK | {"critic": spac.smoothed_critic},
        "Half the slope at pi_t: it acts like twice the lam.",
    ),
    "smoothed, no box": (
        NETWORK | {"critic": spac.smoothed_critic, "box": math.inf},
        "The language model's form: bounded below without any box.",
    ),
    "no baseline": (
        NETWORK | {"critic": without_baseline},
        "Rewards variance instead of doubt: in rare it follows the luckiest response.",
    ),
}


def path(world, wins, box=1, eta=10, steps=0, optimizer=None, critic=spac.linear_critic):
    """(61 policies of 60 rounds, beta, lam by the plain rule); steps = 0 solves the critic."""
    rounds = 60
    eta = eta * math.sqrt(8 * math.log(wins.shape[-1]) / rounds) / world.R
    lam = bandit.theorem(world, wins, rounds, plain=True).lam
    optimizer = optimizer or partial(torch.optim.SGD, lr=2 * eta**2)
    exact, policies = bandit.Critic(wins, lam, box * world.R), [world.mu.expand(wins.shape[:-1])]
    for _ in range(rounds):
        pi = policies[-1]
        if steps:
            setting = wins, 1 / eta, lam, critic
            pi = practical_step(pi, setting, box * world.R * eta, optimizer, steps)
        else:
            pi = spac.mirror_step(pi, exact(pi), eta)
        policies.append(pi)
    return policies, 1 / eta, lam


def mediocre(n: int) -> bandit.Instance:
    """As rare(n, 8), but the second best response nets more wins than the best."""
    mu = [0.1, 0.6, 0.3 - 8 / n] + [1 / n] * 8
    return bandit.single_prompt(mu, [1.0, 0.75, 0.25] + [0.0] * 8)


CERTIFIED = "mediocre, n = 3,000"  # where too few data, rounds or inner steps show side by side
WORLDS = {"rare": lambda n: bandit.rare(n, 8), "mediocre": mediocre}


def ablation(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """One factor at a time: error after 60 rounds, how far J still moves, and the certificate."""
    seeds, table = 24 if quick else 100, {row: {"why": why} for row, (_, why) in ABLATION.items()}
    off = []
    for n, label in product((3000, 300_000), WORLDS):
        world = WORLDS[label](n)
        wins = bandit.sample_wins(world.repeat(seeds), n, rng)
        best = bandit.greedy(world.reward)
        for row, (change, _) in ABLATION.items():
            policies, beta, lam = path(world, wins, **change)
            regrets = torch.stack([world.regret(pi) for pi in policies])
            moved = regrets[-20:].diff(dim=0).abs().mean().item()
            verdict = "oscillates" if moved > 0.02 else "settles"
            terms = spac.certificate(policies, beta, best, world.reward, wins, lam)
            gap = regrets[:-1].mean(0)  # one prompt: J is J at the prompts of the data
            known = sum(terms.values()).isfinite()  # not where a policy has lost a response
            off += (sum(terms.values()) - gap)[known].abs().tolist()
            cell = {"error": regrets[-1].mean().item(), "moved": moved, "verdict": verdict}
            cell |= {
                name: term[known].mean().item() if known.any() else None
                for name, term in terms.items()
            }
            cell |= {"gap": gap.mean().item(), "Hoeffding": world.R**2 / (8 * beta)}
            table[row][f"{label}, n = {n:,}"] = cell
    value = {
        "base": table["base"]["rare, n = 300,000"]["error"],
        "box-10R": table["box 10 R"]["rare, n = 300,000"]["error"],
        "no-baseline": table["no baseline"]["rare, n = 300,000"]["error"],
        "one-step": table["1 gradient step"]["mediocre, n = 300,000"]["error"],
    }
    claims = bandit.judge("what_makes_it_work", value, 4 * seeds, EXPECTED)
    claims |= bandit.judge("certificate", {"identity": max(off)}, len(off), EXPECTED)
    rows = ("1 gradient step", "eta x 1", "smoothed, no box")
    one, slow, soft = (table[row][CERTIFIED] for row in rows)
    value = {"inexact,1-step": one["inexact"] / one["gap"], "inexact,smoothed": soft["inexact"]}
    value |= {"travel,eta-x-1": slow["travel"] / table["base"][CERTIFIED]["travel"]}
    value |= {"steps/Hoeffding": soft["steps"] / soft["Hoeffding"]}
    return claims | bandit.judge("certificate_reads", value, seeds, EXPECTED), {"table": table}


def draw_certificate(path: Path, table: dict) -> None:
    """The terms of Eq. 36 and 37, one row a variant; they add up to the gap, a dot."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    cells = {row: table[row][CERTIFIED] for row in table}
    axis = figure.subplots()
    terms = {"travel": "KL travelled", "steps": "KL spent", "doubt": "statistics"}
    terms |= {"inexact": "critic's error"}
    colours = [bandit.COLOURS["SPAC theorem"], bandit.COLOURS["SPAC"], *bandit.OTHERS[2:4]]
    rows = [row for row in cells if all(abs(cells[row][t] or 9) < 0.5 for t in terms)][::-1]
    beyond = ", ".join(row for row in cells if row not in rows)
    ends = {row: {1: 0.0, -1: 0.0} for row in rows}  # where the bars of either sign have got to
    for (term, label), colour in zip(terms.items(), colours):
        for k, row in enumerate(rows):
            value = cells[row][term]
            sign = 1 if value > 0 else -1
            axis.barh(k, value, left=ends[row][sign], color=colour, label=None if k else label)
            ends[row][sign] += value
    axis.plot(
        [cells[row]["gap"] for row in rows], range(len(rows)), "ko", label="their sum, the gap"
    )
    axis.axvline(0, color=bandit.THEORY, lw=0.8)
    axis.set(xlabel=f"gap, mean of 60 rounds, by its causes ({CERTIFIED})\noff the scale: {beyond}")
    axis.set_yticks(range(len(rows)), rows)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.15, 1), ncols=5, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def draw_ablation(path: Path, table: dict) -> None:
    """One row a variant, one mark a world; to the left is better."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis, rows = figure.subplots(), list(table)[::-1]
    columns = [key for key in table["base"] if key != "why"]
    for column, marker, colour in zip(columns, "os^v", [bandit.COLOURS["SPAC"], *bandit.OTHERS]):
        errors = [max(table[row][column]["error"], 1e-5) for row in rows]
        axis.plot(errors, range(len(rows)), marker, color=colour, ms=8, alpha=0.8, label=column)
    for k, row in enumerate(rows):
        if any(table[row][column]["verdict"] == "oscillates" for column in columns):
            axis.text(1.3, k, "oscillates", va="center")
    axis.set(xscale="log", xlabel="regret after 60 rounds (zeros drawn at 1e-5)", xlim=(7e-6, 8))
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


# -------------------------------------------------------- function approximation


class LearnedCritic:
    """Eq. 7 by ten Adam steps a round on warm parameters (..., P); f = R sigmoid(model)."""

    def __init__(self, model, parameters: Tensor, wins: Tensor, lam, R: float):
        self.model, self.parameters, self.wins, self.lam, self.R = model, parameters, wins, lam, R

    def critic(self, parameters: Tensor) -> Tensor:
        return self.R * self.model(parameters).sigmoid()

    def __call__(self, pi: Tensor) -> Tensor:
        def objective(parameters):
            return spac.critic_objective(pi, self.critic(parameters), self.wins, self.lam)

        self.parameters = descend(objective, self.parameters, ADAM, 10)
        return self.critic(self.parameters)


def approximation(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Critics that share features, same data, same actor; a finite class and its bound."""
    seeds, X, A, d, hidden, rounds = 24, 20, 8, 4, 16, 40 if quick else 100
    features = torch.tensor(rng.normal(size=(X, A, d)))
    weights = torch.tensor(rng.normal(size=(64, d)))  # the finite class; the first is the truth
    functions = 2 * (features @ weights.T).permute(2, 0, 1).sigmoid()
    mu, rho = torch.tensor(rng.dirichlet(np.full(A, 2.0), X)), torch.full((X,), 1 / X).double()
    world = bandit.Instance(mu, functions[0], rho, 2.0)

    def mlp(p):
        first, last = p[..., : d * hidden].unflatten(-1, (d, hidden)), p[..., d * hidden :]
        return torch.einsum("...xah,...h->...xa", (features @ first.unsqueeze(-3)).tanh(), last)

    models = {  # parameters (..., P) -> logits of f / R, (..., X, A), and P
        "tabular critic": (lambda p: p.unflatten(-1, (X, A)), X * A),
        "log-linear critic": (lambda p: torch.einsum("xad,...d->...xa", features, p), d),
        "MLP critic": (mlp, hidden * (d + 1)),
    }
    ns, lams = [200, 2000, 20_000], torch.tensor([0.3, 1.0, 3.0]).double()[:, None]
    lines = {name: [] for name in [*models, "finite class, mixture", "its bound"]}
    coverage = {"finite class": [], "tables": [], "share of tables reached": []}
    eta = math.sqrt(8 * math.log(A) / rounds) / world.R
    for n in ns:
        wins = bandit.sample_wins(world.repeat(seeds), n, rng)
        for name, (model, size) in models.items():  # last iterate at the best of three lam
            scale = 0.3 if name == "MLP critic" else 0.0
            start = torch.tensor(scale * rng.normal(size=size)).expand(3, seeds, size)
            critic = LearnedCritic(model, start, wins, lams * math.sqrt(n), world.R)
            *_, (last, _) = spac.spac_t(mu.expand(3, seeds, X, A), critic, 3 * eta, rounds)
            regrets = world.regret(last)
            lines[name].append(regrets[regrets.mean(1).argmin()])

        prompts, muhat = spac.data_policy(wins)
        v, g = (
            prompts.unsqueeze(-1) * (bandit.greedy(functions[0]) - muhat),
            functions - functions[0],
        )
        spread = torch.einsum("sxac,fxac->sf", wins, bandit.margins(g[1:]) ** 2) / n
        C_hat = (torch.einsum("sxa,fxa->sf", v, g[1:]) ** 2 / spread).amax(1)  # Eq. 13
        cost = math.log(len(functions) / 0.05) / (bandit.slope_at(world.R) * n)
        lam = (C_hat / (2 * cost)).sqrt() / bandit.slope_at(world.R)
        promise = bandit.theorem(world, wins, rounds)
        critic = spac.FiniteCritic(functions, wins, lam)
        run = spac.spac_t(mu.expand(seeds, X, A), critic, promise.eta[:, None, None], rounds)
        lines["finite class, mixture"].append(world.regret(spac.mixture(pi for pi, _ in run)))
        bound = promise.transfer * (promise.regret + (8 * C_hat * cost).sqrt())  # Eq. 15, 20
        lines["its bound"].append(bound)
        reached = promise.coverage.isfinite()
        coverage["finite class"].append(C_hat.mean().item())
        mean = promise.coverage[reached].mean().item() if reached.any() else None
        coverage["tables"].append(mean)
        coverage["share of tables reached"].append(reached.double().mean().item())
    ratio = lines["log-linear critic"][1].mean() / lines["tabular critic"][1].mean()
    pairs = zip(lines["finite class, mixture"], lines["its bound"])
    value = {
        "log-linear": ratio.item(),
        "finite/bound": max((m / b).max().item() for m, b in pairs),
    }
    panels = [bandit.panel("preference pairs (n)", ns, lines)]
    claims = bandit.judge("function_approximation", value, seeds * len(ns), EXPECTED)
    return claims, {"coverage": coverage, "panels": panels}


# -------------------------------------------------------- the proximal form, linear classes


def proximal(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 40: Psi never falls, each round's policy keeps its bound; against SPAC-T, same lam."""
    instances, seeds = bandit.random_instances(20, rng), 2 if quick else 8
    worlds, falls, violations, runs = instances.repeat(seeds), [], 0, 0
    for n, beta in product((300, 3000, 100_000), (1.0, 0.1, 0.01)):
        wins = bandit.sample_wins(worlds, n, rng)
        lam = bandit.theorem(worlds, wins, 1).lam
        lam = lam.where(lam.isfinite(), 1.0)  # beyond Eq. 18's reach any lam will do
        prompts, best = spac.data_policy(wins)[0], bandit.greedy(worlds.reward)
        value = partial(spac.critic_objective, wins=wins, lam=lam)
        judge = bandit.Critic(wins, lam, worlds.R, 1e-12)
        pessimistic = [value(pi, judge(pi)) - judge.gap for pi in (worlds.mu, best)]
        gamma = value(best, worlds.reward) - pessimistic[1]
        divergence = -(prompts * torch.xlogy(best, worlds.mu).sum(-1)).sum(-1)
        critic, last = (
            bandit.ProximalCritic(wins, lam, worlds.R, beta, tolerance=1e-12),
            pessimistic[0],
        )
        inexact = 0.0
        for t, (pi, f) in enumerate(spac.spac_t(worlds.mu, critic, 1 / beta, 20), start=1):
            after = spac.mirror_step(pi, f, 1 / beta)  # pi_t+1
            inexact = inexact + critic.gap
            now = value(after, judge(after))
            falls.append((last - now - critic.gap).max().item())
            last = now - judge.gap
            gap = (prompts * ((best - after) * worlds.reward).sum(-1)).sum(-1)
            bound = gamma + beta * divergence / t + inexact / t
            violations += int((~(gap <= bound + 1e-12)).sum())
            runs += gap.numel()
    claims = bandit.judge(
        "proximal", {"fall": max(falls), "violations": violations}, runs, EXPECTED
    )
    ns, rounds = [300, 1000, 3000, 10_000, 30_000, 100_000][:: 2 if quick else 1], 600
    lines = {name: [] for name in ("SPAC-T, mixture", "proximal, beta = 1", "proximal, beta = .1")}
    for n in ns:
        wins = bandit.sample_wins(worlds, n, rng)
        promise = bandit.theorem(worlds, wins, rounds)
        run = bandit.run_spac_t(worlds, wins, promise.lam, promise.eta, rounds)
        policies = [run.mixture]
        policies += [bandit.run_proximal(worlds, wins, promise.lam, beta) for beta in (1.0, 0.1)]
        for line, pi in zip(lines.values(), policies):
            line.append(worlds.regret(pi).mean(1))
    ratio = (lines["proximal, beta = .1"][-1].mean() / lines["SPAC-T, mixture"][-1].mean()).item()
    claims |= bandit.judge(
        "proximal_pays", {"error/SPAC-T": ratio}, worlds.mu[..., 0, 0].numel(), EXPECTED
    )
    return claims, {"panels": [bandit.panel("preference pairs (n)", ns, lines)]}


def linear_class(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Eq. 41 where every prompt is new: n prompts with one pair each, responses that mix d = 4
    prototypes whose rewards are the unknowns. Tables learn nothing from another prompt."""
    ns, seeds, rounds = ([100, 1000], 8, 100) if quick else ([100, 300, 1000, 3000], 20, 300)
    theta, R = torch.tensor([1.8, 1.2, 0.6, 0.2]).double(), 2.0
    names = ("bound, Eq. 41", "SPAC-T, mixture", "SPAC-T, last (new x)", "tables, mixture")
    lines, violations, bounded = {name: [] for name in (*names, "data policy")}, 0, 0

    def prompts(count):
        features = torch.tensor(rng.dirichlet(np.full(4, 0.5), (count, 4)))
        uniform = torch.full((count, 4), 0.25).double(), torch.full((count,), 1 / count).double()
        return bandit.Instance(uniform[0], features @ theta, uniform[1], R, features)

    for n in ns:
        world, fresh = prompts(n), prompts(2000)
        apart = [t.unsqueeze(-2) for t in world[:2]] + [torch.ones(n, 1).double()]
        wins = bandit.sample_wins(bandit.Instance(*apart).repeat(seeds), 1, rng).squeeze(-3)
        promise = bandit.theorem(world, wins, rounds)
        run = bandit.run_spac_t(world, wins, promise.lam, promise.eta, rounds)
        error, certified = world.regret(run.mixture), promise.bound + run.gap.mean(0)
        violations += int((~(error <= certified)).sum())
        tables = world._replace(features=None)
        bounded += int(bandit.theorem(tables, wins, rounds).bound.isfinite().sum())
        plain = bandit.theorem(tables, wins, rounds, plain=True)
        there = bandit.run_spac_t(tables, wins, plain.lam, plain.eta, rounds).mixture
        # log(pi / mu) is linear in the features, up to a shift: read theta off, apply it elsewhere
        centred = world.features - world.features.mean(-2, keepdim=True)
        h = (run.last * 4).log()
        h = h - h.mean(-1, keepdim=True)
        moved = torch.einsum("dk,sk->sd", torch.linalg.pinv(centred.flatten(0, 1)), h.flatten(1))
        elsewhere = torch.einsum("xad,sd->sxa", fresh.features, moved).softmax(-1)
        found = certified, error, fresh.regret(elsewhere), world.regret(there)
        for line, value in zip(lines.values(), (*found, world.regret(world.mu).expand(seeds))):
            line.append(value)
    bound, error, _, there, _ = (line[-1].mean().item() for line in lines.values())
    runs, lines["bound, Eq. 41"] = (
        seeds * len(ns),
        [b.mean().item() for b in lines["bound, Eq. 41"]],
    )
    lines["data policy"] = [e.mean().item() for e in lines["data policy"]]
    value = {"violations": violations, "tables": bounded / runs}
    claims = bandit.judge("linear_class", value, runs, EXPECTED)
    value = {"bound": bound, "error": error, "tables/linear": there / error}
    claims |= bandit.judge("linear_class_learns", value, seeds, EXPECTED)
    return claims, {"panels": [bandit.panel("prompts, one pair each (n)", ns, lines)]}


# -------------------------------------------------------- rates, coverage, a wider field


def rates(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Slopes in T, and in n of the worst of fixed gaps, where doing nothing has slope 0."""
    ns = [100, 1000, 10_000] if quick else [100, 1000, 10_000, 100_000]
    gaps = [2 / 10 ** (k / 4) for k in range(9)]
    pairs = [bandit.single_prompt([0.2, 0.8], [1 + gap / 2, 1 - gap / 2]) for gap in gaps]
    worlds = bandit.Instance(*(torch.stack(column) for column in list(zip(*pairs))[:3]))
    in_n = bandit.series([(worlds.repeat(16 if quick else 40), [n], n // 10) for n in ns], rng)
    Ts, worlds = (
        [10, 30, 100, 300, 1000],
        bandit.random_instances(20, rng).repeat(4 if quick else 10),
    )
    in_T = bandit.series([(worlds, [100_000], T) for T in Ts], rng)
    worst = {k: [e[:, e.mean(0).argmax()] for e in in_n[k]] for k in ("mixture", "last")}
    slopes = {key: bandit.slope(ns, errors, rng) for key, errors in worst.items()}
    values = {key: interval[0] for key, interval in slopes.items()}
    claims = bandit.judge("rate_in_n", values, int(sum(in_n["runs"])), EXPECTED)
    ratios = [m.mean().item() / term for m, term in zip(in_T["mixture"], in_T["regret_term"])]
    claims |= bandit.judge(
        "rate_in_rounds", {"error/term": max(ratios)}, int(sum(in_T["runs"])), EXPECTED
    )
    lines = {"SPAC-T, mixture": worst["mixture"], "SPAC-T, last": worst["last"]}
    lines |= {"slope -1/2": [2 / math.sqrt(n) for n in ns]}
    means = [m.mean(1) for m in in_T["mixture"]]
    terms = {"theory's term Reg_T": in_T["regret_term"], "SPAC-T, mixture": means}
    panels = (
        bandit.panel("pairs (n), the worst gap", ns, lines),
        bandit.panel("rounds (T)", Ts, terms),
    )
    return claims, {"slopes": slopes | {"rounds": bandit.slope(Ts, means, rng)}, "panels": panels}


def coverage(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Against the number of rare responses, at one C."""
    seeds, rounds, Ks = (12, 300, [1, 4, 16]) if quick else (100, 600, [1, 2, 4, 8, 16, 32])
    names = ("SPAC plain", "DPO", "IPO", "RLHF greedy")
    lines, _ = bandit.contest([(bandit.rare(3000, K), 3000) for K in Ks], names, seeds, rng)
    worlds = [bandit.rare(3000, K).repeat(1).repeat(seeds) for K in Ks]
    found = bandit.series([(world, [3000], rounds) for world in worlds], rng)
    ratios = [m.mean().item() / b for m, b in zip(found["mixture"], found["bound"])]
    value = {"error/bound": max(ratios), "growth": ratios[-1] / ratios[0]}
    value |= {"error/start": max(m.mean().item() for m in found["mixture"]) / found["start"][0]}
    claims = bandit.judge("single_policy_coverage", value, seeds * len(Ks), EXPECTED)
    lines |= {"SPAC-T, mixture": found["mixture"], "bound": found["bound"]}
    return claims, {"panels": [bandit.panel("rare responses (K), C = .75", Ks, lines)]}


def chi_po(world: bandit.Instance, wins: Tensor, beta: Tensor) -> Tensor:
    """chi-PO's minimiser (arXiv 2407.13399): z + log z = (r - c) / beta with z = pi / pi_ref, the
    likeliest r with margins within 2R, and c, by bisection, such that pi sums to one."""
    ref, r = world.mu, bandit.reward_mle(world, wins, 2 * world.R)
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


def pessimistic_policy(world: bandit.Instance, wins: Tensor, width: Tensor, rounds=400) -> Tensor:
    """Zhu et al. 2023, one bar for the whole policy (Eq. 46): mirror ascent of value less bar."""
    reward, G = (
        bandit.reward_mle(world, wins, world.R),
        bandit.laplacian(world.features, wins + wins.mT),
    )
    inverse = torch.linalg.inv(G + torch.eye(G.shape[-1], dtype=G.dtype))
    prompts, muhat = spac.data_policy(wins)

    def less_bar(pi):
        v = bandit.in_theta(world.features, prompts.unsqueeze(-1) * (pi - muhat))
        pull = (inverse @ v.unsqueeze(-1)).squeeze(-1)
        norm = (v * pull).sum((-2, -1), keepdim=True).clamp(min=1e-20).sqrt()
        return reward - width[..., None, None] * bandit.table(world.features, pull / norm)

    start = world.mu.expand(*width.shape, *wins.shape[-3:-1])
    played = [pi for pi, _ in spac.spac_t(start, less_bar, 0.3, rounds)]
    return spac.mixture(played[rounds // 2 :])


FIELD = {"chi-PO": (chi_po, bandit.BETAS), "pessimistic policy": (pessimistic_policy, bandit.BETAS)}


def elsewhere(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """The contest on other worlds, with two more methods; from the uniform policy as well."""
    seeds, ns = 12 if quick else 50, [3000, 300_000]
    bandit.METHODS.update(FIELD)
    worlds = {"rare": WORLDS["rare"], "mediocre": mediocre, "hedge": bandit.hedge}
    found, plan = {}, [(name, False) for name in worlds] + [("rare", True), ("hedge", True)]
    for name, uniform in plan:
        points = [(worlds[name](n), n) for n in ns]
        errors, settings = bandit.contest(points, bandit.METHODS, seeds, rng, uniform)
        found[name + ", uniform" * uniform] = {
            method: {"regret": [e.mean().item() for e in line], "setting": settings[method]}
            for method, line in errors.items()
        }
    far = {method: row["regret"][-1] for method, row in found["rare, uniform"].items()}
    value = {"SPAC": far["SPAC"], "rivals": min(far[name] for name in ("DPO", "IPO", "chi-PO"))}
    value |= {"rules": max(far[name] for name in far if name.startswith("SPAC "))}
    claims = bandit.judge("any_start", value, seeds * len(ns), EXPECTED)
    value = {"policy": found["hedge"]["pessimistic policy"]["regret"][-1]}
    return claims | bandit.judge("policies_not_bars", value, seeds, EXPECTED), {"n": ns} | found


def mechanism(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """One data set in which the rare response won: DPO's path, SPAC's path, the critic's belief."""
    world = bandit.rare(3000, 1)
    wins = bandit.sample_wins(world, 3000, rng)
    while wins[0, 2].sum() <= wins[0, :, 2].sum():  # until it won more pairs than it lost
        wins = bandit.sample_wins(world, 3000, rng)
    promise = bandit.theorem(world, wins, 300, plain=True)
    critic = bandit.Critic(wins, promise.lam, world.R)
    rounds = spac.spac_t(world.mu, critic, 3 * promise.eta, 300)
    policies, critics = (torch.cat(column) for column in zip(*rounds))
    betas = torch.logspace(1, -2, 100, dtype=torch.float64)
    dpo = bandit.tilted(40.0, world, wins.expand(100, *wins.shape), betas)[:, 0]
    paths = {"DPO, beta falling": dpo.tolist(), "SPAC-T": policies.tolist()}
    critics = critics - bandit.mean(world.mu, critics)
    return {}, {"paths": paths, "beliefs": critics[:60].T.tolist()}


def draw_mechanism(path: Path, found: dict) -> None:
    """Left: policies on the simplex of three responses. Right: the critic, by round."""
    names, heights = ["best", "common", "rare"], (-0.06, -0.06, 0.89)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    simplex, belief = figure.subplots(1, 2)
    simplex.set_axis_off()
    simplex.set(ylim=(-0.1, 0.95))
    simplex.plot([0, 1, 0.5, 0], [0, 0, 0.866, 0], color=bandit.THEORY, lw=0.8)
    for name, x, y in zip(names, (0, 1, 0.5), heights):
        simplex.text(x, y, name, ha="center")
    for label, policies in found["paths"].items():
        policies = np.array(policies)
        x, y = policies[:, 1] + policies[:, 2] / 2, policies[:, 2] * 0.866
        colour = bandit.COLOURS["DPO" if label.startswith("DPO") else "SPAC"]
        simplex.plot(x, y, color=colour, label=label)
        simplex.plot(x[-1], y[-1], ">", color=colour)
    simplex.plot(0.6, 0.0, "ko", label="start, the data policy")
    simplex.legend(frameon=False, loc="upper left")
    for name, line, colour in zip(names, found["beliefs"], bandit.OTHERS):
        belief.plot(range(1, 61), line, color=colour)
        belief.text(1, line[0] + 0.012, name, color=colour, va="bottom")
    belief.set(xlabel="round (t)", ylabel="critic f_t, centred on the data")
    belief.margins(y=0.1)
    belief.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def story(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """Ten pairs by hand (theory.md, section 1): what the data, DPO and SPAC say in the end."""
    wins, rewards = torch.zeros(1, 3, 3).double(), torch.tensor([[1.0, 0.5, 0.0]]).double()
    wins[0, 0, 1], wins[0, 1, 0], wins[0, 2, 1] = 6, 3, 1
    start, logits = torch.ones(1, 3).double() / 3, torch.zeros(1, 3).double()

    def dpo(logits):
        h = logits.log_softmax(-1) - start.log()
        return (wins * spac.preference_term(h.unsqueeze(-1), h.unsqueeze(-2), 0.5)).sum() / 10

    steps = partial(torch.optim.Adam, lr=0.1)
    critic = bandit.Critic(wins, 2.0, 2.0, tolerance=1e-12)  # lambda, R
    for last, _ in spac.spac_t(start, critic, 0.5, 200):
        policy = last
    ends = {"the data": spac.data_policy(wins)[1], "SPAC": policy}
    ends["DPO"] = descend(dpo, logits, steps, 3000).softmax(-1)
    values = {name: (pi * rewards).sum().item() for name, pi in ends.items()}
    shares = {name: pi.flatten().tolist() for name, pi in ends.items()}
    return {}, {"shares": shares, "values": values}


def draw_story(path: Path, found: dict) -> None:
    """The three responses, and how often each of the three says them."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axis, colours = figure.subplots(), {"the data": "#999999"} | bandit.COLOURS
    about = ["a\nreward 1\nwon 6, lost 3", "b\nreward 0.5\nwon 3, lost 7"]
    for k, name in enumerate(("the data", "DPO", "SPAC")):
        x, share = np.arange(3) + 0.27 * (k - 1), 100 * np.array(found["shares"][name])
        value = f"{name}: value {found['values'][name]:.2f}"
        bars = axis.bar(x, share, 0.25, color=colours[name], label=value)
        axis.bar_label(bars, [f"{part:.0f} %" for part in share], fontsize=9)
    axis.set_xticks(range(3), [*about, "c\nreward 0\nwon 1, lost 0"])
    axis.set(ylabel="how often it is said (%)", ylim=(0, 112))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper center")
    figure.savefig(path, dpi=100)


STUDIES = [ablation, elsewhere, linear_class, coverage, approximation, rates, proximal]
STUDIES += [concentrability, change_of_variables, mechanism, story]


def run_study(index: int, seed: int, quick: bool) -> tuple[dict, dict]:
    torch.set_num_threads(1)
    return STUDIES[index](quick, np.random.default_rng([seed, index]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="out", help="folder for practical.json and the figures")
    parser.add_argument("--seed", type=int, default=0, help="every random draw follows from it")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and rounds")
    config, claims, data = parser.parse_args(), {}, {}
    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        run = partial(run_study, seed=config.seed, quick=config.quick)
        for study, (found, record) in zip(STUDIES, pool.map(run, range(len(STUDIES)))):
            claims, data = claims | found, data | {study.__name__: record}
    draw_ablation(out / "ablation.png", data["ablation"]["table"])
    draw_certificate(out / "certificate.png", data["ablation"]["table"])
    draw_mechanism(out / "mechanism.png", data["mechanism"])
    draw_story(out / "story.png", data["story"])
    return bandit.report(
        out, "practical", claims, data, {"seed": config.seed, "quick": config.quick}
    )


if __name__ == "__main__":
    sys.exit(main())
