"""`regiontower label`: region records from raw images, by the data engines of the papers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .label_options import Shared, with_shared
from .options import Dtype, Json, report

app = typer.Typer()
label = typer.Typer(no_args_is_help=True, help="Region records from raw images: the data engines of the papers.")
app.add_typer(label, name="label")


@label.command("rice-ocr")
@with_shared
def rice_ocr(
    shared: Shared,
    *,
    min_confidence: Annotated[float, typer.Option(min=0, max=1, help="Regions above it are kept.")] = 0.7,
) -> None:
    """RICE's text regions: PP-OCR through rapidocr."""
    from .train_stages.label.ocr import OcrConfig

    _label("rice-ocr", OcrConfig(min_confidence), shared)


@label.command("rice-objects")
@with_shared
def rice_objects(
    shared: Shared,
    *,
    tower: Annotated[str, typer.Option(help="Whose features are clustered: a packaged name, folder or hub id.")],
    clusters: Annotated[int, typer.Option(min=1, help="How many (the paper: 1,000,000).")],
    proposals: Annotated[
        str, typer.Option(help="masks (of --mask-model), record (its own boxes), or segments (no weights).")
    ] = "masks",
    mask_model: Annotated[str | None, typer.Option(help="SAM or the like: folder or hub id.")] = None,
    image_min_edge: Annotated[int, typer.Option(min=1, help="Pixels.")] = 336,
    box_min_edge: Annotated[float, typer.Option(min=0, help="Pixels.")] = 128,
    nms_iou: Annotated[float, typer.Option(min=0, max=1, help="Boxes that overlap more are one.")] = 0.7,
    max_regions: Annotated[int, typer.Option(min=1, help="Of an image.")] = 32,
    feature: Annotated[str, typer.Option(help="masked_crop, crop or region.")] = "masked_crop",
    side: Annotated[int | None, typer.Option(min=1, help="Pixels of the square that regions are read from.")] = None,
    branches: Annotated[
        int, typer.Option(min=1, help="1: one k-means in memory; more: two levels, for many clusters (about sqrt).")
    ] = 1,
    probes: Annotated[int, typer.Option(min=1, help="Branches in which a region's nearest centre is searched.")] = 16,
    iterations: Annotated[int, typer.Option(min=1, help="Of k-means.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of k-means.")] = 0,
    dtype: Dtype = "auto",
) -> None:
    """RICE's object regions: proposals, features, k-means, and the nearest centre as the label."""
    from .train_stages.label.object_clusters import PAGE, KMeansConfig, label_objects
    from .train_stages.label.objects import ObjectsConfig

    config = _checked(
        ObjectsConfig,
        tower=tower,
        proposals=proposals,
        mask_model=mask_model,
        image_min_edge=image_min_edge,
        box_min_edge=box_min_edge,
        nms_iou=nms_iou,
        max_regions=max_regions,
        feature=feature,
        side=side,
    )
    kmeans = KMeansConfig(clusters, branches, iterations, seed=seed, probes=probes)
    result = label_objects(config, kmeans, shared.source(), shared.out, shared.run(dtype))
    page = shared.out / PAGE
    found = {**result.report(), "clusters": clusters, "page": str(page)}
    report(found, shared.json_, f"{result.summary()}\nclusters: {page}")


@label.command()
@with_shared
def vesl(
    shared: Shared,
    *,
    detector: Annotated[str, typer.Option(help="OWLv2, OWL-ViT or Grounding DINO: folder or hub id.")],
    captioner: Annotated[
        str | None, typer.Option(help="Any image-text-to-text model; the records' captions when absent.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What a chat model is asked.")] = "Describe this image in detail.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 128,
    detector_size: Annotated[int, typer.Option(min=0, help="Pixels of the detector's input; 0: its own.")] = 448,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Boxes above it are kept.")] = 0.1,
    max_phrases: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 20,
    nms_iou: Annotated[float, typer.Option(min=0, max=1, help="Boxes of a phrase that overlap more are one.")] = 0.7,
    tagger: Annotated[str, typer.Option(help="auto, nltk (needs its data) or textblob.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="To count text tokens; words are counted when absent.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """CLOC's labels: captions, their noun phrases, and a box for each phrase that is found."""
    from .train_stages.label.vesl import VeslConfig

    config = VeslConfig(
        detector, captioner, prompt, max_new_tokens, detector_size or None, threshold, max_phrases, nms_iou, tagger
    )
    _label("vesl", config, shared, dtype, tokenizer)


@label.command()
@with_shared
def granular(
    shared: Shared,
    *,
    scorer: Annotated[str, typer.Option(help="CLIP or SigLIP that scores tags and captions: folder or hub id.")],
    detector: Annotated[str, typer.Option(help="Of phrases (OWLv2, ...: it looks for the tags) or classes (DETR).")],
    tags: Annotated[Path | None, typer.Option(help="Text file, a tag a line, for the scorer to choose from.")] = None,
    tag_model: Annotated[
        str | None, typer.Option(help="Instead of --tags: a multi-label classifier whose classes are tags.")
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="Any image-text-to-text model; the records' captions when absent.")
    ] = None,
    mask_model: Annotated[str | None, typer.Option(help="SAM or the like; no masks when absent.")] = None,
    prompt: Annotated[str, typer.Option(help="What a chat model is asked.")] = "Describe this image in one sentence.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 64,
    min_tag_score: Annotated[float, typer.Option(help="Cosine of image and tag.")] = 0.22,
    min_tag_probability: Annotated[float, typer.Option(min=0, max=1, help="Of --tag-model.")] = 0.5,
    max_tags: Annotated[int, typer.Option(min=1, help="Of an image.")] = 20,
    min_caption_score: Annotated[float, typer.Option(help="Cosine of picture and caption.")] = 0.22,
    detector_size: Annotated[int, typer.Option(min=0, help="Pixels of the detector's input; 0: its own.")] = 0,
    min_box_score: Annotated[float, typer.Option(min=0, max=1, help="Of a detection.")] = 0.3,
    nms_iou: Annotated[float, typer.Option(min=0, max=1, help="Boxes of a text that overlap more are one.")] = 0.7,
    image_min_edge: Annotated[int, typer.Option(min=0, help="Pixels; larger images are kept.")] = 448,
    max_aspect: Annotated[float, typer.Option(min=1, help="Longer side over shorter, of images and boxes.")] = 3,
    box_min_area: Annotated[float, typer.Option(min=0, help="Square pixels; larger boxes are kept.")] = 10_000,
    tokenizer: Annotated[str | None, typer.Option(help="To count text tokens; words are counted when absent.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """UMG-CLIP's labels: tags and captions of the image and of its boxes, and masks."""
    from .train_stages.label.granular import GranularConfig

    config = GranularConfig(
        scorer,
        detector,
        tags=None if tags is None else str(tags),
        tag_model=tag_model,
        captioner=captioner,
        mask_model=mask_model,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        min_tag_score=min_tag_score,
        min_tag_probability=min_tag_probability,
        max_tags=max_tags,
        min_caption_score=min_caption_score,
        detector_size=detector_size or None,
        min_box_score=min_box_score,
        nms_iou=nms_iou,
        image_min_edge=image_min_edge,
        max_aspect=max_aspect,
        box_min_area=box_min_area,
    )
    _label("granular", config, shared, dtype, tokenizer)


@label.command()
def preview(
    shards: Annotated[Path, typer.Argument(help="Folder of a label run, a shard, or a file of region records.")],
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 12,
    columns: Annotated[int, typer.Option(min=1)] = 3,
    json_: Json = False,
) -> None:
    """Draw a page of labelled images."""
    from .train_stages.label.preview import preview_page

    images = preview_page(shards, out, count, columns)
    report({"page": str(out), "images": images}, json_, f"{images} images: {out}")


def _checked(config: Any, **fields: Any) -> Any:
    """The settings, or one sentence on a choice that there is not."""
    from pydantic import ValidationError

    from .vision_towers.errors import UserError

    try:
        return config(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][-1]).replace("_", "-")
        raise UserError(f"--{option}: {first['msg']}; got {first['input']!r}.") from None


def _label(engine: str, config: Any, shared: Shared, dtype: str = "auto", tokenizer: str | None = None) -> None:
    from .train_stages.label import find_engine, label_images
    from .train_stages.label.statistics import label_statistics, read_shards

    result = label_images(find_engine(engine), config, shared.source(), shared.out, shared.run(dtype))
    found = label_statistics(read_shards(result.shards), tokenizer)
    statistics = {
        "regions_per_image": round(found.regions_per_image, 2),
        "image_text": found.image_tokens,
        "region_text": found.region_tokens,
        "counted_in": found.tokens,
    }
    whole = {**result.report(), "statistics": statistics}
    report(whole, shared.json_, f"{found.table()}\n\n{result.summary()}")
