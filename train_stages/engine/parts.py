"""Parts of a model: which parameters train together, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from rich.table import Table
from torch import nn

from ...vision_towers.errors import UserError
from .layer_decay import layer_factors
from .shards import class_shards


@dataclass(frozen=True)
class Part:
    """A named piece of a model with one learning rate.

    Attributes:
        name: what tables, logs and `lr` blocks call it ("tower", "projector", "llm", ...).
        prefixes: names of modules or parameters as `named_parameters()` gives them; a prefix covers itself and
            everything below it (`model.vision_tower` covers `model.vision_tower.layers...`). `""` covers the model.
        lr: peak learning rate; 0 freezes the part (no gradients, modules in eval mode).
        adapters: of what stands below the prefixes, True takes only the tensors of adapters (LoRA, DoRA), False only
            the others, None all.
        layer_decay: see `layer_decay.layer_factors`; 1 is one rate for all.
    """

    name: str
    prefixes: tuple[str, ...]
    lr: float
    adapters: bool | None = None
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.prefixes, str):
            raise TypeError(f"part {self.name}: prefixes is a tuple of strings")
        if self.lr < 0:
            raise UserError(f"The learning rate of {self.name} is {self.lr}; it must be 0 (frozen) or more.")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"The layer decay of {self.name} is {self.layer_decay}; it must be above 0, at most 1.")

    def covers(self, name: str) -> bool:
        """Whether the parameter or buffer of this name belongs to the part."""
        if self.adapters is not None and is_adapter(name) != self.adapters:
            return False
        return any(not prefix or name == prefix or name.startswith(prefix + ".") for prefix in self.prefixes)


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of LoRA's or DoRA's, by the names of peft (`...q_proj.lora_A.default.weight`)."""
    return ".lora_" in name


@dataclass(frozen=True)
class PartRow:
    """One line of the start-up table."""

    part: str
    parameters: int
    trainable: int
    lr: float
    dtype: str
    layer_decay: float = 1.0


def part_of_each(model: nn.Module, parts: Sequence[Part]) -> dict[str, Part]:
    """Name of every parameter (tied ones once) -> its part.

    Raises:
        UserError: a parameter that no part or several parts cover (a tied parameter counts under all its names), a
            prefix that covers nothing, or two parts of one name.
    """
    names = [part.name for part in parts]
    if len(set(names)) != len(names):
        raise UserError(f"Two parts have the same name: {', '.join(sorted(names))}.")
    every_name = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    owners: dict[int, dict[str, Part]] = {}
    for name, key in every_name:
        owners.setdefault(key, {}).update({part.name: part for part in parts if part.covers(name)})
    for part in parts:
        for prefix in part.prefixes:
            if not any(replace(part, prefixes=(prefix,)).covers(name) for name, _ in every_name):
                what = "adapter" if part.adapters else "parameter"
                raise UserError(f"Part {part.name}: the model has no {what} under {prefix!r}.")
    found: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        owner = owners[id(parameter)]
        if len(owner) != 1:
            raise UserError(
                f"Parameter {name} belongs to {'no part' if not owner else 'the parts ' + ' and '.join(owner)}; "
                "every parameter must belong to exactly one."
            )
        found[name] = next(iter(owner.values()))
    return found


def apply_parts(model: nn.Module, parts: Sequence[Part]) -> dict[str, Part]:
    """Set `requires_grad` of every parameter by its part (lr 0 = frozen) and return `part_of_each`.

    Raises:
        UserError: see `part_of_each`; or nothing is left to train.
    """
    found = part_of_each(model, parts)
    if not any(part.lr for part in found.values()):
        raise UserError("Every part has learning rate 0: nothing would be trained.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(found[name].lr > 0)
    return found


def frozen_modules(model: nn.Module, parts: Sequence[Part]) -> list[nn.Module]:
    """The modules that frozen parts name: they run in eval mode (no dropout, no running statistics)."""
    modules = dict(model.named_modules())
    return [modules[prefix] for part in parts if not part.lr for prefix in part.prefixes if prefix in modules]


def frozen_names(model: nn.Module, parts: Sequence[Part]) -> frozenset[str]:
    """Entries of the state dict that do not train, and what quantization keeps beside them."""
    trained = [part for part in parts if part.lr]
    return frozenset(name for name in model.state_dict() if not any(part.covers(name) for part in trained))


def adapter_dropouts(model: nn.Module, parts: Sequence[Part]) -> list[nn.Module]:
    """The dropouts of trained adapters: they act although the layers that hold them may be frozen."""
    trained = [part for part in parts if part.lr and part.adapters]
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and any(part.covers(name) for part in trained)
    ]


Method = Literal["adamw", "muon", "row_adamw"]


def parameter_groups(
    model: nn.Module, parts: Sequence[Part], weight_decay: float, muon_lr: float | None = None
) -> list[dict]:
    """Optimizer groups `{"params", "lr", "weight_decay", "part", "method"}`, a few for each trained part.

    Weight decay spares what is no matrix of a linear map: tensors with at most one dimension longer than 1 (norms,
    biases, class tokens), tables of `nn.Embedding`, and `(1, N, D)` tables of positions or query tokens. Class centres
    of which each process holds a slice decay, however few rows are here: groups are the same in every process.

    method: "row_adamw" for what `model.row_sparse` (names) lists; with `muon_lr`, "muon" for the weights of `nn.Linear`
    other than the output head, at `muon_lr` times the part's learning rate; "adamw" for the rest. Tables, heads,
    centres and patch embeddings are not for Muon: their rows are separate things, not one map.
    """
    found = part_of_each(model, parts)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden: set[int] = set()
    if muon_lr is not None:
        hidden = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - tables
        hidden -= {id(module.weight) for name, module in model.named_modules() if name.split(".")[-1] == "lm_head"}
    sparse, shards = getattr(model, "row_sparse", frozenset()), class_shards(model)
    factors = _layer_factors(found)
    groups: dict[tuple[str, bool, Method, float], dict] = {}
    for name, parameter in model.named_parameters():
        part = found[name]
        if not part.lr:
            continue
        lr = part.lr * factors[name]
        method: Method = "row_adamw" if name in sparse else "muon" if id(parameter) in hidden else "adamw"
        decays = id(parameter) not in tables and (name in shards or not _is_table_or_vector(parameter))
        group = groups.setdefault(
            (part.name, decays, method, factors[name]),
            {
                "params": [],
                "lr": lr * (muon_lr or 1.0) if method == "muon" else lr,
                "weight_decay": weight_decay if decays else 0.0,
                "part": part.name,
                "method": method,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _entries(parameter: torch.Tensor) -> int:
    """Of the matrix itself, where bitsandbytes keeps two entries in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _layer_factors(found: Mapping[str, Part]) -> dict[str, float]:
    """Parameter -> what layer decay makes of its part's rate."""
    factors: dict[str, float] = {}
    for part in dict.fromkeys(found.values()):
        names = [name for name, owner in found.items() if owner is part]
        factors |= zip(names, layer_factors(names, part.layer_decay), strict=True)
    return factors


def _is_table_or_vector(parameter: torch.Tensor) -> bool:
    longer = sum(size > 1 for size in parameter.shape)  # by its shape alone: a shard cannot be squeezed
    return longer <= 1 or (parameter.ndim == 3 and parameter.shape[0] == 1)


def part_rows(model: nn.Module, parts: Sequence[Part]) -> list[PartRow]:
    """The start-up table as data, one row per part in the given order."""
    found = part_of_each(model, parts)
    rows = []
    for part in parts:
        mine = [parameter for name, parameter in model.named_parameters() if found[name] is part]
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in mine})
        count = sum(_entries(parameter) for parameter in mine)
        trained = count if part.lr else 0
        rows.append(PartRow(part.name, count, trained, part.lr, "+".join(dtypes), part.layer_decay))
    return rows


def trainability_table(model: nn.Module, parts: Sequence[Part]) -> Table:
    """The start-up table: part, parameters, trainable, learning rate, dtype, with a line of sums."""
    table = Table(title="What trains", title_justify="left")
    for heading in ("part", "parameters", "trainable", "learning rate", "dtype"):
        table.add_column(heading, justify="left" if heading in ("part", "dtype") else "right")
    rows = part_rows(model, parts)
    for row in rows:
        rate = f"{row.lr:g}" if row.lr else "frozen"
        rate += f", x {row.layer_decay:g} a layer" if row.lr and row.layer_decay != 1 else ""
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", rate, row.dtype)
    table.add_section()
    table.add_row("all", f"{sum(row.parameters for row in rows):,}", f"{sum(row.trainable for row in rows):,}", "", "")
    return table


def rows_as_data(rows: Sequence[PartRow]) -> list[Mapping]:
    """For stage.json."""
    return [asdict(row) for row in rows]
