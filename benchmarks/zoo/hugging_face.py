"""Families of `transformers` from small configurations, nothing downloaded.

Parameters are random; dropout is what the family's configuration says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import Batch, Entry, images, per_sequence, texts, waves

WORDS, WIDTH, LENGTH = 500, 96, 32

SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 3 * WIDTH,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
"""What most families call their sizes."""

GPT_SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


class Logits(nn.Module):
    """A model of the library, called with tensors in the order of these names."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, inputs, strict=True)))
        return output.logits


def library(task: str, family: str, *names: str, **options: Any) -> Callable[[], nn.Module]:
    """How to make a model.

    Args:
        task: the library's class is AutoModelFor<task>.
        family: the library's class is <family>Config.
        names: of the inputs.
        options: of the configuration.
    """

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{family}Config")(**options)
        return Logits(getattr(transformers, f"AutoModelFor{task}").from_config(config), *names)

    return make


def masked_sentences(size: int) -> Batch:
    """Tokens, a mask of padding behind sentences of unequal lengths, two classes."""
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (size,))
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    tokens = torch.randint(2, WORDS, (size, LENGTH)) * mask
    return (tokens, mask), torch.randint(2, (size,))


def pairs(size: int) -> Batch:
    """Source, target and the target's next tokens."""
    (source,), _ = texts(LENGTH, WORDS)(size)
    (target,), following = texts(LENGTH // 2, WORDS)(size)
    return (source, target), following


def reader(name: str, family: str, size: int = 16, **options: Any) -> Entry:
    """A classifier of sentences."""
    make = library(
        "SequenceClassification", family, "input_ids", "attention_mask", **(SIZES | options)
    )
    return Entry(name, "transformers, text", size, make, masked_sentences)


def writer(name: str, family: str, sizes: dict[str, Any] = SIZES, **options: Any) -> Entry:
    """A language model."""
    make = library("CausalLM", family, "input_ids", **(sizes | options))
    return Entry(name, "transformers, text", 16, make, texts(LENGTH, WORDS), per_sequence)


def translator(name: str, family: str, **options: Any) -> Entry:
    """An encoder and a decoder."""
    names = ("input_ids", "decoder_input_ids")
    make = library("Seq2SeqLM", family, *names, vocab_size=WORDS, **options)
    return Entry(name, "transformers, text", 16, make, pairs, per_sequence)


def viewer(name: str, family: str, side: int = 32, size: int = 16, **options: Any) -> Entry:
    """A classifier of pictures."""
    options = {"num_labels": 10, **options}
    make = library("ImageClassification", family, "pixel_values", **options)
    return Entry(name, "transformers, vision", size, make, images(side))


def listener(
    name: str, family: str, batch: Callable[[int], Batch], input: str, **options: Any
) -> Entry:
    """A classifier of sounds."""
    make = library("AudioClassification", family, input, num_labels=10, **options)
    return Entry(name, "transformers, audio", 16, make, batch)


def sounds(length: int) -> Callable[[int], Batch]:
    def draw(size: int) -> Batch:
        (x,), y = waves(length)(size)
        return (x.squeeze(1),), y

    return draw


def bands(count: int, length: int) -> Callable[[int], Batch]:
    """Spectrograms (B, bands, length)."""
    return waves(length, channels=count)


FEW_HEADS = {"num_key_value_heads": 2}
PATCHES = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 3 * WIDTH,
}
BART_SIZES = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}
SOUND_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}

TEXT = [
    reader("BERT", "Bert"),
    reader("RoBERTa", "Roberta", max_position_embeddings=66),
    reader("DistilBERT", "DistilBert", dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=3 * WIDTH),
    reader(
        "DeBERTa-v2",
        "DebertaV2",
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    reader("ELECTRA", "Electra", embedding_size=48),
    reader("ALBERT", "Albert", embedding_size=48),
    reader("MPNet", "MPNet", max_position_embeddings=66),
    reader("ModernBERT", "ModernBert", global_attn_every_n_layers=2, local_attention=16,
           cls_token_id=1, sep_token_id=1),
    reader("RoFormer", "RoFormer", embedding_size=WIDTH),
    reader("ConvBERT", "ConvBert", embedding_size=WIDTH),
    reader("SqueezeBERT", "SqueezeBert", embedding_size=WIDTH),
    Entry("Funnel", "transformers, text", 16,
          library("SequenceClassification", "Funnel", "input_ids", "attention_mask",
                  vocab_size=WORDS, d_model=64, n_head=4, d_head=16, d_inner=192,
                  block_sizes=[1, 1]),
          masked_sentences),
    writer("GPT-2", "GPT2", GPT_SIZES),
    writer("GPT-NeoX", "GPTNeoX"),
    writer("GPT-J", "GPTJ", GPT_SIZES, rotary_dim=8),
    writer("OPT", "OPT", ffn_dim=3 * WIDTH, word_embed_proj_dim=WIDTH),
    writer("BLOOM", "Bloom", n_layer=2, n_head=4),
    writer("Llama", "Llama", **FEW_HEADS),
    writer("Mistral", "Mistral", **FEW_HEADS, sliding_window=16),
    writer("Mixtral", "Mixtral", **FEW_HEADS, num_local_experts=4,
           experts_implementation="eager"),
    writer("Qwen2", "Qwen2", **FEW_HEADS),
    writer("Qwen3", "Qwen3", **FEW_HEADS, head_dim=24),
    writer("Gemma", "Gemma", **FEW_HEADS, head_dim=24),
    writer("Gemma 2", "Gemma2", **FEW_HEADS, head_dim=24),
    writer("Phi", "Phi"),
    writer("Falcon", "Falcon"),
    writer("OLMo", "Olmo"),
    writer("Mamba", "Mamba", state_size=8),
    translator("T5", "T5", d_model=64, d_kv=16, d_ff=192, num_layers=2, num_heads=4),
    translator("BART", "Bart", **BART_SIZES),
    translator("Pegasus", "Pegasus", **BART_SIZES),
]  # fmt: skip

VISION = [
    viewer("ViT of transformers", "ViT", **PATCHES),
    viewer("DeiT of transformers", "DeiT", **PATCHES,
           architectures=["DeiTForImageClassification"]),
    viewer("BEiT of transformers", "Beit", **PATCHES, use_relative_position_bias=True),
    viewer("Data2Vec", "Data2VecVision", **PATCHES, use_shared_relative_position_bias=True),
    viewer("DINOv2", "Dinov2", **PATCHES),
    viewer(
        "Swin of transformers",
        "Swin",
        image_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
    ),
    viewer("SwinV2", "Swinv2", image_size=32, patch_size=2, window_size=4, embed_dim=32,
           depths=[2, 2], num_heads=[2, 4]),
    viewer("ConvNeXt of transformers", "ConvNext", hidden_sizes=[32, 64, 64, 64],
           depths=[2, 2, 1, 1], patch_size=2),
    viewer("ConvNeXt-V2", "ConvNextV2", hidden_sizes=[32, 64, 64, 64],
           depths=[1, 2, 1, 1], patch_size=2),
    viewer("SegFormer", "Segformer", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1],
           num_attention_heads=[1, 2, 4, 4], sr_ratios=[4, 2, 1, 1], side=64),
    viewer("PVT", "Pvt", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], image_size=64,
           num_attention_heads=[1, 2, 3, 4], sequence_reduction_ratios=[4, 2, 1, 1], side=64),
    viewer("MobileViT", "MobileViT", side=64, image_size=64, hidden_sizes=[32, 48, 64],
           neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96], num_attention_heads=4),
    viewer("ResNet of transformers", "ResNet", embedding_size=16, hidden_sizes=[32, 64, 96, 128],
           depths=[1, 1, 1, 1], side=64),
    viewer("RegNet of transformers", "RegNet", embedding_size=16, hidden_sizes=[32, 48, 64, 96],
           depths=[1, 1, 1, 1], groups_width=16, side=64),
    viewer("EfficientNet of transformers", "EfficientNet", side=48, image_size=48,
           width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320),
    viewer("MobileNetV1 of transformers", "MobileNetV1", depth_multiplier=0.25, side=64),
    viewer("MobileNetV2 of transformers", "MobileNetV2", depth_multiplier=0.25, side=64),
    viewer("BiT", "Bit", embedding_size=16, hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 1, 1],
           num_groups=4, side=64),
    viewer("LeViT", "Levit", side=64, image_size=64, hidden_sizes=[32, 48, 64], key_dim=[8, 8, 8],
           num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
           architectures=["LevitForImageClassification"]),
]  # fmt: skip

AUDIO = [
    listener("Wav2Vec2", "Wav2Vec2", sounds(1600), "input_values", **SOUND_SIZES),
    listener("Hubert", "Hubert", sounds(1600), "input_values", **SOUND_SIZES),
    listener("WavLM", "WavLM", sounds(1600), "input_values", **SOUND_SIZES),
    listener("Whisper encoder", "Whisper", bands(16, 80), "input_features", d_model=64,
             encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=192, num_mel_bins=16,
             max_source_positions=40, decoder_layers=1, decoder_attention_heads=4,
             decoder_ffn_dim=64, vocab_size=WORDS, pad_token_id=0, bos_token_id=1, eos_token_id=1,
             decoder_start_token_id=1),
    listener("Audio spectrogram transformer", "AST",
             lambda size: ((torch.randn(size, 64, 32),), torch.randint(10, (size,))),
             "input_values", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=192, max_length=64, num_mel_bins=32, patch_size=8,
             frequency_stride=8, time_stride=8),
]  # fmt: skip

ENTRIES = [*TEXT, *VISION, *AUDIO]
