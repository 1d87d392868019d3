"""The options that all engines of `regiontower label` share, stated once."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .options import Device, ImageRoot, Json, Out

Images = Annotated[Path, typer.Argument(help="Folder of images, searched through; with --format a file of records.")]
Form = Annotated[str, typer.Option("--form", help="Of the shards: jsonl, or webdataset (needs the extra stream).")]
SourceFormat = Annotated[
    str | None, typer.Option("--format", help="IMAGES is a file of records: records, xywh_jsonl, coco, ...")
]
PerShard = Annotated[int, typer.Option(min=1, help="Images a shard.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a call of the models.")]
Place = Annotated[str, typer.Option("--engine", help="local: this machine; ray: a Ray cluster (needs the extra ray).")]
Processes = Annotated[int, typer.Option(min=1, help="How many, each with models of its own.")]
NearDuplicates = Annotated[
    int | None,
    typer.Option(min=0, help="Leave out pictures whose 256-bit hash differs from an earlier one's in at most so many."),
]
MaxElongation = Annotated[
    float, typer.Option(min=1, help="Leave out images whose longer side is more than so many times the shorter.")
]
Fresh = Annotated[bool, typer.Option("--overwrite", help="Start again where labels of another run stand.")]


@dataclass(frozen=True)
class Shared:
    """What every engine is asked. Fields are in the order of `--help`, after the engine's own options."""

    images: Images
    out: Out
    form: Form = "jsonl"
    format_: SourceFormat = None
    image_root: ImageRoot = None
    per_shard: PerShard = 1000
    batch_size: BatchSize = 8
    engine: Place = "local"
    processes: Processes = 1
    near_duplicates: NearDuplicates = None
    max_elongation: MaxElongation = 40.0
    device: Device = "auto"
    overwrite: Fresh = False
    json_: Json = False

    def source(self) -> Any:
        """The `ImageSource`."""
        from .train_stages.label import ImageSource

        return ImageSource(self.images, self.format_, self.image_root)

    def run(self, dtype: str = "auto") -> Any:
        """The `RunConfig`. Raises UserError for a choice that there is not."""
        from .train_stages.label import RunConfig
        from .train_stages.label.shard import FORMATS
        from .vision_towers.errors import UserError

        for option, given, known in (("form", self.form, FORMATS), ("engine", self.engine, ("local", "ray"))):
            if given not in known:
                raise UserError(f"--{option} must be one of {', '.join(known)}; got {given!r}.")
        return RunConfig(
            self.form,  # pyright: ignore
            self.per_shard,
            self.batch_size,
            self.processes,
            self.engine,  # pyright: ignore
            self.near_duplicates,
            self.max_elongation,
            self.device,
            dtype,
            self.overwrite,
        )


def with_shared(command: Callable[..., None]) -> Callable[..., None]:
    """`command(shared, *, its own options)` -> the same with every field of `Shared` as an option of its own, as typer
    wants them: images first, then the command's own options, then the rest."""
    hints = get_type_hints(Shared, include_extras=True)
    given = {
        field.name: inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.name in ("images", "out") else field.default,
            annotation=hints[field.name],
        )
        for field in fields(Shared)
    }
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    first = [given.pop(name) for name in ("images", "out")]

    @wraps(command)
    def called(**options: Any) -> None:
        shared = {field.name: options.pop(field.name) for field in fields(Shared)}
        command(Shared(**shared), **options)

    parameters = [*first, *own, *given.values()]
    called.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called
