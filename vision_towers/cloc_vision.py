"""CLOC's tower: any native ViT whose regions, and texts, are read by the Prompter (arXiv 2410.02746, Sec. 3.3)."""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .errors import UserError
from .outputs import TowerFeatures, TowerOutput
from .positions import grid_centres
from .prompter import POOLS, BoxHead, Prompter, in_unit_square
from .roi_pool import roi_mean
from .wrapped_model import WrappedVisionConfig, WrappedVisionModel, with_layer

REGION_POOLS = ("prompter", "roi_align")
ROI_SIZE = 7


@strict
class ClocVisionConfig(WrappedVisionConfig):
    """`WrappedVisionConfig` plus the Prompter's choices; see `Prompter` for what the paper says of them.

    Args:
        projection_dim: width of the space that regions and texts share.
        prompter_heads: attention heads of the Prompter.
        prompter_pool: "image", "prompt" or "all" tokens are averaged.
        add_token_pos: positions are added to the image tokens; None: where the tower's own positions are rotary.
        region_pool: "prompter", or "roi_align": boxes are read by RoIAlign of the image tokens instead, as in the
            paper's ablation (Table 2, "- Prompter"; its size is not stated, we average `ROI_SIZE` x `ROI_SIZE`). Texts
            are located by the Prompter either way.
    """

    model_type = "cloc_vision_model"

    projection_dim: int = 512
    prompter_heads: int = 1
    prompter_pool: str = "image"
    add_token_pos: bool | None = None
    region_pool: str = "prompter"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.region_pool not in REGION_POOLS:
            raise UserError(f"region_pool must be one of {', '.join(REGION_POOLS)}, got {self.region_pool!r}.")
        if self.prompter_pool not in POOLS:
            raise UserError(f"prompter_pool must be one of {', '.join(POOLS)}, got {self.prompter_pool!r}.")
        if self.prompter_heads < 1 or self.hidden_size % self.prompter_heads:
            raise UserError(f"prompter_heads must divide the width {self.hidden_size}, got {self.prompter_heads}.")


@dataclass
class ClocVisionOutput(TowerOutput):
    """`TowerOutput` plus what text prompts give.

    `text_prompt_embeds (B, T, hidden_size)`: the Prompter's answers, not normalised. `text_boxes (B, T, 4)` float32:
    where each text is, xyxy in pixels of the input.
    """

    text_prompt_embeds: torch.Tensor | None = None
    text_boxes: torch.Tensor | None = None


class ClocVisionModel(WrappedVisionModel):
    """A native ViT with a Prompter, a projection of its embeddings into the joint space, and a box head.

    `region_embeds` are the Prompter's embeddings before the projection, as wide as the ViT; `projection` takes them to
    the texts.
    """

    config: ClocVisionConfig
    config_class = ClocVisionConfig
    base_model_prefix = "cloc"

    def __init__(self, config: ClocVisionConfig):
        super().__init__(config)
        self._add_readout()
        self.post_init()

    def _add_readout(self) -> None:
        config = self.config
        positions = self.spec.positions == "rotary" if config.add_token_pos is None else config.add_token_pos
        width, joint = self.spec.hidden_size, config.projection_dim
        self.prompter = Prompter(width, joint, config.prompter_heads, config.prompter_pool, positions)
        self.projection = nn.Linear(width, joint, bias=False)
        self.box_head = BoxHead(width)

    def new_readout(self, device: torch.device, dtype: torch.dtype) -> None:
        self._add_readout()
        for module in (self.prompter, self.projection, self.box_head):
            module.apply(self._init_weights).to(device, dtype)

    def read_regions(
        self, tokens: torch.Tensor, grid_hw: tuple[int, int], input_hw: tuple[int, int], boxes: torch.Tensor
    ) -> torch.Tensor:
        if self.config.region_pool == "roi_align":
            patches = tokens[:, -grid_hw[0] * grid_hw[1] :]
            pooled = roi_mean(patches, grid_hw, boxes, self.spec.patch_size, ROI_SIZE)
            prompter = self.prompter
            unused = (prompter.corner, prompter.position.weight, prompter.position.bias)
            return pooled + 0.0 * sum(each.sum() for each in unused)  # without a gradient DDP would wait for them
        return self._prompt(tokens, grid_hw, input_hw, self.prompter.box_prompts(in_unit_square(boxes, input_hw)))

    def _prompt(
        self, tokens: torch.Tensor, grid_hw: tuple[int, int], input_hw: tuple[int, int], prompts: torch.Tensor
    ) -> torch.Tensor:
        rows, columns = grid_hw
        patches = tokens[:, -rows * columns :]
        if prompts.shape[1] == 0:
            return patches.new_zeros(len(patches), 0, patches.shape[-1])
        centres = grid_centres(rows, columns, patches.device)
        # What is left over at the right and at the bottom is no patch: the grid covers so much of the input.
        covered = [count * self.spec.patch_size / side for count, side in ((columns, input_hw[1]), (rows, input_hw[0]))]
        return self.prompter(patches, centres * centres.new_tensor(covered), prompts.to(patches.dtype))

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        features: TowerFeatures | None = None,
        texts: torch.Tensor | None = None,
        **kwargs,
    ):
        """As `WrappedVisionModel.forward`; with `texts (B, T, projection_dim)`, embeddings of texts in the joint space,
        also where each of them is. Returns `ClocVisionOutput` then.

        Raises:
            UserError: as there; with `texts` also neither pixels nor the needed features, or `return_dict=False`.
        """
        if texts is None:
            return super().forward(pixel_values, boxes, region_counts, features, **kwargs)
        layer = self.region_feature_layers[0]
        if features is None:
            if pixel_values is None:
                raise UserError("give pixel_values, or the features of an earlier call.")
            asked = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
            if kwargs.pop("return_dict", True) is False:
                raise UserError("text prompts are answered by name: leave return_dict on.")
            needed = with_layer(asked, layer)
            native = super().forward(pixel_values, boxes, region_counts, output_hidden_states=needed, **kwargs)
            assert isinstance(native, TowerOutput)
            found = TowerFeatures.from_output(
                native, (pixel_values.shape[-2], pixel_values.shape[-1]), self.spec.patch_size
            )
            output = ClocVisionOutput(**native)
            if not asked:
                output.hidden_states = None
        else:
            found, output = features, ClocVisionOutput()
            if layer not in found.hidden:
                raise UserError(f"features need the hidden state {layer}.")
            if boxes is not None:
                answer = super().forward(boxes=boxes, region_counts=region_counts, features=found)
                assert isinstance(answer, TowerOutput)
                output.region_embeds = answer.region_embeds
        prompts = self.prompter.text_prompts(texts)
        embeds = self._prompt(found.hidden[layer], found.grid_hw, found.input_hw, prompts)
        height, width = found.input_hw
        size = torch.tensor([width, height, width, height], device=embeds.device)
        output.text_prompt_embeds = embeds
        output.text_boxes = self.box_head(embeds).float() * size
        return output
