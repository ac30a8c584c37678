"""Two gloo processes: one noise, one state, and the step of one process on the joined batch."""

import warnings

import pytest
import torch
import torch.distributed as dist
from models import mlp
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.utils.batch_memory_manager import BatchMemoryManager
from private_zoo import CLASSES, CONFIG
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from irw_optim.privacy import IRWPrivacyEngine

pytestmark = pytest.mark.slow
warnings.filterwarnings("ignore", message="Secure RNG turned off")
warnings.filterwarnings("ignore", message="Full backward hook is firing")

RANKED = DifferentiallyPrivateDistributedDataParallel
N, RANKS = 40, 2
# Logical batches as (rank 0's rows, rank 1's rows): unequal shards, empty ranks, nobody at all.
BATCHES = [
    ([0, 1, 2, 3, 4], [20, 21]),
    ([5], [22, 23, 24, 25, 26, 27]),
    ([], [28, 29, 30]),
    ([6, 7, 8], []),
    ([], []),
    ([9, 10, 11, 12], [31, 32, 33, 34]),
]


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, CLASSES, (N,), generator=generator))


def private(mode, noise_multiplier, batch_size=8, *, wrap=lambda model: model, seed=0):
    torch.manual_seed(seed)
    model = wrap(mlp(6, 8, CLASSES).double())
    engine, criterion = IRWPrivacyEngine(accountant="rdp"), nn.CrossEntropyLoss()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        data_loader=DataLoader(data(), batch_size=batch_size),
        criterion=criterion,
        noise_multiplier=noise_multiplier,
        max_grad_norm=0.7,
        irw=CONFIG,
        noise_generator=torch.Generator().manual_seed(7),
        grad_sample_mode=mode,
    )
    return engine, model, optimizer, loader, criterion


def train(model, optimizer, batches, criterion):
    for x, y in batches:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def outcome(model, optimizer):
    state = optimizer.public_state
    flat = [p.detach().flatten() for p in model.parameters()]
    flat += [torch.tensor([state.threshold, state.scale, state.steps]).double()]
    return torch.cat([*flat, *(v.flatten() for v in state.direction.values())])


def everywhere(tensor):
    """The tensor as every rank has it."""
    copies = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(copies, tensor)
    return copies


def on_shards(rank, mode, noise_multiplier, max_physical=100):
    _, model, optimizer, _, criterion = private(
        mode,
        noise_multiplier,
        wrap=RANKED,
        seed=rank,  # DPDDP makes the models equal
    )
    loader = DataLoader(data(), batch_sampler=[shards[rank] for shards in BATCHES])
    loader.collate_fn = lambda rows: (  # Opacus' loader makes empty batches of the right shape
        torch.stack([x for x, _ in rows]) if rows else torch.zeros(0, 6).double(),
        torch.tensor([y for _, y in rows], dtype=torch.long),
    )
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=max_physical, optimizer=optimizer
    ) as batches:
        train(model, optimizer, batches, criterion)
    return outcome(model, optimizer)


def two_processes(rank, file, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    found = {}
    for mode in ("hooks", "ghost"):
        for noise in (0.0, 0.5):
            mine = on_shards(rank, mode, noise)
            assert all(torch.equal(mine, other) for other in everywhere(mine)), "states differ"
            found[mode, noise] = mine
        found[mode, "physical"] = on_shards(rank, mode, 0.5, max_physical=2)

    # Through the engine's own loader, at a rate at which ranks often draw nobody.
    engine, model, optimizer, loader, criterion = private("hooks", 1.0, batch_size=2, wrap=RANKED)
    drawn = torch.zeros(N)
    index = {tuple(x.tolist()): i for i, (x, _) in enumerate(data())}
    sizes = []
    for _ in range(5):
        for x, y in loader:
            sizes.append(len(x))
            drawn[[index[tuple(row.tolist())] for row in x]] += 1
            train(model, optimizer, [(x, y)], criterion)
    mine = outcome(model, optimizer)
    assert all(torch.equal(mine, other) for other in everywhere(mine)), "states differ"
    found["history"] = engine.accountant.history
    found["steps"] = len(sizes)
    found["expected batch size"] = optimizer.expected_batch_size
    found["empty draws"] = sizes.count(0)
    found["drawn"] = everywhere(drawn)
    found["sizes"] = everywhere(torch.tensor(sizes))

    # Noise alone: its size over many steps on batches of nobody.
    _, model, optimizer, _, _ = private("hooks", 1.3, wrap=RANKED)
    noise = []
    for _ in range(300):
        optimizer.step(losses=torch.zeros(0))
        noise += [(p.grad * optimizer.expected_batch_size).flatten() for p in optimizer.params]
        optimizer.zero_grad()
    found["noise"] = torch.cat(noise).std().item()

    try:
        private("hooks", 1.0, wrap=DistributedDataParallel)
    except NotImplementedError as error:
        found["DistributedDataParallel"] = str(error)
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(
        two_processes, (str(folder / "rendezvous"), str(folder / "found")), nprocs=RANKS
    )
    return torch.load(folder / "found", weights_only=False)


def alone(mode, noise_multiplier):
    _, model, optimizer, _, criterion = private(mode, noise_multiplier)
    x, y = data().tensors
    batches = [(x[first + second], y[first + second]) for first, second in BATCHES]
    train(model, optimizer, batches, criterion)
    return outcome(model, optimizer)


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_two_processes_make_the_step_of_one(found, mode, noise_multiplier):
    """With noise too: rank 0 draws what the one process draws, and nobody else draws any."""
    torch.testing.assert_close(
        found[mode, noise_multiplier], alone(mode, noise_multiplier), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_ranks_may_split_their_shards_differently(found, mode):
    torch.testing.assert_close(found[mode, "physical"], found[mode, 0.5], rtol=1e-9, atol=1e-9)


def test_every_rank_takes_every_step_and_accounts_for_it(found):
    """Opacus' sampler leaves out a rank's draws of nobody, and the ranks fall apart."""
    assert found["empty draws"] > 0
    assert found["steps"] == 5 * N // 2
    assert found["history"] == [(1.0, 2 / N, 5 * N // 2)]
    assert found["expected batch size"] == 2


def test_ranks_draw_independently_from_shards_of_their_own(found):
    first, second = found["drawn"]
    assert (first > 0).sum() > 0
    assert (second > 0).sum() > 0
    assert not ((first > 0) & (second > 0)).any()
    assert not torch.equal(*found["sizes"])  # the same seed on all ranks would make them equal


def test_noise_is_added_once(found):
    expected = 1.3 / 0.89**0.5 * 0.7
    numbers = 300 * sum(p.numel() for p in private("hooks", 0.0)[1].parameters())
    assert found["noise"] == pytest.approx(expected, rel=5 / (2 * numbers) ** 0.5)


def test_wrappers_that_average_before_the_noise_are_refused(found):
    assert "DifferentiallyPrivateDistributedDataParallel" in found["DistributedDataParallel"]
