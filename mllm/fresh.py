"""First values of new parts, the same every time: the same swap gives the same file, so a file can be proved."""

import torch
from torch import nn

SEED = 0


def fresh_part(
    part: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    std: float,
    generator: torch.Generator | None = None,
) -> None:
    """Give a module on the meta device memory and first values, in place: linear weights and row ends normal with
    `std`, biases zero, norms one and zero. Drawn in float32, then rounded to `dtype`.

    generator: on the CPU; one with a fixed seed when absent.
    """
    part.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(SEED) if generator is None else generator
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(row_end := getattr(module, "row_end", None), nn.Parameter):
            nn.init.normal_(row_end, std=std, generator=generator)
    part.to(device, dtype)


def with_more_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """A table `(V, D)` grown to `(rows, D)`: each new row is the mean of the old ones (in float32, then rounded)."""
    if table.shape[0] >= rows:
        return table
    if table.is_meta:
        return table.new_empty(rows, table.shape[1])
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])
