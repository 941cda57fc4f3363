"""The benchmark's formula of a step's arithmetic equals torch's own count; a wrong one does not."""

import inspect
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_cost as cost  # noqa: E402

tm, SIZES = cost.tm, cost.Sizes(pairs=2, prompt=7, response=5)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    tm.start_processes()
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("again", [False, True])
def test_the_formula_counts_what_torch_counts_with_and_without_recomputation(again):
    lm = cost.model_of(32, 48, 2, 50, 4, 2)
    if again:
        tm.shard(tm.Scorer(lm), torch.device("cpu"), tm.Config(recompute=True))
    theirs = cost.counted(lm, SIZES)
    assert cost.flops(cost.products(lm.config, SIZES, again))["all"] == theirs
    assert cost.flops(cost.products(lm.config, SIZES, not again))["all"] != theirs  # controls
    assert cost.flops(cost.products(lm.config, SIZES._replace(prompt=8), again))["all"] != theirs


def test_what_a_step_must_do_leaves_out_exactly_what_the_mask_hides():
    lm = cost.model_of(32, 48, 2, 50, 4, 2)
    _, rows = cost.run_of(lm, SIZES)
    table, *_ = tm.lay_out(
        [(row.prompt, [*row[2:4], *row.generated]) for row in rows], sharing=True
    )
    seen = (tm.hide(table[..., 1]) == 0).double().mean().item()
    must, does = (cost.flops(cost.products(lm.config, SIZES, must=must)) for must in (True, False))
    assert must["attention"] / does["attention"] == pytest.approx(seen, rel=1e-12) and seen < 0.5
    assert must["head"] / does["head"] == 0.75 and must["body"] == does["body"]


def test_a_step_holds_the_logits_of_a_chunk_and_not_of_all_positions():
    lm, sizes = cost.model_of(32, 48, 1, 20_000, 4, 2), cost.Sizes(pairs=4, prompt=10, response=40)

    def growth(chunk: int) -> int:
        with mock.patch.object(cost, "CHUNK", chunk):
            (step := cost.step_of(lm, sizes))()
        return cost.peak_bytes(step)

    position, weights = 4 * 20_000, 4 * sum(weight.numel() for weight in lm.parameters())
    assert 2 * cost.CHUNK * position < growth(cost.CHUNK) < 4 * cost.CHUNK * position + 2 * weights
    assert growth(cost.CHUNK) < 0.45 * growth(480)  # all positions: the goal of the head, exactly
    if not torch.cuda.is_available():  # which has memory for larger ones
        assert inspect.signature(tm.Scorer).parameters["logits_chunk"].default == cost.CHUNK
