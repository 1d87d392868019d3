"""Parts of a model: every parameter in one, frozen ones frozen, weight decay where it belongs; step 1 checked."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn

from regiontower.train_stages.engine import AuditError, Part, apply_parts, part_rows, trainability_table
from regiontower.train_stages.engine.audit import PATIENCE, MoveAudit, checksum
from regiontower.train_stages.engine.parts import frozen_modules, parameter_groups
from regiontower.vision_towers.errors import UserError


class Tiny(nn.Module):
    """Two layers, a table, a norm, and an output tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4)
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.tower_head = nn.Linear(4, 4)
        self.positions = nn.Parameter(torch.zeros(1, 3, 4))
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.table.weight
        self.register_buffer("count", torch.zeros(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(self.tower_head(self.tower(self.table(ids)) + self.positions)).square().mean()


def parts(tower: float = 0.0, rest: float = 0.1) -> list[Part]:
    return [Part("tower", ("tower",), tower), Part("rest", ("table", "output", "tower_head", "positions"), rest)]


IDS = torch.tensor([[1, 2, 3]])


def test_a_prefix_ends_at_a_dot_and_tied_parameters_count_once():
    model = Tiny()
    found = apply_parts(model, parts())
    assert {name for name, part in found.items() if part.name == "tower"} == {
        "tower.0.weight",
        "tower.0.bias",
        "tower.1.weight",
        "tower.1.bias",
    }
    assert found["tower_head.weight"].name == "rest" and "output.weight" not in found
    assert not model.tower[0].weight.requires_grad and model.tower_head.weight.requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([Part("tower", ("tower",), 1.0)], "positions belongs to no part"),
        ([*parts(), Part("twice", ("tower.1",), 1.0)], "tower.1.weight belongs to the parts tower and twice"),
        ([*parts(), Part("gone", ("projector",), 1.0)], "no parameter under 'projector'"),
        ([*parts(), Part("tower", ("tower",), 1.0)], "same name"),
        (parts(0.0, 0.0), "nothing would be trained"),
    ],
)
def test_wrong_parts_are_named(change, words):
    with pytest.raises(UserError, match=words):
        apply_parts(Tiny(), change)


def test_a_tied_tensor_in_two_parts_is_refused():
    both = [Part("a", ("table", "tower", "tower_head", "positions"), 0.0), Part("b", ("output",), 0.1)]
    with pytest.raises(UserError, match=r"table\.weight belongs to the parts a and b"):
        apply_parts(Tiny(), both)


def test_the_empty_prefix_is_the_whole_model():
    assert set(apply_parts(Tiny(), [Part("all", ("",), 0.1)])) == {name for name, _ in Tiny().named_parameters()}


def test_groups_have_their_rate_and_spare_tables_and_vectors_from_decay():
    model = Tiny()
    groups = parameter_groups(model, parts(0.01, 0.1), weight_decay=0.5)
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.5 for p in group["params"]}
    assert decayed == {id(model.tower[0].weight), id(model.tower_head.weight)}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["part"]: group["lr"] for group in groups} == {"tower": 0.01, "rest": 0.1}
    assert {group["part"] for group in parameter_groups(model, parts(), 0.5)} == {"rest"}


def test_the_table_counts_parameters():
    model = Tiny()
    model.tower.to(torch.bfloat16)
    rows = {row.part: row for row in part_rows(model, parts())}
    assert (rows["tower"].parameters, rows["tower"].trainable, rows["tower"].dtype) == (28, 0, "bfloat16")
    assert rows["rest"].trainable == rows["rest"].parameters == 28 + 20 + 12
    console = Console(width=100)
    with console.capture() as text:
        console.print(trainability_table(model, parts()))
    assert "frozen" in text.get() and "0.1" in text.get() and "88" in text.get()


def test_frozen_modules_are_those_the_parts_name():
    model = Tiny()
    assert frozen_modules(model, parts()) == [model.tower]


def test_a_checksum_sees_the_smallest_change():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64):
        tensor = torch.ones(5, 3).to(dtype)
        before = checksum(tensor)
        assert checksum(tensor.T.contiguous()) == before
        tensor[2, 1] = 0 if dtype in (torch.bool, torch.int64) else tensor[2, 1] * (1 + 2**-7)
        assert checksum(tensor) != before


def stepped(model: Tiny, chosen: list[Part], loss=None) -> MoveAudit:
    """One SGD step under the audit."""
    apply_parts(model, chosen)
    audit = MoveAudit(model, chosen)
    optimizer = torch.optim.SGD(parameter_groups(model, chosen, 0.0))
    (model(IDS) if loss is None else loss(model)).backward()
    optimizer.step()
    return audit


def test_a_good_step_passes_and_reports():
    result = stepped(Tiny(), parts()).check(1)
    assert result is not None
    assert result.moved == result.trained == {"rest": 4}
    assert result.frozen_unchanged == 4 and result.no_gradient == []


def test_a_frozen_tensor_that_changes_stops_the_run():
    model = Tiny()
    audit = stepped(model, parts())
    with torch.no_grad():
        model.tower[1].bias[0] += 1e-6
    with pytest.raises(AuditError, match=r"tower\.1\.bias is frozen but changed at step 1"):
        audit.check(1)


def test_a_frozen_buffer_counts_too():
    model = Tiny()
    model.tower.register_buffer("mean", torch.zeros(2))
    audit = stepped(model, parts())
    model.tower.mean += 1
    with pytest.raises(AuditError, match=r"tower\.mean is frozen"):
        audit.check(1)


def test_a_part_outside_the_loss_stops_the_run():
    audit = stepped(Tiny(), parts(tower=0.1), loss=lambda model: model.table(IDS).square().mean())
    with pytest.raises(AuditError, match="Part tower got no gradient at step 1"):
        audit.check(1)


def test_a_step_too_small_for_the_dtype_stops_the_run():
    model = Tiny()
    nn.init.ones_(model.positions)  # next to zero every step is large enough
    nn.init.ones_(model.tower_head.bias)
    audit = stepped(model.to(torch.bfloat16), parts(rest=1e-12))
    with pytest.raises(AuditError, match=r"rest did not move .* too small for its dtype torch\.bfloat16"):
        audit.check(1)


def test_single_tensors_without_gradient_are_only_listed():
    model = Tiny()
    audit = stepped(model, parts(tower=0.1), loss=lambda m: m.tower_head(m.tower(m.table(IDS))).square().mean())
    result = audit.check(1)
    assert result is not None and result.no_gradient == ["positions"]


def test_zero_gradients_are_waited_for_but_not_for_ever():
    model = Tiny()
    audit = stepped(
        model, parts(tower=0.1), loss=lambda m: m.table(IDS).square().mean() + 0 * m.tower(m.table(IDS)).sum()
    )
    assert audit.check(1) is None
    with torch.no_grad():  # weight decay alone is no training
        model.tower[0].weight *= 0.9
    for step in range(2, PATIENCE):
        assert audit.check(step) is None
    with pytest.raises(AuditError, match="Part tower got only zero gradients"):
        audit.check(PATIENCE)
