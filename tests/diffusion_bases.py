"""Small random pipelines of each family, in folders of diffusers, and pictures for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

FAMILIES = ("sd", "sdxl", "sd3", "flux")
SIDE = 24  # pixels; latents are 12 x 12
WORDS = ["a", "photo", "of", "sks", "dog", "teapot", "in", "the", "snow", "with", "hat"]


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = sorted({c for w in WORDS for c in w})
    vocab = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={t: i for i, t in enumerate(vocab)}, merges=[], model_max_length=77, pad_token="<|endoftext|>"
    )


def _t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = ["<pad>", "</s>", "<unk>", *WORDS]
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _clip(*, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(_clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=14, intermediate_size=22, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=14, eos_token_id=size - 1, bos_token_id=size - 2, pad_token_id=size - 1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=20, d_model=28, d_kv=7, d_ff=22, num_layers=1, num_heads=2))


def _vae(channels: int, side: int, wide: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(6 * wide, 10 * wide), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=2, sample_size=side,
        shift_factor=0.1 if channels > 4 else None,
    )  # fmt: skip


def _unet(side: int, wide: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(10 * wide, 14 * wide), layers_per_block=1, sample_size=side // 2, norm_num_groups=2,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
    )  # fmt: skip


def make_pipeline(family: str, side: int = SIDE, wide: int = 1) -> Any:
    """A random pipeline for pictures of `side` pixels; its autoencoder and what is trained `wide` times as wide."""
    import diffusers as d

    torch.manual_seed(0)
    texts = {"text_encoder": _clip(projection=family == "sd3"), "tokenizer": _clip_tokenizer()}
    scheduler = d.DDIMScheduler(clip_sample=False, steps_offset=1)
    if family == "sd":
        return d.StableDiffusionPipeline(
            vae=_vae(4, side, wide), unet=_unet(side, wide, cross_attention_dim=14), scheduler=scheduler, **texts,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    if family == "sdxl":
        unet = _unet(
            side, wide, cross_attention_dim=28, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=4 * 6 + 14,
        )  # fmt: skip
        return d.StableDiffusionXLPipeline(
            vae=_vae(4, side, wide), unet=unet, scheduler=scheduler, text_encoder_2=_clip(projection=True),
            tokenizer_2=_clip_tokenizer(), **texts,
        )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if family == "sd3":
        transformer = d.SD3Transformer2DModel(
            sample_size=side // 2, patch_size=2, in_channels=5, num_layers=2, attention_head_dim=14,
            num_attention_heads=2 * wide, joint_attention_dim=28, caption_projection_dim=28 * wide,
            pooled_projection_dim=28, out_channels=5, pos_embed_max_size=side // 4,
        )  # fmt: skip
        return d.StableDiffusion3Pipeline(
            transformer, scheduler, _vae(5, side, wide), texts["text_encoder"], texts["tokenizer"], _clip(projection=True),
            _clip_tokenizer(), _t5(), _t5_tokenizer(),
        )  # fmt: skip
    transformer = d.FluxTransformer2DModel(
        patch_size=1, in_channels=20, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2 * wide,
        joint_attention_dim=28, pooled_projection_dim=14, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    return d.FluxPipeline(
        scheduler, _vae(5, side, wide), texts["text_encoder"], texts["tokenizer"], _t5(), _t5_tokenizer(), transformer
    )


def save_sd(folder: Path) -> None:
    """The smallest of them."""
    make_pipeline("sd").save_pretrained(folder)


@cache
def pipeline_folder(family: str, place: Path) -> Path:
    """The pipeline in a folder below `place`."""
    folder = place / family
    if not folder.is_dir():
        make_pipeline(family).save_pretrained(folder)
    return folder


def write_pictures(folder: Path, count: int, *, size: tuple[int, int] = (31, 29), seed: int = 0) -> Path:
    """Smooth random pictures."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(chance.integers(0, 255, (3, 3, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


def save_true_sd15(folder: Path) -> Path:
    """The configurations of Stable Diffusion 1.5, without weights."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig

    with torch.device("meta"):
        UNet2DConditionModel(sample_size=64, cross_attention_dim=768).save_config(folder / "unet")
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
            up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512,
        ).save_config(folder / "vae")  # fmt: skip
    CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    ).save_pretrained(folder / "text_encoder")
    PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    _clip_tokenizer().save_pretrained(folder / "tokenizer")
    parts = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
             "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
             "scheduler": ("diffusers", "PNDMScheduler")}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps({"_class_name": StableDiffusionPipeline.__name__, **parts}))
    return folder
