"""A folder goes through plain diffusers and back; each way of being wrong is one clear error, before anything loads."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.erasure.uce import UCE
from diffusion_unlearn.folders import check_folder, load_delta, load_pipeline, save_delta, save_pipeline
from diffusion_unlearn.pipeline import UnsupportedPipelineError
from robust_core.errors import MalformedFileError, ResourceError, UntrustedFileError


@pytest.fixture(scope="module")
def saved(untrained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(untrained, tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def index(folder: Path, **more: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def equal(first: Any, second: Any) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.quick
def test_what_is_written_is_read(untrained: Any, saved: Path) -> None:
    from diffusers import DiffusionPipeline

    for again in (load_pipeline(saved), DiffusionPipeline.from_pretrained(saved, local_files_only=True)):
        made: Any = again
        assert equal(made.unet, untrained.unet)
        assert equal(made.text_encoder, untrained.text_encoder)
        assert made.tokenizer("three").input_ids == untrained.tokenizer("three").input_ids
    assert load_pipeline(saved, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_weights_of_one_variant_are_found(untrained: Any, tmp_path: Path) -> None:
    untrained.save_pretrained(tmp_path, safe_serialization=True, variant="fp16")
    assert equal(load_pipeline(tmp_path).unet, untrained.unet)


def test_what_would_run_code_is_refused(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    pickle = weights.with_suffix(".bin")
    weights.rename(pickle)
    with pytest.raises(UntrustedFileError, match=r"model\.bin is a pickle.*safe_serialization=True"):
        load_pipeline(folder)
    pickle.rename(weights)
    (folder / "unet" / "mine.py").write_text("raise SystemExit")
    with pytest.raises(UntrustedFileError, match=r"code of its own \(mine\.py\)"):
        load_pipeline(folder)
    (folder / "unet" / "mine.py").unlink()
    index(folder, unet=["os", "system"])
    with pytest.raises(UntrustedFileError, match="'unet' from 'os'"):
        load_pipeline(folder)


def test_folders_that_are_no_pipeline_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no such folder"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(MalformedFileError, match="holds no model_index"):
        load_pipeline(folder / "unet")
    index(folder, text_encoder=[None, None])
    with pytest.raises(UnsupportedPipelineError, match="has no text_encoder"):
        check_folder(folder)
    index(folder, text_encoder="CLIPTextModel", _class_name=3)
    with pytest.raises(MalformedFileError, match="no class of pipeline"):
        check_folder(folder)
    index(folder, _class_name="StableDiffusionPipeline", text_encoder=["transformers", "CLIPTextModel", "x"])
    with pytest.raises(MalformedFileError, match="no pair of library and class"):
        check_folder(folder)


def test_damaged_weights_are_named(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "text_encoder" / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.fc1.weight" not in k}, weights, {"format": "pt"})
    with pytest.raises(MalformedFileError, match=r"leave out 1 tensors, .*layers\.1\.mlp\.fc1\.weight"):
        load_pipeline(folder)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MalformedFileError, match="damaged"):
        load_pipeline(folder)
    weights.unlink()
    with pytest.raises(MalformedFileError, match="holds no weights"):
        load_pipeline(folder)
    weights.write_bytes(whole)
    shutil.rmtree(folder / "vae")
    with pytest.raises(MalformedFileError, match="lacks the part 'vae'"):
        load_pipeline(folder)


def test_a_delta_holds_what_changed_and_fits_where_it_belongs(untrained: Any, tmp_path: Path) -> None:
    from diffusion_unlearn.digits import DigitsRecipe, build_pipeline

    method = UCE("three", preserve=("one",))
    edited = method.fit(untrained)
    names = save_delta(tmp_path, edited, untrained, recipe=method)
    assert names
    assert all(".attn2.to_" in name and name.startswith("unet.") for name in names)
    again = load_delta(untrained, tmp_path)
    assert equal(again.unet, edited.unet)
    assert again.text_encoder is untrained.text_encoder
    assert not equal(untrained.unet, edited.unet)
    assert json.loads((tmp_path / "delta.json").read_text())["method"] == "UCE"
    with pytest.raises(ValueError, match="does not fit"):
        load_delta(build_pipeline(DigitsRecipe(width=32)), tmp_path)
    bare = copy.copy(untrained)
    bare.unet = None
    with pytest.raises(ValueError, match="changes unet, which"):
        load_delta(bare, tmp_path)
    with pytest.raises(ValueError, match="nothing to save"):
        save_delta(tmp_path, untrained, untrained)
    (tmp_path / "delta.json").write_text("{}")
    with pytest.raises(MalformedFileError, match="no delta"):
        load_delta(untrained, tmp_path)
