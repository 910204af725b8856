"""Tiny random pipelines of every family, built from the libraries' own classes with nothing downloaded."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_text import (
    clip,
    clip_tokenizer,
    gemma,
    gemma_tokenizer,
    qwen3,
    qwen3_with_head,
    qwen_tokenizer,
    qwen_vl,
    t5,
    t5_tokenizer,
)


def build(name: str) -> object:
    """A stock pipeline of the family, its weights drawn from a fixed seed."""
    torch.manual_seed(0)
    return BUILDERS[name]()


# -- Autoencoders and schedulers ---------------------------------------------------------------------------------------


def kl(channels: int = 4, scale: float = 0.13025, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
    ).eval()


def dc() -> AutoencoderDC:
    sizes = {}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_block_out_channels": (8, 8), f"{part}_layers_per_block": (0, 1)}
        sizes |= {f"{part}_block_types": "ResBlock", f"{part}_qkv_multiscales": ((), ())}
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, **sizes).eval()


def flow(shift: float = 3.0, **more: object) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift, **more)


def dynamic(max_shift: float, max_tokens: int) -> FlowMatchEulerDiscreteScheduler:
    # The published Qwen-Image file also says shift_terminal=0.02, with which one step is not a number.
    return flow(1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=max_shift, max_image_seq_len=max_tokens)


# -- Pipelines ---------------------------------------------------------------------------------------------------------


def sana_transformer(**more: object) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        **more,
    ).eval()


def sana() -> SanaPipeline:
    parts = {"tokenizer": gemma_tokenizer(), "text_encoder": gemma(), "vae": dc()}
    return SanaPipeline(transformer=sana_transformer(), scheduler=flow(), **parts)


def sana_sprint() -> SanaSprintPipeline:
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    parts = {"tokenizer": gemma_tokenizer(), "text_encoder": gemma(), "vae": dc()}
    return SanaSprintPipeline(transformer=transformer, scheduler=SCMScheduler(), **parts)


def qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.7, 0.1, 0.4, -0.2],
        latents_std=[2.8, 1.4, 2.3, 2.6],
    )
    parts = {"tokenizer": tokenizer, "text_encoder": qwen_vl(tokenizer)}
    return QwenImagePipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=dynamic(0.9, 8192), **parts)


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=flow(),
        vae=kl(4, 1.5305, 0.0609),
        text_encoder=clip(16, 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(16, 16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(40),
        tokenizer_3=t5_tokenizer(),
    )


def flux(guidance: bool, scheduler: FlowMatchEulerDiscreteScheduler) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=scheduler,
        vae=kl(4, 0.3611, 0.1159),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def flux2() -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=1)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 4)
    parts = {"tokenizer": tokenizer, "text_encoder": qwen3_with_head(tokenizer)}
    return Flux2KleinPipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=dynamic(1.15, 4096), **parts)


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    tokenizer = qwen_tokenizer()
    parts = {"vae": kl(4, 0.3611, 0.1159), "text_encoder": qwen3(tokenizer), "tokenizer": tokenizer}
    return ZImagePipeline(transformer=transformer.eval(), scheduler=flow(6.0), **parts)


def lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    parts = {"vae": kl(4, 0.3611, 0.1159), "text_encoder": gemma(), "tokenizer": gemma_tokenizer()}
    return Lumina2Pipeline(transformer=transformer.eval(), scheduler=flow(6.0), **parts)


def sdxl(guidance_width: int | None = None) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        layers_per_block=1,
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
        time_cond_proj_dim=guidance_width,
    )
    return StableDiffusionXLPipeline(
        unet=unet.eval(),
        scheduler=DDIMScheduler(**DDIM, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        vae=kl(),
        text_encoder=clip(16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(16, 16),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )


def pixart(kind: type, sample_size: int) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,  # three size embeddings share the width
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        caption_channels=32,
        use_additional_conditions=sample_size == 128,
    )
    scheduler = DDIMScheduler(**DDIM, beta_start=0.0001, beta_end=0.02)
    parts = {"vae": kl(4, 0.18215), "text_encoder": t5(), "tokenizer": t5_tokenizer()}
    return kind(transformer=transformer.eval(), scheduler=scheduler, **parts)


# One step of DDIM so set starts at the last index and answers its x0.
DDIM = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}

# Families that pad every text: to 256 and 512 tokens by themselves, which would be most of a tiny model's time.
MAX_TOKENS = dict.fromkeys(("flux_schnell", "flux_dev", "flux2"), 48)

BUILDERS = {
    "sana": sana,
    "sana_sprint": sana_sprint,
    "qwen_image": qwen_image,
    "sd3": sd3,
    "flux_schnell": lambda: flux(False, flow(1.0)),
    "flux_dev": lambda: flux(True, dynamic(1.15, 4096)),
    "flux2": flux2,
    "z_image": z_image,
    "lumina2": lumina2,
    "sdxl": sdxl,
    "sdxl_lcm": lambda: sdxl(guidance_width=8),
    "pixart_alpha": lambda: pixart(PixArtAlphaPipeline, 128),
    "pixart_sigma": lambda: pixart(PixArtSigmaPipeline, 16),
}
