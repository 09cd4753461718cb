"""Tables of n-grams: what is added to the trunk's input, how it learns, and that it is the only thing added."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from experiments.arms.arm import N_TABLES, Arm, TrainSpec, cost
from experiments.arms.gates import context_rows
from experiments.arms.text import open_text
from experiments.arms.training import NoExperts, TrainRun, build_model
from node.model.learning_rate import learning_rate_factor
from tests.unit.experiments.test_life import Context

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.arms.tables import NgramTables
    from experiments.arms.training import Model

SPEC = TrainSpec(
    arm=Arm(label="dense and tables", hidden=16, tables=512), seed=0, tokens=512, lr=1e-2, expert_lr=1e-2, d_model=32,
    layers=2, context=32, batch=4, eval_bytes=256, final_eval_bytes=256,
)  # fmt: skip
CPU = torch.device("cpu")


def tables_of(model: Model) -> NgramTables:
    assert isinstance(model.experts, NoExperts)
    assert model.experts.tables is not None
    return model.experts.tables


def test_rows_go_by_one_byte_then_two_and_so_on() -> None:
    before = context_rows(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), range(1, 5), 1000)
    after = context_rows(torch.tensor([[1, 9, 3, 4, 5, 6, 7]]), range(1, 5), 1000)
    changed = [(before[:, table] != after[:, table]).nonzero().flatten().tolist() for table in range(4)]
    assert changed == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert int(before.max()) < 1000


def test_rows_start_as_nothing_and_are_added_to_what_the_first_layer_gets() -> None:
    model, plain = build_model(SPEC, CPU), build_model(TrainSpec.from_json({**SPEC.to_json(), "arm": PLAIN}), CPU)
    ids_BT = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.trunk(ids_BT), plain.trunk(ids_BT))
        rows_QRD = tables_of(model).rows_QRD.normal_()
        rows_NQ = context_rows(ids_BT, range(1, N_TABLES + 1), SPEC.arm.tables)
        added_ND = torch.stack([rows_QRD[table, rows_NQ[:, table]] for table in range(N_TABLES)]).sum(0)
        added_BTD = added_ND.view(2, 16, 32)
        plain.trunk.layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] + added_BTD, *inputs[1:]))
        torch.testing.assert_close(model.trunk(ids_BT), plain.trunk(ids_BT))


PLAIN = {"label": "dense", "hidden": 16}


def test_rows_that_are_used_step_by_adam_and_no_others() -> None:
    tables = tables_of(build_model(SPEC, CPU))
    tables.run_tokens = 256
    rows = torch.tensor([[3, 5, 7, 9] * 2, [3, 6, 7, 9] * 2])
    adam = SPEC.manifest().optimizer
    twins = [torch.zeros(2, 32, requires_grad=True) for _ in range(N_TABLES)]
    optimizer = torch.optim.Adam(twins, lr=rate_at(256), betas=(adam.beta1, adam.beta2), eps=adam.eps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        grad_ND = torch.randn(2, 32, generator=generator)
        tables._row_NQ = rows
        tables.learn(grad_ND)
        for table, twin in enumerate(twins):
            shared = bool(rows[0, table] == rows[1, table])
            twin.grad = torch.stack((grad_ND.sum(0), torch.zeros(32))) if shared else grad_ND.clone()
        optimizer.step()
    for table, twin in enumerate(twins):
        used = rows[:, table].unique()
        torch.testing.assert_close(tables.rows_QRD[table, used], twin.detach()[: len(used)])
        assert tables.rows_QRD[table].any(1).nonzero().flatten().tolist() == used.tolist()


def rate_at(tokens: int) -> float:
    adam = SPEC.manifest().optimizer
    return adam.expert_lr * learning_rate_factor(adam, tokens)


def test_a_training_moves_rows_counts_them_and_leaves_no_checkpoint_that_lacks_them(tmp_path: Path) -> None:
    run = TrainRun(SPEC, Context(tmp_path), open_text())
    run.go()
    assert float(tables_of(run.model).rows_QRD.abs().max()) > 0
    assert tables_of(run.model).run_tokens > 0, "the rate follows the schedule"
    assert not run.keeps_checkpoints
    plain = TrainSpec.from_json({**SPEC.to_json(), "arm": PLAIN})
    assert cost(SPEC).parameters - cost(plain).parameters == N_TABLES * 512 * 32
    assert "tables" not in plain.to_json()["arm"]
    assert TrainSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
