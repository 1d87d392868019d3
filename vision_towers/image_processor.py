"""The image processor that belongs in a tower's directory."""

from transformers import CLIPImageProcessor, PreTrainedConfig

from .describe import describe_tower


def tower_image_processor(config: PreTrainedConfig) -> CLIPImageProcessor:
    """An image processor that agrees with the tower; `save_pretrained` it beside the tower's weights.

    It never crops: a centre crop cuts boxes off. regiontower letterboxes every picture to the tower's square itself,
    where the frame of the boxes is known, so for its images the resize here changes nothing. Used alone, the processor
    squeezes a picture that is not square; pass `do_resize=False` for a tower with `any_resolution` and an image whose
    sides are multiples of the patch.

    Args:
        config: configuration of any registered tower; size, mean and std come from its `TowerSpec`.
    Raises:
        UserError: the `model_type` is not registered.
    """
    spec = describe_tower(config)
    square = {"height": spec.image_size, "width": spec.image_size}
    return CLIPImageProcessor(
        size=square,
        do_center_crop=False,
        crop_size=square,  # unused here, but LLaVA tools read the input size off it
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
    )
