"""SPAC: Self-Play with Adversarial Critic, for offline preference alignment.

An independent implementation of the algorithm of Ji, Kulkarni, Wang and Xie (arXiv 2406.04274).
A critic f doubts the current policy as far as the preference data allow; the policy improves
against that doubt. Equation numbers are those of theory.md.

SPAC-T, the algorithm of the theorem (toy_bandit.py runs it exactly):

    pi_1 = the data policy mu
    for t = 1 .. T:
        f_t      = argmin over f in [0, R]  of  L(pi_t, f) + lam E(f)      critic        Eq. 4, 7
        pi_t+1   proportional to  pi_t exp(eta f_t)                        actor         Eq. 8
    return the uniform mixture of pi_1 .. pi_T                             mixture       Eq. 9

SPAC, its single-timescale form for language models (train_mistral.py runs it). Substitute
f = log(pi / pi_t) / eta (Eq. 26): the critic's minimiser IS the next policy, so that one loss
does both steps. With h(y) = log pi(y|x) - log pi_t(y|x) and beta = 1 / eta:

    pi_1 = the SFT model
    for round t = 1, 2, ..:
        for each prompt x with a pair y+, y-:  draw y' from pi_t(.|x)      self-play
        minimise over pi, starting from pi_t:                              spac_loss     Eq. 31
            -log sigmoid(beta (h(y+) - h(y-)))                             preference    Eq. 28
            - 1/(2 lam) sum over s in +,-  of  log sigmoid(beta (h(y^s) - h(y')))        Eq. 30
        pi_t+1 = pi

Differences from what is publicly known of the paper
 - Only its abstract and public summaries could be read. Constants, proofs and defaults are ours.
 - lam multiplies the data fit E (some notes put it on the other term): the proof decides (Eq. 13).
 - The critic's term compares y' with the pair's two responses. Without that baseline it
   rewards variance instead of doubt (theory.md, section 8).
 - The critic is smoothed by default (Eq. 30); the linear one that equals SPAC-T's (Eq. 29) is
   beside it, and has twice its slope at pi = pi_t. The proximal one (Eq. 39) is ours: the same
   game, played without y'.
 - The box [0, R] is exact in the bandit and absent from the language model's loss; the trainer
   logs how far the implied rewards go instead.
Provenance: a reconstruction made without the authors' text or code; corrections are welcome.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# -------------------------------------------------------- SPAC's loss, on log-probabilities


def preference_term(h_chosen: Tensor, h_rejected: Tensor, beta: float) -> Tensor:
    """Eq. 28: Bradley-Terry negative log-likelihood of the pair under the reward beta h. (B,)"""
    return -F.logsigmoid(beta * (h_chosen - h_rejected))


def linear_critic(h_chosen: Tensor, h_rejected: Tensor, h_generated: Tensor, beta: float) -> Tensor:
    """Eq. 29: implied reward of y' above the pair's mean: shift(x) cancels (Eq. 26). (B,)"""
    return beta * (h_generated - (h_chosen + h_rejected) / 2)


def smoothed_critic(
    h_chosen: Tensor, h_rejected: Tensor, h_generated: Tensor, beta: float
) -> Tensor:
    """Eq. 30: the same doubt as two "preferences" of the data over y', bounded below by 0. (B,)"""
    wins = F.logsigmoid(beta * (h_chosen - h_generated))
    return -(wins + F.logsigmoid(beta * (h_rejected - h_generated))) / 2


def proximal_critic(h_chosen: Tensor, h_rejected: Tensor, _: Tensor, beta: float) -> Tensor:
    """Eq. 39: supervised learning of the pair's two responses; it has no use for y'. (B,)"""
    return -beta * (h_chosen + h_rejected) / 2


def spac_loss(
    policy: tuple[Tensor, Tensor, Tensor],
    opponent: tuple[Tensor, Tensor, Tensor],
    beta: float,
    lam: float,
    critic=smoothed_critic,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 31: SPAC's practical loss of each preference pair.

    policy, opponent: log pi(y|x) and log pi_t(y|x) of (chosen, rejected, generated), each (B,),
    fp32 or fp64, in nats, summed over the response's tokens; the generated y' comes from pi_t.
    beta: 1 / eta, nats of reward per nat of log-ratio. lam: weight of the data against the doubt;
    inf switches the critic off (then one round is DPO with reference pi_1). critic: one of those
    above (the trainer's --critic). Returns (preference + critic / lam, preference, critic), each
    (B,), not reduced; at policy = opponent log 2 (1 + 1/lam), log 2, log 2 (others: .., .., 0).
    Raises ValueError on bad shapes, precision, beta or lam.
    """
    _check_positive(beta=beta, lam=lam)
    if beta == float("inf"):
        raise ValueError("beta must be finite")
    if len(policy) != 3 or len(opponent) != 3:
        raise ValueError("policy and opponent each hold (chosen, rejected, generated)")
    shape = policy[0].shape
    for logps in (*policy, *opponent):
        if logps.ndim != 1 or logps.shape != shape:
            raise ValueError(f"six tensors of one shape (B,) are needed, got {tuple(logps.shape)}")
        if logps.dtype not in (torch.float32, torch.float64):  # bf16 keeps 3 digits of a sum of 500
            raise ValueError(f"log-probabilities must be fp32 or fp64, got {logps.dtype}")
    h_chosen, h_rejected, h_generated = (p - q for p, q in zip(policy, opponent))  # Eq. 26
    preference = preference_term(h_chosen, h_rejected, beta)
    doubt = critic(h_chosen, h_rejected, h_generated, beta)
    return preference + doubt / lam, preference, doubt


# -------------------------------------------------------- log-probabilities of responses


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) at each position: logits (..., V), labels (...) integer -> (...), fp32 or fp64.

    Nothing is shifted here: logits[..., t, :] must already be the prediction of labels[..., t].
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # models return bf16
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def sequence_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x) in nats: logits (B, T, V), labels (B, T), mask (B, T) -> (B,).

    mask is true at the response's tokens, its end-of-sequence token included, and false at the
    prompt's and the padding's, whose labels may hold anything. Not divided by length: the theory
    is about pi(y|x). Raises ValueError on bad shapes and on a row without a response token.
    """
    if mask.shape != labels.shape or labels.ndim != 2:
        raise ValueError(f"labels {tuple(labels.shape)}, mask {tuple(mask.shape)}: need (B, T)")
    mask = mask.bool()
    if not bool(mask.any(-1).all()):
        raise ValueError("a row of mask is empty: drop rows without response tokens beforehand")
    logps = token_logps(logits, labels.masked_fill(~mask, 0))
    return logps.masked_fill(~mask, 0.0).sum(-1)


# -------------------------------------------------------- SPAC-T, on tables
# wins (..., X, A, A): wins[x, a, c] counts the pairs at prompt x where response a beat c (a = c
# too, when both draws were equal). The data enter only through it: rows + columns count the
# responses, and nothing grows with n. pi and f are (..., X, A); leading axes are independent runs.


def data_policy(wins: Tensor) -> tuple[Tensor, Tensor]:
    """The empirical prompts rhohat (..., X) and pooled responses muhat (..., X, A) of the pairs."""
    responses = wins.sum(-1) + wins.sum(-2)  # (..., X, A), two a pair
    per_prompt = responses.sum(-1)
    muhat = responses / per_prompt.clamp(min=1).unsqueeze(-1)  # 0 where a prompt was never met
    return per_prompt / per_prompt.sum(-1, keepdim=True), muhat


def relative_value(pi: Tensor, f: Tensor, wins: Tensor) -> Tensor:
    """Eq. 2: L(pi, f), how much better f rates pi than the data's own responses. (...)"""
    prompts, muhat = data_policy(wins)
    return (prompts * ((pi - muhat) * f).sum(-1)).sum(-1)


def data_fit(f: Tensor, wins: Tensor) -> Tensor:
    """Eq. 3: E(f), the negative log-likelihood of the labels, per pair. (...)"""
    margins = f.unsqueeze(-1) - f.unsqueeze(-2)  # (..., X, A, A)
    return -(wins * F.logsigmoid(margins)).sum((-3, -2, -1)) / wins.sum((-3, -2, -1))


def critic_objective(pi: Tensor, f: Tensor, wins: Tensor, lam: float | Tensor) -> Tensor:
    """Eq. 4: psi(pi, f) = L(pi, f) + lam E(f), which the critic minimises. lam: > 0. (...)"""
    _check_positive(lam=lam)
    return relative_value(pi, f, wins) + lam * data_fit(f, wins)


def mirror_step(pi: Tensor, f: Tensor, eta: float | Tensor) -> Tensor:
    """Eq. 8: one step of exponentiated-gradient ascent of <pi, f> at each prompt. (..., X, A)"""
    f = f.masked_fill(pi == 0, -float("inf"))  # what pi never says stays unsaid
    # Subtracting the best f changes nothing (a shift cancels) and keeps exp from overflowing.
    weights = pi * (eta * (f - f.amax(-1, keepdim=True))).exp()
    return weights / weights.sum(-1, keepdim=True)


def spac_t(pi: Tensor, critic, eta: float | Tensor, rounds: int):
    """SPAC-T: yields (pi_t, f_t) for t = 1 .. rounds, from pi_1 = pi.

    critic(pi_t) returns f_t, an (approximate) minimiser of Eq. 4 (Eq. 7); eta broadcasts against
    (..., X, A). The output of the theorem is the mixture of the policies yielded (Eq. 9).
    """
    _check_positive(eta=eta)
    for _ in range(rounds):
        f = critic(pi)
        yield pi, f
        pi = mirror_step(pi, f, eta)


class FiniteCritic:
    """Eq. 7 over a finite class F of any functions: the exact minimiser for each run.

    functions: (F, X, A), values in [0, R]; wins: (..., X, A, A); lam: a number or (...).
    """

    def __init__(self, functions: Tensor, wins: Tensor, lam: float | Tensor):
        _check_positive(lam=lam)
        self.functions, (self.prompts, self.muhat) = functions, data_policy(wins)
        fits = torch.stack([data_fit(f, wins) for f in functions], -1)
        self.penalty = torch.as_tensor(lam, dtype=fits.dtype).unsqueeze(-1) * fits  # (..., F)

    def __call__(self, pi: Tensor) -> Tensor:
        v = self.prompts.unsqueeze(-1) * (pi - self.muhat)
        values = torch.einsum("...xa,fxa->...f", v, self.functions) + self.penalty
        return self.functions[values.argmin(-1)]


def mixture(policies) -> Tensor:
    """Eq. 9: the response distribution of "draw t uniformly, then answer with pi_t". (..., X, A)"""
    mean = None
    for t, pi in enumerate(policies, start=1):
        mean = pi.clone() if mean is None else mean + (pi - mean) / t
    if mean is None:
        raise ValueError("a mixture needs at least one policy")
    return mean


def certificate(policies, beta: float, best: Tensor, reward: Tensor, wins: Tensor, lam) -> dict:
    """Eq. 36, 37: why policies pi_1 .. pi_T+1 of one support, however found, fall short of best.

    Four terms, each (...), that add up to J(best) less the mean of J(pi_1) .. J(pi_T) at the
    prompts of the data. policies: a list of (..., X, A); best, reward: (..., X, A).
    """
    prompts, steps = data_policy(wins)[0], list(zip(policies, policies[1:]))

    def kl(p, q):
        return (prompts * (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)).sum(-1)

    def excess(pi, f):
        return critic_objective(pi, f, wins, lam) - critic_objective(pi, reward, wins, lam)

    critics = [beta * (q.log() - p.log()).masked_fill(p == 0, 0.0) for p, q in steps]  # Eq. 26
    terms = {"travel": beta * (kl(best, policies[0]) - kl(best, policies[-1]))}
    terms["steps"] = beta * sum(kl(p, q) for p, q in steps)
    terms["doubt"] = -sum(excess(best, f) for f in critics)
    terms["inexact"] = sum(excess(p, f) for (p, _), f in zip(steps, critics))  # eps_t: Eq. 37
    return {name: term / len(steps) for name, term in terms.items()}


def _check_positive(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not bool(torch.as_tensor(value > 0).all()):  # also false for nan
            raise ValueError(f"{name} must be > 0, got {value}")
