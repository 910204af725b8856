"""What published checkpoints have and tiny random ones do not: instructions, twins, other programs' files, old tokenizers."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import sentencepiece
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from stock import load_stock
from tiny_text import LETTERS

from apexflow import generator
from apexflow.backbones import load_backbone, resolve
from apexflow.backbones.miniature import word_tokenizer
from apexflow.data.fingerprint import text_fingerprint
from apexflow.errors import UserError
from apexflow.export.folder import export
from apexflow.generator import suited_dtype


@pytest.mark.parametrize("name", ["sana", "sana_sprint"])
@pytest.mark.parametrize("prompts", [["a red cube"], ["a cat", "two balls on a table"], ["", "a cat"], ["word " * 400]])
@pytest.mark.filterwarnings("ignore:a prompt is longer")
@torch.no_grad()
def test_an_instruction_shorter_than_the_text_limit_is_cut_off_as_in_stock(name, prompts, folder_of):
    """SANA's instruction has some 200 tokens, the limit is 300: what is kept of it must not hang on the prompt's length."""
    stock, ours = load_stock(folder_of(name)), load_backbone(str(folder_of(name)))
    instruction = list(ours._instruction.split("\n"))
    stock.tokenizer = ours.tokenizer = word_tokenizer(
        ["a", "red", "cube", "cat", "two", "balls", "on", "table", "word"]
    )
    assert 100 < len(ours.tokenizer.encode(ours._instruction)) < ours.settings.max_tokens
    c = ours.encode_prompts(prompts)
    for row, prompt in enumerate(prompts):
        embeds, mask, *_ = stock.encode_prompt(prompt, complex_human_instruction=instruction if prompt else None)
        expected, own = embeds[mask.bool()], c.embeds[row][c.mask[row].bool()]
        assert own.shape == expected.shape
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_defaults_are_those_of_the_checkpoint(folder_of, tmp_path):
    assert load_backbone(str(folder_of("sana"))).settings.guidance == 4.5
    for name, (steps, tokens) in {"flux_dev": (28, 512), "flux_schnell": (4, 256)}.items():
        folder = Path(shutil.copytree(folder_of(name), tmp_path / name))
        (folder / "apexflow.json").unlink()  # the tiny ones say how long their texts are
        settings = load_backbone(str(folder)).settings
        assert (settings.steps, settings.max_tokens) == (steps, tokens)
    for shift, expected in ((6.0, (50, 6.0)), (3.0, (8, 1.0))):
        folder = Path(shutil.copytree(folder_of("z_image"), tmp_path / f"{shift}"))
        config = folder / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": shift}))
        settings = load_backbone(str(folder)).settings
        assert (settings.steps, settings.guidance) == expected


@pytest.mark.parametrize("distilled", [None, False, True])
def test_flux2_is_known_by_its_index_and_drawn_at_the_times_of_its_pipeline(distilled, folder_of, tmp_path):
    folder = Path(shutil.copytree(folder_of("flux2"), tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    index = {key: value for key, value in index.items() if key != "is_distilled"}  # as the published base leaves it out
    (folder / "model_index.json").write_text(
        json.dumps(index | ({} if distilled is None else {"is_distilled": distilled}))
    )
    backbone = load_backbone(str(folder))
    settings = backbone.settings
    assert (settings.steps, settings.guidance, settings.size) == ((4, 1.0, 1024) if distilled else (50, 4.0, 1024))
    backbone.save(tmp_path, settings)
    again, stock = load_backbone(str(tmp_path)), load_stock(tmp_path)
    assert again.distilled == stock.config.is_distilled == bool(distilled)
    embeds = torch.zeros(1, 3, 48)
    stock(prompt_embeds=embeds, height=32, width=64, num_inference_steps=settings.steps, guidance_scale=1.0)
    times = generator.Generator(again).times(settings.steps, (32, 64))
    torch.testing.assert_close(stock.scheduler.sigmas, times.float(), rtol=1e-5, atol=1e-6)


def test_a_large_sana_is_drawn_in_float32_unless_it_was_trained_in_bfloat16(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "LARGE", 1000)
    for name, suited in (("sana", torch.float32), ("sana_sprint", torch.bfloat16), ("sd3", torch.bfloat16)):
        assert suited_dtype(str(folder_of(name)), "cuda") == suited
    folder = Path(shutil.copytree(folder_of("sana"), tmp_path / "half"))
    file = next((folder / "transformer").glob("*.safetensors"))
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, {"format": "pt"})
    assert suited_dtype(str(folder), "cuda") == torch.bfloat16
    # Of Sana_1600M_1024px_BF16_diffusers the weights that are read by default are in float32.
    published = Path(shutil.copytree(folder_of("sana"), tmp_path / "Sana_1600M_1024px_BF16_diffusers"))
    assert suited_dtype(str(published), "cuda") == torch.bfloat16
    assert suited_dtype(str(published), "cpu") == torch.float32
    monkeypatch.setattr(generator, "resolve", lambda _: folder_of("sana"))  # a hub id lies in a folder of another name
    assert suited_dtype("owner/Sana_1600M_1024px_BF16_diffusers", "cuda") == torch.bfloat16
    assert suited_dtype("owner_of_bf16/sana", "cuda") == torch.float32


@pytest.mark.parametrize(
    ("card", "suited"),
    [
        ({"recipe": {"precision": "bf16"}}, torch.bfloat16),
        ({"recipe": {"precision": "fp32"}}, torch.float32),
        ({"recipe": "mine"}, torch.float32),
    ],
)
def test_a_student_of_sana_is_drawn_in_the_precision_of_its_run(card, suited, folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "LARGE", 1000)
    folder, backbone = tmp_path / "student", load_backbone(str(folder_of("sana")))
    backbone.save(folder, replace(backbone.settings, card=card))
    assert suited_dtype(str(folder), "cuda") == suited
    export(str(folder), tmp_path / "out")
    assert f"torch_dtype={suited})" in (tmp_path / "out" / "README.md").read_text()
    assert suited_dtype(str(tmp_path / "out"), "cuda") == suited  # ours takes of the copy what its README says


@pytest.fixture
def cluttered(folder_of, tmp_path):
    """A model folder as a full clone of a hub repository has it."""
    folder = Path(shutil.copytree(folder_of("sdxl"), tmp_path / "clone"))
    other = {"other": torch.zeros(3)}
    for place in (
        "sd_xl_base_1.0",
        "unet/diffusion_pytorch_model.fp16",
        "text_encoder/model.fp16",
        "text_encoders/clip",
    ):
        file = folder / f"{place}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file(other, file, {"format": "pt"})
    (folder / "vae_decoder").mkdir()
    (folder / "vae_decoder" / "openvino_model.bin").write_bytes(b"x")
    return folder


def test_what_lies_beside_the_parts_is_neither_read_nor_refused_nor_exported(cluttered, folder_of, tmp_path):
    backbone = load_backbone(str(cluttered))
    assert text_fingerprint(cluttered, backbone.settings) == text_fingerprint(folder_of("sdxl"), backbone.settings)
    export(str(cluttered), tmp_path / "out", "original")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    original = {str(p.relative_to(folder_of("sdxl"))) for p in folder_of("sdxl").rglob("*") if p.is_file()}
    assert written == original | {"README.md", "apexflow.json"}


def older_tokenizers(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of a CLIP tokenizer and of a T5 tokenizer as they were published before tokenizer.json."""
    pieces = ["<|startoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|endoftext|>"]
    clip = {"vocab.json": json.dumps({p: i for i, p in enumerate(pieces)}).encode(), "merges.txt": b"#version: 0.2\n"}
    model = io.BytesIO()
    texts = ["a red cube on a table", "two green balls", "a cat"] * 20
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=22, minloglevel=2, **ids
    )
    clip["tokenizer_config.json"] = b'{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}'
    config = b'{"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0}'
    return {"sdxl": clip, "pixart_sigma": {"spiece.model": model.getvalue(), "tokenizer_config.json": config}}


@pytest.mark.parametrize("name", ["sdxl", "pixart_sigma"])
def test_a_tokenizer_of_older_files_is_read_and_known_again_when_saved(name, folder_of, tmp_path):
    folder = Path(shutil.copytree(folder_of(name), tmp_path / "old"))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    for file, content in older_tokenizers(folder)[name].items():
        (folder / "tokenizer" / file).write_bytes(content)
    backbone = load_backbone(str(folder))
    assert len(set(backbone.tokenizer("a red cube").input_ids)) > 4
    before = text_fingerprint(folder, backbone.settings)
    (tmp_path / "saved").mkdir()
    backbone.save(tmp_path / "saved", backbone.settings)
    assert (tmp_path / "saved" / "tokenizer" / "tokenizer.json").is_file()
    assert text_fingerprint(tmp_path / "saved", backbone.settings) == before


@pytest.mark.parametrize(
    ("name", "part", "beside"),
    [
        ("pixart_alpha", "transformer", "caption_projection.y_embedding"),
        ("sdxl", "text_encoder", "text_model.embeddings.position_ids"),
        ("sdxl", "text_encoder", "vision_model.encoder.layers.9.mlp.fc1.weight"),
        ("sdxl", "text_encoder", "logit_scale"),
        ("pixart_sigma", "text_encoder", "decoder.block.9.layer.0.SelfAttention.q.weight"),
        ("z_image", "text_encoder", "lm_head.weight"),
        ("lumina2", "text_encoder", "layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_what_published_weights_hold_beside_the_network_is_passed_over(name, part, beside, folder_of, tmp_path):
    folder = Path(shutil.copytree(folder_of(name), tmp_path / "m"))
    file = next((folder / part).glob("*.safetensors"))
    save_file(load_file(file) | {beside: torch.zeros(3)}, file, {"format": "pt"})
    assert load_backbone(str(folder)).encode_prompts(["a cat"]).embeds.isfinite().all()


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_text_encoder_saved_under_its_head_is_read(prefix, folder_of, tmp_path):
    folder = Path(shutil.copytree(folder_of("z_image"), tmp_path / "m"))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {prefix + name: tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"lm_head.weight": torch.zeros(3)}, file, {"format": "pt"})
    ours, same = load_backbone(str(folder)), load_backbone(str(folder_of("z_image")))
    assert torch.equal(ours.encode_prompts(["a cat"]).embeds, same.encode_prompts(["a cat"]).embeds)


@pytest.fixture
def hub(cluttered, monkeypatch):
    """A hub that serves one repository, and records what is asked of it."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **given: asked.update(given) or str(cluttered))
    return asked


def test_of_a_hub_repository_only_what_is_read_is_fetched(cluttered, hub):
    assert resolve("owner/name") == cluttered
    there = [str(path.relative_to(cluttered)) for path in cluttered.rglob("*") if path.is_file()]
    patterns = {"allow_patterns": hub["allow_patterns"], "ignore_patterns": hub["ignore_patterns"]}
    fetched = set(huggingface_hub.utils.filter_repo_objects(there, **patterns))
    assert {name for name in set(there) - fetched if name.endswith((".safetensors", ".bin"))} == {
        *("sd_xl_base_1.0.safetensors", "text_encoders/clip.safetensors", "vae_decoder/openvino_model.bin"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"),
    }
    assert {
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    } <= fetched


def test_of_a_base_the_weights_of_the_network_are_not_fetched(cluttered, hub):
    assert resolve("owner/name", network=False) == cluttered
    there = ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "vae/diffusion_pytorch_model.safetensors"]
    patterns = {"allow_patterns": hub["allow_patterns"], "ignore_patterns": hub["ignore_patterns"]}
    assert set(huggingface_hub.utils.filter_repo_objects(there, **patterns)) == set(there[1:])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "accept its owners' terms at https://huggingface.co/owner/name"),
        (LocalEntryNotFoundError, "check the name and the network"),
        (TimeoutError, "check the name and the network"),
    ],
)
def test_why_a_model_cannot_be_fetched_is_told(error, words, hub, monkeypatch):
    def fail(*_: object, **__: object) -> str:
        answer = SimpleNamespace(headers={}, request=None)
        raise error("no", **({"response": answer} if issubclass(error, huggingface_hub.errors.HfHubHTTPError) else {}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=words):
        resolve("owner/name")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["README.md", "unet/model.safetensors"], "the hub has no model_index.json for it$"),
        (
            ["README.md", "eight.safetensors"],
            "`apexflow export eight.safetensors --base MODEL --merge -o FOLDER` merges",
        ),
    ],
)
def test_a_hub_repository_without_an_index_is_called_so(files, words, cluttered, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: files)
    (cluttered / "model_index.json").unlink()
    with pytest.raises(UserError, match=f"'owner/name' is not a diffusers checkpoint: .*{words}"):
        resolve("owner/name")


def test_what_an_index_names_is_no_pattern_for_the_hub(cluttered, hub):
    index = cluttered / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"*": ["a", "b"]}))
    with pytest.raises(UserError, match=r"'\*', which is not a plain name"):
        resolve("owner/name")
    assert hub["allow_patterns"] == ["model_index.json"]
