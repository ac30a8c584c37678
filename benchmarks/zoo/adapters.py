"""The methods of PEFT on a small Llama: its own parameters stay, the adapter's are trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.zoo.entry import Entry, per_sequence, texts
from benchmarks.zoo.hugging_face import FEW_HEADS, LENGTH, SIZES, library


class Adapted(nn.Module):
    """Logits of the tokens alone, where the method puts others in front."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits[:, -tokens.shape[1] :]


def adapter(name: str, method: str, **options: Any) -> Entry:
    """The base model with an adapter; `method` names PEFT's class of a configuration."""

    def adapted() -> nn.Module:
        import peft

        base = library("CausalLM", "Llama", "input_ids", **(SIZES | FEW_HEADS))().model
        config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **options)
        return Adapted(peft.get_peft_model(base, config))

    return Entry(name, "PEFT", 16, adapted, texts(LENGTH), per_sequence)


ON = {"target_modules": ["q_proj", "v_proj"]}
ENTRIES = [
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
