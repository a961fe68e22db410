"""Small folders of pictures that can be told apart, and tiny image models with their processors, saved as folders."""

from __future__ import annotations

import random

import torch
import transformers as tf
from PIL import Image, ImageDraw

SHAPES = ("disc", "stripes")


def picture(kind, chance, size=(37, 29)):
    """A bright disc, or stripes, somewhere on a dark ground; no two are alike."""
    ground = tuple(chance.randrange(60) for _ in range(3))
    ink = tuple(chance.randrange(150, 256) for _ in range(3))
    made = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(made)
    if kind == "disc":
        x, y, r = chance.randrange(5, 20), chance.randrange(5, 15), chance.randrange(5, 10)
        draw.ellipse((x, y, x + r, y + r), fill=ink)
    else:
        for x in range(chance.randrange(4), size[0], 6):
            draw.line((x, 0, x, size[1]), fill=ink, width=2)
    return made


def write_pictures(folder, rows=31, *, seed=0, sides=(), kinds=SHAPES):
    """`folder/[SIDE/]CLASS/N.png`, rows of each class on each side."""
    chance = random.Random(seed)
    for side in sides or ("",):
        for kind in kinds:
            place = folder / side / kind
            place.mkdir(parents=True, exist_ok=True)
            for i in range(rows):
                picture(kind, chance).save(place / f"{i}.png")
    return folder


def save_vit(folder, size=16):
    config = tf.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=29, image_size=size, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    processor = tf.ViTImageProcessorPil(size={"height": size, "width": size})
    return _save(folder, tf.ViTForImageClassification(config), processor)


def save_mobilenet(folder, labels=5):
    """With BatchNorm statistics that are none of a fresh model's."""
    config = tf.MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=labels, classifier_dropout_prob=0.0)
    torch.manual_seed(0)
    model = tf.MobileNetV2ForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    processor = tf.MobileNetV2ImageProcessorPil(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32})
    return _save(folder, model, processor)


def save_segformer(folder, size=32):
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0, drop_path_rate=0.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    processor = tf.SegformerImageProcessorPil(size={"height": size, "width": size}, do_reduce_labels=True)
    return _save(folder, tf.SegformerForSemanticSegmentation(config), processor)


def disc_and_mask(chance, size=(37, 29)):
    """A picture with a bright disc, and its mask: 1 within the disc, 255 on its edge, else 0."""
    made, mask = picture("disc", chance, size), Image.new("L", size, 0)
    x, y, r = chance.randrange(4, 16), chance.randrange(4, 12), chance.randrange(9, 15)
    for drawn, ink, edge in ((made, (240, 240, 20), (240, 240, 20)), (mask, 1, 255)):
        ImageDraw.Draw(drawn).rectangle((0, 0, *size), fill=(20, 10, 30) if drawn is made else 0)
        ImageDraw.Draw(drawn).ellipse((x, y, x + r, y + r), fill=ink, outline=edge)
    return made, mask


def _save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
