"""Hugging Face Trainer: a small BERT reads what the census says about people, in words.

    python examples/huggingface.py      # about half a minute on one core, offline

A row of UCI Adult becomes a sentence ("age 30 , private , never married , ..."), a tokenizer of
whole words is made from the sentences, and the model from a small configuration: nothing is
downloaded. The Trainer takes IRW in two places, `optimizers=` and `compute_loss_func=`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from adult_data import read_adult
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from irw_optim import IRWOptimizer
from irw_optim.metrics import group_accuracy

BATCH_SIZE = 64
OPTIONS = {"alpha": 0.3, "class_balance": True}


def sentences(table: pd.DataFrame) -> list[str]:
    """What there is to read of each person; race and sex are not among it."""
    words = ["workclass", "marital_status", "occupation", "relationship"]
    described = table[words].fillna("unknown").apply(lambda c: c.str.replace("-", " "))
    columns = [
        "age " + (table["age"] // 10 * 10).astype(str),
        *(described[word] for word in words),
        "education " + table["education_num"].astype(str),
        "hours " + (table["hours_per_week"] // 10 * 10).astype(str),
        np.where(table["capital_gain"] > 0, "with", "without") + pd.Series(" gains", table.index),
    ]
    return columns[0].str.cat(columns[1:], sep=" , ").str.lower().tolist()


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Whole words, those of the training sentences."""
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = ["[PAD]", "[UNK]"]
    tokenizer.train_from_iterator(texts, WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def encoded(table: pd.DataFrame, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Tensor]]:
    """Sentences with their labels, 1 for an income of more than 50,000 dollars a year."""
    columns = dict(tokenizer(sentences(table), padding=True, return_tensors="pt"))
    columns["labels"] = torch.tensor((table["income"] == ">50K").to_numpy(int))
    names = ("input_ids", "attention_mask", "labels")
    rows = zip(*(columns[name] for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def small_bert(words: int, length: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=words,
            max_position_embeddings=length,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=2,
            attn_implementation="eager",  # fused attention has no double backward
        )
    )


def trainer_of(
    model: nn.Module, data: Any, epochs: int, irw: dict[str, Any] | None, folder: str
) -> Trainer:
    """The Trainer as it is, or with IRW."""
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=512,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    adamw = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if irw is None:
        return Trainer(model, arguments, train_dataset=data, optimizers=(adamw, None))

    criterion = nn.CrossEntropyLoss(reduction="sum")
    optimizer = IRWOptimizer(adamw, model=model, criterion=criterion, **irw)

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = criterion(outputs.logits, labels) / (num_items_in_batch or len(labels))
        return loss

    return Trainer(
        model,
        arguments,
        train_dataset=data,
        optimizers=(optimizer, None),
        compute_loss_func=compute_loss,
    )


def judge(predicted: Tensor, table: pd.DataFrame) -> dict[str, float]:
    """Accuracies, in %."""
    decided = np.where(predicted == 1, ">50K", "<=50K")
    by_group = group_accuracy(table["income"], decided, table[["income", "sex"]])
    return {
        "accuracy": 100 * float((decided == table["income"]).mean()),
        **{", ".join(group): 100 * value for group, value in by_group.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--people", type=int, default=8000, help="train on that many")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    table = read_adult()
    train = table[table["split"] == "train"].sample(options.people, random_state=0)
    test = table[table["split"] == "test"].sample(4000, random_state=0)
    texts = sentences(train)
    tokenizer = tokenizer_of(texts)
    print(f"{len(tokenizer)} words; the first sentence: {texts[0]!r}\n")

    data, unseen = (encoded(part, tokenizer) for part in (train, test))
    length = max(len(rows[0]["input_ids"]) for rows in (data, unseen))
    rows = {}
    for name, irw in {"plain": None, "IRW": OPTIONS}.items():
        set_seed(0)
        model = small_bert(len(tokenizer), length)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(model, data, options.epochs, irw, folder)
            trainer.train()
            outputs = trainer.predict(unseen)
        rows[name] = judge(torch.from_numpy(outputs.predictions).argmax(1), test)
    print("On people of the test split, accuracies in %:")
    print(pd.DataFrame(rows).T.round(1).to_string())


if __name__ == "__main__":
    main()
