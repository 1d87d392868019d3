"""Fixtures for all tests."""

import gc
import os
from pathlib import Path

# Before torch is imported: tiny models gain nothing from threads, and with one thread results do not depend on a
# machine's core count.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# The same examples on every run, and no failures because a shared machine was slow for a moment.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; left out unless asked for with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow: run with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


def pytest_collection_finish(session):
    """What is imported by now stays. Else every training run, which collects garbage at its end, walks all of torch and
    transformers: half the time of a small one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real annotated images (REGIONTOWER_TEST_DATA, default ../shared/data beside the repository)."""
    folder = (REPOSITORY / os.environ.get("REGIONTOWER_TEST_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"real images are not here: set REGIONTOWER_TEST_DATA to their folder ({folder} does not exist)")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A real sentencepiece tokenizer with the chat template, trained on a few phrases."""
    from regiontower.train_stages.tokenizer import train_tokenizer

    texts = [
        "Where is the red star?",
        "What is in it?",
        "[12, 345, 678, 1000]",
        "none",
        "Read the sign.",
        "a blue heart",
    ]
    return train_tokenizer(texts * 20, tmp_path_factory.mktemp("tokenizer"), vocab_size=420)


@pytest.fixture(scope="session")
def make_tiny_mllm(tiny_tokenizer):
    """`make(**choices)` -> (model, processor): a random RegionLlava of 0.2 million parameters, 64 px, patch 8.

    Its weights are large enough that answers depend on pictures and boxes. language: "llama", or "gemma3" as
    `pretrain-lm` trains it.
    """
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    from regiontower.mllm import build_mllm
    from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel

    gemma3 = {"head_dim": 12, "query_pre_attn_scalar": 12, "layer_types": ["full_attention"] * 2}
    languages = {
        "llama": (LlamaForCausalLM, LlamaConfig, 64, {}),
        "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, 48, gemma3),
    }

    def make(seed: int = 0, language: str = "llama", width: int | None = None, **choices):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        tower = RiceVisionModel(RiceVisionConfig(**sizes, patch_size=8, image_size=64))
        tokenizer = tiny_tokenizer
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        kind, config, usual, fields = languages[language]
        width = width or usual
        language_model = kind(
            config(
                **fields,
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                initializer_range=0.3,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        if language == "gemma3":  # its blocks have to outweigh its scaled embeddings, or each token predicts itself
            for name, weight in language_model.named_parameters():
                if "post_" in name:
                    torch.nn.init.normal_(weight, mean=8.0, std=4.0)
        model, processor = build_mllm(tower, language_model, tokenizer, **choices)
        return model.eval(), processor

    return make


@pytest.fixture(scope="session")
def tiny_mllm(make_tiny_mllm):
    """One such model, shared: do not change it."""
    return make_tiny_mllm()


@pytest.fixture(scope="session")
def tiny_mllm_dir(tiny_mllm, tmp_path_factory) -> Path:
    """That model as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny_mllm")
    for part in tiny_mllm:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def noise_image():
    """`noise_image(width, height, seed)`: a picture in which every box looks different."""
    import numpy as np
    from PIL import Image

    def make(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

    return make


@pytest.fixture
def in_processes(tmp_path):
    """`in_processes(count, work, *arguments)`: the results of `work(rank, *arguments)` in `count` gloo processes.

    Forked: a fresh interpreter would import transformers for longer than a test runs.
    """
    import multiprocessing
    import socket
    import time
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    calls = iter(range(1000))

    def rank_main(rank, count, port, folder, work, arguments):
        torch.set_num_threads(1)
        # As torchrun sets them.
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        AcceleratorState._reset_state(True)  # the parent may have been a single process of accelerate's
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))  # of a busy machine
        (folder / f"{rank}.joined").touch()
        torch.save(work(rank, *arguments), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()

    def start(count, work, arguments):
        """The processes and their folder, once all have found each other; None when gloo lost a connection, as it
        does now and then while many are opened on one machine."""
        folder = tmp_path / f"processes{next(calls)}"
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        about = (count, port, folder, work, arguments)
        ranks = [context.Process(target=rank_main, args=(rank, *about)) for rank in range(count)]
        for process in ranks:
            process.start()
        latest = time.monotonic() + 60
        while not all((folder / f"{rank}.joined").exists() for rank in range(count)):
            if time.monotonic() > latest or any(process.exitcode for process in ranks):
                for process in ranks:
                    process.kill()
                return None
            time.sleep(0.02)
        return ranks, folder

    def run(count, work, *arguments):
        found = next(filter(None, (start(count, work, arguments) for _ in range(3))), None)
        assert found is not None, "gloo did not connect the processes, three times"
        ranks, folder = found
        for process in ranks:
            process.join(timeout=200)
            process.kill()
        assert [process.exitcode for process in ranks] == [0] * count
        return [torch.load(folder / f"{rank}.pt") for rank in range(count)]

    return run
