"""One model in a form for others: what `regiontower export` does."""

from pathlib import Path
from typing import Any

from .mllm import (
    RegionLlavaConfig,
    RegionLlavaNextConfig,
    export_merged,
    export_mllm_remote_code,
    load_mllm,
    to_plain_llava,
    write_mllm_card,
)
from .mllm.adapters import adapter_base
from .vision_towers import UserError, export_native, export_remote_code, push_folder
from .vision_towers.packaged import model_source
from .vision_towers.remote_code import card_facts, model_type, new_folder

FORMS = ("remote-code", "native", "plain-llava")


def export_model(
    source: str | Path,
    out: str | Path,
    form: str = "remote-code",
    *,
    merge: bool = False,
    dtype: str = "auto",
    license: str | None = None,
    push_to: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write a tower or a RegionLlava, and upload it when `push_to` is given.

    Args:
        source: a packaged name, run directory, folder or hub id. out: a new or empty folder.
        form: "remote-code" (with its Python file: everything is kept), "native" (the ViT alone, of a tower) or
            "plain-llava" (a RegionLlava without its regions). It is not asked for with `merge`.
        merge: write the checkpoint that a LoRA run makes of its base. dtype: of its files, see `export_merged`.
        license: of the weights, as the hub writes it ("apache-2.0"); not on the card when absent.
        push_to: hub id "owner/name". private, revision: as of `push_folder`.
    Returns:
        `{"out", "form", "type", "files", "address"}`; the address is None when nothing was uploaded.
    Raises:
        UserError: nothing to open there, a form that the model has not, `out` holds files, or no upload.
    """
    if form not in FORMS:
        raise UserError(f"--as must be {', '.join(FORMS[:-1])} or {FORMS[-1]}, got {form!r}.")
    if push_to is None and (private or revision is not None):
        raise UserError("--private and --revision belong to an upload; give --push-to-hub OWNER/NAME, too.")
    if merge and form != FORMS[0]:
        raise UserError(f"--merge writes a checkpoint to go on with; export that one --as {form} afterwards.")
    if not merge and adapter_base(model_source(source)) is not None:
        raise UserError(f"{source} is a LoRA run: --merge writes it together with its base.")
    ours = (RegionLlavaConfig.model_type, RegionLlavaNextConfig.model_type)
    kind = RegionLlavaConfig.model_type if merge else model_type(source)
    folder = new_folder(out)
    names = {"repo_id": push_to, "license": license}
    if merge:
        form = "merged"
        export_merged(source, folder, dtype=dtype)
        write_mllm_card(folder, card_facts(source, **names))
    elif kind in ours:
        if form == "native":
            raise UserError(
                f"{str(source)!r} is a {kind}, and transformers has no such class: use --as plain-llava, which leaves "
                "the regions behind, or --as remote-code."
            )
        if form == "remote-code":
            export_mllm_remote_code(source, folder, **names)
        else:
            to_plain_llava(*load_mllm(source, device="cpu"), folder)
            write_mllm_card(folder, card_facts(source, **names))
    elif form == "plain-llava":
        raise UserError(f"{str(source)!r} is a {kind}; only a region_llava can be written as a plain LLaVA.")
    else:
        (export_native if form == "native" else export_remote_code)(source, folder, **names)
    address = None if push_to is None else push_folder(folder, push_to, private=private, revision=revision)
    files = sorted(path.name for path in folder.iterdir())
    return {"out": str(folder), "form": form, "type": model_type(folder), "files": files, "address": address}
