"""Modules as one file: nothing missing, nothing left over, nothing taken twice."""

import ast
import subprocess
import sys

import pytest

from regiontower.vision_towers import UserError
from regiontower.vision_towers.bundle import bundle

SOURCES = {
    "describe": "from regiontower.vision_towers import describe_tower",
    "umg_clip": "from regiontower.vision_towers import UmgClipModel, ClocModel, RiceVisionModel, RoiVisionModel",
    "mllm": "from regiontower.mllm import RegionLlavaForConditionalGeneration, RegionLlavaProcessor",
}


def bundled(name: str) -> str:
    names = SOURCES[name].partition(" import ")[2]
    return bundle(f'"""Head."""\n{SOURCES[name]}\nEXPORTED = ({names},)\n')


@pytest.mark.parametrize("name", SOURCES)
def test_every_name_is_defined_and_every_import_is_used(name):
    text = bundled(name)
    assert ast.get_docstring(ast.parse(text)) == "Head."
    modules = {node.module or "" for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert not any(module.startswith("regiontower") for module in modules) and "" not in modules
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F", "-"],
        input=text,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


def test_what_is_not_needed_stays_out_and_comments_come_along():
    text = bundled("describe")
    assert "class UserError" in text and "def describe_tower" in text
    assert "RiceVisionModel" not in text and "CLIPImageProcessor" not in text
    assert "# The feature layer follows each family's use in LLaVA models" in text
    assert text.count('register_tower("clip_vision_model"') == 1
    assert text.index("class UserError") < text.index("def describe_tower") < text.index('register_tower("clip')


def test_the_file_does_what_the_modules_do():
    from transformers import CLIPVisionConfig

    from regiontower.vision_towers import describe_tower

    space = {"__name__": "alone"}
    exec(compile(bundled("describe"), "alone.py", "exec"), space)
    ours, theirs = (describe(CLIPVisionConfig()) for describe in (describe_tower, space["describe_tower"]))
    assert type(ours) is not type(theirs) and vars(ours) == vars(theirs)


def test_annotations_that_were_never_evaluated_are_strings():
    from regiontower.mllm.boxes.frame import ImageFrame  # a module with `from __future__ import annotations`

    text = bundle("from regiontower.mllm.boxes.frame import ImageFrame\nprint(ImageFrame)\n")
    tree = ast.parse(text)
    methods = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    then = ImageFrame.then.__annotations__
    arguments = {arg.arg: arg.annotation for arg in methods["then"].args.args if arg.annotation}
    written = {name: ast.literal_eval(node) for name, node in (arguments | {"return": methods["then"].returns}).items()}
    assert written == then and "__future__" not in text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "from regiontower.vision_towers.convpass import add_convpass\n"
            "from regiontower.vision_towers.reduced_vit import run_reduced\n"
            "BOTH = add_convpass, run_reduced\n",
            r"the name _places stands for two things in one file, those of \S+convpass and \S+reduced_vit",
        ),
        ("from regiontower.vision_towers.errors import Nothing\nprint(Nothing)\n", "nothing defines the Nothing"),
        ("from regiontower.nowhere import x\nprint(x)\n", "regiontower.nowhere cannot be bundled: it is no module"),
        ("def f():\n    from regiontower.mllm import y\n", "line 2 imports from this package inside a function"),
        ("for x in ():\n    pass\n", "line 1 is no definition"),
        ("from regiontower.vision_towers import UserError as E\nprint(E)\n", "under another name"),
    ],
)
def test_what_cannot_be_one_file_is_refused_in_one_line(source, said):
    with pytest.raises(UserError, match=said) as error:
        bundle(source)
    assert "\n" not in str(error.value)
