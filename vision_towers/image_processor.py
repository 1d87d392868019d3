"""The image processor that belongs to a tower."""

from transformers import CLIPImageProcessor, PreTrainedConfig

from .describe import describe_tower


def tower_image_processor(config: PreTrainedConfig) -> CLIPImageProcessor:
    """Resize the short side, no centre crop, rescale, normalise: size, mean and std from `describe_tower`.

    A centre crop would cut boxes off, so there is none; regiontower letterboxes before this processor.
    """
    spec = describe_tower(config)
    return CLIPImageProcessor(
        size={"height": spec.image_size, "width": spec.image_size},
        do_center_crop=False,
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
    )
