"""Other model classes of lmms-eval on our tasks: a small LLaVA on disk through `llava_hf`, and a local HTTP server that
speaks OpenAI's protocol through `openai`, each in its own declared convention."""

import base64
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from regiontower.eval.command import EvalChoices, run_eval
from regiontower.eval.conventions import CONVENTIONS
from regiontower.eval.foreign import ForeignModel
from regiontower.eval.run import evaluate
from regiontower.mllm.boxes import Boxes, box_format
from regiontower.vision_towers.errors import UserError

RED_SAID = ["[0.10,", "0.20,", "0.50,", "0.50]"]  # the red box of the records in the padded square


@pytest.fixture(scope="module")
def llava_that_sees_red(tmp_path_factory, one_answer):
    """A real LLaVA checkpoint that makes one answer to everything."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    language = one_answer(RED_SAID, ["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        language.tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=language.template("<image>"),
    )
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=28, patch_size=14),
        text_config=LlamaConfig(**language.text()),
        image_token_index=language.vocabulary.index("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    language.teach(model)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_that_sees_red(tmp_path_factory, one_answer):
    """The same of a real Qwen2.5-VL: the red box in pixels of the picture that it is sent."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    frame = CONVENTIONS["qwen2_5_vl"].frame((100, 80))
    said = box_format("qwen2_5_json").write(Boxes([[10.0, 10.0, 50.0, 40.0]]), frame)
    specials = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    language = one_answer(said.split(), specials)
    ids = {name: language.vocabulary.index(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ids |= {name: language.vocabulary.index(f"<|{name}_pad|>") for name in ("image", "video")}
    width = len(language.vocabulary)
    config = Qwen2_5_VLConfig(
        text_config={
            **language.text(),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [width // 4 - 4, 2, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
        },
        **{f"{name}_token_id": number for name, number in ids.items()},
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    language.teach(model)
    template = language.template("<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), language.tokenizer(), Qwen2VLVideoProcessor(), chat_template=template
    )
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_qwen2_5_vl_answers_in_its_own_convention(qwen_that_sees_red, records_path, tmp_path):
    pytest.importorskip("decord", reason="lmms-eval's qwen2_5_vl needs decord (lmms-eval[video-legacy])")
    pytest.importorskip("qwen_vl_utils", reason="lmms-eval's qwen2_5_vl needs qwen-vl-utils")
    arguments = {"through": "qwen2_5_vl", "model_args": "device_map=cpu,device=cpu", "batch_size": 2}
    choices = EvalChoices(tmp_path / "out", data=(records_path,), tasks=["grounding", "reading"], limit=6, **arguments)
    found = run_eval([str(qwen_that_sees_red)], choices)
    rows = [
        json.loads(line) for line in (tmp_path / "out/samples_regiontower_grounding.jsonl").read_text().splitlines()
    ]
    red = ["red" in row["question"] or "left" in row["question"] for row in rows]
    assert [row["correct"] for row in rows] == red and 0 < sum(red) < len(red)
    assert found["tasks"]["regiontower_grounding"]["parse_rate"] == 1.0
    assert all(row["iou"] > 0.97 for row in rows if row["correct"]) and "bbox_2d" in rows[0]["answer"]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["box_format"] == {"model": "qwen2_5_json", "scored": "qwen2_5_json"}


def test_llava_hf_answers_in_its_own_convention(llava_that_sees_red, records_path, tmp_path):
    pytest.importorskip("decord", reason="lmms-eval's llava_hf needs decord (lmms-eval[video-legacy])")
    out = tmp_path / "out"
    arguments = "device_map=cpu,device=cpu"
    choices = {"tasks": ["grounding", "absent"], "through": "llava_hf", "batch_size": 1}
    found = run_eval(
        [str(llava_that_sees_red)], EvalChoices(out, data=(records_path,), model_args=arguments, **choices)
    )
    grounding = found["tasks"]["regiontower_grounding"]
    assert grounding["n"] == 12 and grounding["parse_rate"] == 1.0
    assert grounding["acc50"] == pytest.approx(
        8 / 12
    )  # "the red box" and "the left one" of 4 pictures, the blue one not
    assert found["tasks"]["regiontower_absent"]["rejection"] == 0.0
    results = json.loads((out / "results.json").read_text())
    assert results["box_format"] == {"model": "norm01", "scored": "norm01"} and results["convention"] == "llava15"
    assert len(results["weights_sha256"]) == 64 and results["model"].startswith("llava_hf:pretrained=")
    rows = [json.loads(line) for line in (out / "samples_regiontower_grounding.jsonl").read_text().splitlines()]
    assert rows[0]["answer"] == " ".join(RED_SAID) and rows[0]["iou"] == pytest.approx(1.0)
    assert rows[0]["question"] == (
        "Please provide the bounding box coordinate of the region this sentence describes: the red box"
    )


@pytest.fixture
def endpoint(records_path):
    """`(url, asked, faults)`: a model that knows the records and speaks Qwen2.5-VL's convention, boxes in pixels of the
    picture that it was sent. While `faults` holds statuses they are the answers."""
    asked, faults = [], []
    red, blue = [10, 10, 50, 40], [60, 20, 90, 70]  # of 100 x 80

    def answer(text: str, size: tuple[int, int]) -> str:
        if "Locate" in text:
            boxes = {"red box": [red], "left one": [red], "blue box": [blue], "a thing": [red, blue]}
            scale = (size[0] / 100, size[1] / 80) * 2
            chosen = next((found for name, found in boxes.items() if name in text), None)
            if chosen is None:
                return "none"
            rows = [[round(v * s) for v, s in zip(box, scale, strict=True)] for box in chosen]
            return "```json\n" + json.dumps([{"bbox_2d": row, "label": "x"} for row in rows]) + "\n```"
        x1 = int(re.search(r"the region \[(\d+),", text)[1]) * 100 / size[0]
        return "the red box" if x1 < 30 else "hello world" if "Read" in text else "the blue box"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            parts = body["messages"][0]["content"]
            url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
            text = next(part["text"] for part in parts if part["type"] == "text")
            image = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
            asked.append((self.path, self.headers["Authorization"], body["model"], text, image.size))
            status = faults.pop(0) if faults else 200
            message = {"role": "assistant", "content": answer(text, image.size)}
            reply = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
            }
            data = json.dumps(reply if status == 200 else {"error": {"message": "out of memory"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, faults
    server.shutdown()
    server.server_close()
    thread.join()


def remote(url: str, **more) -> ForeignModel:
    arguments = f"model=qwen,base_url={url},api_key=k,num_concurrent=2,max_retries=1,retry_backoff_s=0"
    return ForeignModel("openai", arguments, CONVENTIONS["qwen2_5_vl"])


def test_an_openai_endpoint_answers_in_the_declared_convention(endpoint, records_path, tmp_path):
    url, asked, _ = endpoint
    tasks = ["grounding", "several", "referring", "reading", "absent"]
    result = evaluate(remote(url), records_path, tasks, tmp_path / "out", progress=False)
    found = {name.removeprefix("regiontower_"): figures for name, figures in result.tasks.items()}
    assert found["grounding"]["acc50"] == 1.0 and found["grounding"]["miou"] > 0.98
    assert found["several"]["f1"] == 1.0 and found["several"]["exact"] == 1.0
    assert found["referring"]["em"] == found["reading"]["em"] == found["absent"]["rejection"] == 1.0
    path, key, model, _, size = asked[0]
    assert (path, key, model) == ("/v1/chat/completions", "Bearer k", "qwen")
    assert size == CONVENTIONS["qwen2_5_vl"].frame((100, 80)).input_size
    assert all("<region>" not in text for *_, text, _ in asked) and len(asked) == 12 + 4 + 8 + 3 + 4
    assert result.results["weights_sha256"] is None and result.results["convention"] == "qwen2_5_vl"


def test_what_an_endpoint_has_answered_is_not_asked_again(endpoint, records_path, tmp_path, monkeypatch):
    from regiontower.eval import foreign

    url, asked, faults = endpoint
    monkeypatch.setattr(foreign, "PIECE", 4)
    faults += [200] * 5 + [500] * 50
    with pytest.raises(UserError, match=r"failed on \d of 4 requests") as error:
        evaluate(remote(url), records_path, ["grounding"], tmp_path / "out", progress=False)
    assert "out of memory" in str(error.value) and "\n" not in str(error.value)
    assert len((tmp_path / "out/responses.jsonl").read_text().splitlines()) == 4  # the whole piece before
    faults.clear()
    before = len(asked)
    result = evaluate(remote(url), records_path, ["grounding"], tmp_path / "out", progress=False)
    assert len(asked) - before == 8 and result.tasks["regiontower_grounding"]["acc50"] == 1.0


def test_what_cannot_be_opened_gets_one_sentence(records_path, tmp_path):
    for through, says in {"nothing_like_that": "cannot be loaded", "openai": "declare it with --convention"}.items():
        with pytest.raises(UserError, match=says) as error:
            run_eval(["x"], EvalChoices(tmp_path / "out", data=(records_path,), through=through))
        assert "\n" not in str(error.value)


def test_empty_answers_are_an_error_and_not_a_score(records_path, tmp_path, monkeypatch):
    from lmms_eval.models.simple.openai import OpenAICompatible

    from regiontower.eval import foreign

    class Swallows(OpenAICompatible):
        def __init__(self, model="", batch_size=1):
            super(OpenAICompatible, self).__init__()
            self.batch_size_per_gpu = 1

        def generate_until(self, requests):
            return ["" for _ in requests]

        rank, world_size = 0, 1

    monkeypatch.setattr(foreign, "model_class", lambda name: Swallows)
    model = ForeignModel("swallows", "model=x", CONVENTIONS["int1000"])
    with pytest.raises(UserError, match="12 empty answers in a row"):
        evaluate(model, records_path, ["grounding"], tmp_path / "out", progress=False)
