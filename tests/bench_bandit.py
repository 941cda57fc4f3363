"""How fast is toy_bandit.py? python tests/bench_bandit.py --out results

Seconds of the whole story; critic solves a second, batched, beside scipy's L-BFGS-B on the same
problems in the same run; growth with pairs, prompts, responses and rounds. Medians over repetitions
that take turns, so that a slow minute of the machine meets all alike. Writes OUT/bench_bandit.json
(with clock times, hence never twice the same). Three minutes on two quiet cores.
"""

import argparse
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before numpy loads: its threads would spin on problems this small and slow scipy 20-fold.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy import optimize, special  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import spac  # noqa: E402
import toy_bandit as bandit  # noqa: E402

EXPECTED = """
goal whole_run    full        0    90    seconds of python toy_bandit.py, two processes
goal whole_run    quick       0    15    the same with --quick
goal critic_speed times_scipy 100  1e9   critic solves a second, batched / scipy L-BFGS-B
goal critic_speed gap         0    1e-6  largest certified gap of a batched solve, in reward
goal growth_in_n  slope       -.1  .1    log-log slope of seconds in n, 1,000 to 10,000,000 pairs
"""  # kind, claim, value, least and most expected, what it is


def seconds(action, clock=time.perf_counter) -> float:
    start = clock()
    action()
    return clock() - start


def take_turns(variants: dict, repetitions: int, clock=time.perf_counter) -> dict:
    """Median seconds of each variant; each repetition times all of them once."""
    for action in variants.values():  # caches, threads, lazy imports
        action()
    times = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, action in variants.items():
            times[name].append(seconds(action, clock))
    return {name: float(np.median(column)) for name, column in times.items()}


def whole_run(*flags: str) -> float:
    """Wall seconds of the script in a fresh process, import included."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "toy_bandit.py"), "--out", out, *flags]
        free = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
        return seconds(lambda: subprocess.run(command, env=free, check=True, capture_output=True))


# -------------------------------------------------------- the critic beside scipy


def scipy_objective(f, v, wins):
    """<v, f> - sum wins log sigmoid of one prompt, and its gradient, in numpy."""
    margins = f[:, None] - f
    pull = wins * special.expit(-margins)
    value = v @ f + (wins * np.logaddexp(0, -margins)).sum()
    return value, v - pull.sum(1) + pull.sum(0)


def gap_of(f, v, wins, R: float) -> float:
    gradient = scipy_objective(f, v, wins)[1]
    return gradient @ f - R * np.minimum(gradient, 0).sum()


class ScipyCritic:
    """The same problems, one prompt of one run at a time, warm-started as well. To gaps near the
    batched critic's: gtol bounds the projected gradient, 1e-7 of it times A R is 1e-6 of gap."""

    def __init__(self, wins: np.ndarray, R: float):  # (problems, A, A), lam / n in them
        self.wins, self.R = wins, R
        self.f, self.gaps = np.full(wins.shape[:2], R / 2), []

    def __call__(self, v: np.ndarray) -> None:
        for k, (row, wins) in enumerate(zip(v, self.wins)):
            self.f[k] = optimize.minimize(
                scipy_objective,
                self.f[k],
                (row, wins),
                "L-BFGS-B",
                jac=True,
                bounds=[(0, self.R)] * len(row),
                options={"gtol": 1e-7, "ftol": 1e-15, "maxiter": 1000},
            ).x


def critic_speed(repetitions: int) -> dict:
    """Problems of the guarantee's runs: 20 random worlds, n = 3,000, lam and eta by the theorem."""
    rng, rounds, few = np.random.default_rng(0), 200, 4
    worlds = bandit.random_instances(20, rng).repeat(40)
    wins = bandit.sample_wins(worlds, 3000, rng)
    promise = bandit.theorem(worlds, wins, 600)
    critic = bandit.Critic(wins, promise.lam, worlds.R)
    eta = promise.eta[..., None, None]
    policies = [pi for pi, _ in spac.spac_t(worlds.mu, critic, eta, rounds)]
    prompts, muhat = spac.data_policy(wins)
    problems = np.arange(0, worlds.mu[..., 0].numel(), worlds.mu[..., 0].numel() // few)[:few]
    vs = [
        (prompts.unsqueeze(-1) * (pi - muhat)).flatten(0, -2).numpy()[problems] for pi in policies
    ]
    gaps: dict[str, list] = {"batched": [], "scipy": []}

    def batched():
        critic = bandit.Critic(wins, promise.lam, worlds.R)
        gaps["batched"] = []
        for pi in policies:
            critic(pi)
            gaps["batched"].append(critic.gap)

    def scipys():
        rival = ScipyCritic(critic.wins.view(-1, 5, 5).numpy()[problems], worlds.R)
        gaps["scipy"] = []
        for v in vs:
            rival(v)
            gaps["scipy"].append([gap_of(*row, worlds.R) for row in zip(rival.f, v, rival.wins)])

    times = take_turns({"batched": batched, "scipy": scipys}, repetitions)
    solves = {"batched": rounds * worlds.mu[..., 0].numel(), "scipy": rounds * few}
    a_second = {name: solves[name] / times[name] for name in times}
    largest = torch.stack(gaps["batched"]).max().item() / worlds.mu.shape[-2]
    return {
        "solves_a_second": a_second,
        "times_scipy": a_second["batched"] / a_second["scipy"],
        "gap": {"batched": largest, "scipy": float(np.max(gaps["scipy"]))},
        "problems": solves | {"A": worlds.mu.shape[-1], "batch": worlds.mu[..., 0].numel()},
    }


# -------------------------------------------------------- growth


def game(n=3000, X=2, A=5, T=200) -> Callable:
    """Sampling, the theorem's settings and T rounds, for 20 random worlds."""

    def play():
        rng = np.random.default_rng(0)
        worlds = bandit.random_instances(20, rng, X, A)
        wins = bandit.sample_wins(worlds, n, rng)
        promise = bandit.theorem(worlds, wins, T)
        lam = promise.lam.where(promise.bound.isfinite(), math.sqrt(n))
        bandit.run_spac_t(worlds, wins, lam, promise.eta, T)

    return play


def growth(repetitions: int) -> dict:
    """{size: {"at": values, "seconds": medians, "slope": of their logarithms}}."""
    grids = {
        "n": [1000, 10_000, 100_000, 1_000_000, 10_000_000],
        "X": [1, 4, 16, 64],
        "A": [3, 6, 12, 24],
        "T": [100, 400, 1600],
    }
    variants = {(size, at): game(**{size: at}) for size, grid in grids.items() for at in grid}
    times, found = take_turns(variants, repetitions), {}
    for size, grid in grids.items():
        column = [times[size, at] for at in grid]
        slope = float(np.polyfit(np.log(grid), np.log(column), 1)[0])
        found[size] = {"at": grid, "seconds": column, "slope": slope}
    return found


def processor() -> str:
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    names = [row.split(":")[1].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default="out", help="folder for bench_bandit.json")
    parser.add_argument("--repetitions", type=int, default=5, help="of each timing, taking turns")
    parser.add_argument("--no_full", action="store_true", help="leave out the whole run at length")
    config = parser.parse_args()
    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    torch.set_num_threads(1)

    speed, growing = critic_speed(config.repetitions), growth(config.repetitions)
    quick = float(np.median([whole_run("--quick") for _ in range(3)]))
    runs = {"quick": quick} | ({} if config.no_full else {"full": whole_run()})
    data = {"seconds": runs, "critic": speed, "growth": growing}
    expected = EXPECTED
    if config.no_full:
        expected = "\n".join(row for row in EXPECTED.splitlines() if " full " not in row)
    claims = bandit.judge("whole_run", runs, 3, expected)
    value = {"times_scipy": speed["times_scipy"], "gap": speed["gap"]["batched"]}
    claims |= bandit.judge("critic_speed", value, config.repetitions, expected)
    claims |= bandit.judge(
        "growth_in_n", {"slope": growing["n"]["slope"]}, config.repetitions, expected
    )
    setting = {"processor": processor(), "cores": os.cpu_count(), "load_before": load}
    status = bandit.report(out, "bench_bandit", claims, data, setting)

    print("\ncritic solves a second, one core")
    for name, rate in speed["solves_a_second"].items():
        print(f"  {name:10}{rate:12,.0f}   largest gap {speed['gap'][name]:.1e}")
    for size, row in growing.items():
        cells = "  ".join(f"{at:,}: {t:.3g} s" for at, t in zip(row["at"], row["seconds"]))
        print(f"{size}, slope {row['slope']:+.2f}   {cells}")
    return status


if __name__ == "__main__":
    sys.exit(main())
