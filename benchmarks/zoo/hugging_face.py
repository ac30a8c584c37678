"""Families of `transformers`, and adapters of PEFT, from small configurations.

Nothing is downloaded: parameters are random; dropout is what the family's configuration says. Of
an adapted model its own parameters stay, and the adapter's are trained.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.zoo.blocks import Apply
from benchmarks.zoo.entry import WORDS, Batch, Entry, images, pairs, per_sequence, texts, waves

WIDTH, LENGTH = 96, 32

SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 3 * WIDTH, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
"""What most families call their sizes."""

GPT_SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


class Logits(nn.Module):
    """A model of the library, called with tensors in the order of these names."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def library(task: str, family: str, *names: str, **options: Any) -> Callable[[], nn.Module]:
    """How to make AutoModelFor<task> from <family>Config with options; names are the inputs'."""

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


def sounds(size: int) -> Batch:
    (x,), y = waves(1600)(size)
    return (x.squeeze(1),), y


class Kind(NamedTuple):
    """What entries of one kind share: field, task, names and batch of the inputs, losses, sizes."""

    field: str
    task: str
    names: tuple[str, ...]
    batch: Callable[[int], Batch]
    losses: Callable[[Tensor, Tensor], Tensor] | None
    sizes: dict[str, Any]


def entry(kind: Kind, name: str, family: str, size: int = 16, **options: Any) -> Entry:
    make = library(kind.task, family, *kind.names, **(kind.sizes | options))
    return Entry(name, f"transformers, {kind.field}", size, make, kind.batch, kind.losses)


def viewer(name: str, family: str, side: int = 32, **options: Any) -> Entry:
    return entry(VIEWER._replace(batch=images(side)), name, family, **options)


MASKED = ("input_ids", "attention_mask")
READER = Kind("text", "SequenceClassification", MASKED, masked_sentences, None, SIZES)
WRITER = Kind("text", "CausalLM", ("input_ids",), texts(LENGTH), per_sequence, SIZES)
GPT = WRITER._replace(sizes=GPT_SIZES)
TRANSLATOR = Kind("text", "Seq2SeqLM", ("input_ids", "decoder_input_ids"),
                  pairs(LENGTH, LENGTH // 2), per_sequence, {"vocab_size": WORDS})  # fmt: skip
VIEWER = Kind("vision", "ImageClassification", ("pixel_values",), images(32), None,
              {"num_labels": 10})  # fmt: skip
LISTENER = Kind("audio", "AudioClassification", ("input_values",), sounds, None,
                {"num_labels": 10})  # fmt: skip
reader, writer, translator, listener = (
    partial(entry, kind) for kind in (READER, WRITER, TRANSLATOR, LISTENER)
)

FEW_HEADS = {"num_key_value_heads": 2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 32, "patch_size": 4, "hidden_size": WIDTH, **LAYERS,
           "intermediate_size": 3 * WIDTH}  # fmt: skip
WINDOWS = {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32,
           "depths": [2, 2], "num_heads": [2, 4]}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
BART_SIZES = {
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 256 for part in ("encoder", "decoder")},
    "d_model": 64, "max_position_embeddings": 64, **SPECIAL, "forced_eos_token_id": 1,
}  # fmt: skip
SOUND_SIZES = {
    "hidden_size": 64, **LAYERS, "intermediate_size": 192, "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 2), "conv_kernel": (10, 8, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 32,
    "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip

TEXT = [
    reader("BERT", "Bert"),
    reader("RoBERTa", "Roberta", max_position_embeddings=66),
    reader("DistilBERT", "DistilBert", dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=3 * WIDTH),
    reader("DeBERTa-v2", "DebertaV2", relative_attention=True, position_buckets=16,
           pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
           position_biased_input=False),
    reader("ELECTRA", "Electra", embedding_size=48),
    reader("ALBERT", "Albert", embedding_size=48),
    reader("MPNet", "MPNet", max_position_embeddings=66),
    reader("ModernBERT", "ModernBert", global_attn_every_n_layers=2, local_attention=16,
           cls_token_id=1, sep_token_id=1),
    reader("RoFormer", "RoFormer", embedding_size=WIDTH),
    reader("ConvBERT", "ConvBert", embedding_size=WIDTH),
    reader("SqueezeBERT", "SqueezeBert", embedding_size=WIDTH),
    entry(READER._replace(sizes={}), "Funnel", "Funnel", vocab_size=WORDS, d_model=64, n_head=4,
          d_head=16, d_inner=192, block_sizes=[1, 1]),
    entry(GPT, "GPT-2", "GPT2"),
    writer("GPT-NeoX", "GPTNeoX"),
    entry(GPT, "GPT-J", "GPTJ", rotary_dim=8),
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
    viewer("Swin of transformers", "Swin", **WINDOWS),
    viewer("SwinV2", "Swinv2", **WINDOWS),
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
    listener("Wav2Vec2", "Wav2Vec2", **SOUND_SIZES),
    listener("Hubert", "Hubert", **SOUND_SIZES),
    listener("WavLM", "WavLM", **SOUND_SIZES),
    entry(LISTENER._replace(names=("input_features",), batch=waves(80, channels=16)),
          "Whisper encoder", "Whisper", d_model=64, encoder_layers=2, encoder_attention_heads=4,
          encoder_ffn_dim=192, num_mel_bins=16, max_source_positions=40, decoder_layers=1,
          decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=WORDS, **SPECIAL),
    entry(LISTENER._replace(batch=waves(32, channels=64)), "Audio spectrogram transformer", "AST",
          hidden_size=64, **LAYERS, intermediate_size=192, max_length=64, num_mel_bins=32,
          patch_size=8, frequency_stride=8, time_stride=8),
]  # fmt: skip

# Adapters --------------------------------------------------------------------------------------


def adapter(name: str, method: str, **options: Any) -> Entry:
    """The base model with an adapter; `method` names PEFT's class of a configuration."""

    def adapted() -> nn.Module:
        import peft

        base = library("CausalLM", "Llama", "input_ids", **(SIZES | FEW_HEADS))().model
        config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **options)
        # of the tokens alone, where the method puts others in front
        own = Apply(lambda logits: logits[:, -LENGTH:])
        return nn.Sequential(Logits(peft.get_peft_model(base, config), "input_ids"), own)

    return Entry(name, "PEFT", 16, adapted, texts(LENGTH), per_sequence)


ON = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = [
    adapter("LoRA", "Lora", r=4, **ON),
    adapter("LoRA, dropout", "Lora", r=4, lora_dropout=0.1, **ON),
    adapter("rsLoRA, all layers", "Lora", r=4, use_rslora=True, target_modules="all-linear"),
    adapter("DoRA", "Lora", r=4, use_dora=True, **ON),
    adapter("IA3", "IA3", target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"]),
    adapter("Prompt tuning", "PromptTuning", num_virtual_tokens=8),
    adapter("Prefix tuning", "PrefixTuning", num_virtual_tokens=8),
    adapter("P-tuning", "PromptEncoder", num_virtual_tokens=8, encoder_hidden_size=32),
    adapter("LoHa", "LoHa", r=4, **ON),
    adapter("LoKr", "LoKr", r=4, **ON),
    adapter("AdaLoRA", "AdaLora", init_r=6, target_r=4, total_step=1000, **ON),
    adapter("VeRA", "Vera", r=8, **ON),
    adapter("OFT", "OFT", oft_block_size=8, r=0, **ON),
    adapter("BOFT", "BOFT", boft_block_size=8, **ON),
    adapter("HRA", "HRA", r=4, **ON),
    adapter("MiSS", "Miss", r=4, **ON),
    adapter("FourierFT", "FourierFT", n_frequency=100, **ON),
    adapter("LayerNorm tuning", "LNTuning", target_modules=["input_layernorm",
            "post_attention_layernorm", "norm"]),
]  # fmt: skip

ENTRIES = [*TEXT, *VISION, *AUDIO, *ADAPTERS]
