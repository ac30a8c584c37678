"""The data sets, on tables of a few rows: splits, what is fitted on what, groups, noise, errors."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.data import planted
from benchmarks.data import sources as data
from benchmarks.data.tasks import TASKS

PEOPLE = 200


def table_of(name: str) -> pd.DataFrame:
    """A small table with the columns of a data set, missing values where the real one has them."""
    generator = np.random.default_rng(0)

    def one_of(*values: object) -> np.ndarray:
        return generator.choice(np.array(values, dtype=object), PEOPLE)

    people = {"race": one_of("Black", "White"), "sex": one_of("Female", "Male")}
    if name == "adult":
        numbers = ["age", "education_num", "capital_gain", "capital_loss", "hours_per_week"]
        texts = ["workclass", "marital_status", "occupation", "relationship", "native_country"]
        columns = {n: generator.integers(1, 60, PEOPLE) for n in numbers}
        columns |= {t: one_of("a", "b", None) for t in texts}
        return pd.DataFrame(columns | people | {"income": one_of(">50K", "<=50K")})
    if name == "compas":
        numbers = ["age", "juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count"]
        columns = {n: generator.integers(0, 30, PEOPLE) for n in numbers}
        columns["days_b_screening_arrest"] = one_of(-1.0, 2.0, None)
        columns |= {"c_charge_degree": one_of("F", "M"), "c_charge_desc": one_of("x", None)}
        return pd.DataFrame(columns | people | {"two_year_recid": one_of(0, 1).astype(int)})
    if name == "law_school":
        numbers = ["zfygpa", "zgpa", "dob_year", "weighted_lsat_ugpa", "cluster_tier"]
        numbers += ["family_income", "lsat", "ugpa"]
        columns = {n: generator.normal(size=PEOPLE) for n in numbers}
        columns["is_part_time"] = one_of("Yes", "No")
        return pd.DataFrame(columns | people | {"pass_bar": one_of(0, 1).astype(int)})
    attributes = [*data.HAIR, "male", "young", "smiling", "big_nose"]
    columns = {name: generator.integers(0, 2, PEOPLE) for name in attributes}
    return pd.DataFrame({"image_id": [f"{i}.jpg" for i in range(PEOPLE)], **columns})


STEMS = ("adult", "compas", "law_school", "celeba_attributes")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for stem in STEMS:
        table_of(stem).to_csv(tmp_path / f"{stem}.csv.gz", index=False)
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", data.SOURCES)
class TestEverySource:
    def test_splits_into_parts_without_a_common_row(self, folder, name):
        source = data.load(name)
        marked = source.features.assign(row=np.arange(len(source.label), dtype=float))
        source = data.replace(source, features=marked, numbers=[*source.numbers, "row"])
        parts = data.split(source, seed=0)
        columns = data.preprocessing(source).fit(source.features).get_feature_names_out().tolist()
        column = columns.index("numbers__row")
        together = torch.cat([part.x[:, column] for part in parts]).tolist()
        assert len(together) == len(set(together)) == sum(data.Sizes().of(len(source.label)))

    def test_sensitive_columns_are_no_features(self, folder, name):
        source = data.load(name)
        assert not set(source.features) & {*source.sensitive, "race", "sex", "male", "young"}

    def test_is_finite_and_float32(self, folder, name):
        for part in data.split(data.load(name), seed=1):
            assert part.x.dtype == torch.float32
            assert part.x.isfinite().all()
            assert part.y.dtype == torch.int64

    def test_groups_are_those_of_the_table(self, folder, name):
        source = data.load(name)
        train, _, _ = data.split(source, seed=3)
        rows = np.random.default_rng(3).permutation(len(source.label))[: len(train)]
        for grouping, columns in source.groupings.items():
            wanted = [
                ", ".join(
                    str({**source.sensitive.iloc[r], "label": source.label.iloc[r]}[c])
                    for c in columns
                )
                for r in rows
            ]
            found = [train.names[grouping][code] for code in train.groups[grouping].tolist()]
            assert found == wanted


def test_scales_are_fitted_on_the_training_part_alone(folder):
    source = data.load("law_school")
    train, validation, _ = data.split(source, seed=0)
    numbers = len(source.numbers)
    assert torch.allclose(train.x[:, :numbers].mean(0), torch.zeros(numbers), atol=1e-5)
    assert not torch.allclose(validation.x[:, :numbers].mean(0), torch.zeros(numbers), atol=1e-3)
    outside = np.setdiff1d(
        np.arange(PEOPLE), np.random.default_rng(0).permutation(PEOPLE)[: len(train)]
    )
    changed = source.features.copy()
    changed.loc[outside, "lsat"] = 1e6
    again, _, _ = data.split(data.replace(source, features=changed), seed=0)
    assert torch.equal(again.x, train.x)


def test_hair_colours_are_those_with_exactly_one(folder):
    source = data.load("celeba_hair")
    table = table_of("celeba_attributes")
    one = table[table[data.HAIR].sum(axis=1) == 1]
    assert len(source.label) == len(one)
    assert (source.label.to_numpy() == one[data.HAIR].to_numpy().argmax(1)).all()
    assert not set(source.features) & set(data.HAIR)


class TestNoise:
    def test_flips_the_share_outside_the_test_part_only(self, folder):
        source = data.load("adult")
        clean, noisy = data.split(source, seed=0), data.split(source, seed=0, noise=0.3)
        flips = [float((a.y != b.y).float().mean()) for a, b in zip(clean, noisy, strict=True)]
        assert 0.15 < flips[0] < 0.45
        assert flips[2] == 0
        assert all(torch.equal(a.x, b.x) for a, b in zip(clean, noisy, strict=True))

    def test_groups_with_the_label_are_those_of_the_record(self, folder):
        train, _, _ = data.split(data.load("adult"), seed=0, noise=0.3)
        names = [train.names["label x sex"][code] for code in train.groups["label x sex"]]
        assert [int(name[0]) for name in names] == train.y.tolist()

    def test_goes_to_another_class(self):
        labels = pd.Series([0, 1, 2, 3] * 500)
        noisy = data.flipped(labels, 1.0, np.random.default_rng(0))
        assert (noisy != labels).all()
        assert set(noisy) == {0, 1, 2, 3}


class TestFiles:
    def test_a_missing_file_says_where_it_is_looked_for(self, tmp_path, monkeypatch):
        monkeypatch.delenv(data.VARIABLE, raising=False)
        with pytest.raises(FileNotFoundError, match="IRW_OPTIM_DATA is not set"):
            data.load("compas")
        monkeypatch.setenv(data.VARIABLE, str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"law_school.csv.gz: IRW_OPTIM_DATA='.*' has"):
            data.load("law_school")
        with pytest.raises(FileNotFoundError, match="list_attr_celeba of CelebA"):
            data.load("celeba_blond")
        assert not TASKS["celeba_hair"].available
        assert TASKS["adult"].available  # shipped
        assert TASKS["coloured_digits"].available

    @pytest.mark.parametrize("stem", ["adult", "compas", "law_school", "celeba_attributes"])
    def test_a_message_says_which_file_to_put_where_and_whence_it_comes(
        self, stem, tmp_path, monkeypatch
    ):
        monkeypatch.setenv(data.VARIABLE, str(tmp_path))
        monkeypatch.setattr(data, "SHIPPED", tmp_path)
        wanted = rf"{stem}\.csv\.gz: .* put there {re.escape(data.WHAT[stem])}"
        with pytest.raises(FileNotFoundError, match=wanted):
            data.read(stem)

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match="name='german': expected one of adult, compas"):
            data.load("german")


class TestPlanted:
    def test_the_colour_agrees_with_the_class_as_often_as_said(self):
        train, validation, _ = planted.coloured_digits(seed=0)
        for part in (train, validation):
            colour = part.groups["label x colour"] % 2
            assert abs(float((colour == part.y).float().mean()) - planted.SHORTCUT) < 0.05

    def test_the_colour_is_the_channel_with_the_image(self):
        train, _, _ = planted.coloured_digits(seed=0)
        empty = train.x.view(len(train), 2, 64).sum(2) == 0
        assert torch.equal(empty.long().argmin(1), train.groups["label x colour"] % 2)
        assert (empty.sum(1) == 1).all()

    def test_every_test_image_comes_in_both_colours(self):
        _, _, test = planted.coloured_digits(seed=0)
        red, green = test.x.view(2, -1, 2, 64)
        assert torch.equal(red[:, 0], green[:, 1])
        assert torch.equal(*test.y.view(2, -1))

    def test_the_marked_have_the_other_label(self):
        plain, marked = data.adult(), planted.marked_adult()
        mark = marked.features["mark"] == 1
        assert (plain.label != marked.label).equals(mark)
        assert abs(mark.mean() - planted.MINORITY) < 0.005
        assert (marked.sensitive["mark"] == "marked").equals(mark.rename("mark"))
