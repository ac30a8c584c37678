"""Hugging Face Trainer and PEFT, on models made from a small configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from common import ALL_WORST_OFF, ALPHA
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler

from irw_optim import IRWOptimizer

transformers = pytest.importorskip("transformers")

# peft asks transformers in a way that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

VOCABULARY, LENGTH, SIZE, BATCH = 20, 6, 24, 8


class Sentences(Dataset[dict[str, Tensor]]):
    """Random tokens with padding of random length; ``labels`` is a class, or the next token."""

    def __init__(self, language: bool = False) -> None:
        draw = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(2, VOCABULARY, (SIZE, LENGTH), generator=draw)
        lengths = torch.randint(3, LENGTH + 1, (SIZE, 1), generator=draw)
        self.mask = (torch.arange(LENGTH) < lengths).long()
        self.tokens = self.tokens * self.mask
        if language:
            self.labels = self.tokens.masked_fill(self.mask == 0, -100)
        else:
            self.labels = torch.randint(3, (SIZE,), generator=draw)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.tokens[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
        }

    def batches(self) -> list[dict[str, Tensor]]:
        whole = {"input_ids": self.tokens, "attention_mask": self.mask, "labels": self.labels}
        return [{k: v[i : i + BATCH] for k, v in whole.items()} for i in range(0, SIZE, BATCH)]


def classifier() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


def language_model(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
            **options,
        )
    )


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


class Training:
    """One line and a loss function: what a user of the Trainer changes."""

    def __init__(self, model: Any, path: Path, language: bool = False, **options: Any) -> None:
        self.model, self.language = model, language
        self.criterion = nn.CrossEntropyLoss(reduction="sum")
        irw = {
            name: options.pop(name)
            for name in ("alpha", "accumulation_steps", "warmup_steps_irw")
            if name in options
        }
        if "warmup_steps_irw" in irw:
            irw["warmup_steps"] = irw.pop("warmup_steps_irw")
        self.optimizer = IRWOptimizer(
            sgd(model), model=model, criterion=self.criterion, **{"alpha": ALPHA, **irw}
        )
        self.options = {
            "output_dir": str(path),
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
            **options,
        }
        self.trainer = InOrder(
            model,
            transformers.TrainingArguments(**self.options),
            train_dataset=Sentences(language),
            compute_loss_func=self.loss,
            optimizers=(self.optimizer, None),
        )

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits
        if self.language:
            logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
        total = self.criterion(logits, labels)
        return total / (BATCH if num_items_in_batch is None else num_items_in_batch)


def plain_steps(model: Any, k: int = 1, clip: float | None = None, **options: Any) -> Any:
    criterion = nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        sgd(model), **{"alpha": ALPHA, "model": model, "criterion": criterion, **options}
    )
    model.train()
    for number, batch in enumerate(Sentences().batches(), start=1):
        labels = batch.pop("labels")
        (criterion(model(**batch).logits, labels) / k).backward()
        if number % k == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def same_parameters(one: nn.Module, other: nn.Module, rtol: float = 1e-5) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(p, q, rtol=rtol, atol=rtol) for p, q in pairs)


def test_classification(tmp_path: Path) -> None:
    training = Training(classifier(), tmp_path)
    start = classifier()
    assert same_parameters(training.model, start)
    training.trainer.train()
    assert same_parameters(training.model, plain_steps(classifier()))
    assert not same_parameters(training.model, start)
    assert training.optimizer.steps == SIZE // BATCH
    assert len(training.optimizer.last_step.weights) == BATCH


def test_the_gradient_against_a_loop_over_the_samples(tmp_path: Path) -> None:
    # The mask of the other attention overflows in float64 with the lowest transformers supported.
    writer = language_model(attn_implementation="eager")
    for language, model in ((False, classifier()), (True, writer)):
        training = Training(model.double(), tmp_path, language)
        batch = Sentences(language).batches()[0]
        labels = batch.pop("labels")
        model.train()
        elements = nn.functional.cross_entropy(
            *(
                (model(**batch).logits[:, :-1].transpose(1, 2), labels[:, 1:])
                if language
                else (model(**batch).logits, labels)
            ),
            reduction="none",
        )
        losses = elements
        if language:  # the mean over a sentence's own tokens
            losses = elements.sum(1) / (labels[:, 1:] != -100).sum(1)
        parameters = [p for p in model.parameters() if p.requires_grad]
        items = int((labels[:, 1:] != -100).sum()) if language else BATCH
        oracle = reference.step(losses, parameters, ALPHA)
        training.loss(model(**batch), labels, items).backward()
        assert reference.error(training.optimizer.last_step.weights, oracle.weights) < 1e-9
        for p, gradient in zip(parameters, oracle.gradients, strict=True):
            found = torch.zeros_like(p) if p.grad is None else p.grad
            assert float((found - gradient).abs().max()) < 1e-9
        training.optimizer.detach()


def test_language_modelling(tmp_path: Path) -> None:
    training = Training(language_model(), tmp_path, language=True)
    training.trainer.train()
    assert len(training.optimizer.last_step.weights) == BATCH, "a sample is a sentence"
    assert not same_parameters(training.model, language_model())


def test_clipping(tmp_path: Path) -> None:
    training = Training(classifier(), tmp_path, max_grad_norm=1e-2)
    training.trainer.train()
    assert same_parameters(training.model, plain_steps(classifier(), clip=1e-2), 1e-7)


@pytest.mark.parametrize("k", [1, 3])
def test_accumulation_in_both_meanings(tmp_path: Path, k: int) -> None:
    training = Training(classifier(), tmp_path, gradient_accumulation_steps=3, accumulation_steps=k)
    training.trainer.train()
    expected = plain_steps(classifier(), k=3, accumulation_steps=k)
    assert same_parameters(training.model, expected)
    assert training.optimizer.steps == 1


def test_mixed_precision(tmp_path: Path) -> None:
    training = Training(classifier(), tmp_path, bf16=True, **ALL_WORST_OFF)
    training.trainer.train()
    expected = plain_steps(classifier(), **ALL_WORST_OFF)
    assert same_parameters(training.model, expected, rtol=5e-3)


def test_resuming(tmp_path: Path) -> None:
    options = {"num_train_epochs": 2, "warmup_steps_irw": 2}
    whole = Training(classifier(), tmp_path / "whole", **options)
    whole.trainer.train()
    saving = {"save_strategy": "epoch", "save_total_limit": 2}
    first = Training(classifier(), tmp_path / "parts", **options, **saving)
    first.trainer.train()
    second = Training(classifier(), tmp_path / "parts", **options)
    second.trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert all(map(torch.equal, second.model.parameters(), whole.model.parameters()))
    assert second.optimizer.steps == 6


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"]
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():  # B starts at zero, which would leave A without a gradient
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return adapted


def test_lora(tmp_path: Path) -> None:
    model = lora(classifier().double())
    training = Training(model, tmp_path)
    trainable = [p for p in model.parameters() if p.requires_grad]
    batch = Sentences().batches()[0]
    labels = batch.pop("labels")
    model.train()
    losses = nn.functional.cross_entropy(model(**batch).logits, labels, reduction="none")
    oracle = reference.step(losses, trainable, ALPHA)
    training.loss(model(**batch), labels, BATCH).backward()
    assert 0 < len(trainable) < len(list(model.parameters()))
    for p, gradient in zip(trainable, oracle.gradients, strict=True):
        assert reference.error(p.grad, gradient) < 1e-8
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    training.optimizer.zero_grad()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    training.trainer.train()
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    assert training.optimizer.steps == SIZE // BATCH
