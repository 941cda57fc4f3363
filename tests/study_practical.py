"""From SPAC-T to what a network can run: python tests/study_practical.py --out results

On the tables of toy_bandit.py, where everything is known: is chi2/2 the concentrability (Eq. 12)?
Is a practical step SPAC-T's step (Eq. 26, 27)? Which parts of the practical form matter, and what
do critics that share features gain? Writes OUT/practical.json, ablation.png, approximation.png.
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


def trace(world, wins, box=1, eta=10, steps=0, optimizer=None, critic=spac.linear_critic):
    """Regrets (60, seeds) of 60 rounds, lam by the plain rule; steps = 0 solves the critic."""
    rounds = 60
    eta = eta * math.sqrt(8 * math.log(wins.shape[-1]) / rounds) / world.R
    lam = bandit.theorem(world, wins, rounds, plain=True).lam
    optimizer = optimizer or partial(torch.optim.SGD, lr=2 * eta**2)
    exact, regrets = bandit.Critic(wins, lam, box * world.R), []
    pi = world.mu.expand(wins.shape[:-1])
    for _ in range(rounds):
        if steps:
            setting = wins, 1 / eta, lam, critic
            pi = practical_step(pi, setting, box * world.R * eta, optimizer, steps)
        else:
            pi = spac.mirror_step(pi, exact(pi), eta)
        regrets.append(world.regret(pi))
    return torch.stack(regrets)


def mediocre(n: int) -> bandit.Instance:
    """As rare(n, 8), but the second best response nets more wins than the best."""
    mu = [0.1, 0.6, 0.3 - 8 / n] + [1 / n] * 8
    return bandit.single_prompt(mu, [1.0, 0.75, 0.25] + [0.0] * 8)


def ablation(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """One factor at a time: error after 60 rounds, and how far J still moves each round."""
    seeds, table = 24 if quick else 100, {row: {"why": why} for row, (_, why) in ABLATION.items()}
    for n, (label, world) in product(
        (3000, 300_000), (("rare", lambda n: bandit.rare(n, 8)), ("mediocre", mediocre))
    ):
        wins = bandit.sample_wins(world(n).repeat(seeds), n, rng)
        for row, (change, _) in ABLATION.items():
            regrets = trace(world(n), wins, **change)
            moved = regrets[-20:].diff(dim=0).abs().mean().item()
            verdict = "oscillates" if moved > 0.02 else "settles"
            cell = {"error": regrets[-1].mean().item(), "moved": moved, "verdict": verdict}
            table[row][f"{label}, n = {n:,}"] = cell
    value = {
        "base": table["base"]["rare, n = 300,000"]["error"],
        "box-10R": table["box 10 R"]["rare, n = 300,000"]["error"],
        "no-baseline": table["no baseline"]["rare, n = 300,000"]["error"],
        "one-step": table["1 gradient step"]["mediocre, n = 300,000"]["error"],
    }
    return bandit.judge("what_makes_it_work", value, 4 * seeds, EXPECTED), {"table": table}


def elsewhere(quick: bool, rng: np.random.Generator) -> tuple[dict, dict]:
    """The contest on a world where the mediocre response is the common one: no claim, a look."""
    names = [name for name in bandit.METHODS if not name.endswith(" u") and "theorem" not in name]
    seeds, ns = 24 if quick else 100, [3000, 300_000]
    errors, _ = bandit.contest([(mediocre(n), n) for n in ns], names, seeds, rng)
    return {}, {"n": ns} | {name: [e.mean().item() for e in line] for name, line in errors.items()}


def draw_ablation(path: Path, table: dict) -> None:
    """One row a variant, one mark a world; to the left is better."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis, rows = figure.subplots(), list(table)[::-1]
    columns = [key for key in table["base"] if key != "why"]
    for column, marker, colour in zip(columns, "os^v", [bandit.SPAC_BLUE, *bandit.COLOURS]):
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


STUDIES = [ablation, approximation, elsewhere, concentrability, change_of_variables]


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
    return bandit.report(
        out, "practical", claims, data, {"seed": config.seed, "quick": config.quick}
    )


if __name__ == "__main__":
    sys.exit(main())
