"""What every family must hold, over the whole table: tiny random pipelines against the stock pipelines."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from stock import largest_difference, load_stock, one_step
from tiny import BUILDERS, MAX_TOKENS
from torch import nn

from apexflow.backbones import Settings, backbones, load_backbone
from apexflow.conditioning import Condition
from apexflow.errors import UserError
from apexflow.generator import Generator
from apexflow.sampler import sample, time_grid
from apexflow.training.sharding import fill, hollow, leave, read_shares

FAMILIES = list(BUILDERS)
SIZE = (32, 64)
PROMPTS = ["a red cube", "two green balls on a wooden table", "a cat"]

INSIDE = ("sana_sprint", "flux_schnell", "flux_dev", "sdxl_lcm")  # guidance is in the weights, or an input

families = pytest.mark.parametrize("name", FAMILIES)


def noise(backbone, rows, seed=0):
    shape = backbone.latent_shape(SIZE)
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sampled(backbone, prompts, z, guidance=1.0):
    """One step of our sampler."""
    c, null = backbone.encode_prompts(prompts), backbone.encode_prompts([""]).expand(len(prompts))

    def velocity(x_t, t):
        return backbone.guide(*(backbone.velocity(backbone.transformer, x_t, t, one) for one in (c, null)), guidance)

    return sample(velocity, z, time_grid(1))


def test_the_table_is_covered(folder_of):
    from apexflow.backbones.folder import read_index

    assert {read_index(folder_of(name))["_class_name"] for name in FAMILIES} == set(backbones())


@families
def test_one_step_equals_the_stock_pipeline(name, folder_of, backbone_of):
    backbone = backbone_of(name)
    z = noise(backbone, len(PROMPTS))
    expected = one_step(name, load_stock(folder_of(name)), PROMPTS, z, SIZE, "latent")
    assert largest_difference(sampled(backbone, PROMPTS, z), expected) < 1e-5
    assert float((expected - z).abs().max()) > 1e-2  # the network did something


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in INSIDE])
def test_a_guided_step_equals_the_stock_pipeline(name, folder_of, backbone_of):
    backbone = backbone_of(name)
    z = noise(backbone, len(PROMPTS))
    options = backbone.stock_options(replace(backbone.settings, guidance=3.0))
    expected = one_step(name, load_stock(folder_of(name)), PROMPTS, z, SIZE, "latent", **options)
    assert largest_difference(sampled(backbone, PROMPTS, z, 3.0), expected) < 1e-5
    assert largest_difference(sampled(backbone, PROMPTS, z), expected) > 1e-3


@families
@torch.no_grad()
def test_weights_that_are_read_later_answer_the_same(name, folder_of, backbone_of):
    backbone, network = backbone_of(name), load_backbone(str(folder_of(name)), hollow=True).transformer
    names = [name for name, _ in network.named_parameters()]
    assert all(parameter.is_meta for parameter in network.parameters())
    half = [
        load_backbone(str(folder_of(name)), dtype=torch.bfloat16, hollow=hollow).transformer for hollow in (True, False)
    ]
    tensors = (
        [*half[0].named_parameters(), *half[0].named_buffers()],
        [*half[1].named_parameters(), *half[1].named_buffers()],
    )
    assert [(name, t.dtype) for name, t in tensors[0]] == [(name, t.dtype) for name, t in tensors[1]]
    network._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    read_shares(network, network.weights_from, names)
    asked = (noise(backbone, 2), torch.tensor([0.9, 0.4]), backbone.encode_prompts(PROMPTS[:2]))
    assert torch.equal(*(backbone.velocity(one, *asked) for one in (network, backbone.transformer)))


@families
@torch.no_grad()
def test_a_batch_equals_its_prompts_one_by_one(name, backbone_of):
    backbone = backbone_of(name)
    prompts = [*PROMPTS, ""]
    x_t, t = noise(backbone, len(prompts)), torch.tensor([0.9, 0.5, 0.3, 0.7])
    whole = backbone.velocity(backbone.transformer, x_t, t, backbone.encode_prompts(prompts))
    for row, prompt in enumerate(prompts):
        one = slice(row, row + 1)
        alone = backbone.velocity(backbone.transformer, x_t[one], t[one], backbone.encode_prompts([prompt]))
        assert largest_difference(whole[one], alone) < 1e-4


@families
@torch.no_grad()
def test_padding_is_masked_and_a_full_mask_may_be_left_out(name, backbone_of):
    backbone = backbone_of(name)
    c = backbone.encode_prompts(PROMPTS[:1])
    x_t, t = noise(backbone, 1), torch.tensor([0.6])
    F = backbone.velocity(backbone.transformer, x_t, t, c)
    ones = torch.ones(c.embeds.shape[:2])
    for same in (replace(c, mask=None), replace(c, mask=ones), replace(c, mask=ones.bool())):
        assert largest_difference(backbone.velocity(backbone.transformer, x_t, t, same), F) < 1e-6
    both = backbone.encode_prompts(PROMPTS[:2])
    if both.mask is None or bool(both.mask.all()):
        return  # a family of fixed length: there is no padding to hide
    rubbish = torch.where(both.mask.bool()[..., None], both.embeds, 7.0)
    x_t, t = x_t.expand(2, -1, -1, -1), t.expand(2)
    clean = backbone.velocity(backbone.transformer, x_t, t, both)
    assert (
        largest_difference(backbone.velocity(backbone.transformer, x_t, t, replace(both, embeds=rubbish)), clean) < 1e-5
    )
    assert largest_difference(clean[:1], F) < 1e-4


@families
def test_gradients_reach_every_lora_target(name, backbone_of):
    backbone = backbone_of(name)
    network = copy.deepcopy(backbone.transformer)
    config = LoraConfig(r=2, target_modules=list(backbone.lora_targets), init_lora_weights=False)
    inject_adapter_in_model(config, network)
    gradients(backbone, network)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    for parameter_name, parameter in trained.items():
        if not parameter_name.startswith(tuple(backbone.without_gradient)):
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), parameter_name
    for target in backbone.lora_targets:  # none is a dead letter
        assert any(f".{target}." in f".{name}" for name in trained), target


@families
def test_parameters_without_a_gradient_are_declared(name, backbone_of):
    backbone = backbone_of(name)
    network = copy.deepcopy(backbone.transformer).requires_grad_(True)
    gradients(backbone, network)
    missing = {name for name, p in network.named_parameters() if p.grad is None}
    declared = {name for name, _ in network.named_parameters() if name.startswith(tuple(backbone.without_gradient))}
    assert missing == declared


def gradients(backbone, network):
    """Backward through one velocity, text encoder included."""
    c = backbone.encode_prompts(PROMPTS[:2])
    F = backbone.velocity(network, noise(backbone, 2), torch.tensor([0.8, 0.4]), c)
    F.square().mean().backward()


@families
def test_text_is_differentiable(name, backbone_of):
    backbone = backbone_of(name)
    encoder = backbone.text_encoder.requires_grad_(True)
    backbone.encode_prompts(PROMPTS[:1]).embeds.square().mean().backward()
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in encoder.parameters())
    encoder.requires_grad_(False).zero_grad()


@families
@torch.no_grad()
def test_a_sharded_text_encoder_answers_as_a_whole_one(name, folder_of, backbone_of):
    backbone, expected = load_backbone(str(folder_of(name))), backbone_of(name).encode_prompts(PROMPTS)
    for part in backbone.text_encoder.modules():  # sharding puts a class of its own over those of a network
        if not isinstance(part, nn.ModuleDict | nn.ModuleList):
            part.__class__ = type(f"Sharded{type(part).__name__}", (type(part),), {})
    assert torch.equal(backbone.encode_prompts(PROMPTS).embeds, expected.embeds)


@families
@torch.no_grad()
def test_a_copy_of_a_text_encoder_is_filled_and_keeps_what_is_tied(name, backbone_of):
    encoder = backbone_of(name).text_encoder
    copied = hollow(encoder)
    fill(copied, encoder, leave)
    whole, named = dict(encoder.named_parameters()), dict(copied.named_parameters())
    assert whole.keys() == named.keys() and all(torch.equal(named[key], value) for key, value in whole.items())
    assert not any(parameter.is_meta for parameter in copied.parameters())


@families
@torch.no_grad()
def test_encode_and_decode(name, backbone_of):
    backbone = backbone_of(name)
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = backbone.encode_images(images)
    assert latents.shape == (2, *backbone.latent_shape(SIZE)) and latents.dtype == torch.float32
    decoded = backbone.decode(latents)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32 and float(decoded.abs().max()) <= 1
    frames = images.unsqueeze(2) if name == "qwen_image" else images
    encoded = backbone.vae.encode(frames)
    raw = encoded.latent if name.startswith("sana") else encoded.latent_dist.mode()
    plain = backbone.vae.decode(raw).sample.reshape(images.shape).clamp(-1, 1)
    assert largest_difference(decoded, plain) < 1e-5


@families
@torch.no_grad()
def test_a_saved_folder_is_what_the_stock_pipeline_loads(name, tmp_path, backbone_of):
    backbone = backbone_of(name)
    backbone.save(tmp_path, replace(backbone.settings, steps=1, card={"seed": 3}))
    again = load_backbone(str(tmp_path))
    assert again.settings == replace(backbone.settings, steps=1, card={"seed": 3})
    z = noise(backbone, len(PROMPTS))
    x = sampled(backbone, PROMPTS, z)
    assert torch.equal(sampled(again, PROMPTS, z), x)
    pictures = one_step(name, load_stock(tmp_path), PROMPTS, z, SIZE, "pt")
    assert largest_difference(backbone.decode(x) / 2 + 0.5, pictures) < 1e-4
    assert torch.equal(again.encode_prompts([""]).embeds, backbone.encode_prompts([""]).embeds)


@families
def test_sizes_that_do_not_fit(name, backbone_of):
    backbone = backbone_of(name)
    for size in ((33, 32), (32, 0), (32, -32)):
        with pytest.raises(UserError, match="does not fit this model"):
            backbone.latent_shape(size)
    channels, height, width = backbone.latent_shape(SIZE)
    assert channels == 4 and height * 2 == width
    if name in ("sd3", "z_image", "lumina2"):  # position tables of 12 and 32 tokens a side
        with pytest.raises(UserError, match="sides can be at most"):
            backbone.latent_shape((16 * 33, 32))


@families
def test_missing_and_damaged_parts(name, tmp_path, folder_of):
    folder = tmp_path / name
    shutil.copytree(folder_of(name), folder)
    weights = max((folder / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="vae"):
        load_backbone(str(folder))
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folder_of(name) / "vae", folder / "vae", dirs_exist_ok=True)
    with pytest.raises(UserError, match="text_encoder/ is missing"):
        load_backbone(str(folder))


@families
def test_the_null_prompt(name, folder_of, backbone_of):
    backbone = backbone_of(name)
    null = backbone.encode_prompts([""])
    assert null.embeds.shape[0] == 1 and bool(null.embeds.isfinite().all())
    if name.startswith("sdxl"):
        assert not null.embeds.any() and not null.pooled.any()
        return
    stock, options = load_stock(folder_of(name)), {"device": "cpu"}
    if name == "qwen_image":
        expected, mask = stock.encode_prompt([" "], **options)
    elif name == "sana_sprint":  # never guided, so the stock pipeline has no null prompt
        return
    elif name.startswith("flux"):
        limit = backbone.settings.max_tokens
        expected, mask = stock.encode_prompt([""], max_sequence_length=limit, **options)[0], None
    elif name == "sd3":
        expected, mask = stock.encode_prompt(["x"], None, None, **options)[1], None
    elif name == "z_image":
        expected, mask = stock.encode_prompt(["x"], **options)[1][0][None], None
    else:
        expected, mask = stock.encode_prompt(["x"], **options)[2:]
    expected = expected if mask is None else expected[:, : int(mask.sum())]
    assert largest_difference(null.embeds, expected) < 1e-5


def test_a_prompt_too_long_is_cut_and_said(backbone_of):
    backbone = backbone_of("flux_schnell")
    with pytest.warns(UserWarning, match=f"longer than the {MAX_TOKENS['flux_schnell']} tokens"):
        c = backbone.encode_prompts(["word " * 600])
    assert isinstance(c, Condition) and c.embeds.shape[1] == MAX_TOKENS["flux_schnell"]


@pytest.mark.parametrize(("name", "readers"), [("qwen_image", ["512", "the model"]), ("sd3", ["CLIP", "the model"])])
def test_what_is_said_of_a_prompt_too_long_is_what_is_read(backbone_of, name, readers):
    backbone = backbone_of(name)  # Qwen's template comes on top; of SD3's encoders T5 reads on where the CLIPs end
    with pytest.warns(UserWarning) as told:
        backbone.encode_prompts(["word " * 600])
    said = {str(one.message) for one in told}
    assert all(any(word in one for one in said) for word in (*readers, f"the {backbone.settings.max_tokens} tokens"))


@pytest.mark.filterwarnings("ignore:a prompt is longer")
@families
def test_no_prompt_gives_a_longer_condition_than_is_planned(backbone_of, name):
    backbone = backbone_of(name)
    assert backbone.encode_prompts(["word " * 600]).embeds.shape[1] == backbone.most_tokens


def test_settings_of_a_folder_lie_over_the_family_s(tmp_path, folder_of):
    shutil.copytree(folder_of("flux_dev"), tmp_path / "model")
    (tmp_path / "model" / "apexflow.json").write_text('{"steps": 2, "embedded_guidance": 7.0}')
    backbone = load_backbone(str(tmp_path / "model"))
    assert (backbone.settings.steps, backbone.settings.max_tokens, backbone.embedded_guidance) == (2, 512, 7.0)
    assert Settings().embedded_guidance is None
    (tmp_path / "model" / "apexflow.json").write_text('{"size": 64}')
    of_folder, other = load_backbone(str(tmp_path / "model")), load_backbone(str(folder_of("flux_dev")))
    before = other.time_shift
    other.draw_at(64)  # brings the time shift of such pictures
    assert other.default_size == of_folder.default_size == 64 and other.time_shift == of_folder.time_shift != before
    drawn = Generator(load_backbone(str(folder_of("flux_dev")))).times(4, (64, 64))
    assert torch.equal(drawn, Generator(of_folder).times(4))  # whatever size the model draws unasked
    (tmp_path / "model" / "apexflow.json").write_text('{"stepz": 2}')
    with pytest.raises(UserError, match=r"apexflow\.json does not fit"):
        load_backbone(str(tmp_path / "model"))
