"""The Prompter against the layer that the paper describes: attention over [prompt ; image], once a prompt."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regiontower.vision_towers.positions import grid_centres, sinusoidal_2d
from regiontower.vision_towers.prompter import CHUNK, Prompter

WIDTH, TEXT, GRID = 16, 12, (3, 5)


def prompter(**fields) -> Prompter:
    torch.manual_seed(0)
    made = Prompter(WIDTH, TEXT, **fields).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def inputs(regions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 15, WIDTH, generator=generator, dtype=torch.float64)
    corners = torch.rand(2, regions, 2, 2, generator=generator, dtype=torch.float64).sort(dim=2).values
    texts = torch.randn(2, regions, TEXT, generator=generator, dtype=torch.float64)
    return tokens, grid_centres(*GRID).double(), corners.flatten(2), texts


def twin(made: Prompter, tokens: torch.Tensor, centres: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """One image `(N, D)`, one prompt `(P, D)`: everything concatenated, by torch's own attention."""
    image = made.token_norm(tokens)
    if made.add_token_pos:
        image = image + made.position(sinusoidal_2d(centres.float()).double())
    states = torch.cat([prompt, image])
    q, k, v = made.qkv(made.norm_1(states)).chunk(3, dim=-1)
    heads = (part.view(len(states), made.num_heads, -1).transpose(0, 1) for part in (q, k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1)
    states = states + made.out(mixed)
    states = states + made.mlp(made.norm_2(states))
    first = {"all": 0, "image": len(prompt)}.get(made.pool)
    return states[: len(prompt)].mean(0) if first is None else states[first:].mean(0)


@pytest.mark.parametrize("pool", ["image", "prompt", "all"])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("add_token_pos", [False, True])
@pytest.mark.parametrize("kind", ["box", "text"])
def test_equals_one_layer_over_prompt_and_image(pool, num_heads, add_token_pos, kind):
    made = prompter(num_heads=num_heads, pool=pool, add_token_pos=add_token_pos)
    tokens, centres, boxes, texts = inputs(3)
    prompts = made.box_prompts(boxes) if kind == "box" else made.text_prompts(texts)
    assert prompts.shape == (2, 3, {"box": 2, "text": 1}[kind], WIDTH)
    found = made(tokens, centres, prompts)
    pairs = [[twin(made, tokens[i], centres, prompt) for prompt in prompts[i]] for i in range(len(tokens))]
    expected = torch.stack([torch.stack(row) for row in pairs])
    torch.testing.assert_close(found, expected)
    parameters = [p for name, p in made.named_parameters() if kind == "text" or not name.startswith("text.")]
    for a, b in zip(
        torch.autograd.grad(found.sin().sum(), parameters, retain_graph=True, allow_unused=True),
        torch.autograd.grad(expected.sin().sum(), parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_scores_far_above_and_below_each_other_stay_finite():
    made = prompter().float()
    with torch.no_grad():
        made.qkv.weight.mul_(60)
    tokens, centres, boxes, _ = inputs(2)
    found = made(tokens.float(), centres.float(), made.box_prompts(boxes.float()))
    assert found.isfinite().all()
    found.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@torch.no_grad()
def test_chunks_bound_the_memory_and_change_nothing():
    made = prompter()
    tokens, centres, boxes, _ = inputs(3 * CHUNK)
    prompts = made.box_prompts(boxes)
    with Largest() as of_one_chunk:
        made(tokens, centres, prompts[:, :CHUNK])
    with Largest() as of_three:
        together = made(tokens, centres, prompts)
    assert of_three.elements == of_one_chunk.elements == 2 * CHUNK * 15 * 4 * WIDTH  # the MLP on every image token
    alone = torch.cat([made(tokens, centres, prompts[:, i : i + 1]) for i in range(3 * CHUNK)], dim=1)
    torch.testing.assert_close(together, alone)


def test_grid_centres_run_along_the_rows():
    centres = grid_centres(2, 4)
    torch.testing.assert_close(centres[:2], torch.tensor([[0.125, 0.25], [0.375, 0.25]]))
    torch.testing.assert_close(centres[-1], torch.tensor([0.875, 0.75]))


def test_the_code_tells_close_points_apart_and_x_from_y():
    code = sinusoidal_2d(torch.tensor([[0.5, 0.25], [0.505, 0.25], [0.25, 0.5]]))
    assert code.shape == (3, 64)
    assert (code[0] - code[1]).norm() > 0.5 and (code[0] - code[2]).norm() > 1
    torch.testing.assert_close(code[0, :32], code[2, 32:])


@torch.no_grad()
@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_in_half_precision_weights_of_a_row_still_sum_to_one(sharp):
    """Beside the concatenated layer in bf16, whose attention torch computes in float32 inside."""
    torch.manual_seed(0)
    made = Prompter(64, TEXT)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1 * sharp if parameter.ndim == 2 else 0.3)
    tokens, prompts = torch.randn(1, 256, 64), torch.randn(1, 2, 2, 64)
    centres = grid_centres(16, 16)
    exact = made.double()(tokens.double(), centres.double(), prompts.double()).float()
    made.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = made(tokens, centres, prompts).float()
        beside = torch.stack([twin(made, tokens[0], centres, prompt) for prompt in prompts[0]])[None].float()
    error, usual = (found - exact).norm() / exact.norm(), (beside - exact).norm() / exact.norm()
    assert error < 1.5 * usual < 0.1
