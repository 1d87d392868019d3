"""`regiontower label`: region records from raw images, by the data engines of the papers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, Dtype, ImageRoot, Json, Out, report

app = typer.Typer()
label = typer.Typer(no_args_is_help=True, help="Region records from raw images: the data engines of the papers.")
app.add_typer(label, name="label")

Images = Annotated[Path, typer.Argument(help="Folder of images, searched through; with --format a file of records.")]
Form = Annotated[str, typer.Option("--form", help="Of the shards: jsonl, or webdataset (needs the extra stream).")]
SourceFormat = Annotated[
    str | None, typer.Option("--format", help="IMAGES is a file of records: records, xywh_jsonl, coco, ...")
]
PerShard = Annotated[int, typer.Option(min=1, help="Images a shard.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a call of the models.")]
Processes = Annotated[int, typer.Option(min=1, help="Of this machine, each with models of its own.")]
NearDuplicates = Annotated[
    int | None,
    typer.Option(min=0, help="Leave out pictures whose 256-bit hash differs from an earlier one's in at most so many."),
]
Fresh = Annotated[bool, typer.Option("--overwrite", help="Start again where labels of another run stand.")]


@label.command("rice-ocr")
def rice_ocr(
    images: Images,
    out: Out,
    min_confidence: Annotated[float, typer.Option(min=0, max=1, help="Regions above it are kept.")] = 0.7,
    form: Form = "jsonl",
    format_: SourceFormat = None,
    image_root: ImageRoot = None,
    per_shard: PerShard = 1000,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    near_duplicates: NearDuplicates = None,
    device: Device = "auto",
    overwrite: Fresh = False,
    json_: Json = False,
) -> None:
    """RICE's text regions: PP-OCR through rapidocr."""
    from .train_stages.label.ocr import OcrConfig

    run = _run(form, per_shard, batch_size, processes, near_duplicates, device, "auto", overwrite)
    _label("rice-ocr", OcrConfig(min_confidence), _source(images, format_, image_root), out, run, json_)


@label.command("rice-objects")
def rice_objects(
    images: Images,
    out: Out,
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
    iterations: Annotated[int, typer.Option(min=1, help="Of k-means.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of k-means.")] = 0,
    form: Form = "jsonl",
    format_: SourceFormat = None,
    image_root: ImageRoot = None,
    per_shard: PerShard = 1000,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    near_duplicates: NearDuplicates = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Fresh = False,
    json_: Json = False,
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
    run = _run(form, per_shard, batch_size, processes, near_duplicates, device, dtype, overwrite)
    kmeans = KMeansConfig(clusters, iterations, seed=seed)
    result = label_objects(config, kmeans, _source(images, format_, image_root), out, run)
    page = out / PAGE
    report({**result.report(), "clusters": clusters, "page": str(page)}, json_, f"{result.summary()}\nclusters: {page}")


@label.command()
def vesl(
    images: Images,
    out: Out,
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
    form: Form = "jsonl",
    format_: SourceFormat = None,
    image_root: ImageRoot = None,
    per_shard: PerShard = 1000,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    near_duplicates: NearDuplicates = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Fresh = False,
    json_: Json = False,
) -> None:
    """CLOC's labels: captions, their noun phrases, and a box for each phrase that is found."""
    from .train_stages.label.vesl import VeslConfig

    config = VeslConfig(
        detector, captioner, prompt, max_new_tokens, detector_size or None, threshold, max_phrases, nms_iou, tagger
    )
    run = _run(form, per_shard, batch_size, processes, near_duplicates, device, dtype, overwrite)
    _label("vesl", config, _source(images, format_, image_root), out, run, json_, tokenizer)


@label.command()
def granular(
    images: Images,
    out: Out,
    scorer: Annotated[str, typer.Option(help="CLIP or SigLIP that scores tags and captions: folder or hub id.")],
    detector: Annotated[str, typer.Option(help="Of phrases (OWLv2, ...: it looks for the tags) or classes (DETR).")],
    tags: Annotated[Path, typer.Option(help="Text file, a tag a line.")],
    captioner: Annotated[
        str | None, typer.Option(help="Any image-text-to-text model; the records' captions when absent.")
    ] = None,
    mask_model: Annotated[str | None, typer.Option(help="SAM or the like; no masks when absent.")] = None,
    prompt: Annotated[str, typer.Option(help="What a chat model is asked.")] = "Describe this image in one sentence.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 64,
    min_tag_score: Annotated[float, typer.Option(help="Cosine of image and tag.")] = 0.22,
    max_tags: Annotated[int, typer.Option(min=1, help="Of an image.")] = 20,
    min_caption_score: Annotated[float, typer.Option(help="Cosine of picture and caption.")] = 0.22,
    detector_size: Annotated[int, typer.Option(min=0, help="Pixels of the detector's input; 0: its own.")] = 0,
    min_box_score: Annotated[float, typer.Option(min=0, max=1, help="Of a detection.")] = 0.3,
    nms_iou: Annotated[float, typer.Option(min=0, max=1, help="Boxes of a text that overlap more are one.")] = 0.7,
    image_min_edge: Annotated[int, typer.Option(min=0, help="Pixels; larger images are kept.")] = 448,
    max_aspect: Annotated[float, typer.Option(min=1, help="Longer side over shorter, of images and boxes.")] = 3,
    box_min_area: Annotated[float, typer.Option(min=0, help="Square pixels; larger boxes are kept.")] = 10_000,
    tokenizer: Annotated[str | None, typer.Option(help="To count text tokens; words are counted when absent.")] = None,
    form: Form = "jsonl",
    format_: SourceFormat = None,
    image_root: ImageRoot = None,
    per_shard: PerShard = 1000,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    near_duplicates: NearDuplicates = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Fresh = False,
    json_: Json = False,
) -> None:
    """UMG-CLIP's labels: tags and captions of the image and of its boxes, and masks."""
    from .train_stages.label.granular import GranularConfig

    config = GranularConfig(
        scorer,
        detector,
        str(tags),
        captioner,
        mask_model,
        prompt,
        max_new_tokens,
        min_tag_score=min_tag_score,
        max_tags=max_tags,
        min_caption_score=min_caption_score,
        detector_size=detector_size or None,
        min_box_score=min_box_score,
        nms_iou=nms_iou,
        image_min_edge=image_min_edge,
        max_aspect=max_aspect,
        box_min_area=box_min_area,
    )
    run = _run(form, per_shard, batch_size, processes, near_duplicates, device, dtype, overwrite)
    _label("granular", config, _source(images, format_, image_root), out, run, json_, tokenizer)


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


def _run(
    form: str,
    per_shard: int,
    batch_size: int,
    processes: int,
    near_duplicates: int | None,
    device: str,
    dtype: str,
    overwrite: bool,
) -> Any:
    from .train_stages.label import RunConfig
    from .train_stages.label.shard import FORMATS
    from .vision_towers.errors import UserError

    if form not in FORMATS:
        raise UserError(f"--form must be one of {', '.join(FORMATS)}; got {form!r}.")
    return RunConfig(form, per_shard, batch_size, processes, near_duplicates, device, dtype, overwrite)  # pyright: ignore


def _source(images: Path, format_: str | None, image_root: Path | None) -> Any:
    from .train_stages.label import ImageSource

    return ImageSource(images, format_, image_root)


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


def _label(
    engine: str, config: Any, source: Any, out: Path, run: Any, as_json: bool, tokenizer: str | None = None
) -> None:
    from .train_stages.label import find_engine, label_images
    from .train_stages.label.statistics import label_statistics, read_shards

    result = label_images(find_engine(engine), config, source, out, run)
    found = label_statistics(read_shards(result.shards), tokenizer)
    statistics = {
        "regions_per_image": round(found.regions_per_image, 2),
        "image_text": found.image_tokens,
        "region_text": found.region_tokens,
        "counted_in": found.tokens,
    }
    whole = {**result.report(), "statistics": statistics}
    report(whole, as_json, f"{found.table()}\n\n{result.summary()}")
