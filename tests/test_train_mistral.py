"""train_mistral.py on small models, offline, on CPUs; each claim has a control that fails it.

Oracles: the model's own logits in a slow loop, autograd on DPO's formula written out, numpy's
counts, a second process, a second run that nothing interrupted.
"""

import gzip
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from array import array
from bisect import bisect
from collections import Counter
from datetime import datetime
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import datasets
import pytest
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BloomConfig,
    GenerationConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MistralForSequenceClassification,
    ModernBertDecoderConfig,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
import spac  # noqa: E402
import train_mistral as tm  # noqa: E402

SHORT = "--rows 40 --heldout 10 --sft_epochs 1 --rounds 2 --epochs 1 --batch 16".split()
SHORT += "--micro_batch 8 --generate_batch 16 --checkpoint_every 2".split()


@pytest.fixture(scope="module", autouse=True)
def one_process():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tm.start_processes()
    yield
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


# -------------------------------------------------------- small things to test with


def small_model(seed=0, kind=MistralConfig, **options):
    torch.manual_seed(seed)
    shape = dict(vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    shape |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, sliding_window=None)
    lm = AutoModelForCausalLM.from_config(kind(**shape | options))
    with torch.no_grad():  # logits that are far from uniform
        lm.get_output_embeddings().weight.mul_(8)
    return lm.eval()


def rows_of(count, seed=0, vocabulary=24, longest=7):
    draw = random.Random(seed)

    def ids(least=1):
        return array("i", draw.choices(range(3, vocabulary), k=draw.randint(least, longest)))

    return [tm.Row(i, ids(), ids(), ids()) for i in range(1, count + 1)]


def run_of(lm, rows, out=Path("unused"), stops=frozenset({2}), heldout=(), **options):
    settings = dict(max_response=7, batch=len(rows) or 1, generate_batch=4, micro_batch=8)
    settings |= dict(lam=5.0)
    config = tm.Config(**settings | options)
    state = dict(round=1, step=0, saves=0, pi_t="", largest=0.0, seconds={}, peak_bytes={})
    state |= dict(noise=0.0, first={})
    state |= {"logs": {"log.jsonl": [], "samples.jsonl": [], "dropped.jsonl": []}}
    tokenizer, scorer = tm.CopyDigits().tokenizer(), tm.Scorer(lm)
    run = tm.Run(config, out, scorer, tokenizer, set(stops), rows, list(heldout), state)
    state["pi_t"] = run.scorer.sha256()
    return run


def slow_logp(lm, prompt, response):
    """One token after another, each from a fresh forward pass of the whole prefix."""
    ids, total = list(prompt), 0.0
    for token in response:
        total += lm(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token]
        ids.append(token)
    return total


def fake_play(rows, seed=0, samples=1):
    draw = random.Random(seed)
    return [
        tm.Row(
            *row[:4],
            [draw.choices(range(2, 24), k=draw.randint(1, 7)) for _ in range(samples)],
            [draw.uniform(-20, -5) for _ in range(2 + samples)],
        )
        for row in rows
    ]


def gradient(run, played):
    run.scorer.zero_grad()
    tm.accumulate(run, played)
    return torch.cat([p.grad.flatten().clone() for p in run.scorer.parameters()])


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


# -------------------------------------------------------- the loss and its gradient


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_scorer_equals_a_slow_loop_over_the_models_own_logits(sharing, attention):
    lm = small_model(attn_implementation=attention)
    items = [(r.prompt, [r.chosen, r.rejected, r.prompt]) for r in rows_of(5)]
    scorer = tm.Scorer(lm, sharing=sharing)
    ours = scorer(items)
    theirs = torch.stack([torch.stack([slow_logp(lm, x, y) for y in ys]) for x, ys in items])
    assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < 1e-4
    late = [(x, [[*y[1:], 3] for y in ys]) for x, ys in items]  # control: shifted by one
    assert (scorer(late) - theirs).abs().max() > 1


def test_without_its_mask_a_shared_row_is_wrong(monkeypatch):
    lm, row = small_model(), rows_of(1, seed=3)[0]
    item = [(row.prompt, [row.chosen, row.rejected])]
    good = tm.Scorer(lm, sharing=False)(item)
    assert (tm.Scorer(lm, sharing=True)(item) - good).abs().max() < 1e-4
    monkeypatch.setattr(tm, "hide", lambda s: torch.zeros(len(s), 1, *[s.shape[1]] * 2))
    assert (tm.Scorer(lm, sharing=True)(item) - good).abs().max() > 0.1


@pytest.mark.parametrize("critic", tm.CRITICS)
def test_the_loss_of_a_batch_is_spacs(critic):
    rows = rows_of(6)
    run, played = run_of(small_model(), rows, critic=critic, lam=3.0), fake_play(rows)
    told = tm.accumulate(run, played)
    logps = [
        [slow_logp(run.scorer.lm, r.prompt, y) for y in (r.chosen, r.rejected, *r.generated)]
        for r in played
    ]
    policy = torch.tensor([[logp.item() for logp in row] for row in logps], dtype=torch.float64)
    policy = tuple(policy.unbind(1))
    opponent = tuple(torch.tensor([r.logps for r in played]).double().unbind(1))
    loss, preference, doubt = spac.spac_loss(policy, opponent, 0.3, 3.0, tm.CRITICS[critic])
    for name, column in dict(loss=loss, preference=preference, critic=doubt).items():
        assert torch.tensor([pair[name] for pair in told]) == pytest.approx(column, rel=1e-4)
    wrong = spac.spac_loss(policy, opponent, 0.3, 30.0, tm.CRITICS[critic])[0]  # control
    assert torch.tensor([pair["loss"] for pair in told]) != pytest.approx(wrong, rel=1e-4)


def test_two_samples_a_prompt_give_the_mean_of_two_losses():
    rows = rows_of(5)
    run, played = run_of(small_model(), rows, lam=2.0), fake_play(rows, samples=2)
    both = tm.accumulate(run, played)
    for k in range(2):
        one = [
            row._replace(generated=[row.generated[k]], logps=[*row.logps[:2], row.logps[2 + k]])
            for row in played
        ]
        for pair, half in zip(both, tm.accumulate(run, one)):
            for name in ("loss", "critic", "kl", "logp_generated"):
                pair[name] -= half[name] / 2
            assert pair["preference"] == pytest.approx(half["preference"], rel=1e-5)
    assert max(abs(p[n]) for p in both for n in ("loss", "critic", "kl", "logp_generated")) < 1e-4
    assert len({half["critic"] for half in tm.accumulate(run, one)}) == 5  # control: they differ


def test_what_is_logged_of_a_pair_is_what_its_name_says():
    rows = rows_of(6)
    run, played = run_of(small_model(), rows), fake_play(rows)
    told = tm.accumulate(run, played)
    for pair, row in zip(told, played):
        answers = (row.chosen, row.rejected, *row.generated)
        logps = [slow_logp(run.scorer.lm, row.prompt, y).item() for y in answers]
        h = [policy - opponent for policy, opponent in zip(logps, row.logps)]
        expected = dict(zip(("logp_chosen", "logp_rejected", "logp_generated"), logps))
        expected |= dict(accuracy=float(h[0] > h[1]), margin=0.3 * (h[0] - h[1]), kl=-h[2])
        expected |= dict(largest=0.3 * max(map(abs, h)), row=row.number)
        expected |= dict(gap=fmean(x**2 / len(y) for x, y in zip(h, answers)))
        assert {name: pair[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert {pair["accuracy"] for pair in told} == {0.0, 1.0}  # control: pairs of both kinds
    assert any(0.3 * pair["gap"] ** 0.5 < 0.9 * pair["largest"] for pair in told)  # of many tokens


def test_the_supervised_loss_is_nats_per_token_of_both_responses():
    rows = rows_of(5)
    run, told = run_of(small_model(), rows), []
    for pair, row in zip(tm.accumulate(run, rows), rows):
        both = [slow_logp(run.scorer.lm, row.prompt, y).item() for y in row[2:4]]
        expected = -sum(both) / len(row.chosen + row.rejected)
        assert pair["loss"] == pytest.approx(expected, rel=1e-4)
        told.append(expected == pytest.approx(-fmean(b / len(y) for b, y in zip(both, row[2:4]))))
    assert not all(told)  # control: the mean of the two means is another number


def test_a_step_descends_the_clipped_gradient_of_its_own_batch_alone(tmp_path, monkeypatch):
    """Three steps of plain descent, made again by hand; without the clip they lead elsewhere."""
    told = []
    monkeypatch.setitem(tm.OPTIMIZERS, "adamw", torch.optim.SGD)
    monkeypatch.setattr(tm, "check_step", lambda run, values, norm: told.append(values))
    rows, settings = rows_of(12), dict(batch=4, lr=1e-2, clip=0.5, epochs=1)
    run = run_of(small_model(), rows, tmp_path, **settings)
    played = fake_play(rows)
    odd = tm.batches_of(run, played)[0][0].number - 1  # the largest |beta h| comes first
    played[odd] = played[odd]._replace(logps=[-90.0] * 3)
    tm.train(run, played, None)

    def by_hand(clip):
        hand = run_of(small_model(), rows, **settings)
        for step, batch in enumerate(tm.batches_of(hand, played)):
            norm = gradient(hand, batch).norm().item()
            assert norm > settings["clip"]
            size = tm.learning_rate(step, 3, 1e-2, 0.1) * min(1, clip / norm)
            with torch.no_grad():
                for weight in hand.scorer.parameters():
                    weight -= size * weight.grad
        return torch.cat([weight.flatten() for weight in hand.scorer.parameters()])

    start = torch.cat([weight.flatten() for weight in small_model().parameters()])
    ours = torch.cat([weight.detach().flatten() for weight in run.scorer.parameters()])
    assert apart(ours - start, by_hand(0.5) - start) < 1e-3
    assert apart(ours - start, by_hand(math.inf) - start) > 0.1  # control
    largest = [max(pair["largest"] for pair in values) for values in told]
    assert run.state["largest"] == largest[0] > max(largest[1:])


@pytest.mark.parametrize("sharing", [False, True])
def test_micro_batches_chunks_padding_and_checkpointing_leave_the_gradient_as_it_is(sharing):
    rows = rows_of(11)  # the last micro-batch is smaller
    played = fake_play(rows)
    run = run_of(small_model(), rows, micro_batch=11)
    run.scorer.sharing = sharing
    reference = gradient(run, played)
    for micro_batch in (1, 2, 4, 8):
        run.config = tm.Config(**vars(run.config) | dict(micro_batch=micro_batch))
        assert apart(gradient(run, played), reference) < 1e-6
    for chunk in (1, 3, 1000):
        run.scorer.logits_chunk = chunk
        assert apart(gradient(run, played), reference) < 1e-6
    tm.shard(run.scorer, torch.device("cpu"), tm.Config(recompute=True))
    assert apart(gradient(run, played), reference) < 1e-6
    # Control: the mean of micro-batch means, the field's usual bug, is seen by this measure.
    halves = [gradient(run, played[:8]), gradient(run, played[8:])]
    assert apart(sum(halves) / 2, reference) > 1e-3
    assert apart((8 * halves[0] + 3 * halves[1]) / 11, reference) < 1e-6


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_no_gradient_outlives_its_step(tmp_path, monkeypatch, optimizer):
    """Weak references to every gradient that a step used; at the next one none is alive."""
    rows, used, alive, real = rows_of(12), [], [], tm.accumulate
    run = run_of(small_model(), rows, tmp_path, batch=4, lr=1e-3, epochs=1, optimizer=optimizer)

    def watched(run, batch):
        alive.append(sum(ref() is not None for ref in used))
        told = real(run, batch)
        used.extend(weakref.ref(weight.grad) for weight in run.scorer.parameters())
        return told

    monkeypatch.setattr(tm, "accumulate", watched)
    monkeypatch.setattr(tm, "check_step", lambda *_: None)
    tm.train(run, fake_play(rows), None)
    assert alive == [0, 0, 0] and len(used) == 3 * len([*run.scorer.parameters()])
    assert all(weight.grad is None for weight in run.scorer.parameters())
    held = real(run, fake_play(rows[:4]))  # control: one that nobody drops is seen
    last = [weakref.ref(weight.grad) for weight in run.scorer.parameters()]
    assert held and all(ref() is not None for ref in last)


def test_bf16_gradients_are_fp32s_to_a_few_per_cent_and_recomputing_leaves_them_as_they_are():
    """Rounding to 8 bits: each product errs by up to 2^-8, the gradient by a few of these."""
    rows = rows_of(11)
    played, flat = fake_play(rows), {}
    for bf16 in (False, True):
        for recompute in (False, True):
            run = run_of(small_model(), rows, micro_batch=4)
            tm.shard(run.scorer, torch.device("cpu"), tm.Config(bf16=bf16, recompute=recompute))
            run.scorer.zero_grad()
            tm.accumulate(run, played)
            flat[bf16, recompute] = torch.cat(
                [tm.local(p.grad).flatten() for p in run.scorer.parameters()]
            )
            assert all(tm.local(p).dtype == torch.float32 for p in run.scorer.parameters())
        assert torch.equal(flat[bf16, False], flat[bf16, True])
    assert 1e-4 < apart(flat[True, True], flat[False, True]) < 0.05


def test_recomputed_layers_run_twice_and_others_once():
    rows, passes = rows_of(4), []
    for recompute in (False, True):
        lm = small_model()
        lm.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
        run = run_of(lm, rows)
        tm.shard(run.scorer, torch.device("cpu"), tm.Config(recompute=recompute))
        passes.clear()
        tm.accumulate(run, fake_play(rows))
        assert len(passes) == 1 + recompute


def test_a_layer_of_a_bf16_run_gets_bf16_and_whatever_else_it_was_given_as_it_was():
    """OLMo hands its layers fp32 sines, Mamba fp32 states; ids, masks of bools and caches stay."""
    given, cache, number = [], object(), torch.ones(2)

    def forward(*args, **kwargs):
        given.append((args, kwargs))

    sines = (number, (number, number.long()))
    options = dict(mask=number > 0, position_embeddings=sines, past=cache, scale=number, no=None)
    for bf16 in (True, False):
        tm.compute(tm.Config(bf16=bf16), forward, number, **options)
    (((x,), low), ((y,), high)) = given
    assert (x.dtype, low["scale"].dtype, y.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    dtypes = [t.dtype for t in (low["position_embeddings"][0], *low["position_embeddings"][1])]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.int64]
    assert low["past"] is cache and low["mask"] is options["mask"] and low["no"] is None
    assert high == options


@pytest.mark.parametrize("past", ["all", "state"])
def test_in_gathered_a_layer_is_called_without_fsdp2s_hooks_and_says_the_same(past, tmp_path):
    """The hooks of 32 layers are slow beside the work of a token. Outside they are needed."""
    rows, calls = rows_of(6), []
    run = run_of(small_model(**PASTS[past]), rows, bf16=True, max_response=9)
    tm.shard(run.scorer, torch.device("cpu"), run.config)
    tm.check_model(run)  # the first forward
    items = [(row.prompt, [row.chosen, row.rejected]) for row in rows]
    units = [unit for unit in run.scorer.modules() if isinstance(unit, tm.FSDPModule)]
    assert len(units) > 1
    for unit in units:
        unit.register_forward_pre_hook(lambda *_: calls.append("before"))
        unit.register_forward_hook(lambda *_: calls.append("after"))
    with torch.no_grad():
        outside = run.scorer(items)
    assert {*calls} == {"before", "after"} and len(calls) == 2 * len(units)
    calls.clear()
    with run.scorer.gathered():
        inside = run.scorer(items)
        assert tm.sample(run, [row.prompt for row in rows], seed=0)
    assert torch.equal(inside, outside) and not calls
    tm.accumulate(run, fake_play(rows))
    assert calls  # and back again: without them there would be no sharded gradient
    assert all(isinstance(weight.grad, tm.DTensor) for weight in run.scorer.parameters())


def test_padding_changes_no_score_on_either_side_and_of_any_amount():
    lm, row = small_model(), rows_of(1)[0]
    alone = tm.Scorer(lm)([(row.prompt, [row.chosen])])[0, 0]
    for length in (1, 20, 100):  # padded on the right by a longer neighbour
        neighbour = (array("i", [5] * length), [array("i", [6] * length)])
        beside = tm.Scorer(lm)([(row.prompt, [row.chosen]), neighbour])[0, 0]
        assert beside.item() == pytest.approx(alone.item(), abs=1e-5)
    ids = torch.tensor([[0] * 9 + [*row.prompt, *row.chosen]])  # on the left, as in generation
    mask = torch.tensor([[0] * 9 + [1] * (len(row.prompt) + len(row.chosen))])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = lm(ids, attention_mask=mask, position_ids=places).logits
    left = spac.sequence_logps(
        logits[:, :-1], ids[:, 1:], torch.arange(1, ids.shape[1])[None] >= 9 + len(row.prompt)
    )
    assert left.item() == pytest.approx(alone.item(), abs=1e-5)
    unmasked = lm(ids).logits[:, :-1]  # control: padding that is seen
    wrong = spac.sequence_logps(
        unmasked, ids[:, 1:], torch.arange(1, ids.shape[1])[None] >= 9 + len(row.prompt)
    )
    assert abs(wrong.item() - alone.item()) > 1e-3


def test_with_no_critic_the_first_round_has_dpos_gradient():
    rows, reference = rows_of(8), small_model(seed=1)
    lm = small_model(seed=2)
    with torch.no_grad():
        played = [
            r._replace(
                generated=[[*r.prompt]],
                logps=[
                    slow_logp(reference, r.prompt, y).item()
                    for y in (r.chosen, r.rejected, r.prompt)
                ],
            )
            for r in rows
        ]
    ours = {lam: gradient(run_of(lm, rows, lam=lam), played) for lam in (math.inf, 1.0)}
    lm.zero_grad()
    dpo = 0.0
    for r in played:  # -log sigmoid(beta (log pi/ref of chosen - log pi/ref of rejected))
        ratios = [
            sum(
                -F.cross_entropy(
                    lm(torch.tensor([[*r.prompt, *y]])).logits[0, len(r.prompt) - 1 : -1],
                    torch.tensor(list(y)),
                    reduction="none",
                )
            )
            - known
            for y, known in zip((r.chosen, r.rejected), r.logps)
        ]
        dpo = dpo + (1 + (-0.3 * (ratios[0] - ratios[1])).exp()).log() / len(rows)
    dpo.backward()
    theirs = torch.cat([p.grad.flatten() for p in lm.parameters()])
    assert apart(ours[math.inf], theirs) < 1e-5
    assert apart(ours[1.0], theirs) > 1e-2  # control: with the critic it is another gradient


# -------------------------------------------------------- y' ~ pi_t


def test_sampled_frequencies_match_the_softmax_and_inherit_nothing_from_the_model():
    """400 first tokens of a 100-word vocabulary at each of 4 prompts; chi-square of 99 degrees:
    above 220 with probability below 1e-10 a prompt if the sampler is right."""
    lm = small_model(vocab_size=100)
    bent = dict(top_k=5, temperature=0.5, repetition_penalty=3.0, min_p=0.9, suppress_tokens=[8])
    lm.generation_config = GenerationConfig(**bent)
    run = run_of(lm, [], max_response=1)
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(0.25)  # nearly flat: top_k would show at once

    def chi_square(draw):
        worst = 0.0
        for prompt in ([1, 7, 9], [1, 30], [1, 4, 4, 60], [1, 99]):
            with torch.no_grad():
                p = lm(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
            counts = torch.bincount(draw([prompt] * 400), minlength=100)
            worst = max(worst, ((counts - 400 * p) ** 2 / (400 * p)).sum().item())
        return worst

    def ours(prompts):
        return torch.tensor([y[0] for y in tm.sample(run, prompts, seed=0)])

    def defaults(prompts):  # control: what generate does when left alone
        torch.manual_seed(0)
        lm.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
        with torch.no_grad():
            return lm.generate(torch.tensor(prompts), do_sample=True, max_new_tokens=1)[:, -1]

    assert chi_square(ours) < 220
    assert lm.generation_config.min_p == 0.9  # the round that is saved keeps what came with it
    assert chi_square(defaults) > 220


def test_sampling_leaves_the_global_generator_alone_and_depends_on_the_seed():
    run = run_of(small_model(), [])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (tm.sample(run, [[1, 5], [1, 9, 8]], seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again != other


def slow_samples(lm, prompts, seed, most=7, stops=(2,)):
    """One prompt after another, each token from a fresh forward pass of all before it, no padding
    and no cache: where the running sum of pi passes a uniform number. And the logits of each."""
    answers, steps = [], []
    for i, prompt in enumerate(prompts):
        y, logits, chance = [], [], random.Random(tm.seed_of(seed, i))
        while len(y) < most and not (y and y[-1] in stops):
            with torch.no_grad():
                logits.append(lm(torch.tensor([[*prompt, *y]])).logits[0, -1].double())
            y.append(bisect(list(accumulate(logits[-1].softmax(-1).tolist())), chance.random()))
        answers.append(y)
        steps.append(logits)
    return answers, steps


PASTS = {  # what a model keeps of the past: keys and values, the last of them, or no such thing
    "all": dict(),
    "window": dict(sliding_window=4),
    "bloom": dict(kind=BloomConfig),
    "state": dict(kind=MambaConfig, state_size=8, tie_word_embeddings=False),
}


@pytest.mark.parametrize("past", PASTS)
def test_a_prompt_is_answered_as_if_it_were_alone_whatever_the_model_keeps_of_the_past(past):
    lm, prompts = small_model(**PASTS[past]), [row.prompt for row in rows_of(24, longest=9)]
    stops = {2, *range(10, 16)}  # about a quarter of all tokens: rows leave at many steps
    run = run_of(lm, [], max_response=20, stops=stops)
    ours = tm.sample(run, prompts, seed=3)
    assert ours == slow_samples(lm, prompts, 3, 20, stops)[0]
    assert len(set(map(len, ours))) > 3
    assert tm.sample(run, prompts[:5], seed=3) == ours[:5]
    for places in (1, 5, 16):  # 16: two leave before another comes
        few = run_of(lm, [], max_response=20, stops=stops, generate_tokens=places * 29)
        assert tm.sample(few, prompts, seed=3) == ours
    assert tm.sample(run, prompts, seed=4) != ours  # control: other numbers, other samples
    short = [*min(prompts, key=len)]
    with torch.no_grad():  # control: a model that sees the padding says something else
        seen, alone = (lm(torch.tensor([ids])).logits[0, -1] for ids in ([0, 0, *short], short))
    assert (seen - alone).abs().max() > 1e-3


def test_a_row_that_has_ended_is_computed_no_more():
    lm, prompts, sizes = small_model(), [row.prompt for row in rows_of(12)], []
    watch = dict(with_kwargs=True)
    lm.register_forward_hook(lambda *call: sizes.append(call[2]["input_ids"].shape), **watch)
    run = run_of(lm, [], max_response=20, stops={2, *range(10, 16)})
    ours = tm.sample(run, prompts, seed=3)
    assert sizes[0] == (12, max(map(len, prompts)))
    assert {width for _, width in sizes[1:]} == {1}
    assert sum(rows for rows, _ in sizes) == sum(map(len, ours))
    assert sum(map(len, ours)) < 0.6 * 12 * max(map(len, ours))  # control: all rows to the end


@pytest.mark.parametrize("past", ["all", "window"])
def test_who_waits_takes_the_place_of_who_has_ended_and_no_more_than_fit_are_held(past):
    lm, passes = small_model(**PASTS[past]), []
    prompts = [row.prompt for row in rows_of(48, longest=9)]
    watch = dict(with_kwargs=True)
    lm.register_forward_hook(lambda *call: passes.append(len(call[2]["input_ids"])), **watch)
    options = dict(max_response=20, stops={2, *range(10, 16)}, generate_tokens=8 * 29)
    ours = tm.sample(run_of(lm, [], **options), prompts, seed=3)
    assert max(passes) == 8 and sum(passes) == sum(map(len, ours))
    order = sorted(range(48), key=lambda i: -len(prompts[i]))
    turns = [max(len(ours[i]) for i in order[k : k + 8]) for k in range(0, 48, 8)]
    assert len(passes) < 0.75 * sum(turns)  # control: eight after eight, each waits for the slowest


def test_the_least_and_the_largest_uniform_number_draw_a_token_that_can_be_drawn(monkeypatch):
    """Rounded sums of pi may end below 1, and begin with tokens of probability 0."""
    lm = small_model(vocab_size=4000)
    real = lm.forward

    def forward(*args, **kwargs):
        told = real(*args, **kwargs)
        told.logits[..., :3] = told.logits[..., -3:] = -math.inf
        return told

    forward.__signature__ = inspect.signature(real)
    lm.forward = forward
    prompts = [[1, i] for i in range(5, 45)]
    for chance, wanted in ((0.0, 3), (1 - 2**-53, 3996)):
        always = type("Always", (), {"random": lambda self, chance=chance: chance})
        monkeypatch.setattr(tm.random, "Random", lambda *_, always=always: always())
        drawn = tm.sample(run_of(lm, [], max_response=1), prompts, seed=0)
        assert {y[0] for y in drawn} == {wanted}


def test_the_past_of_answers_that_all_ended_is_gone_before_the_next_are_begun(monkeypatch):
    """On a card it is gigabytes: 17 of 61 at 7B."""
    alive, begun, real = [], [], tm.decode

    def decode(lm, texts, width, cache):
        if cache is None:
            alive.append(sum(past() is not None for past in begun))
        logits, past = real(lm, texts, width, cache)
        begun.append(weakref.ref(past))
        return logits, past

    monkeypatch.setattr(tm, "decode", decode)
    few = run_of(small_model(), [], max_response=5, stops={10**6}, generate_tokens=4 * 7)
    tm.sample(few, [[1, i] for i in range(5, 17)], seed=0)
    assert alive == [0, 0, 0] and len(begun) == 3 * 5


def test_bf16_logits_are_summed_with_all_their_bits():
    """A softmax in bf16 has 8 bits: of 4,000 tokens the sums would be nonsense."""
    lm, told = small_model(vocab_size=4000), torch.randn(4000).bfloat16()
    real = lm.forward

    def forward(*args, **kwargs):
        output = real(*args, **kwargs)
        output.logits = told.expand_as(output.logits)
        return output

    forward.__signature__ = inspect.signature(real)
    lm.forward = forward
    prompts = [[1, i] for i in range(5, 1005)]
    drawn = tm.sample(run_of(lm, [], max_response=1), prompts, seed=0)
    sums = list(accumulate(told.double().softmax(-1).tolist()))
    seeds = (tm.seed_of(0, i) for i in range(1000))
    assert [y[0] for y in drawn] == [bisect(sums, random.Random(seed).random()) for seed in seeds]


def test_fewer_places_than_a_row_needs_are_one():
    lm, prompts, passes = small_model(), [row.prompt for row in rows_of(5)], []
    watch = dict(with_kwargs=True)
    lm.register_forward_hook(lambda *call: passes.append(len(call[2]["input_ids"])), **watch)
    alone = tm.sample(run_of(lm, [], generate_tokens=5), prompts, seed=3)
    assert set(passes) == {1} and alone == tm.sample(run_of(lm, []), prompts, seed=3)


def test_rounds_and_batches_have_noise_of_their_own(tmp_path):
    row = rows_of(1)[0]
    rows = [row._replace(number=n) for n in range(8)]
    run = run_of(small_model(), rows, generate_batch=4, max_response=7)
    run.out = tmp_path
    first, second = ([r.generated[0] for r in tm.play(run, rows, f"round-{n}")] for n in (1, 2))
    assert first[:4] != first[4:] and first != second


def test_logits_that_are_not_finite_end_the_sampling():
    lm = small_model()
    run = run_of(lm, [])
    with torch.no_grad():
        assert tm.sample(run, [[1, 7]], seed=0)  # control
        lm.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(SystemExit, match="not finite"):
        tm.sample(run, [[1, 7]], seed=0)


def test_the_score_of_sampled_ids_is_the_samplers_own_log_probability():
    rows, lm = rows_of(12), small_model()
    run = run_of(lm, rows)
    prompts = [r.prompt for r in rows]
    ours, (drawn, steps) = tm.sample(run, prompts, seed=3), slow_samples(lm, prompts, 3)
    with torch.no_grad():
        scored = run.scorer([(x, [y]) for x, y in zip(prompts, ours)])[:, 0]
    for i, y in enumerate(ours):
        assert y == drawn[i]  # the sampled ids, an end token only where it was drawn
        assert 2 not in y[:-1] and (y[-1] == 2 or len(y) == 7)
        own, cooled = (
            sum((logits * cold).log_softmax(-1)[token].item() for logits, token in zip(steps[i], y))
            for cold in (1, 2)
        )
        assert scored[i].item() == pytest.approx(own, abs=1e-4)
        assert abs(scored[i].item() - cooled) > 1e-3  # control: another temperature


def test_at_step_0_pi_is_pi_t_and_a_model_that_is_not_is_refused(tmp_path, capsys):
    rows = rows_of(9)
    for sharing in (False, True):
        run = run_of(small_model(), rows, tmp_path / f"{sharing}", batch=4, lr=1e-3, clip=9.0)
        run.scorer.sharing = sharing
        played = tm.play(run, rows, "round-1")
        told = tm.accumulate(run, played)
        assert max(pair["gap"] for pair in told) < 1e-5
        assert told[0]["preference"] == pytest.approx(math.log(2), abs=1e-5)
    with torch.no_grad():  # control: other weights than those that were scored
        next(run.scorer.parameters()).mul_(1.01)
    run.out.mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match="pi is not pi_t"):
        tm.train(run, played, None)
    assert "log pi is as in play to" in capsys.readouterr().out


def test_every_weight_counts_in_the_digest_that_names_pi_t():
    scorer, seen = tm.Scorer(small_model()), set()
    assert scorer.sha256() == tm.Scorer(small_model()).sha256()  # control: it names the weights
    for weight in scorer.parameters():
        seen.add(scorer.sha256())
        with torch.no_grad():
            weight.view(-1)[-1] += 0.25
    seen.add(scorer.sha256())
    assert len(seen) == 1 + len([*scorer.parameters()])


def test_a_tie_of_a_held_out_pair_counts_half(tmp_path, monkeypatch):
    rows = fake_play(rows_of(5))
    scores = [[-1.0, -1.0], [-1.0, -2.0], [-3.0, -4.0], [-1.0, -3.0], [-2.0, -1.0]]
    rows = [row._replace(logps=[*pair, -9.0]) for row, pair in zip(rows, scores)]
    monkeypatch.setattr(tm, "play", lambda run, rows, name: rows)
    run = run_of(small_model(), [], tmp_path, heldout=rows)
    tm.evaluate(run)
    told = run.state["logs"]["log.jsonl"][-1]
    assert told["heldout_accuracy"] == pytest.approx(3.5 / 5)
    assert told["heldout_implied"] == 0.5  # pi is pi_1: all ties


def test_the_implied_accuracy_compares_with_the_start_and_not_with_zero(tmp_path, monkeypatch):
    """Leads of y+ of 2 and -2 at the start; later 1 and -1: h+ - h- is -1, then 1."""
    rows, told = fake_play(rows_of(2)), []
    monkeypatch.setattr(tm, "play", lambda run, rows, name: rows)
    run = run_of(small_model(), [], tmp_path)
    for lead in (2.0, 1.0):
        run.heldout = [
            row._replace(logps=[sign * lead, 0.0, -9.0]) for row, sign in zip(rows, (1, -1))
        ]
        tm.evaluate(run)
    run.heldout = [run.heldout[0]._replace(logps=[5.0, 0.0, -9.0]), run.heldout[1]]
    tm.evaluate(run)
    told = [line["heldout_implied"] for line in run.state["logs"]["log.jsonl"]]
    assert told == [0.5, 0.5, 1.0]
    assert {line["heldout_accuracy"] for line in run.state["logs"]["log.jsonl"]} == {0.5}  # control


class Noisy(torch.nn.Module):
    """Dropout that no list of names knows, and a layer that may be left out."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *args, **options):
        out = self.body(*args, **options)
        if self.training:
            out.last_hidden_state = out.last_hidden_state + torch.rand(())
        return out


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_random_is_left_in_a_model_wherever_it_stands(recompute):
    """Dropout in the config, in modules, in a nested module by its own rule."""
    lm = small_model(attention_dropout=0.5).train()
    for layer in lm.model.layers:
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.5))
    decoder = Noisy(lm.model)
    lm.get_decoder = lambda: decoder
    item = [(array("i", [1, 5, 6]), [array("i", [7, 8, 9])])]
    scorer = tm.Scorer(lm)
    assert not torch.equal(scorer(item), scorer(item))  # control
    tm.shard(scorer, torch.device("cpu"), tm.Config(recompute=recompute))
    decoder.train(scorer.training)
    first, again = scorer(item), scorer(item)
    assert torch.equal(first, again) and first.requires_grad


def test_a_revision_is_asked_for_wherever_something_comes_from_the_hub(tmp_path, monkeypatch):
    folder, asked = tmp_path / "model@home", []  # a folder is a folder, whatever its name
    small_model().save_pretrained(folder)
    tm.CopyDigits().tokenizer().save_pretrained(folder)
    assert tm.pinned(str(folder)) == (str(folder), "main")  # control
    for kind in (AutoModelForCausalLM, AutoTokenizer, tm.transformers.AutoConfig):

        def found(name, revision=None, real=kind.from_pretrained, **options):
            if name != folder:  # one asks another
                asked.append((name, revision))
            return real(folder, **options)

        monkeypatch.setattr(kind, "from_pretrained", found)

    def pairs(name, revision, split):
        asked.append((name, revision))
        return [PAIR] if split == "some" else []

    monkeypatch.setattr(datasets, "load_dataset", pairs)
    argv = "--preset mistral-7b --model a/model@abc --data a/pairs@def --split some".split()
    config = tm.parse(argv)
    tm.load_model(config)
    rows, _ = tm.load_rows(config.data, word_tokenizer(), {2}, config)
    assert asked == [("a/model", "abc")] * 3 + [("a/pairs", "def")] and len(rows) == 1
    assert tm.pinned("a/model") == ("a/model", "main")


def test_a_round_moves_every_parameter_and_leaves_pi_t_as_it_was(tmp_path):
    rows = rows_of(8)
    run = run_of(small_model(), rows, tmp_path, batch=4, lr=1e-3, epochs=2)
    before = {name: p.detach().clone() for name, p in run.scorer.named_parameters()}
    played = tm.play(run, rows, "round-1")
    files = {path: path.read_bytes() for path in tmp_path.rglob("play/*/*")}
    tm.train(run, played, None)
    moved = [(p != before[name]).any().item() for name, p in run.scorer.named_parameters()]
    assert all(moved)
    assert files and all(path.read_bytes() == data for path, data in files.items())
    still = run_of(small_model(), rows, tmp_path / "b", batch=4, lr=1e-30)  # control: no step
    (tmp_path / "b").mkdir()
    tm.train(still, played, None)
    assert not any((p != before[n]).any().item() for n, p in still.scorer.named_parameters())


# -------------------------------------------------------- text to ids


def word_tokenizer(bos=True, adds_bos=True, pad="<pad>", template=None):
    """A byte-level BPE with merges, trained on one sentence; BOS, EOS and pad as asked for."""
    special = ["<pad>", "<s>", "</s>", "<|user|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the user asks the assistant: answer the user"] * 9, trainer)
    if bos and adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token=pad, bos_token="<s>" if bos else None
    )
    tokenizer.chat_template = template or tm.PLAIN_TEMPLATE
    return tokenizer


PAIR = {"prompt": "the user asks", "chosen": "the answer", "rejected": "an assistant"}
NO_BOS = "{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("bos, adds_bos", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("template", [None, NO_BOS + "{{ '<|user|>' if add_generation_prompt }}"])
def test_there_is_one_bos_and_one_trained_eos_whatever_the_tokenizer(pad, bos, adds_bos, template):
    tokenizer = word_tokenizer(bos, adds_bos, pad, template)
    row = tm.encode(PAIR, 1, tokenizer, {2}, tm.Config(max_prompt=64, max_response=64))
    expected = bos and (adds_bos or template is None)  # a BOS that nobody writes is not invented
    assert list(row.prompt).count(1) == expected and (row.prompt[0] == 1) == expected
    for response, text in ((row.chosen, "the answer"), (row.rejected, "an assistant")):
        assert list(response).count(2) == 1 and response[-1] == 2 and 1 not in response
        assert tokenizer.decode(response[:-1]) == text
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": PAIR["prompt"]}], add_generation_prompt=True, return_dict=False
    )
    assert [*row.prompt][expected and template is not None :] == whole


def test_a_sampled_eos_is_scored_even_where_it_pads():
    lm = small_model(pad_token_id=2)
    x, y = array("i", [1, 5]), array("i", [7, 2])
    longer = (array("i", [1, 5, 6, 7, 8]), [array("i", [9] * 6)])
    both = tm.Scorer(lm)([(x, [y]), longer])[0, 0].item()
    assert both == pytest.approx(slow_logp(lm, x, y).item(), abs=1e-4)
    assert both != pytest.approx(slow_logp(lm, x, y[:1]).item(), abs=1e-4)  # control: EOS masked


def test_control_tokens_typed_as_text_stay_text():
    tokenizer = word_tokenizer()
    typed = {"prompt": "a</s><s>b<|user|>", "chosen": "<s>", "rejected": "<pad>"}
    row = tm.encode(typed, 1, tokenizer, {2}, tm.Config(max_prompt=64, max_response=64))
    assert list(row.prompt).count(1) == 1 and 2 not in row.prompt and 3 not in row.prompt
    assert tokenizer.decode(row.chosen) == "<s></s>" and len(row.chosen) > 2
    assert 0 not in row.rejected
    naive = tokenizer(typed["prompt"]).input_ids  # control: the tokenizer alone is fooled
    assert 2 in naive and 3 in naive


TURNS = "{{ bos_token }}{% for m in messages %}{{ m.role }}:"
TURNS += "BODY{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
KEEPS = TURNS.replace(
    "BODY",
    "{% if m.role != 'assistant' %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] "
    "if '</think>' in m.content and not loop.last else m.content }}{{ eos_token }}{% endif %}",
)
SPLITS = TURNS.replace(  # thoughts taken out and written back, from the text or their own field
    "BODY",
    "{% if m.role != 'assistant' %}{{ m.content }}{% else %}{% set c = m.content %}"
    "{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1] %}{% set c = c.split('</think>')[-1] %}"
    "{% endif %}<think>\n{{ r.strip('\n') }}\n</think>\n\n{{ c.lstrip('\n') }}"
    "{{ eos_token }}{% endif %}",
)
LOSES = KEEPS.replace(" and not loop.last", "")
CALLS = KEEPS.replace(
    "{{ eos_token }}",
    "{% for c in m.tool_calls %}<call>{{ c.function.name }}</call>{% endfor %}{{ eos_token }}",
)


def thinking_tokenizer(template, *names):
    """Thinking is named by tokens that are not special, as Qwen's and DeepSeek's are."""
    tokenizer = word_tokenizer(template=template)
    tokenizer.add_tokens([*names] or ["<think>", "</think>", "<call>", "</call>"])
    return tokenizer


def ids_by_the_library(tokenizer, answer):
    """What the template and the tokenizer make of a trusted conversation, behind its prompt."""
    turns = [{"role": "user", "content": "the user"}, {"role": "assistant"} | answer]
    options = dict(return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(turns, **options)
    assert whole[: len(prompt)] == prompt
    return whole[len(prompt) :]


@pytest.mark.parametrize("template", [KEEPS, SPLITS, CALLS])
@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nask\n</think>\n\nthe answer"},
        {"content": "the answer", "reasoning_content": "ask"},
        {"content": "", "tool_calls": [{"function": {"name": "ask"}}]},
    ],
)
def test_an_assistants_turn_is_what_the_model_would_write_or_the_row_is_dropped(template, answer):
    tokenizer = thinking_tokenizer(template)
    row = {"prompt": "the user", "chosen": [{"role": "assistant"} | answer], "rejected": "no"}
    reads = {KEEPS: ("content",), SPLITS: ("reasoning_content",), CALLS: ("tool_calls",)}[template]
    if {"reasoning_content", "tool_calls"} & answer.keys() - {*reads}:
        with pytest.raises(ValueError, match="does not write (reasoning_content|tool_calls)"):
            tm.encode(row, 1, tokenizer, {2}, tm.Config(max_prompt=64, max_response=64))
        return
    ids = tm.encode(row, 1, tokenizer, {2}, tm.Config(max_prompt=64, max_response=64)).chosen
    assert list(ids) == ids_by_the_library(tokenizer, answer)
    names = [tokenizer.convert_tokens_to_ids(name) for name in ("<think>", "</think>", "<call>")]
    assert {*names} & {*ids}  # control: they hold the tokens that are in question


def test_what_a_user_typed_stays_text_where_an_assistants_are_tokens():
    tokenizer = thinking_tokenizer(KEEPS)
    end = tokenizer.convert_tokens_to_ids("</think>")
    turns = [("user", "</think>"), ("assistant", "a</think>the answer"), ("user", "<s></think>")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    row = {"prompt": prompt, "chosen": "x</think>yes", "rejected": "no"}
    made = tm.encode(row, 1, tokenizer, {2}, tm.Config(max_prompt=99, max_response=64))
    assert end not in made.prompt and [*made.chosen].count(end) == 1
    assert tokenizer.decode(made.prompt).count("</think>") == 2  # as letters; the old thought went
    assert [*made.prompt].count(1) == 1
    naive = tokenizer.apply_chat_template(prompt, return_dict=False)  # control
    assert naive.count(end) == 2


def test_a_template_that_drops_thoughts_or_a_turn_drops_the_row():
    row = {"prompt": "the user", "chosen": "<think>ask</think>the answer", "rejected": "no"}
    config = tm.Config(max_prompt=64, max_response=64)
    with pytest.raises(ValueError, match="not write all of assistant's text"):
        tm.encode(row, 1, thinking_tokenizer(LOSES), {2}, config)
    assert tm.encode(PAIR, 1, thinking_tokenizer(LOSES), {2}, config)  # control: nothing to drop
    deaf = KEEPS.replace("{{ m.content }}{% else", "{{ m.content if m.role == 'user' }}{% else")
    with pytest.raises(ValueError, match="not write all of system's text"):
        tm.encode(PAIR | {"system": "answer"}, 1, thinking_tokenizer(deaf), {2}, config)


PHI = "{% for m in messages %}<|user|>{{ m.content }}<|end|>\n{% endfor %}"
PHI += "{{ '<|user|>' if add_generation_prompt else eos_token }}"
LLAMA = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|user|>"


def test_a_response_ends_at_its_first_stop_token_as_a_sample_does():
    for template in (PHI, LLAMA):
        tokenizer = thinking_tokenizer(template, "<|end|>")
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        stops = {2, end}
        row = tm.encode(PAIR, 1, tokenizer, stops, tm.Config(max_prompt=64, max_response=64))
        for ids, text in ((row.chosen, "the answer"), (row.rejected, "an assistant")):
            assert ids[-1] == end and not stops & {*ids[:-1]}
            assert tokenizer.decode(ids[:-1]) == text
    row = PAIR | {"chosen": "the answer<|end|>"}  # a trace of another template: the same answer
    made = tm.encode(row, 1, tokenizer, stops, tm.Config(max_prompt=64, max_response=64))
    assert made.chosen == tm.encode(PAIR, 1, tokenizer, stops, tm.Config(max_response=64)).chosen


def test_an_end_of_turn_that_is_no_stop_token_is_named():
    tokenizer = thinking_tokenizer(LLAMA, "<|end|>")
    with pytest.raises(ValueError, match=r"'<\|end\|><\|user\|>', no stop token: name it in gen"):
        tm.encode(PAIR, 1, tokenizer, {2}, tm.Config())
    plain = thinking_tokenizer("{% for m in messages %}{{ m.content }}\n::\n{% endfor %}")
    with pytest.raises(ValueError, match="'::', no stop token"):
        tm.encode(PAIR, 1, plain, {2}, tm.Config())
    silent = thinking_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert tm.encode(PAIR, 1, silent, {2}, tm.Config(max_response=64)).chosen[-1] == 2


def test_a_templates_clock_stands_still_for_a_run():
    clock = "{{ strftime_now('%d %b %Y') }}" + KEEPS
    tokenizer, config = thinking_tokenizer(clock), tm.Config(max_prompt=64, max_response=64)
    days = [datetime(2031, 5, day).strftime for day in (4, 4, 5)]
    rows = [tm.encode(PAIR, 1, tokenizer, {2}, config, day) for day in days]
    assert rows[0] == rows[1] != rows[2]  # and a control
    assert "04 May 2031" in tokenizer.decode(rows[0].prompt)


@pytest.mark.parametrize("max_prompt", [2, 3, 5, 64])
@pytest.mark.parametrize("max_response", [1, 2, 3, 64])
def test_truncation_keeps_the_bos_the_prompts_end_and_the_responses_beginning(
    max_prompt, max_response
):
    tokenizer = word_tokenizer()
    full = tm.encode(PAIR, 1, tokenizer, {2}, tm.Config(max_prompt=99, max_response=99))
    config = tm.Config(max_prompt=max_prompt, max_response=max_response)
    row = tm.encode(PAIR, 1, tokenizer, {2}, config)
    assert len(row.prompt) == min(max_prompt, len(full.prompt)) and row.prompt[0] == 1
    assert row.prompt[1:] == full.prompt[-(len(row.prompt) - 1) :]
    for cut, whole in zip(row[2:4], full[2:4]):
        assert cut == whole[:max_response]
        assert (2 in cut) == (len(whole) <= max_response)  # a cut answer has no EOS


U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
B = A | {"content": "b"}
GOOD = [
    PAIR,
    {"prompt": [U], "chosen": [A], "rejected": [B]},
    {"prompt": "u", "chosen": [U, A], "rejected": [U, B]},  # of a whole conversation, a part
    {"prompt": [S, U], "chosen": [U, A], "rejected": [U, B]},  # or more of it
    {"system": "s", "prompt": "u", "chosen": "one", "rejected": "two", "score": 3},
    {"system": "s", "chosen": [S, U, A], "rejected": [S, U, B]},
    {"prompt": "", "system": "", "chosen": [U, A], "rejected": [U, B]},
    {
        "prompt": "u",
        "system": None,
        "input": "",
        "history": None,
        "chosen": [U, A],
        "rejected": [U, B],
    },
    {"chosen": [S, U, A, U, A], "rejected": [S, U, A, U, B]},
    {"prompt": [U, A, U], "chosen": "one", "rejected": "two"},
    {"prompt": "u", "chosen": [U, A, U, A], "rejected": [U, A, U, B]},
]
BAD = [
    ("not a JSON object", [None, 3, "text", [], True]),
    ("no chosen", [{}, PAIR | {"chosen": None}, PAIR | {"chosen": []}]),
    ("no rejected", [PAIR | {"rejected": {}}]),
    ("no prompt", [{"chosen": "a", "rejected": "b"}, PAIR | {"prompt": []}]),
    ("chosen of type int, not text or a list", [PAIR | {"chosen": 5}]),
    ("chosen of type dict, not text or a list", [PAIR | {"chosen": A}]),
    ("rejected of type float, not text or a list", [PAIR | {"rejected": 1.5}]),
    ("prompt of type int, not text or a list", [PAIR | {"prompt": 3}]),
    ("wrong role order", [PAIR | {"prompt": [A]}, PAIR | {"prompt": [S]}]),
    ("wrong role order", [{"chosen": [U, U, A], "rejected": [U, U, B]}, PAIR | {"chosen": [U]}]),
    ("wrong role order", [PAIR | {"chosen": [{"role": ["x"], "content": "x"}]}]),
    ("a list of str, not of messages", [PAIR | {"chosen": ["x"]}]),
    ("has role: rename its fields to role, content", [PAIR | {"chosen": [{"role": "user"}]}]),
    ("has from, value: rename its", [PAIR | {"chosen": [{"from": "gpt", "value": "x"}]}]),
    ("content of type list, not text", [PAIR | {"prompt": [U | {"content": [{"type": "text"}]}]}]),
    ("an empty text", [PAIR | {"chosen": " \n"}, PAIR | {"chosen": [A | {"content": None}]}]),
    ("an empty text", [PAIR | {"chosen": [A | {"content": " ", "thinking": "of nothing"}]}]),
    ("no prompt", [PAIR | {"prompt": ""}]),
    ("prompt of type dict", [{"prompt": {"a": 1}, "chosen": [U, A], "rejected": [U, B]}]),
    ("system of type", [PAIR | {"system": 5}, PAIR | {"system": {"role": "system"}}]),
    ("contradicts", [{"prompt": "other", "chosen": [U, A], "rejected": [U, B]}]),
    ("contradicts", [{"prompt": [U, A, U], "chosen": [U, A, U, A], "rejected": [S, U, B]}]),
    ("wrong role order", [{"system": "x", "chosen": [S, U, A], "rejected": [S, U, B]}]),
    ("not read: input", [PAIR | {"input": "and this"}]),
    ("not read: system_prompt", [PAIR | {"system_prompt": "Be brief."}]),
    (
        "write function_call",
        [{"prompt": [U], "chosen": [A | {"function_call": {"name": "f"}}], "rejected": [B]}],
    ),
    ("not read: instruction, history", [PAIR | {"instruction": "x", "history": [["a", "b"]]}]),
    ("the row has chosen, instruct", [{"instruct": "a", "chosen": "b", "rejected": "c"}]),
    (
        "order, 'human', not",
        [
            {
                "chosen": [{"role": "human", "content": "u"}, {"role": "gpt", "content": "a"}],
                "rejected": [U, A],
            }
        ],
    ),
    (
        "write reasoning_content",
        [{"prompt": [U], "chosen": [A | {"reasoning_content": "r"}], "rejected": [B]}],
    ),
    (
        "write tool_calls",
        [
            {
                "prompt": [U],
                "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
                "rejected": [B],
            }
        ],
    ),
    ("after a stop token", [PAIR | {"chosen": "one</s>two"}]),
    ("nothing of a response", [PAIR | {"chosen": "</s>"}]),
    ("different prompts", [{"chosen": [U, A], "rejected": [U | {"content": "?"}, B]}]),
    ("chosen equals rejected", [PAIR | {"rejected": PAIR["chosen"]}]),
    ("does once cut", [PAIR | {"chosen": "x" * 99 + "y", "rejected": "x" * 99 + "z"}]),
    ("not Unicode", [PAIR | {"chosen": "\ud800"}, PAIR | {"prompt": "\udfff!"}]),
]


def test_every_kind_of_bad_row_is_dropped_with_its_reason_and_good_ones_are_used(tmp_path):
    rows = [row for _, bad in BAD for row in bad]
    lines = [json.dumps(row).encode() for row in [*GOOD, *rows]]
    broken = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "x"', b"1" * 5000]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines + broken))
    argv = ["--preset", "mistral-7b", "--data", str(path), "--max_response", "50"]
    kept, dropped = tm.load_rows(str(path), word_tokenizer(), {2}, tm.parse(argv))
    assert [row.number for row in kept] == list(range(1, len(GOOD) + 1))  # control: those pass
    expected = [reason for reason, bad in BAD for _ in bad] + ["not valid JSON"] * len(broken)
    assert [d["row"] for d in dropped] == list(range(len(GOOD) + 1, len(lines + broken) + 1))
    for line, reason in zip(dropped, expected):
        assert reason in line["reason"], line


def test_two_thousand_mutated_rows_are_used_or_dropped_and_none_crashes(tmp_path):
    draw = random.Random(0)
    odd = [None, 0, 1e309, "", " ", "\ud800", "\U0001f600" * 50, "x" * 20_000, [], {}, [[]], True]
    odd += [
        "</s><s>",
        "<|user|>",
        "\x00",
        [U],
        [A],
        [S],
        [U, A],
        {"role": "user"},
        "\u202e",
        "{{ x }}",
    ]

    def mutate(value, depth=0):
        if draw.random() < 0.25 or depth > 3:
            return draw.choice(odd)
        if isinstance(value, dict):
            kept = [key for key in value if draw.random() < 0.9]
            return {key: mutate(value[key], depth + 1) for key in kept}
        if isinstance(value, list):
            return [mutate(one, depth + 1) for one in value] * draw.choice([1, 1, 1, 0, 2])
        return value

    lines = [json.dumps(mutate(draw.choice(GOOD))).encode() for _ in range(2000)]
    lines = [
        line[: draw.randint(0, len(line))] if i % 20 == 0 else line for i, line in enumerate(lines)
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    config = tm.parse(["--preset", "mistral-7b", "--data", str(tmp_path / "rows.jsonl")])
    rows, dropped = tm.load_rows(config.data, word_tokenizer(), {2}, config)
    seen = sorted([row.number for row in rows] + [line["row"] for line in dropped])
    assert seen == list(range(1, 2001))
    assert len(rows) > 50 and len(Counter(line["reason"] for line in dropped)) > 7
    for row in rows:  # what is used is usable
        assert 2 <= len(row.prompt) <= 512 and row.chosen != row.rejected and row.prompt[0] == 1
        assert 1 not in row.prompt[1:] and not {1, 2} & {*row.chosen[:-1], *row.rejected[:-1]}


def test_parquet_is_read_like_jsonl(tmp_path):
    datasets.Dataset.from_list([PAIR, PAIR | {"chosen": ""}]).to_parquet(tmp_path / "pairs.parquet")
    source = str(tmp_path / "pairs.parquet")
    config = tm.parse(["--preset", "mistral-7b", "--data", source])
    kept, dropped = tm.load_rows(source, word_tokenizer(), {2}, config)
    assert kept == [tm.encode(PAIR, 1, word_tokenizer(), {2}, config)] and len(dropped) == 1


def test_data_that_cannot_be_read_stops_with_a_remedy(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for source in ("missing.jsonl", str(tmp_path / "bad.parquet"), str(tmp_path / "none.parquet")):
        config = tm.parse(["--preset", "mistral-7b", "--data", source])
        with pytest.raises(SystemExit, match="cannot read .*.jsonl.*, .parquet, .* hub name"):
            tm.load_rows(source, word_tokenizer(), {2}, config)


def test_a_model_that_cannot_be_read_stops_with_a_remedy(tmp_path):
    """No such folder; one without a tokenizer; one that is whole is read."""
    (tmp_path / "empty").mkdir()
    tm.CopyDigits().model(0).save_pretrained(tmp_path / "bare")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, tm.CopyDigits().pairs(4, 0))))
    argv = ["--preset", "mistral-7b", "--data", str(pairs), "--dry_run", "--model"]
    for name in ("nothing", "empty", "bare"):
        with pytest.raises(SystemExit, match=f"cannot read .*{name}.*--model is.*OUT/round-1"):
            in_process([*argv, str(tmp_path / name)])
    tm.CopyDigits().tokenizer().save_pretrained(tmp_path / "bare")
    in_process([*argv, str(tmp_path / "bare")])


def test_every_form_of_a_file_gives_the_same_rows(tmp_path):
    """.json as an array, .jsonl with a byte-order mark, gzip, parquet, a data set's own folder."""
    rows = [PAIR, PAIR | {"chosen": ""}, PAIR | {"prompt": "the user \u00e9"}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "lines.json").write_bytes(lines)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train_prefs": table}).save_to_disk(tmp_path / "splits")
    names = "a.json b.jsonl c.jsonl.gz lines.json d.parquet saved splits".split()
    told = []
    for name in names:
        config = tm.parse(["--preset", "mistral-7b", "--data", str(tmp_path / name)])
        kept, dropped = tm.load_rows(config.data, word_tokenizer(), {2}, config)
        told.append((kept, [line["reason"] for line in dropped]))
    assert all(one == told[0] for one in told) and [row.number for row in told[0][0]] == [1, 3]


def test_data_that_is_not_there_is_called_that_and_columns_not_read_are_named(tmp_path, capsys):
    config = tm.parse(["--preset", "mistral-7b", "--data", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no such file or folder here; wanted: .jsonl") as told:
        tm.load_rows(config.data, word_tokenizer(), {2}, config)
    assert "\n" not in str(told.value)  # without the hub's advice on names
    (tmp_path / "a.json").write_text(json.dumps([PAIR | {"score": 3, "source": "x"}]))
    tm.load_rows(str(tmp_path / "a.json"), word_tokenizer(), {2}, config)
    assert "columns not read: score, source" in capsys.readouterr().out


FEW = dict(vocab_size=24, bos_token_id=1, eos_token_id=2, pad_token_id=0)
DIGITS = [{"prompt": f"{i:06d}", "chosen": "123456", "rejected": f"{i + 1:06d}"} for i in range(12)]


def a_run_with(folder, lm, tokenizer=None, rows=DIGITS, **options):
    """The words of a run of the preset for your model, with lm saved in a folder."""
    folder.mkdir(exist_ok=True)
    lm.save_pretrained(folder / "model")
    (tokenizer or tm.CopyDigits().tokenizer()).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = dict(model=folder / "model", data=folder / "pairs.jsonl", out=folder / "out")
    settings |= dict(rounds=1, batch=6, max_response=9) | options
    return ["--preset", "mistral-7b"] + [
        str(word) for name, value in settings.items() for word in (f"--{name}", value)
    ]


def edited(argv, file="config.json", **changes):
    page = Path(argv[argv.index("--model") + 1]) / file
    page.write_text(json.dumps(json.loads(page.read_text()) | changes))
    return argv


def without(argv, *names, **added):
    """The same model, whose file of weights lacks some, or has others."""
    path = Path(argv[argv.index("--model") + 1]) / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if k not in names} | added
    save_file(weights, path, metadata={"format": "pt"})
    return argv


def test_a_model_that_is_not_whole_or_not_causal_is_refused_and_the_reason_is_named(tmp_path):
    """(words of the refusal, whether the shape alone tells, the run)."""
    lm = small_model()
    odd = {"model.norm.weight": torch.full((32,), math.nan)}
    reward = MistralForSequenceClassification(lm.config)
    bert = BertForMaskedLM(BertConfig(**FEW, hidden_size=32, num_hidden_layers=1,
                                      num_attention_heads=4, intermediate_size=32))  # fmt: skip
    four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    cases = [
        (
            "lacks.* lm_head.weight",
            False,
            without(a_run_with(tmp_path / "a", lm), "lm_head.weight"),
        ),
        ("norm.weight.* is not finite", False, without(a_run_with(tmp_path / "b", lm), **odd)),
        (
            "MistralForSequenceClass.*ForCausalLM is needed",
            True,
            a_run_with(tmp_path / "c", reward),
        ),
        ("BertForMaskedLM.* is needed", True, a_run_with(tmp_path / "d", bert)),
        ("quantized", True, edited(a_run_with(tmp_path / "e", lm), quantization_config=four_bits)),
        ("shape, .*embed_tokens", False, edited(a_run_with(tmp_path / "f", lm), vocab_size=23)),
        (
            "cannot read .*--model is",
            True,
            edited(a_run_with(tmp_path / "g", lm), model_type="unheard"),
        ),
    ]
    for reason, by_shape, argv in cases:
        for words in ([*argv, "--dry_run"], argv):
            if by_shape or words is argv:
                with pytest.raises(SystemExit, match=reason):
                    in_process(words)
            else:
                in_process(words)
        assert not (Path(argv[argv.index("--out") + 1]) / "play").exists()
    in_process(a_run_with(tmp_path / "whole", lm))  # control


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    """BERT, saved as what it is not: its first token's logits change with the rest of the row."""
    shape = BertConfig(**FEW, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=32, initializer_range=0.5)  # fmt: skip
    for decoder in (False, True):
        shape.is_decoder = decoder
        torch.manual_seed(0)
        argv = a_run_with(tmp_path / f"{decoder}", BertLMHeadModel(shape))
        if decoder:  # control: it may not look ahead, but its head is more than a matrix
            argv = [*argv, "--dry_run"]
            in_process(argv)
        else:
            with pytest.raises(SystemExit, match="looks ahead"):
                in_process(argv)


def test_tokens_and_positions_that_the_model_lacks_are_named_before_anything_is_done(tmp_path):
    larger = tm.CopyDigits().tokenizer()
    larger.add_tokens(["x", "y"])
    rows = [*DIGITS, {"prompt": "1", "chosen": "y", "rejected": "2"}]
    argv = a_run_with(tmp_path / "a", small_model(), larger, rows, heldout=1)
    for words in ([*argv, "--dry_run"], argv):
        with pytest.raises(SystemExit, match="row 13 has the token 25 'y' and the model 24 rows"):
            in_process(words)
    argv = a_run_with(tmp_path / "b", small_model(max_position_embeddings=14))
    for words in ([*argv, "--dry_run"], argv):
        with pytest.raises(
            SystemExit, match="row 1 takes 15 positions and the model has 14: lower"
        ):
            in_process(words)
    in_process(a_run_with(tmp_path / "c", small_model(max_position_embeddings=15)))
    drawn = [json.loads(line) for line in open(tmp_path / "c" / "out" / "log.jsonl")]
    assert max(e["length"] for e in drawn if e["event"] == "round") <= 15 - 8  # y' ends there too


def test_limits_are_found_wherever_in_a_config_they_stand():
    lm = small_model(sliding_window=9)
    assert tm.least(lm, "sliding_window") == 9
    lm.config = type("Outer", (), {"text_config": lm.config})()  # the modules know their own
    assert tm.least(lm, "sliding_window") == 9 and tm.least(lm, "nothing") == math.inf


@pytest.mark.parametrize("kind", ["bloom", "mamba", "llama4"])
def test_a_model_that_takes_no_mask_of_ours_scores_a_row_each(tmp_path, capsys, kind):
    few = FEW | dict(hidden_size=32)
    size = few | dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    shape = dict(
        bloom=lambda: BloomConfig(**few, n_layer=2, n_head=4),
        mamba=lambda: MambaConfig(**few, num_hidden_layers=2, state_size=8),
        llama4=lambda: Llama4TextConfig(
            **size, head_dim=8, intermediate_size=64, intermediate_size_mlp=64,
            num_local_experts=2, attention_chunk_size=512, interleave_moe_layer_step=1,
        ),
    )[kind]()  # fmt: skip
    torch.manual_seed(0)
    in_process(a_run_with(tmp_path, AutoModelForCausalLM.from_config(shape)))
    said = capsys.readouterr().out
    assert ("each of its responses take a row" in said) == (kind != "llama4") and "done: " in said


def test_a_plan_names_what_would_be_cut_and_a_missing_chat_template(tmp_path, capsys):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    rows = [{"prompt": "a b a b a b", "chosen": "a b a", "rejected": "b"}] * 3
    lm = small_model(vocab_size=len(tokenizer))
    argv = a_run_with(tmp_path, lm, tokenizer, rows, heldout=0)
    in_process([*argv, "--dry_run", "--max_prompt", "6", "--max_response", "3"])
    said = capsys.readouterr().out
    assert "no chat template" in said and "3 prompts at --max_prompt, 3 answers at" in said
    in_process([*argv, "--dry_run", "--max_prompt", "6", "--max_response", "99"])
    assert "3 prompts at --max_prompt, 0 answers at" in capsys.readouterr().out
    in_process([*argv, "--dry_run", "--max_prompt", "99", "--max_response", "99"])
    assert "cut, if longer" not in capsys.readouterr().out  # control


def test_a_saved_split_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list(DIGITS)).save_to_disk(tmp_path / "rows")
    argv = a_run_with(tmp_path, small_model())
    argv[argv.index("--data") + 1] = str(tmp_path / "rows")
    with pytest.raises(SystemExit, match="no split 'train_prefs', but train: --split names one"):
        in_process([*argv, "--dry_run"])
    in_process([*argv, "--dry_run", "--split", "train"])


def test_a_head_that_is_more_than_a_matrix_is_refused(tmp_path):
    few = {key: FEW[key] for key in FEW if key != "hidden_size"} | dict(hidden_size=32)
    size = dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(ModernBertDecoderConfig(**few | size))
    with pytest.raises(SystemExit, match="head is more than a matrix"):
        in_process(a_run_with(tmp_path, lm))


def test_sharing_is_decided_once_and_kept(tmp_path, monkeypatch, capsys):
    rows = rows_of(4)
    run = run_of(small_model(), rows)
    tm.check_model(run)
    assert run.state["sharing"] and run.scorer.sharing
    monkeypatch.setattr(tm, "hide", lambda *_: 1 / 0)  # what would now decide otherwise
    again = run_of(small_model(), rows)
    again.state["sharing"] = True
    tm.check_model(again)
    assert again.scorer.sharing
    fresh = run_of(small_model(), rows)  # control
    tm.check_model(fresh)
    assert not fresh.scorer.sharing and fresh.state["sharing"] is False


def test_a_template_that_refuses_or_rewrites_drops_the_row():
    refuses = word_tokenizer(template="{{ raise_exception('no') }}")
    rewrites = word_tokenizer(template="{{ messages | length }}{{ messages[-1].content }}</s>")
    config = tm.Config(max_prompt=64, max_response=64)
    with pytest.raises(TemplateError, match="no"):
        tm.encode(PAIR, 1, refuses, {2}, config)
    with pytest.raises(ValueError, match="rewrites"):
        tm.encode(PAIR, 1, rewrites, {2}, config)


# -------------------------------------------------------- one run, and a run cut short


def child(argv, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    with open(environment["SAID"], "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    tm.main(tm.parse(argv))


def start(argv, said, processes=1):
    """Starts `train_mistral.py ARGV` on so many processes, forked from a server that has imported
    everything, which is torchrun without the seconds."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["train_mistral"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    group = group if processes > 1 else {}
    started = []
    for r in range(processes):
        environment = group | dict(RANK=str(r), LOCAL_RANK=str(r), SAID=f"{said}.{r}")
        started.append(context.Process(target=child, args=(argv, environment)))
        started[-1].start()
    return started


def finish(started):
    for process in started:
        process.join(100)
    return [process.exitcode for process in started]


def result(out):
    """All that a run leaves, but for clock times and memory."""
    logs = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for event in logs:
        event.pop("seconds", None), event.pop("peak_bytes", None)
    names = [*(f"round-{n}" for n in range(3)), "average"]
    weights = [(out / name / "model.safetensors").read_bytes() for name in names]
    played = sorted((p.relative_to(out), p.read_bytes()) for p in out.glob("play/*/*"))
    return logs, weights, played, (out / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A short tiny run that nothing interrupts, on one process and on two."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        out = folder / str(processes)
        argv = [*SHORT, "--out", str(out)]
        started = start(argv, folder / f"said{processes}", processes)
        assert finish(started) == [0] * processes, (folder / f"said{processes}.0").read_text()
    return folder


def test_what_is_prefetched_in_the_backward_pass_is_the_same_on_every_rank(tmp_path):
    """FSDP2 prefetches in the order of the forward passes that it has seen. In play() each rank
    does its own, and two ranks once waited for one another for ever: it may not see those."""
    tm.start_processes()
    run = run_of(small_model(), rows := rows_of(4), tmp_path, bf16=True)
    tm.shard(run.scorer, torch.device("cpu"), run.config)
    tm.check_model(run)
    (context,) = {
        unit._get_fsdp_state()._comm_ctx
        for unit in run.scorer.modules()
        if isinstance(unit, FSDPModule)
    }
    seen = list(context.post_forward_order)
    tm.play(run, rows, "round-1")
    assert context.post_forward_order == seen
    run.scorer([(row.prompt, [row.chosen, row.rejected]) for row in rows])
    assert len(context.post_forward_order) > len(seen)  # control: a pass that it has seen


def test_two_processes_log_the_same_course_as_one(straight):
    one, two = result(straight / "1"), result(straight / "2")
    for a, b in zip(one[0], two[0]):
        assert {k: a[k] for k in ("event", "round")} == {k: b[k] for k in ("event", "round")}
        if a["event"] in ("sft", "step") and a["round"] < 2:
            for name in ("loss", "grad_norm", "lr"):
                assert a[name] == pytest.approx(b[name], rel=2e-4), (name, a, b)
    assert one[0][0]["grad_norm"] == pytest.approx(two[0][0]["grad_norm"], rel=1e-6)
    assert one[0][1]["grad_norm"] != pytest.approx(two[0][0]["grad_norm"], rel=1e-6)  # control


def gradient_and_play(rank, processes, port, out):
    os.environ |= dict(WORLD_SIZE=str(processes), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    if processes == 1:
        del os.environ["WORLD_SIZE"]
    device = tm.start_processes()
    rows = rows_of(11)  # ragged: 6 and 5 rows, micro-batches of 2
    for sharing in (False, True):
        run = run_of(small_model(), rows, Path(out) / f"{processes}-{sharing}", micro_batch=2)
        tm.shard(run.scorer, device, tm.Config(recompute=True))
        run.state["pi_t"] = "the same on one and two processes"
        run.scorer.sharing = sharing
        with torch.no_grad():
            run.scorer([(rows[0].prompt, [rows[0].chosen])])
        played = tm.play(run, rows, "round-1")
        flat = []
        for batch in (rows, rows[:1]):  # of one row: the second process has none
            run.scorer.zero_grad()
            assert len(tm.accumulate(run, fake_play(batch))) == len(batch)
            grads = [p.grad for p in run.scorer.parameters()]
            grads = [g.full_tensor() if processes > 1 else g for g in grads]
            flat.append(torch.cat([g.flatten() for g in grads]))
        if rank == 0:
            result = (flat, [(row.generated[0], row.logps) for row in played])
            torch.save(result, f"{out}/{processes}-{sharing}.pt")


def test_one_or_two_processes_give_the_same_gradient_and_samples(tmp_path):
    context = get_context("forkserver")
    context.set_forkserver_preload(["train_mistral"])
    for processes in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = [
            context.Process(target=gradient_and_play, args=(r, processes, port, str(tmp_path)))
            for r in range(processes)
        ]
        for process in started:
            process.start()
        assert finish(started) == [0] * processes
    for sharing in (False, True):
        (one, played), (two, same) = (torch.load(tmp_path / f"{n}-{sharing}.pt") for n in (1, 2))
        assert apart(two[0], one[0]) < 1e-6 and apart(two[1], one[1]) < 1e-6
        assert apart(two[1], one[0]) > 0.1  # control: the gradient of other rows
        assert [y for y, _ in played] == [y for y, _ in same]
        assert len({tuple(y) for y, _ in played}) > 5  # control: the samples do differ by row


def test_the_log_has_the_fields_of_the_contract(straight):
    events = result(straight / "1")[0]
    steps = [e for e in events if e["event"] == "step"]
    wanted = "round step loss preference critic accuracy margin logp_chosen logp_rejected "
    wanted = (wanted + "logp_generated kl grad_norm lr").split()
    assert steps and all(set(wanted) <= set(event) for event in steps)
    rounds = [
        e for e in map(json.loads, open(straight / "1" / "log.jsonl")) if e["event"] == "round"
    ]
    assert [event["round"] for event in rounds] == [0, 1, 2]
    wanted = "reward outside length finished max_implied_reward heldout_accuracy seconds peak_bytes"
    assert all({*wanted.split(), "heldout_implied"} <= set(event) for event in rounds)
    assert all({"average_reward", "average_outside"} <= set(event) for event in rounds[1:])
    assert {"generate", "score", "train", "save"} <= set(rounds[1]["seconds"])
    assert steps[0]["preference"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_saved_round_reloads_to_the_same_logits_with_its_tokenizer(straight):
    folder = straight / "1" / "round-2"
    lm, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert lm.dtype == torch.float32
    state = tm.unseal(next((straight / "1" / "state").glob("*-0")))["model"]
    live = tm.CopyDigits().model(0)
    start_logits = live(torch.tensor([[1, 5, 6]])).logits
    live.load_state_dict({name.removeprefix("lm."): w for name, w in state.items()})
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "123456"}], return_dict=False)
    assert ids == [1, 5, 6, 7, 8, 9, 10, 3] and tokenizer.decode(ids) == "<s>123456="
    ids = torch.tensor([ids])
    assert torch.equal(lm.eval()(ids).logits, live.eval()(ids).logits)
    assert not torch.equal(lm(torch.tensor([[1, 5, 6]])).logits, start_logits)  # control
    assert lm.generation_config.eos_token_id == 2
    assert (straight / "1" / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("tied", [False, True])
def test_a_round_of_a_tied_or_untied_model_reloads_to_equal_logits(tmp_path, tied):
    lm = small_model(kind=LlamaConfig, tie_word_embeddings=tied)
    lm.generation_config = GenerationConfig(eos_token_id=[2, 5], do_sample=True, temperature=0.6)
    run = run_of(lm, rows_of(2), tmp_path)
    (tmp_path / "run.json").write_text("{}")
    run.save_model("round-1")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "round-1").eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(again(ids).logits, lm(ids).logits)
    served = again.generation_config  # it ends and samples as what it came from
    assert (served.eos_token_id, served.temperature) == ([2, 5], 0.6)
    bare = AutoModelForCausalLM.from_config(lm.config)  # control
    assert bare.generation_config.eos_token_id == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_ends_as_if_nothing_had_happened(straight, tmp_path, processes):
    expected = result(straight / str(processes))
    argv, out = [*SHORT, "--out", str(tmp_path / "run")], tmp_path / "run"
    kills, moment = 0, random.Random(processes)
    for lines in (1, 4, 7, 9)[:: 1 if processes == 1 else 2]:  # of the log: SFT to the last round
        started = start(argv, tmp_path / "said", processes)
        log = out / "log.jsonl"
        while started[0].is_alive() and (
            not log.exists() or len(log.read_bytes().splitlines()) < lines
        ):
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.05))
        for process in started:
            process.kill()
        kills += -signal.SIGKILL in finish(started)
    assert kills >= 2
    assert finish(start(argv, tmp_path / "said", processes)) == [0] * processes
    logs, weights, played, samples = result(out)
    assert weights == expected[1] and played == expected[2]
    assert logs == expected[0] and samples == expected[3]
    assert weights[1] != weights[2]  # control: rounds differ, so equality says something
    assert not list(out.rglob("*.tmp")) or (out / "state" / "page").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_in_bf16_with_recomputed_layers_a_killed_run_ends_as_if_nothing_had_happened(
    tmp_path, processes
):
    """The whole path as a GPU takes it: SFT, play, train, save; one kill in the last round."""
    argv, ends = [*SHORT, "--bf16", "--recompute"], []
    for name, lines in (("straight", None), ("killed", 9)):
        out = tmp_path / name
        started = start([*argv, "--out", str(out)], tmp_path / f"said-{name}", processes)
        log = out / "log.jsonl"
        while lines and started[0].is_alive():
            if log.exists() and len(log.read_bytes().splitlines()) >= lines:
                for process in started:
                    process.kill()
                assert -signal.SIGKILL in finish(started)
                started = start([*argv, "--out", str(out)], tmp_path / f"said-{name}", processes)
                break
            time.sleep(0.002)
        assert finish(started) == [0] * processes, (tmp_path / f"said-{name}.0").read_text()
        ends.append(result(out))
    assert ends[0] == ends[1]
    weights = load_file(tmp_path / "killed" / "round-2" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    part = tm.unseal(next((tmp_path / "killed" / "state").glob("*-0")))["model"]
    assert {tm.local(weight).dtype for weight in part.values()} == {torch.float32}  # masters
    losses = [event["loss"] for event in ends[0][0] if event["event"] == "step"]
    in_fp32 = [*SHORT, "--out", str(tmp_path / "fp32")]
    in_process(in_fp32)
    exact = [e["loss"] for e in result(tmp_path / "fp32")[0] if e["event"] == "step"]
    assert losses == pytest.approx(exact, rel=0.05) and losses != exact  # control: bf16 was on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])  # Ctrl-C is the latter
def test_a_run_told_to_stop_saves_and_leaves_and_goes_on(straight, tmp_path, number):
    argv, out = [*SHORT, "--out", str(tmp_path / "run")], tmp_path / "run"
    argv[argv.index("--checkpoint_every") + 1] = "1000"
    started = start(argv, tmp_path / "said")
    while not (out / "log.jsonl").exists() or b"sft" not in (out / "log.jsonl").read_bytes():
        time.sleep(0.001)
    os.kill(started[0].pid, number)
    assert finish(started) == [1]
    said = (tmp_path / "said.0").read_text()
    assert "what is done is saved" in said and "going on" not in said
    assert (out / "state" / "page").exists()
    assert finish(start(argv, tmp_path / "said")) == [0]
    assert "from round 0 step" in (tmp_path / "said.0").read_text()
    assert result(out)[1] == result(straight / "1")[1]


def test_a_round_goes_on_with_the_optimizers_memory(tmp_path, monkeypatch):
    rows = rows_of(16)
    played = fake_play(rows)

    def fresh(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return run_of(small_model(), rows, tmp_path / name, batch=4, lr=1e-3, epochs=1)

    def weights(run):
        return torch.cat([weight.detach().flatten() for weight in run.scorer.parameters()])

    monkeypatch.setattr(tm, "check_step", lambda *_: None)
    straight, cut = fresh("straight"), fresh("cut")
    tm.train(straight, played, None)
    cut.open_folder(None, 0)
    monkeypatch.setattr(tm, "leaving", [])
    monkeypatch.setattr(
        tm, "check_step", lambda run, *_: run.state["step"] == 1 and tm.leaving.append(15)
    )
    with pytest.raises(SystemExit, match="asked to stop"):
        tm.train(cut, played, None)
    tm.leaving.clear()
    monkeypatch.setattr(tm, "check_step", lambda *_: None)
    shutil.copytree(tmp_path / "cut", tmp_path / "forgets")
    for name in ("cut", "forgets"):
        run = fresh(name)
        saved = run.open_folder(tm.unseal(run.out / "state" / "page"), 0)
        assert run.state["step"] == 2
        tm.train(run, played, saved if name == "cut" else None)
        assert torch.equal(weights(run), weights(straight)) == (name == "cut")  # and a control


def in_process(argv):
    tm.leaving.clear()
    tm.main(tm.parse(argv))


def copy_run(straight, to):
    shutil.copytree(straight / "1", to)
    return [*SHORT, "--out", str(to)]


def test_another_argument_or_world_size_in_the_same_folder_is_refused(straight, tmp_path):
    argv = copy_run(straight, tmp_path / "run")
    before = result(tmp_path / "run")
    assert finish(start(argv, tmp_path / "said", 2)) == [1, 1]
    assert "processes was 1, is 2" in (tmp_path / "said.0").read_text()
    for words, told in (
        (["--lam", "7"], r"lam was [\d.]+, is 7.0"),
        (["--generate_batch", "8"], "generate_batch was 16, is 8"),  # samples were drawn by it
        (["--seed", "1"], "seed was 0, is 1; other rows; other weights"),
        (["--bf16"], "bf16 was False, is True"),
    ):
        with pytest.raises(SystemExit, match=told) as refusal:
            in_process([*argv, *words])
        assert not re.search("[0-9a-f]{20}", str(refusal.value))  # words, no digests
    in_process(argv)  # control: the same command has nothing left to do, and does nothing
    assert result(tmp_path / "run") == before


def test_what_changes_no_result_may_change_and_rounds_may_be_added(straight, tmp_path):
    argv, out = copy_run(straight, tmp_path / "run"), tmp_path / "run"
    more = "--rounds 3 --micro_batch 2 --checkpoint_every 9 --recompute --no-repeatable".split()
    in_process([*argv, *more])
    longer = result(out)
    assert longer[0][: len(result(straight / "1")[0])] == result(straight / "1")[0]
    assert longer[1][:3] == result(straight / "1")[1][:3] and (out / "round-3").exists()
    whole = [*SHORT, "--out", str(tmp_path / "whole"), "--rounds", "3"]
    in_process(whole)
    steps = [
        [e["loss"] for e in r[0] if e["event"] == "step"]
        for r in (longer, result(tmp_path / "whole"))
    ]
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)  # other micro-batches: other last bits
    assert json.loads((out / "run.json").read_text())["run"]["micro_batch"] == 2


def test_after_out_of_memory_in_sft_other_batches_may_be_drawn(tmp_path, monkeypatch):
    argv, real = [*SHORT, "--out", str(tmp_path)], tm.accumulate
    monkeypatch.setattr(tm, "accumulate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        in_process(argv)
    monkeypatch.setattr(tm, "accumulate", real)
    in_process([*argv, "--generate_batch", "8", "--micro_batch", "4"])
    assert (tmp_path / "round-2").exists()


def test_the_day_does_not_change_a_runs_identity(tmp_path, monkeypatch):
    """The template prints the clock; the second command is given years later."""
    tokenizer = tm.CopyDigits().tokenizer()
    day = "{{ strftime_now('%Y') }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ bos_token }}", "{{ bos_token }}" + day
    )
    argv = a_run_with(tmp_path, small_model(), tokenizer)
    in_process(argv)
    later = type("Later", (datetime,), {"now": classmethod(lambda cls: cls(2077, 1, 1))})
    monkeypatch.setattr(tm, "datetime", later)
    in_process([*argv, "--rounds", "2"])
    prompts = {json.loads(x)["prompt"][:4] for x in open(tmp_path / "out" / "samples.jsonl")}
    assert len(prompts) == 1 and prompts != {"2077"}
    argv[argv.index("--out") + 1] = str(tmp_path / "fresh")  # control: a new run has a new day
    in_process(argv)
    assert json.loads(open(tmp_path / "fresh" / "samples.jsonl").readline())["prompt"][:4] == "2077"


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["state/page", "state/*-0"])
def test_a_damaged_state_is_named_and_not_used(straight, tmp_path, name, damage):
    argv = copy_run(straight, tmp_path / "run")
    path = next((tmp_path / "run").glob(name))
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-5])
    if damage == "remove":
        path.unlink()
    with pytest.raises(SystemExit, match=path.name + " is damaged"):
        in_process(argv)


def test_logs_and_the_record_are_made_again_from_the_state(straight, tmp_path):
    argv, out = copy_run(straight, tmp_path / "run"), tmp_path / "run"
    before = {name: (out / name).read_bytes() for name in ("log.jsonl", "samples.jsonl")}
    record = json.loads((out / "run.json").read_text())
    assert record["run"]["data_sha256"] and record["run"]["seed"] == 0 and record["torch"]
    (out / "log.jsonl").write_bytes(before["log.jsonl"][:-9] + b"x")
    (out / "samples.jsonl").unlink()
    (out / "run.json").write_text("{")
    in_process(argv)
    assert before == {name: (out / name).read_bytes() for name in before}
    assert json.loads((out / "run.json").read_text()) == record


def test_damaged_self_play_is_made_again_while_pi_t_is_there_and_named_after(tmp_path):
    rows = rows_of(9)
    run = run_of(small_model(), rows, tmp_path)
    played = tm.play(run, rows, "round-1")
    path = next((tmp_path / "play" / "round-1").iterdir())
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    assert tm.play(run, rows, "round-1") == played and path.read_bytes() == good
    path.write_bytes(good[:-1])
    run.state["step"] = 3
    with pytest.raises(SystemExit, match=path.name):
        tm.play(run, rows, "round-1")
    path.write_bytes(good)
    run.state |= {"step": 0, "pi_t": "another model"}  # a stale page is made again too
    tm.play(run, rows, "round-1")
    assert path.read_bytes() != good


def test_a_sealed_file_opens_to_its_own_key_and_whole_or_not_at_all(tmp_path):
    tm.seal(tmp_path / "page", [1, 2], "pi_1")
    assert tm.unseal(tmp_path / "page", "pi_1") == [1, 2]  # control
    for key in ("pi_2", "pi_", ""):
        assert tm.unseal(tmp_path / "page", key) is None
    whole = (tmp_path / "page").read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[1:], b"", b"\n" + whole):
        (tmp_path / "page").write_bytes(damaged)
        assert tm.unseal(tmp_path / "page", "pi_1") is None


def test_a_sealed_file_is_on_the_disk_before_it_takes_the_old_ones_name(tmp_path, monkeypatch):
    """A power cut loses what is not on the disk; a kill may come at any call."""
    path, calls = tmp_path / "page", []
    tm.seal(path, "old")
    old, sizes = path.read_bytes(), []

    def noted(name, real):
        def call(*args):
            calls.append(name)
            sizes.append(path.with_name("page.tmp").stat().st_size)
            assert path.read_bytes() == old
            return real(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(tm.os, name, noted(name, getattr(os, name)))
    tm.seal(path, "new")
    assert calls == ["fsync", "replace"] and sizes == [path.stat().st_size] * 2
    assert tm.unseal(path) == "new"
    path.write_bytes(path.read_bytes()[:-9])  # control: cut short, in place
    assert tm.unseal(path) is None


def test_a_loss_that_is_not_finite_stops_with_step_and_rows_and_keeps_the_state(tmp_path):
    rows = rows_of(8)
    run = run_of(small_model(), rows, tmp_path, batch=4, lr=1e-3)
    played = fake_play(rows)
    played[4] = played[4]._replace(logps=[math.nan, -1.0, -1.0])  # of the row with number 5
    batches = tm.batches_of(run, played)
    step = next(i for i, batch in enumerate(batches) if 5 in [row.number for row in batch])
    run.state["step"] = step
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "page").write_text("the last good state")
    with pytest.raises(SystemExit, match=rf"round 1 step {step}.* rows \[5\]"):
        tm.train(run, played, None)
    assert (tmp_path / "state" / "page").read_text() == "the last good state"
    run = run_of(small_model(), rows, tmp_path, batch=4, lr=1e-3)
    run.state["step"] = 1  # control: the same without that row's nan goes through
    tm.train(run, fake_play(rows), None)


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    in_process([*SHORT, "--dry_run"])
    assert torch.get_num_threads() == 1  # tiny's bits are those of any number of cores
    said = capsys.readouterr().out
    assert "saved states" not in said  # advice for a reader's own data alone
    assert not list(tmp_path.iterdir())
    for word in ("pairs to train on", "held out", "dropped", "steps", "tokens", "parameters", "GB"):
        assert word in said


def test_a_folder_that_cannot_be_written_and_too_small_a_disk_are_found_first(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        in_process([*SHORT, "--out", str(tmp_path / "file" / "run")])
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(tm.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="GB free"):
        in_process([*SHORT, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "state").exists()  # other flags may do with less


def test_a_disk_that_fills_up_is_an_error_with_the_files_name(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("unexpected pos")  # torch's word for it

    tm.seal(tmp_path / "a", {"x": 1})  # control
    monkeypatch.setattr(tm.torch, "save", full)
    with pytest.raises(OSError, match="No space left.*b.tmp"):
        tm.seal(tmp_path / "b", {"x": 1})
    assert tm.unseal(tmp_path / "a") == {"x": 1} and not (tmp_path / "b").exists()


def test_each_round_starts_from_the_weights_that_it_names_and_from_nothing_else(
    tmp_path, monkeypatch
):
    met = []

    def train(run, rows, saved):  # moves a weight
        state = run.state
        same = state["pi_t"] == run.scorer.sha256()
        met.append((state["round"], state["step"], state["largest"], saved, same))
        with torch.no_grad():
            next(run.scorer.parameters()).add_(0.1)
        assert state["pi_t"] != run.scorer.sha256()  # control
        state |= {"step": 3, "largest": 9.0}
        run.charge("train")

    monkeypatch.setattr(tm, "train", train)
    monkeypatch.setattr(tm, "draw_curves", lambda run: None)  # there are no steps to draw
    in_process([*SHORT, "--out", str(tmp_path / "run")])
    assert met == [(number, 0, 0.0, None, True) for number in range(3)]
    rounds = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert [event["max_implied_reward"] for event in rounds] == [9.0] * 3


def test_your_model_and_your_pairs_take_the_same_road(tmp_path):
    """A folder with a 200-token vocabulary and a .jsonl of text pairs: two rounds, three files."""
    tokenizer = word_tokenizer()
    small_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = random.Random(0)
    lines = [
        {"prompt": f"ask {i}", "chosen": "the answer " * words.randint(1, 3), "rejected": f"no {i}"}
        for i in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"prompt": 1}])))
    argv = ["--preset", "mistral-7b", "--model", str(tmp_path / "model"), "--heldout", "4"]
    argv += [
        "--data",
        str(tmp_path / "pairs.jsonl"),
        "--out",
        str(tmp_path / "out"),
        "--lr",
        "1e-3",
    ]
    argv += "--rounds 2 --max_prompt 12 --max_response 9 --batch 8 --optimizer adafactor".split()
    argv += ["--rows", "15"]
    in_process(argv)
    met = {}
    for path in (tmp_path / "out" / "play").glob("*/*"):
        pages = torch.load(path)
        met.setdefault(path.parent.name, set()).update(pages)
    assert met["round-1"] == met["round-2"] and met["heldout-1"] == met["heldout-2"]
    assert len(met["round-1"]) == 15 and len(met["heldout-1"]) == 4  # of 20
    assert not met["round-1"] & met["heldout-1"]  # no held-out pair is trained on
    assert len([*(tmp_path / "out" / "state").iterdir()]) == 2  # the page and the last state
    assert sorted(p.name for p in (tmp_path / "out").glob("round-*")) == [
        f"round-{n}" for n in range(3)
    ]
    assert [json.loads(x)["row"] for x in open(tmp_path / "out" / "dropped.jsonl")] == [21]
    rounds = [json.loads(x) for x in open(tmp_path / "out" / "log.jsonl") if '"round", ' in x]
    assert len(rounds) == 3 and "reward" not in rounds[0]
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "round-2").state_dict()
    assert all((first[name] != last[name]).any() for name in first)
    with pytest.raises(SystemExit):  # control: tiny takes no model
        tm.parse(["--model", "x"])


def test_a_head_that_is_more_than_a_matrix_and_a_window_are_noticed(capsys):
    row = tm.Row(1, array("i", range(3, 20)), array("i", [5, 6, 7]), array("i", [8, 9]))
    for window, words in (
        (None, "its responses share a row"),
        (4, "each of its responses take a row"),
    ):
        lm = small_model(sliding_window=window)
        run = run_of(lm, [row], max_prompt=20)
        tm.check_model(run)
        assert words in capsys.readouterr().out
    forward = lm.forward
    lm.forward = lambda *a, **k: forward(*a, **k).__class__(logits=forward(*a, **k).logits * 0.5)
    with pytest.raises(SystemExit, match="more than a matrix"):
        tm.check_model(run_of(lm, [row]))


def test_a_folder_in_use_is_refused_at_once_and_left_alone(straight, tmp_path):
    argv, out = copy_run(straight, tmp_path / "run"), tmp_path / "run"
    (out / "log.jsonl").write_text("as another run has left it")
    holder = "import sys, pathlib, train_mistral as tm; print(tm.lock(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-u", "-c", holder + "; sys.stdin.read()", str(out / "lock")]
    pipes = dict(cwd=Path(tm.__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"True\n"
        files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        for processes in (1, 2):
            said = tmp_path / f"said{processes}"
            assert finish(start(argv, said, processes)) == [1] * processes
            text = Path(f"{said}.0").read_text()
            assert "is in use by another run" in text and "Traceback" not in text
        assert files == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        in_process([*argv, "--dry_run"])  # a plan is no work
        other.kill()
    assert finish(start(argv, tmp_path / "said")) == [0]  # control: it died, and the run goes on
    assert result(out)[0] == result(straight / "1")[0]


def rank_zero_reads(rank, port, argv, out):
    os.environ |= dict(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    if rank:  # a rank that reads any weights dies
        AutoModelForCausalLM.from_pretrained = lambda *_, **__: os._exit(9)
    device, config = tm.start_processes(), tm.parse(argv)
    scorer = tm.Scorer(tm.load_model(config)[0])
    assert next(scorer.parameters()).is_meta == (rank > 0)
    tm.shard(scorer, device, config)
    whole = {name: weight.full_tensor() for name, weight in scorer.lm.named_parameters()}
    buffers = {name: buffer for name, buffer in scorer.lm.named_buffers()}
    torch.save(whole | buffers, f"{out}-{rank}")
    logps = scorer([(array("i", [1, 5, 6]), [array("i", [7, 8, 9])])])
    torch.save(logps.detach(), f"{out}-logps-{rank}")


@pytest.mark.parametrize("tied", [False, True])
def test_one_rank_reads_the_weights_and_the_others_get_theirs_from_it(tmp_path, tied):
    lm = small_model(tie_word_embeddings=tied)
    argv, context = a_run_with(tmp_path, lm), get_context("forkserver")
    context.set_forkserver_preload(["train_mistral"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        context.Process(target=rank_zero_reads, args=(r, port, argv, str(tmp_path / "rank")))
        for r in range(2)
    ]
    for process in started:
        process.start()
    assert finish(started) == [0, 0]
    expected = dict(lm.named_parameters()) | dict(lm.named_buffers())
    for rank in range(2):
        got = torch.load(tmp_path / f"rank-{rank}")
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
        own = tm.Scorer(lm)([(array("i", [1, 5, 6]), [array("i", [7, 8, 9])])])
        assert torch.load(tmp_path / f"rank-logps-{rank}").item() == pytest.approx(
            own.item(), abs=1e-5
        )


def test_a_model_that_rank_0_cannot_read_stops_all_ranks(tmp_path):
    argv = without(a_run_with(tmp_path, small_model()), "lm_head.weight")
    assert finish(start(argv, tmp_path / "said", 2)) == [1, 1]
    assert "lacks, or has in another shape, lm_head.weight" in (tmp_path / "said.1").read_text()


@pytest.mark.parametrize("optimizer, live, saved", [("adamw", 16, 16), ("adafactor", 8, 8)])
def test_bytes_a_parameter_are_those_of_the_table(tmp_path, monkeypatch, optimizer, live, saved):
    """Live at a step: 4 of weights, 4 of gradients, 8 or next to none of the optimizer. In a saved
    state also 4 of the average; the plan's disk is what two states and all folders take."""
    rows, seen, sizes, kind = rows_of(8), [], [], tm.OPTIMIZERS[optimizer]
    lm = small_model(hidden_size=128, intermediate_size=256)
    settings = dict(batch=4, epochs=1, rounds=1, optimizer=optimizer, checkpoint_every=1)
    run = run_of(lm, rows, tmp_path, **settings)
    save, count = run.save_state, sum(weight.numel() for weight in lm.parameters())

    def watched(*args, **options):
        made = kind(*args, **options)
        step = made.step

        def counted():
            step()
            tensors = [t for s in made.state.values() for t in s.values() if t.dim()]
            tensors += [t for g in made.param_groups for p in g["params"] for t in (p, p.grad)]
            seen.append(sum(t.nbytes for t in tensors))

        made.step = counted
        return made

    def noted(optimizer=None):
        save(optimizer)
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "state").glob("*-0")))

    monkeypatch.setitem(tm.OPTIMIZERS, optimizer, watched)
    monkeypatch.setattr(tm, "check_step", lambda *_: None)
    run.save_state = noted
    run.open_folder(None, 0)
    tm.train(run, fake_play(rows), None)
    assert seen[0] / count == pytest.approx(live, rel=0.03)
    assert sizes[0] / count == pytest.approx(saved, rel=0.05)
    run.save_model("round-1")
    folder = (
        (tmp_path / "round-1" / "model.safetensors").stat().st_size
    )  # as round-0's and the average's
    assert tm.plan(run) == pytest.approx(2 * sizes[0] + 3 * folder, rel=0.05)


@pytest.mark.parametrize("letters", ["ascii", "latin-1", "utf-8"])
def test_no_terminal_ends_a_run(tmp_path, letters, monkeypatch):
    """Words that it cannot print are escaped; and one that has gone is none."""
    heard = (tmp_path / "heard").open("wb")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(heard, encoding=letters))
        tm.say("\u00e9 \u4f60 \ud800")
        sys.stdout.detach()
    heard.close()
    text = (tmp_path / "heard").read_bytes().decode(letters)
    assert ("\u4f60" in text) == (letters == "utf-8") and "\\ud800" in text
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone := os.fdopen(writer, "w"))
        tm.say("nobody")
        with pytest.raises(BrokenPipeError):  # control
            print("nobody", flush=True)
    with pytest.raises(BrokenPipeError):
        gone.close()


def test_a_plan_says_what_is_too_small_and_what_is_met_twice(tmp_path, capsys):
    rows = [*DIGITS, *DIGITS[:6], DIGITS[0] | {"rejected": "777777"}]
    in_process([*a_run_with(tmp_path, small_model(), rows=rows, heldout=9), "--dry_run"])
    said = capsys.readouterr().out
    assert "10 pairs to train on, 9 held out" in said
    assert "2 steps a round are few: lower --batch, to 1, or raise --epochs" in said
    assert "saved states: one a round; a lower --checkpoint_every saves within" in said
    assert "more than a fifth of the pairs is held out: lower --heldout" in said
    pairs = int(re.search(r"(\d+) of the held-out pairs are among", said)[1])
    prompts = int(re.search(r"(\d+) of the held-out prompts are among", said)[1])
    assert 0 < pairs <= prompts <= 9
    draw = {i for i in random.Random(0).sample(range(19), 9)}
    kept = [repr(rows[i]) for i in range(19) if i not in draw]
    assert pairs == sum(repr(rows[i]) in kept for i in draw)
    large = [{"prompt": f"{i:06d}", "chosen": "1", "rejected": "2"} for i in range(200)]
    in_process([*a_run_with(tmp_path, small_model(), rows=large), "--dry_run"])  # control
    said = capsys.readouterr().out
    assert "180 pairs to train on, 20 held out" in said  # a tenth
    assert "are few" not in said and "fifth" not in said and "among" not in said
    many = a_run_with(tmp_path, small_model(), rows=large[:100], heldout=60, epochs=2)
    in_process([*many, "--batch", "9", "--dry_run"])
    said = capsys.readouterr().out
    assert "--heldout 60 is more than half of the usable rows: 50 are held out" in said
    assert "12 steps a round are few: lower --batch, to 5," in said
    in_process([*many, "--batch", "9", "--dry_run", "--epochs", "1"])
    twice, once = (re.search(r"([\d,]+) tokens a round", text)[1].replace(",", "")
                   for text in (said, capsys.readouterr().out))  # fmt: skip
    assert int(twice) == 2 * int(once) > 0


def test_a_console_shows_steps_out_of_all_and_supervision_in_ten_lines(straight):
    lines = (straight / "said1.0").read_text().splitlines()
    steps = [line for line in lines if re.match(r"round [12]/2 +\d+/3 0:\d\d:\d\d ", line)]
    assert len(steps) == 2 * 3  # 40 rows, 16 a step
    assert 0 < len([line for line in lines if re.match(r"round 0/2 +\d", line)]) <= 11


def test_the_noise_of_scoring_is_logged_beside_the_margin(tmp_path):
    rows = rows_of(8)
    run = run_of(small_model(), rows, tmp_path, batch=8, epochs=1)
    played = tm.play(run, rows, "round-1")
    offs = [0.1 * (i % 3 - 1) for i in range(8)]
    shifted = [r._replace(logps=[r.logps[0] - off, *r.logps[1:]]) for r, off in zip(played, offs)]
    tm.TOLERANCE[False], before = 1.0, tm.TOLERANCE[False]
    try:
        for rows, noise in ((played, 0.0), (shifted, 0.3 * fmean(o * o for o in offs) ** 0.5)):
            fresh = run_of(small_model(), rows, tmp_path, batch=8, epochs=1)
            tm.train(fresh, rows, None)
            line = fresh.state["logs"]["log.jsonl"][-1]
            assert line["noise"] == pytest.approx(noise, abs=1e-4)
    finally:
        tm.TOLERANCE[False] = before


# -------------------------------------------------------- the tiny world, and the options


def test_the_tiny_worlds_labels_follow_bradley_terry_on_its_reward():
    """4,000 pairs; a share of wins in a bin of n has standard error sqrt(p (1-p) / n): 5 of them,
    missed with probability below 1e-6 a bin."""
    world, wins = tm.CopyDigits(), {}
    for pair in world.pairs(4000, seed=1):
        rewards = [world.reward(pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        gap = round(2 * abs(rewards[0] - rewards[1]))
        wins.setdefault(gap, Counter())[rewards[0] >= rewards[1]] += 1
        assert not world.outside(pair["chosen"]) and world.outside("1a3456") and world.outside("1")
    for gap, count in wins.items():
        if gap:
            n, p = count.total(), 1 / (1 + math.exp(-gap / 2))
            assert abs(count[True] / n - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert abs(wins[2][True] / wins[2].total() - 0.5) > 0.1  # control: labels are not coin flips
    assert world.reward("123456", "123456") == world.best


def test_lam_is_by_default_a_rule_in_the_number_of_pairs_that_are_trained_on(straight):
    run = json.loads((straight / "1" / "run.json").read_text())["run"]
    dropped = len((straight / "1" / "dropped.jsonl").read_text().splitlines())
    held, pairs = 10, 50 - dropped - 10
    assert run["lam"] == round(0.8 * math.sqrt(min(40, pairs)), 2) and run["heldout"] == held
    assert run["lam"] != round(0.8 * math.sqrt(50), 2)  # control: not of all rows


def test_another_run_is_drawn_beside_and_must_be_one(straight, tmp_path, monkeypatch, capsys):
    argv, lines = copy_run(straight, tmp_path / "run"), []
    log = (straight / "1" / "log.jsonl").read_text()
    rounds = [x for x in map(json.loads, log.splitlines()) if x["event"] == "round"]
    axhline = Axes.axhline
    monkeypatch.setattr(
        "matplotlib.axes.Axes.axhline",
        lambda ax, y, **style: (lines.append(y), axhline(ax, y, **style))[1],
    )
    with pytest.raises(SystemExit):
        in_process([*argv, "--beside", str(tmp_path / "none")])
    assert "holds no run" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text("".join(log.splitlines(True)[:2]))
    with pytest.raises(SystemExit):
        in_process([*argv, "--beside", str(other)])
    assert "its log.jsonl has no round" in capsys.readouterr().err
    (other / "log.jsonl").write_text(log + '{"event": "round", "rewa')  # it is still being written
    in_process([*argv, "--rounds", "3", "--beside", str(other)])
    assert lines == [rounds[-1]["average_reward"], rounds[-1]["reward"]]


def test_curves_show_the_rounds_last_and_averaged_weights_and_only_what_there_is(
    straight, tmp_path, monkeypatch
):
    """The first panel's lines are the log's; without --average there is one."""
    log = (straight / "1" / "log.jsonl").read_text().splitlines()
    rounds = [x for x in map(json.loads, log) if x["event"] == "round"]
    figures, real = [], Figure
    monkeypatch.setattr(
        "matplotlib.figure.Figure", lambda **k: figures.append(real(**k)) or figures[-1]
    )
    in_process([*copy_run(straight, tmp_path / "run"), "--rounds", "3"])
    in_process([*SHORT, "--out", str(tmp_path / "none"), "--average", "0"])
    with_average, without = ({x.get_label(): x.get_ydata() for x in f.axes[0].lines}
                             for f in (figures[0], figures[-1]))  # fmt: skip
    assert set(with_average) == {"averaged weights", "last weights"}
    assert list(with_average["last weights"][:3]) == [x["reward"] for x in rounds]
    mean = [x.get("average_reward", math.nan) for x in rounds]
    assert list(with_average["averaged weights"][1:3]) == mean[1:] and math.isnan(mean[0])
    assert set(without) == {"last weights"}


def test_the_command_alone_runs_dpo_in_as_many_steps_and_draws_it_beside():
    ours, dpo = tm.parse([]), tm.parse(tm.DPO)
    assert dpo.rounds == 1 and dpo.lam == math.inf and dpo.out != ours.out
    assert dpo.rounds * dpo.epochs * ours.batch == ours.rounds * ours.epochs * dpo.batch
    same = "seed rows heldout sft_epochs sft_lr max_prompt max_response".split()
    assert all(getattr(ours, name) == getattr(dpo, name) for name in same)


def test_options_out_of_range_or_abbreviated_are_refused(capsys):
    for argv in (
        ["--lam", "0"],
        ["--lam", "nan"],
        ["--batch", "0"],
        ["--critic", "x"],
        ["--roun", "2"],
        ["--lr", "inf"],
        ["--beta", "inf"],
        ["--clip", "nan"],
        ["--warmup", "1.5"],
        ["--warmup", "-0.1"],
        ["--rows", "0"],
        ["--heldout", "-1"],
        ["--model", "some/model"],
        ["--data", "pairs.jsonl"],
        ["--beside", "out/no-such-run"],
    ):
        with pytest.raises(SystemExit):
            tm.parse(argv)
    said = capsys.readouterr().err
    for told in ("lam 0.0: it must be above 0\n", "lr inf: it must be above 0 and finite\n",
                 "warmup -0.1: it must be 0 or more and at most 1\n"):  # fmt: skip
        assert told in said
    assert tm.parse(["--lam", "inf"]).lam == math.inf
    least = tm.parse(["--rows", "1", "--heldout", "0", "--average", "0", "--warmup", "1"])
    assert (least.rows, least.heldout, least.average, least.warmup) == (1, 0, 0, 1)
    of_preset = tm.parse(["--preset", "mistral-7b", "--rows", "0", "--heldout", "-1"])
    assert (of_preset.rows, of_preset.heldout) == (0, -1)
    with pytest.raises(SystemExit):
        tm.parse(["--help"])
    said = capsys.readouterr().out
    for field in tm.dataclasses.fields(tm.Config):
        assert f"--{field.name}" in said and field.metadata["help"]


def test_bf16_and_recompute_can_be_asked_for_and_are_off_on_a_cpu():
    if not torch.cuda.is_available():
        assert not tm.parse([]).bf16 and not tm.parse([]).recompute
    assert tm.parse(["--bf16"]).bf16 and tm.parse(["--recompute"]).recompute
    assert not tm.parse(["--no-bf16"]).bf16


def test_adafactor_has_its_own_rate_and_moves_weights_as_far_as_adamw(tmp_path):
    """Weights of N(0, .02), as in a new model: 12 steps move them as far, to a factor of 2."""
    rows, moved = rows_of(12), {}
    usual = tm.parse(["--preset", "mistral-7b"])
    assert tm.parse(["--preset", "mistral-7b", "--optimizer", "adafactor"]).lr == 50 * usual.lr
    assert tm.parse("--optimizer adafactor --lr 3e-5".split()).lr == 3e-5
    played, settings = fake_play(rows), dict(batch=3, epochs=3)
    tm.TOLERANCE[False], before = math.inf, tm.TOLERANCE[False]
    for name, rate in (("adamw", 1e-6), ("adafactor", 5e-5), ("same", 1e-6)):
        kind = "adamw" if name == "adamw" else "adafactor"
        lm = AutoModelForCausalLM.from_config(small_model(hidden_size=64).config)
        run = run_of(lm, rows, tmp_path / name, lr=rate, optimizer=kind, **settings)
        (tmp_path / name).mkdir()
        start = [w.detach().clone() for w in lm.parameters() if w.dim() > 1]
        tm.train(run, played, None)
        ends = [w.detach() for w in lm.parameters() if w.dim() > 1]
        parts = torch.cat([(a - b).flatten() for a, b in zip(start, ends)])
        moved[name] = parts.square().mean().sqrt().item()
    tm.TOLERANCE[False] = before
    assert 0.5 < moved["adafactor"] / moved["adamw"] < 2
    assert moved["same"] / moved["adamw"] < 0.1  # control: at AdamW's rate it hardly trains


def test_the_learning_rate_warms_up_and_ends_near_zero():
    rates = [tm.learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert max(rates) == 1.0 and rates[-1] < 1e-3 and rates == sorted(rates[:11]) + rates[11:]
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_the_average_is_the_exponential_mean_of_the_weights_and_stands_in_their_place(tmp_path):
    """Against a loop over the weights after each of 12 steps; horizon .5 x 3 rounds x 6 steps."""
    rows, course = rows_of(12), []
    run = run_of(small_model(), rows, tmp_path, batch=4, lr=1e-2, rounds=3, epochs=2, average=0.5)
    weights, real = [*run.scorer.parameters()], run.charge
    by_hand = [weight.detach().clone() for weight in weights]

    def charge(phase):
        course.extend([[w.detach().clone() for w in weights]] if phase == "train" else [])
        real(phase)

    run.charge = charge
    for number in (1, 2):
        run.state |= dict(round=number, step=0, pi_t=run.scorer.sha256())
        tm.train(run, tm.play(run, rows, f"round-{number}"), None)
    for after in course:
        by_hand = [mean + (weight - mean) / 9 for mean, weight in zip(by_hand, after)]
    assert len(course) == 12
    for mean, expected in zip(run.average, by_hand):
        assert torch.allclose(mean, expected, atol=1e-6)
    assert not any(torch.allclose(m, w, atol=1e-6) for m, w in zip(run.average, course[-1]))
    last, mean = run.scorer.sha256(), [m.clone() for m in run.average]
    tm.swap(run)
    assert all(torch.equal(w, m) for w, m in zip(weights, mean))
    assert run.state["pi_t"] == run.scorer.sha256() != last
    tm.swap(run)
    assert run.scorer.sha256() == run.state["pi_t"] == last
    assert all(torch.equal(a, b) for a, b in zip(run.average, mean))


def test_without_an_average_none_is_kept_or_saved(tmp_path):
    in_process([*SHORT, "--out", str(tmp_path), "--average", "0"])
    assert not (tmp_path / "average").exists() and (tmp_path / "round-2").exists()
    rounds = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert not [name for line in rounds for name in line if "average" in name]


def test_the_order_of_a_round_depends_on_seed_round_and_epoch_and_covers_every_row():
    rows = rows_of(11)
    run = run_of(small_model(), rows, batch=4, epochs=2)
    batches = tm.batches_of(run, rows)
    assert [len(batch) for batch in batches] == [4, 4, 3] * 2
    epochs = [
        [row.number for batch in half for row in batch] for half in (batches[:3], batches[3:])
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 12)) and epochs[0] != epochs[1]
    assert batches == tm.batches_of(run, rows)
    run.state["round"] = 2
    assert batches != tm.batches_of(run, rows)
    run.state["round"], run.config = 1, tm.Config(**vars(run.config) | dict(seed=1))
    assert batches != tm.batches_of(run, rows)


def test_importing_the_trainer_is_silent_and_touches_nothing(tmp_path):
    command = [sys.executable, "-c", "import train_mistral"]
    environment = os.environ | {"PYTHONPATH": str(Path(tm.__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not PAGES.exists() or "[madvise]" not in PAGES.read_text(),
    reason="a kernel that gives huge pages to who asks",
)
def test_tensors_of_a_process_on_a_cpu_lie_on_huge_pages_unless_its_user_says_no():
    look = """if True:
        import torch, train_mistral
        train_mistral.start_processes()
        tensor = torch.ones(2**24)
        said = open("/proc/self/smaps_rollup").read().split("AnonHugePages:")[1]
        print(int(said.split()[0]) * 1024 / tensor.nbytes)
    """
    for environment, least, most in (({}, 0.9, 3), ({"THP_MEM_ALLOC_ENABLE": "0"}, 0, 0.1)):
        environment = os.environ | {"PYTHONPATH": str(Path(tm.__file__).parent)} | environment
        done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True)
        assert least <= float(done.stdout) <= most, done.stderr
