"""Weights go to the samples that they were made of, whatever a collate_fn does, or it is named."""

import random

import pytest
import reference
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler

from irw_optim import IRWOptimizer
from irw_optim.schemes import GlobalScheme, IndexedDataset, global_weights

N, BATCH, WORDS, CLASSES = 26, 6, 7, 3


class Texts(Dataset):
    """Token sequences of different lengths, with ties in length and duplicates."""

    def __init__(self, tied=False):
        generator = torch.Generator().manual_seed(1)

        def draw(high, size):
            return torch.randint(1, high, size, generator=generator)

        lengths = [3 if tied else int(draw(9, (1,))) for _ in range(N)]
        self.texts = [draw(WORDS, (length,)) for length in lengths]
        self.labels = [int(draw(CLASSES + 1, (1,))) - 1 for _ in range(N)]
        self.texts[3], self.labels[3] = self.texts[7], self.labels[7]

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.texts[i], self.labels[i]


class Bag(nn.Module):
    """Sums embeddings; 0 is padding and counts nothing."""

    def __init__(self, hidden=5):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, hidden, padding_idx=0)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).sum(1).tanh())


def padded(samples):
    texts, labels = zip(*samples, strict=True)
    return pad_sequence(list(texts), batch_first=True), torch.tensor(labels)


def longest_first(samples):
    return padded(sorted(samples, key=lambda sample: -len(sample[0])))


def sorted_in_place(samples):
    samples.sort(key=lambda sample: len(sample[0]))
    return padded(samples)


def first_word_first(samples):
    return padded(sorted(samples, key=lambda sample: int(sample[0][0])))


def backwards_if_long(samples):
    return padded(samples if len(samples[0][0]) < 4 else samples[::-1])


def filled_up(samples):
    """Drops the long ones, and repeats others in their place."""
    short = [sample for sample in samples if len(sample[0]) < 6] or samples[:1]
    return padded([short[k % len(short)] for k in range(len(samples))])


def shuffled(samples):
    return padded(random.sample(samples, len(samples)))


def shuffled_by_torch(samples):
    return padded([samples[i] for i in torch.randperm(len(samples))])


def sorted_and_masked(samples):
    return masked(sorted(samples, key=lambda sample: len(sample[0])))


def masked_and_sorted(samples):
    noisy = [(hidden(text), label) for text, label in samples]
    return padded(sorted(noisy, key=lambda sample: len(sample[0])))


def next_ones_text(samples):
    texts, labels = padded(samples)
    return texts.roll(1, 0), labels


REORDERING = [
    longest_first,
    sorted_in_place,
    first_word_first,
    backwards_if_long,
    filled_up,
    shuffled,
    shuffled_by_torch,
    sorted_and_masked,
    masked_and_sorted,
]


def hidden(text):
    return text * (torch.rand(len(text)) < 0.7)


def masked(samples):
    texts, labels = padded(samples)
    return texts * (torch.rand(texts.shape) < 0.7), labels


def masked_one_by_one(samples):
    """The draws are as many as there are words, in the order of the samples."""
    return padded([(hidden(text), label) for text, label in samples])


def shifted(samples):
    """One draw a sample."""
    return padded([(text.roll(random.randrange(9)), label) for text, label in samples])


def changed_in_place(samples):
    for text, _ in samples:
        text.mul_(1)
    samples.append(samples.pop())
    return padded(samples)


def listed(samples):
    return list(padded(samples))


KEEPING = [padded, masked, shifted, changed_in_place, listed]


class Training:
    def __init__(self, collate=padded, data=None, zero_head=False, **options):
        torch.manual_seed(0)
        self.data = Texts() if data is None else data
        self.model = Bag().double()
        if zero_head:
            for parameter in self.model.head.parameters():
                nn.init.zeros_(parameter)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = IRWOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.1),
            alpha=0.3,
            model=self.model,
            criterion=self.criterion,
        )
        options = {"batch_size": BATCH, "shuffle": True, **options}
        self.loader = DataLoader(self.data, collate_fn=collate, **options)
        self.scheme = GlobalScheme(self.optimizer, self.loader)

    def weights(self, **options):
        return global_weights(
            self.model, self.criterion, self.loader, 0.3, progress=False, **options
        )

    def one_by_one(self):
        """Weights without any batch, by plain autograd."""
        texts = Texts()
        pairs = [padded([sample]) for sample in (texts[i] for i in range(N))]
        losses = torch.stack([nn.functional.cross_entropy(self.model(x), y) for x, y in pairs])
        G = reference.per_sample_gradients(losses, self.model.parameters())
        return reference.decide(losses.detach(), G, 0.3).weights


# Functions that take samples ---------------------------------------------------------------------


@pytest.mark.parametrize("zero_head", [False, True], ids=["", "all losses equal"])
@pytest.mark.parametrize("collate", REORDERING, ids=lambda f: f.__name__)
def test_an_order_that_is_not_kept_is_named(collate, zero_head):
    if zero_head and collate is backwards_if_long:
        pytest.skip("its batches are asked one by one, and some of them are in order")
    training = Training(collate, zero_head=zero_head)
    before = torch.get_rng_state()
    for call in (training.weights, training.scheme.renew):
        with pytest.raises(ValueError, match=rf"collate_fn={collate.__name__}.*IndexedDataset"):
            call()
        assert torch.equal(torch.get_rng_state(), before)
    assert training.scheme.record is None
    assert all(module.training for module in training.model.modules())


def test_samples_that_are_mixed_with_their_neighbours_are_named():
    with pytest.raises(ValueError, match="collate_fn=next_ones_text"):
        Training(next_ones_text).weights()


@pytest.mark.parametrize("change", [lambda s: s[1:], lambda s: s + s], ids=["dropped", "repeated"])
def test_another_number_of_samples_is_named(change):
    with pytest.raises(ValueError, match="a collate_fn that keeps every sample"):
        Training(lambda samples: padded(change(samples))).weights()


def test_a_forward_that_sorts_is_named():
    def by_label(model, batch):
        order = batch[1].argsort()
        return model(batch[0][order]), batch[1][order]

    with pytest.raises(ValueError, match=r"\(or forward=\)"):
        Training().weights(forward=by_label)


@pytest.mark.parametrize("collate", KEEPING, ids=lambda f: f.__name__)
def test_an_order_that_is_kept_is_taken(collate):
    training = Training(collate)
    record = training.scheme.renew()
    assert record.weights.sum().item() == pytest.approx(1)
    if collate not in (masked, shifted):
        assert reference.error(record.weights, training.one_by_one()) < 1e-10


def test_draws_that_depend_on_other_samples_cannot_be_verified():
    with pytest.raises(ValueError, match=r"cannot be verified.*IndexedDataset"):
        Training(masked_one_by_one).weights()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_smallest_data_sets_are_checked_as_well(size):
    data = torch.utils.data.Subset(Texts(), range(size))
    assert len(Training(padded, data).weights()) == size
    if size > 1:
        with pytest.raises(ValueError, match="collate_fn=longest_first"):
            Training(longest_first, data).weights()


def test_equal_samples_are_no_reason_to_refuse():
    text = torch.tensor([1, 2, 3])
    equal = [(text, 1)] * N
    for collate in (padded, longest_first):  # which sorts nothing here
        assert len(Training(collate, equal).weights()) == N


def packed(samples):
    """Reads sequences that are sorted by length, and no others."""
    lengths = [len(text) for text, _ in samples]
    nn.utils.rnn.pack_padded_sequence(padded(samples)[0], lengths, batch_first=True)
    return padded(samples)


@pytest.mark.parametrize("workers", [0, 1])
def test_functions_that_take_one_order_alone_are_taken(workers):
    data = sorted((Texts()[i] for i in range(N)), key=lambda sample: -len(sample[0]))
    training = Training(packed, data, shuffle=False, num_workers=workers)
    expected = Training(padded, data).weights()
    assert reference.error(training.weights(), expected) < 1e-10
    assert len(list(training.scheme)) == len(training.loader)
    with pytest.raises(RuntimeError, match="sorted in decreasing order"):  # its own
        Training(packed).weights()


def test_ties_that_are_all_there_is_are_no_reason_to_refuse():
    assert len(Training(longest_first, Texts(tied=True)).weights()) == N


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 2},
        {"num_workers": 1, "persistent_workers": True},
        {"batch_sampler": "batches"},
        {"sampler": "distributed"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("told", [False, True])
def test_every_kind_of_loader_gives_the_right_samples(options, told):
    data = Texts()
    if "batch_sampler" in options:
        batches = BatchSampler(RandomSampler(data), BATCH, drop_last=False)
        options = {"batch_sampler": batches, "batch_size": 1, "shuffle": None}
    if "sampler" in options:
        options = {"sampler": DistributedSampler(data, 2, rank=1), "shuffle": None}
    if told:
        data = IndexedDataset(data)
    training = Training(pairs_longest_first if told else padded, data, **options)
    assert_steps_on_the_right_samples(training)


# Functions that take pairs, and say what they did -----------------------------------------------


def told(pairs):
    indices, samples = zip(*pairs, strict=True)
    return torch.tensor(indices), padded(samples)


def pairs_longest_first(pairs):
    return told(sorted(pairs, key=lambda pair: -len(pair[1][0])))


def pairs_shuffled(pairs):
    return told(random.sample(pairs, len(pairs)))


def pairs_as_a_list(pairs):
    indices, batch = told(pairs[::-1])
    return [indices.tolist(), batch]


def assert_steps_on_the_right_samples(training):
    training.optimizer.param_groups[0]["lr"] = 0.0
    expected = training.one_by_one()
    texts, seen = Texts(), 0
    for x, y in training.scheme:
        training.optimizer.zero_grad()
        training.criterion(training.model(x), y).backward()
        training.optimizer.step()
        assert reference.error(training.scheme.weights, expected) < 1e-10
        rows = training.scheme._held.indices.tolist()
        again = padded([texts[i] for i in rows])
        assert torch.equal(again[1], y)
        assert torch.equal(again[0], x[:, : again[0].shape[1]])
        held = expected[rows]
        if held.sum():
            weights = training.optimizer.last_step.weights
            assert reference.error(weights, held / held.sum()) < 1e-10
        seen += len(rows)
    assert seen in (N, N // 2)


@pytest.mark.parametrize("collate", [told, pairs_longest_first, pairs_shuffled, pairs_as_a_list])
def test_a_function_of_pairs_may_have_any_order(collate):
    training = Training(collate, IndexedDataset(Texts()))
    assert reference.error(training.weights(), training.one_by_one()) < 1e-10
    assert reference.error(training.weights(batch_size=4), training.one_by_one()) < 1e-10
    assert_steps_on_the_right_samples(training)


def test_a_function_of_pairs_that_is_wrong_about_its_order_is_named():
    def wrong(pairs):
        indices, _ = zip(*pairs, strict=True)
        return torch.tensor(indices), pairs_longest_first(pairs)[1]

    with pytest.raises(ValueError, match="wrong samples"):
        Training(wrong, IndexedDataset(Texts())).weights()


def test_a_function_of_pairs_may_leave_samples_out_of_a_step_but_not_of_the_scores():
    short_only = False

    def some(pairs):
        kept = [pair for pair in pairs if len(pair[1][0]) < 6] if short_only else pairs
        return told(kept or pairs[:1])

    training = Training(some, IndexedDataset(Texts()))
    training.scheme.renew()
    short_only = True
    for x, y in training.scheme:
        training.optimizer.zero_grad()
        training.criterion(training.model(x), y).backward()
        held = training.scheme.weights[training.scheme._held.indices]
        if held.sum():
            weights = training.optimizer.last_step.weights
            assert reference.error(weights, held / held.sum()) < 1e-10
    with pytest.raises(ValueError, match=r"\(without \[.*expected each sample once"):
        training.weights()


def test_batches_of_pairs_without_indices_are_named():
    with pytest.raises(TypeError, match=r"expected \(indices, batch\)"):
        Training(lambda pairs: told(pairs)[1][0], IndexedDataset(Texts())).weights()


def test_a_plain_loader_over_an_indexed_data_set_is_one_over_the_data_set():
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(N, 4), torch.randint(0, 2, (N,)))
    model = nn.Linear(4, 2)
    weights = [
        global_weights(model, nn.CrossEntropyLoss(), DataLoader(d, BATCH), 0.3, progress=False)
        for d in (data, IndexedDataset(data))
    ]
    assert torch.equal(*weights)


# Loops with a loader of their own -----------------------------------------------------------------


@pytest.mark.parametrize("collate", [longest_first, sorted_in_place, first_word_first])
def test_a_wrapped_function_that_sorts_is_named(collate):
    data = IndexedDataset(Texts())
    loader = DataLoader(data, batch_size=N, collate_fn=data.collate(collate))
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"collate_fn={collate.__name__} puts"):
        loader.collate_fn([data[i] for i in range(N)])
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("collate", [padded, masked, list, changed_in_place, lambda samples: None])
@pytest.mark.parametrize("equal", [False, True])
def test_a_wrapped_function_that_keeps_the_order_is_taken(collate, equal):
    samples = [(torch.tensor([1, 2]), 1) for _ in range(N)] if equal else Texts()
    data = IndexedDataset(samples)
    states = random.getstate(), torch.get_rng_state()
    for _ in range(5):
        indices, _ = data.collate(collate)([data[i] for i in range(4)])
        assert indices.tolist() == [0, 1, 2, 3]
    assert random.getstate() == states[0]
    if collate is not masked:
        assert torch.equal(torch.get_rng_state(), states[1])


def test_samples_that_differ_in_what_is_left_out_are_no_reason_to_refuse():
    named = [(torch.tensor([1, 2]), 1, f"file {i}") for i in range(N)]
    data = IndexedDataset(named)
    collate = data.collate(lambda samples: padded([(x, y) for x, y, _ in samples]))
    indices, _ = collate([data[i] for i in range(5)])
    assert indices.tolist() == [0, 1, 2, 3, 4]
