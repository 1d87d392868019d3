"""Layer-wise learning rate decay: the further a block is from the output, the slower it learns."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks|h)\.(\d+)(?:\.|$)")


def layer_factors(names: Sequence[str], decay: float) -> list[float]:
    """What each parameter's learning rate is multiplied by.

    BEiT's rule (Bao et al. 2021, arXiv 2106.08254, its `LayerDecayValueAssigner`): `decay ** (L + 1 - depth)`, where
    depth is 0 for what stands before the blocks (embeddings), `i + 1` in block `i` and `L + 1` after the blocks.

    Args:
        names: the parameters of one part, in the order of the model. Blocks are found by `layers.N`, `layer.N`,
            `blocks.N` or `h.N`; a part without any is left as it is.
        decay: above 0, at most 1; 1 changes nothing.
    """
    matches = [_LAYER.search(name) for name in names]
    numbers = [int(match[1]) if match else None for match in matches]
    found = [number for number in numbers if number is not None]
    if not found or decay == 1.0:
        return [1.0] * len(names)
    count = max(found) + 1
    first = next(index for index, number in enumerate(numbers) if number is not None)
    depths = [
        number + 1 if number is not None else 0 if index < first else count + 1 for index, number in enumerate(numbers)
    ]
    return [decay ** (count + 1 - depth) for depth in depths]
