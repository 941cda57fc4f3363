"""SPAC in language models, fairly judged: python tests/study_worlds.py --out OUT

Two worlds whose true reward is known (styles with rare bad ones, digits to be copied), the tiny
preset's Mistral, several numbers of pairs. Every method takes as many steps of as many pairs; of
each its last policy is read, the average of its weights, and its oracle stop: the best read of its
last policy, seed by seed, which nobody could choose without the true reward. SPAC runs at settings
by RULE; a rival has a grid of lr x beta, a screening on tuning seeds sends its best cells on, and
on the report seeds it may take, for each number of pairs and each of the three, whichever cell is
best.

All seeds of a setting are trained at once: their weights are stacked, and every product is batched
over them. tests/test_study_worlds.py holds that against the trainer. Runs that are done are kept
under out/worlds, so that a study that was stopped goes on. An hour of two quiet cores.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, as the trainer takes

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy import stats  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import spac  # noqa: E402
import toy_bandit as bandit  # noqa: E402
import train_mistral as trainer  # noqa: E402

EXPECTED = """
goal    average_leads             {n>=1000} 1e-9 1 its lead over each rival's: 95 % interval's low
goal    average_leads             {n=300}   -.02 1 SPAC's average less the best rival's average
goal    average_beats_oracle_stop {n>=1000} 1e-9 1 SPAC's average less the best rival's oracle stop
goal    average_beats_oracle_stop {n=300}   -.02 1 SPAC's average less the best rival's oracle stop
goal    critic_matters            {all}     .03  1 SPAC's average less that of the same without it
goal    rare_doubted              {styles}  0    .2 mass on lucky styles, averages: SPAC over DPO
theorem certificate_adds_up       {all}     0    5 sum of terms less the gap, in standard errors
"""  # kind, claim, points, least and most expected, what it is: written before it was run
# A lucky rare style won all, or all but one, of its three or more comparisons: the data choose it.
# A rival stands with its best cell of those on the report seeds, at each point; SPAC with RULE.

CRITICS = {
    "linear": spac.linear_critic,
    "smoothed": spac.smoothed_critic,
    "proximal": spac.proximal_critic,
}

# -------------------------------------------------------- the tiny preset's Mistral, stacked
# R models, one a seed: weights (R, P), one row a model; activations (R, B, T, H).
H, V, VALUES, WIDTH, REPEAT = 64, 24, 2, 16, 2  # REPEAT query heads share one of VALUES key heads
ID = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", *trainer.CopyDigits.characters])}
ZERO, A = ID["0"], ID["a"]
BLOCK = {  # our weight: its shape, and the names of the weights that transformers keeps apart
    "norm1": ((H,), ["input_layernorm"]),
    "qkv": ((128, H), ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    "out": ((H, H), ["self_attn.o_proj"]),
    "norm2": ((H,), ["post_attention_layernorm"]),
    "gate_up": ((256, H), ["mlp.gate_proj", "mlp.up_proj"]),
    "down": ((H, 128), ["mlp.down_proj"]),
}
WEIGHTS = {"embed": ((V, H), ["model.embed_tokens"])}
for layer in "01":
    for name, (shape, theirs) in BLOCK.items():
        WEIGHTS[name + layer] = (shape, [f"model.layers.{layer}.{part}" for part in theirs])
WEIGHTS |= {"norm": ((H,), ["model.norm"]), "head": ((V, H), ["lm_head"])}
SIZES = [math.prod(shape) for shape, _ in WEIGHTS.values()]


def flatten(model) -> Tensor:
    """A transformers model's weights as one row (P,)."""
    state = model.state_dict()
    keys = [f"{name}.weight" for _, names in WEIGHTS.values() for name in names]
    return torch.cat([state[key].reshape(-1) for key in keys])


def scaled(x: Tensor, weight: Tensor) -> Tensor:  # RMS norm of (R, N, H)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.unsqueeze(1)


def logits(flat: Tensor, tokens: Tensor, positions: Tensor, hidden: Tensor, at, past=None):
    """tokens (R, B, T), positions (T,), hidden (T, T or more): what is added to the scores of
    attention -> the logits at the positions `at`, (R, B, len(at), V). past: a dict that keeps keys
    and values of the tokens before these; they are seen too."""
    R, B, T = tokens.shape
    parts = zip(WEIGHTS.items(), flat.split(SIZES, 1))
    W = {name: part.view(R, *shape) for (name, (shape, _)), part in parts}
    rows = tokens + V * torch.arange(R).view(R, 1, 1)
    embed = torch.cat([W["embed"][:, :1].detach(), W["embed"][:, 1:]], 1)  # <pad>'s stays
    x = F.embedding(rows, embed.reshape(R * V, H)).view(R, B * T, H)
    angle = positions.unsqueeze(-1) / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH)
    cos = torch.cat([angle.cos(), angle.cos()], -1).unsqueeze(1)  # (T, 1, WIDTH)
    sin = torch.cat([-angle.sin(), angle.sin()], -1).unsqueeze(1)
    for layer in "01":
        normed = scaled(x, W["norm1" + layer])
        heads = torch.bmm(normed, W["qkv" + layer].mT).view(R * B, T, -1, WIDTH)
        turned, v = heads[:, :, :-VALUES], heads[:, :, -VALUES:].transpose(1, 2)
        turned = turned * cos + turned.roll(WIDTH // 2, -1) * sin
        q, k = turned[:, :, :-VALUES], turned[:, :, -VALUES:].transpose(1, 2)
        if past is not None:
            old = past.get(layer, (k[:, :, :0], v[:, :, :0]))
            k, v = past[layer] = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        if layer == "1":  # from here on only what is asked for
            q, x, hidden = q[:, at], x.view(R, B, T, H)[:, :, at].reshape(R, -1, H), hidden[at]
        asked = q.shape[1]  # the query heads of one key head lie side by side as more queries
        q = q.view(R * B, asked, VALUES, REPEAT, WIDTH).permute(0, 2, 3, 1, 4)
        q = q.reshape(R * B, VALUES, REPEAT * asked, WIDTH)
        scores = q @ k.mT / WIDTH**0.5 + hidden.repeat(REPEAT, 1)
        mixed = (scores.softmax(-1) @ v).view(R * B, VALUES, REPEAT, asked, WIDTH)
        mixed = mixed.permute(0, 3, 1, 2, 4).reshape(R, B * asked, H)
        x = x + torch.bmm(mixed, W["out" + layer].mT)
        wide = torch.bmm(scaled(x, W["norm2" + layer]), W["gate_up" + layer].mT)
        gate, up = wide.chunk(2, -1)
        x = x + torch.bmm(F.silu(gate) * up, W["down" + layer].mT)
    return torch.bmm(scaled(x, W["norm"]), W["head"].mT).view(R, B, -1, V)


@cache
def layout(P: int, L: int, S: int):
    """A prompt of P tokens and S responses of L, in one row: positions, what is hidden, where the
    logits are wanted, and for each response token which of those predicts it (S, L)."""
    each = torch.arange(P, P + L - 1)  # the last token of a response predicts nothing
    positions = torch.cat([torch.arange(P), *[each] * S])
    segments = torch.cat([torch.zeros(P), torch.arange(1, S + 1).repeat_interleave(L - 1)])
    later = 1 + torch.arange(S * (L - 1)).view(S, L - 1)
    predicts = torch.cat([torch.zeros(S, 1, dtype=torch.long), later], 1)
    hidden = trainer.hide(segments.unsqueeze(0))[0, 0]
    return positions, hidden, torch.arange(P - 1, len(positions)), predicts


def logps(flat: Tensor, world, prompts: Tensor, responses: Tensor) -> Tensor:
    """prompts (R, B, P), responses (R, B, S, L) -> log pi (R, B, S), in nats."""
    (R, B, S, L), P = responses.shape, prompts.shape[-1]
    positions, hidden, at, predicts = layout(P, L, S)
    tokens = torch.cat([prompts, responses[..., :-1].reshape(R, B, -1)], -1)
    found = logits(flat, tokens, positions, hidden, at)
    each = spac.token_logps(found[:, :, predicts], responses)  # (R, B, S, L)
    ended = (responses == world.end).cumsum(-1) - (responses == world.end).long() > 0
    return each.masked_fill(ended, 0.0).sum(-1)


@torch.no_grad()
def score(flat: Tensor, world, prompts: Tensor, responses: Tensor, size=500) -> Tensor:
    parts = zip(prompts.split(size, 1), responses.split(size, 1))
    return torch.cat([logps(flat, world, *part) for part in parts], 1)


@torch.no_grad()
def sample(flat: Tensor, world, prompts: Tensor, generators: list) -> Tensor:
    """prompts (R, B, P) -> one response each (R, B, L); a generator a model, so that what a seed
    draws does not depend on which seeds stand beside it. What follows the end token is noise."""
    B, P, past, new, drawn = *prompts.shape[1:], {}, prompts, []
    for i in range(world.length):
        T, before = new.shape[-1], P + i - 1
        positions = torch.arange(T) if i == 0 else torch.tensor([before])
        hidden = layout(P, 1, 0)[1] if i == 0 else torch.zeros(1, before + 1)
        found = logits(flat, new, positions, hidden, torch.tensor([T - 1]), past)
        noise = [torch.empty(B, V).exponential_(generator=g) for g in generators]
        new = (found.squeeze(2) - torch.stack(noise).log()).argmax(-1, keepdim=True)  # Gumbel's
        drawn.append(new)
    return torch.cat(drawn, -1)


# -------------------------------------------------------- two worlds
class Styles:
    """Three digits; answered by a style's letter and a digit.

    r* is 0 for styles c..j, else .5 + .5 [style a] + .5 [digit = the prompt's first]. The data
    policy takes each of c..j with probability 1/n, a with .4, else b; it copies the digit with
    probability .5 and else draws one. So a rare style is met about twice in 2n responses."""

    name, length, best, end = "styles", 2, 1.5, -1

    def __init__(self, n: int):
        self.styles = torch.tensor([0.4, 0.6 - 8 / n] + [1 / n] * 8)

    def draw(self, count: int, g) -> tuple[Tensor, Tensor]:
        """prompts (count, 4), two responses each (count, 2, 2)."""
        x = torch.randint(10, (count, 3), generator=g)
        style = torch.multinomial(self.styles, 2 * count, True, generator=g).view(count, 2)
        other = torch.randint(10, (count, 2), generator=g)
        digit = torch.where(torch.rand(count, 2, generator=g) < 0.5, x[:, :1], other)
        prompts = torch.cat([x + ZERO, torch.full((count, 1), ID["="])], -1)
        return prompts, torch.stack([style + A, digit + ZERO], -1)

    def reward(self, prompts: Tensor, y: Tensor) -> Tensor:
        """prompts (.., 4), y (.., 2) -> (..)"""
        style, right = y[..., 0], (y[..., 1] == prompts[..., 0]).float()
        return torch.where((style == A) | (style == A + 1), 0.5 * (1 + (style == A) + right), 0.0)

    def optimal(self, prompts: Tensor) -> Tensor:
        return torch.stack([torch.full_like(prompts[..., 0], A), prompts[..., 0]], -1)

    @torch.no_grad()
    def read(self, flat: Tensor, prompts: Tensor, generators) -> dict[str, Tensor]:
        """Exactly, on 200 prompts; each (R, ..)."""
        prompts = prompts[:, :200]
        positions, hidden, at, _ = layout(4, 2, 2)
        tokens = torch.cat([prompts, torch.tensor([A, A + 1]).expand(*prompts.shape[:2], 2)], -1)
        p = logits(flat, tokens, positions, hidden, at).softmax(-1)  # (R, B, 3, V)
        right = p[:, :, 1:].gather(-1, prompts[:, :, None, :1].expand(-1, -1, 2, 1)).squeeze(-1)
        style = p[:, :, 0]
        value = (style[..., A : A + 2] * (torch.tensor([1.0, 0.5]) + 0.5 * right)).sum(-1)
        rare = style[..., A + 2 : A + 10].mean(1)  # (R, 8)
        outside = 1 - style[..., A : A + 10].sum(-1).mean(1)
        return {"reward": value.mean(1) / self.best, "outside": outside, "rare": rare}

    @torch.no_grad()
    def known(self, now: Tensor, after: Tensor, x: Tensor, generators) -> tuple[Tensor, Tensor]:
        """As by_samples, but exactly, by the table of all 1,000 prompts' 24 x 24 responses."""
        R, digits = len(x), torch.cartesian_prod(*[torch.arange(10)] * 3)
        prompts = torch.cat([digits + ZERO, torch.full((1000, 1), ID["="])], -1).expand(R, -1, -1)
        styles = torch.arange(V).expand(R, 1000, V)
        positions, hidden, at, _ = layout(4, 2, V)
        tokens, tables = torch.cat([prompts, styles], -1), []
        for policy in (now, after):
            parts = tokens.split(250, 1)
            found = [logits(policy, part, positions, hidden, at).log_softmax(-1) for part in parts]
            found = torch.cat(found, 1)  # (R, 1000, 1 + 24, 24)
            tables.append(found[:, :, 0].unsqueeze(-1) + found[:, :, 1:])
        every = torch.cartesian_prod(torch.arange(V), torch.arange(V)).view(V, V, 2)
        reward = self.reward(prompts[:, :, None, None], every)
        p, h = tables[0].exp(), tables[0] - tables[1]
        which = ((x[..., :3] - ZERO) * torch.tensor([100, 10, 1])).sum(-1)
        return tuple((p * t).sum((-2, -1)).gather(1, which) for t in (h, reward))


class Copy:
    """trainer.CopyDigits, in ids: six digits are to be repeated, each is right with .64."""

    name, length, best, end = "copy", 7, trainer.CopyDigits.best, ID["</s>"]

    def draw(self, count: int, g) -> tuple[Tensor, Tensor]:
        x = torch.randint(10, (count, 6), generator=g)
        other = torch.randint(10, (count, 2, 6), generator=g)
        y = torch.where(torch.rand(count, 2, 6, generator=g) < 0.6, x.unsqueeze(1), other)
        first, last = torch.full((count, 1), ID["<s>"]), torch.full((count, 1), ID["="])
        ends = torch.full((count, 2, 1), self.end)
        return torch.cat([first, x + ZERO, last], -1), torch.cat([y + ZERO, ends], -1)

    def reward(self, prompts: Tensor, y: Tensor) -> Tensor:
        alive = (y[..., :6] == self.end).cumsum(-1) == 0
        return 0.5 * ((y[..., :6] == prompts[..., 1:7]) & alive).float().sum(-1)

    def optimal(self, prompts: Tensor) -> Tensor:
        return torch.cat([prompts[..., 1:7], torch.full_like(prompts[..., :1], self.end)], -1)

    def read(self, flat: Tensor, prompts: Tensor, generators) -> dict[str, Tensor]:
        """By a sample for each prompt."""
        y = sample(flat, self, prompts, generators)
        digits = ((y[..., :6] >= ZERO) & (y[..., :6] < ZERO + 10)).all(-1) & (y[..., 6] == self.end)
        reward = self.reward(prompts, y).mean(1) / self.best
        return {"reward": reward, "outside": 1 - digits.float().mean(1)}

    def known(self, now: Tensor, after: Tensor, x: Tensor, generators) -> tuple[Tensor, Tensor]:
        return by_samples(self, now, after, x, generators)  # other samples: all that can be known


def world_of(name: str, n: int):
    return Styles(n) if name == "styles" else Copy()


def generator(*parts) -> torch.Generator:
    return torch.Generator().manual_seed(trainer.seed_of(*parts))


def pairs(world, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n pairs labelled by Bradley-Terry: prompts (n, P), [chosen, rejected] (n, 2, L)."""
    g = generator("pairs", world.name, n, seed)
    x, y = world.draw(n, g)
    ahead = world.reward(x, y[:, 0]) - world.reward(x, y[:, 1])
    first = torch.rand(n, generator=g) < torch.sigmoid(ahead)
    return x, torch.where(first.view(n, 1, 1), y, y.flip(1))


# -------------------------------------------------------- training, as train_mistral.train does it
def optimizer_of(flat: Tensor):
    return trainer.OPTIMIZERS["adamw"]([flat], weight_decay=0.0)


def descend(flat: Tensor, optimizer, losses: Tensor, rate: float) -> None:
    """One step on each model's own loss (R,), each gradient clipped to norm 1 by itself."""
    (flat.grad,) = torch.autograd.grad(losses.sum(), flat)
    norm = flat.grad.norm(dim=1, keepdim=True)
    flat.grad *= (1.0 / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


SFT = dict(steps=400, batch=64, lr=3e-3)


def supervised(world, n: int, seeds) -> Tensor:
    """The start pi_1 (R, P): the tiny preset's model, supervised on fresh draws of the data policy,
    so that it is the data policy as nearly as the model can be."""
    where = [world.name, n if world.name == "styles" else 0]
    flat = torch.stack([flatten(trainer.CopyDigits().model(1000 + seed)) for seed in seeds])
    generators = [generator("start", *where, seed) for seed in seeds]
    optimizer = optimizer_of(flat.requires_grad_())
    for step in range(SFT["steps"]):
        x, y = (torch.stack(t) for t in zip(*(world.draw(SFT["batch"], g) for g in generators)))
        loss = -logps(flat, world, x, y).mean((1, 2)) / world.length
        rate = trainer.learning_rate(step, SFT["steps"], SFT["lr"], 0.1)
        descend(flat, optimizer, loss, rate)
    return flat.detach()


def losses_of(setting: dict, policy: Tensor, opponent: Tensor) -> Tensor:
    """(R, B, S) log-probabilities -> the mean loss of each model (R,)."""
    R, B, S = policy.shape
    ours, theirs = (t.reshape(R * B, S).unbind(1) for t in (policy, opponent))
    beta, lam = setting["beta"], setting["lam"]
    if setting["kind"] == "SPIN":  # the chosen response against the model's own
        (chosen, _, generated), (chosen_t, _, generated_t) = ours, theirs
        loss = spac.preference_term(chosen - chosen_t, generated - generated_t, beta)
    else:  # without a critic there is no y', and anything may stand for it
        ours, theirs = (t if S == 3 else (*t, t[0]) for t in (ours, theirs))
        loss, _, _ = spac.spac_loss(ours, theirs, beta, lam, CRITICS[setting["critic"]])
    if setting["sft"]:
        loss = loss - setting["sft"] * ours[0]  # RPO
    return loss.view(R, B).mean(1)


BASE = dict(
    kind="SPAC", critic="linear", lam=math.inf, beta=0.3, lr=1e-3, sft=0.0, rounds=10, steps=30,
    batch=32, shares=(0.5,), play="last", schedule="cosine",
)  # fmt: skip
READS = 10


def train(world, x: Tensor, y: Tensor, start: Tensor, setting: dict, generators, watch) -> list:
    """Trains a model for each row of start (R, P) on its pairs x (R, n, P), y (R, n, 2, L).

    setting: see BASE; steps are those of one round. Each round draws y' for the pairs it will use,
    keeps log pi_t, and starts optimizer and schedule afresh. averages: exponential means of the
    weights, by their horizon as a share of the run. watch(flat, averages) is called at the start
    and after each tenth of the steps. Returns the policies pi_1 .. pi_T+1, each (R, P)."""
    s, (R, n), seen = BASE | setting, x.shape[:2], torch.zeros(len(x), 0, dtype=torch.long)
    flat, policies, runs = start.clone().requires_grad_(), [], torch.arange(R).unsqueeze(1)
    averages = {share: start.clone() for share in s["shares"]}
    total, count = s["rounds"] * s["steps"], s["steps"] * s["batch"]
    plays = s["kind"] == "SPIN" or (s["lam"] < math.inf and s["critic"] != "proximal")
    watch(flat.detach(), averages)
    for number in range(s["rounds"]):
        average = averages[s["shares"][0]]
        if s["play"] == "restart":
            flat.data.copy_(average)
        policies.append(flat.detach().clone())
        pi_t = average if s["play"] == "opponent" else policies[-1]
        while seen.shape[1] < count:  # each pass over the pairs in an order of its own
            order = torch.stack([torch.randperm(n, generator=g) for g in generators])
            seen = torch.cat([seen, order], 1)
        use, seen = seen[:, :count], seen[:, count:]
        if count < n:  # only what this round will meet is played
            prompts, responses, use = x[runs, use], y[runs, use], torch.arange(count).expand(R, -1)
        else:
            prompts, responses = x, y
        if plays:
            drawn = [sample(pi_t, world, part, generators) for part in prompts.split(500, 1)]
            responses = torch.cat([responses, torch.cat(drawn, 1).unsqueeze(2)], 2)
        opponent, optimizer = score(pi_t, world, prompts, responses), optimizer_of(flat)
        for step in range(s["steps"]):
            part = use[:, step * s["batch"] : (step + 1) * s["batch"]]
            policy = logps(flat, world, prompts[runs, part], responses[runs, part])
            rate = trainer.learning_rate(step, s["steps"], s["lr"], 0.1)
            if s["schedule"] == "constant":
                rate = s["lr"] * min(1, (step + 1) / 3)
            descend(flat, optimizer, losses_of(s, policy, opponent[runs, part]), rate)
            for share, mean in averages.items():
                mean.lerp_(flat.detach(), 1 / (share * total))
            if (number * s["steps"] + step + 1) % (total // READS) == 0:
                watch(flat.detach(), averages)
    return [*policies, flat.detach()]


def learn(world, n: int, setting: dict, seeds, start: Tensor, weight=0.0) -> dict:
    """train(), and what is read of the last policy and of the average, (R, READS + 1, ..). weight:
    the lam of the certificate, 0 for none."""
    x, y = (torch.stack(both) for both in zip(*(pairs(world, n, seed) for seed in seeds)))
    held = [world.draw(500, generator("heldout", world.name, seed))[0] for seed in seeds]
    held, curves = torch.stack(held), []
    generators = [generator("run", world.name, n, seed) for seed in seeds]
    shares = (BASE | setting)["shares"]

    def read(weights: Tensor) -> dict:
        readers = [generator("read", world.name, seed) for seed in seeds]
        return world.read(weights, held, readers)

    def watch(flat: Tensor, averages: dict) -> None:
        curves.append([read(flat), *(read(averages[share]) for share in shares)])

    policies = train(world, x, y, start, setting, generators, watch)
    told = {}
    for which, name in enumerate(["last", "average", *shares[1:]]):
        for key in curves[0][0]:
            told[f"{name} {key}"] = torch.stack([all[which][key] for all in curves], 1).tolist()
    if weight:
        beta = (BASE | setting)["beta"]
        told["certificate"] = certificate(world, policies, x, y, beta, weight, seeds)
    return told


# -------------------------------------------------------- the certificate
@torch.no_grad()
def by_samples(world, now: Tensor, after: Tensor, x: Tensor, generators) -> tuple[Tensor, Tensor]:
    """At each prompt (R, n): KL(pi_t || pi_t+1) and the reward of pi_t, from fresh y' ~ pi_t."""
    kl, value = torch.zeros(x.shape[:2]), torch.zeros(x.shape[:2])
    for part in torch.arange(x.shape[1]).split(500):
        prompts, repeats = x[:, part], max(1, 1000 // x.shape[1])
        for _ in range(repeats):
            y = sample(now, world, prompts, generators)
            h = [logps(policy, world, prompts, y.unsqueeze(2)) for policy in (now, after)]
            kl[:, part] += (h[0] - h[1]).squeeze(2) / repeats
            value[:, part] += world.reward(prompts, y) / repeats
    return kl, value


def certificate(
    world, policies: list, x: Tensor, y: Tensor, beta: float, lam: float, seeds
) -> dict:
    """Eq. 36 to 38 along a run, whatever it did: with f_t = beta log(pi_t+1 / pi_t) the mean gap of
    pi_1 .. pi_T to the optimal policy is a sum of three means over the rounds,

        regret_t = <pi* - pi_t, f_t>                         what the steps cost
        doubt_t  = psi(pi*, r*) - psi(pi*, f_t)              Gamma: what the data leave open
        eps_t    = psi(pi_t, f_t) - psi(pi_t, r*)            how far f_t is from a minimiser

    Each (R, T). eps_t takes the policy's KL and reward from its own samples; regret_t and gap_t
    from others, or exactly where the world can. error (R,): one standard error of sum - gap."""
    R, n, T = *x.shape[:2], len(policies) - 1
    items = torch.cat([y, world.optimal(x).unsqueeze(2)], 2)
    data = [score(policy, world, x, items) for policy in policies]
    rewards = world.reward(x.unsqueeze(2), y)
    means, true_fit = rewards.mean((1, 2)), F.softplus(rewards[..., 1] - rewards[..., 0]).mean(1)
    told = {key: [] for key in "kl margin regret doubt eps gap".split()}
    variance = torch.zeros(R)
    for t, (now, after) in enumerate(zip(policies, policies[1:])):
        f = beta * (data[t + 1] - data[t])  # of chosen, rejected, pi*'s response
        margin, base, best = f[..., 0] - f[..., 1], f[..., :2].mean((1, 2)), f[..., 2].mean(1)
        fit = lam * (F.softplus(-margin).mean(1) - true_fit)
        here = [generator("certificate", seed, t) for seed in seeds]
        kl, value = by_samples(world, now, after, x, here)
        other_kl, other = world.known(now, after, x, here)
        told["kl"].append(other_kl.mean(1))
        told["margin"].append(margin.abs().amax(1))
        told["regret"].append(best + beta * other_kl.mean(1))
        told["doubt"].append(world.best - means - best + base - fit)
        told["eps"].append(-beta * kl.mean(1) - base + fit - value.mean(1) + means)
        told["gap"].append(world.best - other.mean(1))
        difference = beta * (other_kl - kl) + other - value
        variance += difference.var(1) / n / T**2
    told = {key: torch.stack(rounds, 1).tolist() for key, rounds in told.items()}
    return told | {"error": variance.sqrt().tolist()}


# -------------------------------------------------------- jobs
KEPT = ROOT / "out/worlds"
CODE = (Styles, Copy, pairs, logits, layout, logps, sample, supervised, losses_of, descend, train)
CODE += (learn, by_samples, certificate, trainer.learning_rate, trainer.hide, spac.spac_loss)


def key_of(*parts) -> str:
    text = "".join(map(inspect.getsource, CODE)) + json.dumps([SFT, BASE, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def starts(job: tuple) -> Tensor:
    """Of (world, n, seeds), made once and kept."""
    name, n, seeds = job
    path = KEPT / f"start-{key_of(name, n if name == 'styles' else 0, seeds)}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    torch.set_num_threads(1)
    made = supervised(world_of(name, n), n, seeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, temporary := path.with_suffix(f".{os.getpid()}"))
    os.replace(temporary, path)
    return made


def run(job: tuple) -> dict:
    """(world, n, setting, seeds, weight) -> learn()'s tables, made once and kept."""
    name, n, setting, seeds, weight = job
    path = KEPT / f"{key_of(name, n, setting, seeds, weight)}.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    told = learn(world_of(name, n), n, setting, seeds, starts((name, n, seeds)), weight)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(told))
    os.replace(temporary, path)
    return told


class Lab:
    """Runs (world, n, setting, seeds) four seeds at a time, some at a time; each once."""

    def __init__(self, workers: int):
        spawn = get_context("spawn")
        self.map = ProcessPoolExecutor(workers, spawn).map if workers > 1 else map

    def run(self, wanted: list[tuple], seeds, label: str) -> list[dict]:
        """wanted: (point, setting, weight) -> the tables of each, arrays (seeds, ..)."""
        groups = [list(seeds)[i : i + 4] for i in range(0, len(seeds), 4)]
        places = dict.fromkeys(point for point, _, _ in wanted)
        at_start = [(*point, group) for point in places for group in groups]
        first = {("copy",) if name == "copy" else (name, n): (name, n) for name, n in places}
        at_start = [job for job in at_start if job[:2] in first.values()]
        list(self.map(starts, at_start))  # two runs must not make the same one
        jobs = [(*point, s, group, w) for point, s, w in wanted for group in groups]
        found = list(tqdm(self.map(run, jobs), label, total=len(jobs), disable=None))
        return [joined(found[i : i + len(groups)]) for i in range(0, len(found), len(groups))]


def joined(parts: list[dict]) -> dict:
    table = {}
    for key, first in parts[0].items():
        same = [part[key] for part in parts]
        table[key] = joined(same) if isinstance(first, dict) else np.concatenate(same)
    return table


# -------------------------------------------------------- settings: tuned, then a rule
TUNING, REPORT = range(40, 44), range(100, 116)  # earlier studies have seen 0 to 34
POINTS = {  # (world, pairs): steps a round, of ten rounds
    ("styles", 300): 30, ("styles", 1000): 40, ("styles", 3000): 60, ("styles", 10000): 60,
    ("copy", 300): 24, ("copy", 1000): 24,
}  # fmt: skip
TUNED_AT = [("styles", 300), ("styles", 1000), ("styles", 3000), ("copy", 300)]
SCREENED_AT = [("styles", 1000), ("copy", 300)]


def at(point: tuple, c=0.4, **change) -> dict:
    """A setting with lam = c sqrt(n), in the point's number of steps."""
    setting = dict(lam=c * point[1] ** 0.5, steps=POINTS[point]) | change
    if "rounds" in change:
        setting["steps"] = POINTS[point] * 10 // change["rounds"]
    return setting


def curve(table: dict, what: str) -> np.ndarray:
    return np.asarray(table[f"{what} reward"])


def measured(table: dict) -> dict[str, np.ndarray]:
    """The three that a method is judged by, of each seed."""
    last, average = curve(table, "last"), curve(table, "average")
    return {"last": last[:, -1], "average": average[:, -1], "oracle stop": last.max(1)}


TRIALS = {  # what was tried for SPAC on the tuning seeds, each a change of BASE with c = .4
    "base": dict(shares=[0.5, 0.125, 0.25, 1.0]),
    "c .2": dict(c=0.2),
    "c .8": dict(c=0.8),
    "c 1.6": dict(c=1.6),
    "no critic": dict(c=math.inf),
    "lr 3e-4": dict(lr=3e-4),
    "lr 2e-3": dict(lr=2e-3, shares=[0.5, 0.25]),
    "beta .1": dict(beta=0.1),
    "beta 1": dict(beta=1.0),
    "5 rounds": dict(rounds=5),
    "20 rounds": dict(rounds=20),
    "pi_t is the average": dict(play="restart"),
    "the opponent is the average": dict(play="opponent"),
    "constant rate": dict(schedule="constant"),
    "c .8, beta .1": dict(c=0.8, beta=0.1),
    "smoothed": dict(critic="smoothed"),
    "smoothed, c .8": dict(c=0.8, critic="smoothed"),
    "smoothed, beta .1": dict(critic="smoothed", beta=0.1),
    "smoothed, c .8, beta .1": dict(critic="smoothed", beta=0.1, c=0.8),
    "smoothed, constant rate": dict(schedule="constant", critic="smoothed"),
    "smoothed, c .8, constant rate": dict(schedule="constant", critic="smoothed", c=0.8),
    "smoothed, beta .1, constant rate": dict(schedule="constant", critic="smoothed", beta=0.1),
    "no critic, constant rate": dict(c=math.inf, schedule="constant"),
}
# The rule, frozen before a report seed was run: of the trials with the trainer's schedule the one
# whose average's reward is best on the mean of TUNED_AT, and whose worst loss there to the best
# trial at that point is least.
RULE = dict(c=0.8, critic="smoothed")
GRID = [dict(lr=lr, beta=beta) for lr, beta in product((1e-4, 3e-4, 1e-3), (0.03, 0.1, 0.3))]
RIVALS = {
    "iterated DPO": dict(c=math.inf),
    "DPO": dict(c=math.inf, rounds=1),
    "RPO": dict(c=math.inf, rounds=1),  # and a supervised term, see rival()
    "SPIN": dict(c=math.inf, kind="SPIN"),
    "proximal": dict(critic="proximal"),
}


def tune(lab: Lab) -> dict:
    """{trial: {point: the three means}} of SPAC's trials."""
    wanted = [(p, at(p, **change), 0.0) for change in TRIALS.values() for p in TUNED_AT]
    tables, found = iter(lab.run(wanted, TUNING, "tuning SPAC")), {}
    for name in TRIALS:
        found[name] = {}
        for point in TUNED_AT:
            table = next(tables)
            shares = {f"horizon {key.split()[0]}": table[key] for key in table if key[0] in "01"}
            means = measured(table) | {k: v[:, -1] for k, v in shares.items() if v.ndim == 2}
            found[name][label(point)] = {k: float(v.mean()) for k, v in means.items()}
    return found


def label(point: tuple) -> str:
    return f"{point[0]}-{point[1]}"


def rival(name: str, point: tuple, cell: dict) -> dict:
    """A cell of the grid. RPO's supervised term weighs beta / lam, as a linear critic would."""
    lam = RULE["c"] * point[1] ** 0.5
    extra = dict(sft=cell["beta"] / lam) if name == "RPO" else {}
    return at(point, **(dict(c=RULE["c"]) | RIVALS[name] | extra | cell))


def screen(lab: Lab) -> tuple[dict, dict]:
    """{rival: the cells that go on}, and every cell's means on two tuning seeds: the best by the
    average at each point that is screened, and the best by the oracle stop on the whole."""
    wanted = [(name, cell, p) for name in RIVALS for cell in GRID for p in SCREENED_AT]
    jobs = [(point, rival(name, point, cell), 0.0) for name, cell, point in wanted]
    tables = lab.run(jobs, TUNING[:2], "screening rivals")
    found, chosen = {name: [] for name in RIVALS}, {}
    for (name, cell, point), table in zip(wanted, tables):
        means = {key: float(v.mean()) for key, v in measured(table).items()}
        found[name].append({"cell": cell, "point": label(point)} | means)
    for name, rows in found.items():
        best = [max((r for r in rows if r["point"] == label(p)), key=lambda r: r["average"])
                for p in SCREENED_AT]  # fmt: skip
        stops = {json.dumps(row["cell"]): 0.0 for row in rows}
        for row in rows:
            stops[json.dumps(row["cell"])] += row["oracle stop"]
        cells = [row["cell"] for row in best] + [json.loads(max(stops, key=stops.get))]
        chosen[name] = [cell for i, cell in enumerate(cells) if cell not in cells[:i]]
    return chosen, found


# -------------------------------------------------------- the study
def interval(values: np.ndarray) -> list[float]:
    """The mean over the seeds, and its 95 % interval by Student's t."""
    mean, spread = values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))
    half = stats.t.ppf(0.975, len(values) - 1) * spread
    return [mean, mean - half, mean + half]


def lucky(n: int, seeds) -> np.ndarray:
    """(seeds, 8): the rare styles that won all or all but one of at least three comparisons."""
    found = []
    for seed in seeds:
        style = pairs(Styles(n), n, seed)[1][..., 0] - A  # (n, 2): of chosen and of rejected
        differ = style[style[:, 0] != style[:, 1]]
        won = ((differ == k).sum(0).tolist() for k in range(2, 10))
        found.append([w + l >= 3 and l <= 1 for w, l in won])
    return np.array(found)


OURS, OFF, LINEAR = "SPAC", "SPAC without critic", "SPAC, linear"
ALSO = {LINEAR: dict(critic="linear"), OFF: dict(c=math.inf)}
LONGER = 1.5  # SPAC's seconds over DPO's, see study()


def study(lab: Lab, points: list, seeds, chosen: dict) -> dict:
    """{point: {method: the tables of its cells}}. Beside equal steps stands DPO at equal seconds:
    a third response and its sampling cost SPAC about 1.35 times DPO's time a step, so that DPO
    takes LONGER times the steps there."""
    wanted = []
    for point in points:
        weight = (RULE["c"]) * point[1] ** 0.5
        wanted.append((OURS, {}, point, at(point, **RULE), weight))
        for name, change in ALSO.items():
            checked = weight if name == OFF else 0.0
            wanted.append((name, {}, point, at(point, **(RULE | change)), checked))
        for name, cells in chosen.items():
            for cell in cells:
                wanted.append((name, cell, point, rival(name, point, cell), 0.0))
        for cell in chosen["DPO"]:
            longer = rival("DPO", point, cell)
            longer["steps"] = int(LONGER * longer["steps"])
            wanted.append(("DPO, equal seconds", cell, point, longer, 0.0))
    jobs = [(point, setting, weight) for _, _, point, setting, weight in wanted]
    found = {point: {} for point in points}
    for (name, cell, point, *_), table in zip(wanted, lab.run(jobs, seeds, "report seeds")):
        found[point].setdefault(name, []).append((cell, table))
    return found


def best_of(cells: list[tuple], what: str) -> tuple[dict, dict]:
    return max(cells, key=lambda pair: measured(pair[1])[what].mean())


def judge(found: dict, seeds) -> tuple[dict, dict]:
    """The claims, and for each point and method what was measured of it."""
    value, columns = {}, {}
    for point, methods in found.items():
        where, rivals = label(point), {k: v for k, v in methods.items() if k != OURS}
        ours = measured(methods[OURS][0][1])
        columns[where], lows, leads, stops = {}, {}, {}, {}
        for name, cells in methods.items():
            told = columns[where][name] = {}
            for what in ours:
                cell, table = best_of(cells, what)
                values = measured(table)[what]
                told[what] = {"cell": cell, "reward": interval(values), "by seed": values}
                told[what]["SPAC's average less this"] = interval(ours["average"] - values)
            told["outside"] = {
                which: float(np.mean(best_of(cells, which)[1][f"{which} outside"][:, -1]))
                for which in ("last", "average")
            }
            told["curves"] = {
                which: curve(best_of(cells, which)[1], which).mean(0)
                for which in ("last", "average")
            }
        for name in rivals:
            if name != LINEAR:  # SPAC itself, with its other critic
                mean, low, _ = columns[where][name]["average"]["SPAC's average less this"]
                lows[name], leads[name] = low, mean
                stops[name] = columns[where][name]["oracle stop"]["SPAC's average less this"][0]
        value.setdefault("average_leads", {})[where] = min(
            (leads if point[1] < 1000 else lows).values()
        )
        value.setdefault("average_beats_oracle_stop", {})[where] = min(stops.values())
        off = measured(methods[OFF][0][1])["average"]
        value.setdefault("critic_matters", {})[where] = (ours["average"] - off).mean()
        if point[0] == "styles":
            chosen = lucky(point[1], seeds)
            mass = {}
            for name in (OURS, "DPO"):
                for which in ("last", "average"):
                    rare = best_of(methods[name], which)[1][f"{which} rare"][:, -1]
                    mass[f"{name} {which}"] = rare[chosen]
            columns[where]["lucky rare styles"] = mass | {"count": int(chosen.sum())}
            if chosen.any():
                ratio = mass["SPAC average"].mean() / mass["DPO average"].mean()
                value.setdefault("rare_doubted", {})[where] = ratio
        checks = {}
        for name in (OURS, OFF):
            certificate = methods[name][0][1]["certificate"]
            terms = {k: v for k, v in certificate.items() if k != "error"}
            means = {k: v.mean(1) for k, v in terms.items()}
            total = means["regret"] + means["doubt"] + means["eps"]
            z = np.abs(total - means["gap"]) / certificate["error"]
            checks[name] = float(z.max())
            columns[where][name]["certificate"] = {
                "by round": {k: v.mean(0) for k, v in terms.items()},
                "mean": {k: v.mean() for k, v in means.items()},
                "sum": total.mean(),
                "correlation with the gap over seeds": {
                    k: float(np.corrcoef(means[k], means["gap"])[0, 1])
                    for k in ("regret", "doubt", "eps", "kl")
                },
            }
        value.setdefault("certificate_adds_up", {})[where] = max(checks.values())
    claims = {}
    for name, values in value.items():
        claims |= bandit.judge(name, values, len(seeds), expected(values))
    return claims, columns


def expected(values: dict) -> str:
    """EXPECTED, a row for each point in the place of a row for several."""
    rows = []
    for row in EXPECTED.split("\n"):
        kind, claim, points, *rest = row.split(None, 5) or [""] * 3
        for where in values:
            world, n = where.split("-")
            fits = {"{all}": True, "{n>=1000}": int(n) >= 1000, "{n=300}": int(n) == 300,
                    "{styles}": world == "styles"}  # fmt: skip
            if fits.get(points):
                rows.append(" ".join([kind, claim, where, *rest]))
    return "\n".join(rows)


EXACT_AT = ("styles", 300)


def exact(lab: Lab) -> dict:
    """What if each round came nearer to its minimiser, as the theorem wants it? The same rounds of
    1 and 10 times the steps, on tuning seeds; beta .3, and that of Eq. 11 for ten rounds."""
    spent = -math.log(0.4 * 0.55)  # KL(pi* || mu) of styles
    theory, found = Styles.best * math.sqrt(10 / (8 * spent)), {}
    cells = list(product(("linear", "smoothed"), (0.3, round(theory, 2)), (1, 10)))
    wanted = []
    for critic, beta, times in cells:
        setting = at(EXACT_AT, **(RULE | dict(critic=critic, beta=beta)))
        setting["steps"] *= times
        wanted.append((EXACT_AT, setting, setting["lam"]))
    for (critic, beta, times), table in zip(cells, lab.run(wanted, TUNING, "nearer to exact")):
        means = {key: float(values.mean()) for key, values in measured(table).items()}
        terms = table["certificate"]
        means |= {key: float(terms[key].mean()) for key in ("kl", "margin", "eps", "doubt", "gap")}
        found[f"{critic}, beta {beta}, {times} times the steps"] = means
    return found


def draw(path: Path, methods: dict) -> None:
    """Above, how the true reward moves along a run; below, where averaged weights end for more and
    more pairs, with 95 % intervals (dodged). A method has one colour; thin: the last weights."""
    colours = {name: bandit.COLOURS[name] for name in (OURS, OFF, "DPO", "RPO", "proximal")}
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    worlds = {"styles": "rare bad styles", "copy": "six digits to be copied"}
    worlds = {k: v for k, v in worlds.items() if any(where.startswith(k) for where in methods)}
    axes = figure.subplots(2, len(worlds), squeeze=False)
    for column, (world, about) in enumerate(worlds.items()):
        points = [where for where in methods if where.startswith(world)]
        run, ends = axes[:, column]
        where = next((p for p in points if p.endswith("-1000")), points[0])
        for name in (OURS, OFF, "DPO"):
            for which, width in (("average", 3), ("last", 1)):
                line = methods[where][name]["curves"][which]
                run.plot(range(0, 101, 10), line, color=colours[name], lw=width)
        n = where.split("-")[1]
        run.set(title=f"{about}: a run on {int(n):,} pairs", xlabel="share of the run (%)")
        x = np.array([int(p.split("-")[1]) for p in points])
        for k, (name, colour) in enumerate(colours.items()):
            told = [methods[p][name]["average"]["reward"] for p in points]
            mean, low, high = np.array(told).T
            bars = dict(yerr=(mean - low, high - mean), color=colour, elinewidth=1, capsize=3)
            ends.errorbar(x * 1.03 ** (k - 2), mean, lw=2.5, marker="o", ms=5, label=name, **bars)
        stops = [
            max(m["oracle stop"]["reward"][0] for k, m in methods[p].items() if "oracle stop" in m
                and k not in (OURS, LINEAR))
            for p in points
        ]  # fmt: skip
        ends.plot(x, stops, "k--", lw=1, label="a rival's last weights, stopped by an oracle")
        ends.set(title=f"{about}: the end of the run", xlabel="preference pairs", xscale="log")
        ends.set_xticks(x, [f"{n:,}" for n in x], minor=False)
        ends.minorticks_off()
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("true reward / best (mean of the seeds)")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    for width, about in ((3, "averaged weights; bars: 95 %"), (1, "last weights")):
        handles += axes[0, 0].plot([], [], color="#555555", lw=width)
        labels.append(about)
    figure.legend(handles, labels, frameon=False, ncols=4, loc="outside upper center")
    figure.savefig(path, dpi=100)


def plain(found):
    """Arrays become lists, wherever they stand."""
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    return np.asarray(found).tolist() if isinstance(found, np.ndarray | list) else found


def main() -> int:
    style = dict(allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("--out", default="out", help="folder for worlds.json, worlds.png")
    parser.add_argument("--workers", type=int, default=2, help="processes; they change no number")
    parser.add_argument(
        "--quick", action="store_true", help="one point, two seeds, 30 steps, no tuning"
    )
    args = parser.parse_args()
    lab, points, seeds = Lab(args.workers), list(POINTS), REPORT
    if args.quick:
        points, seeds = points[:1], REPORT[:2]
        POINTS.update(dict.fromkeys(points, 3))
        chosen, data = {name: [dict(lr=3e-4, beta=0.1)] for name in RIVALS}, {}
    else:
        data = {"tuning": tune(lab)}
        chosen, data["screening"] = screen(lab)
    claims, columns = judge(study(lab, points, seeds, chosen), seeds)
    if not args.quick:
        data["nearer to exact"] = exact(lab)
    methods, out = plain(columns), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    setting = {"rule": BASE | RULE, "tuning seeds": [*TUNING], "report seeds": [*seeds]}
    setting |= {"quick": args.quick, "transformers": transformers.__version__}
    draw(out / "worlds.png", methods)
    found = {"chosen": chosen, "methods": methods} | data
    return bandit.report(out, "worlds", plain(claims), found, setting)


if __name__ == "__main__":
    raise SystemExit(main())
