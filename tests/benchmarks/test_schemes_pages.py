"""What the pages on the schemes say in figures is what the stored results say."""

import pytest

from benchmarks import report
from benchmarks.schemes import choosing

CELL = "worst label x sex"


def stored(name):
    return report.stored(f"schemes_{name}")


def rows_of(frame):
    """Rows as dictionaries; a number with a spread is a pair."""
    rows = frame.to_dict("records")
    return [{k: (v, r[f"± {k}"]) if f"± {k}" in r else v for k, v in r.items()} for r in rows]


class Table:
    """Settings by columns, as they are printed: percentages of accuracies, else two digits."""

    def __init__(self, name):
        frame = report.summarised(stored(f"choosing_{name}"), ["setting"])
        self.rows = {row["setting"]: row for row in rows_of(frame)}

    def __call__(self, setting, column=CELL):
        mean, _ = self.rows[setting][column]
        return f"{mean:.2f}" if "loss" in column else f"{100 * mean:.1f}"

    def spread(self, setting, column=CELL):
        return f"{100 * self.rows[setting][column][1]:.1f}"

    def points(self, one, other, column):
        """How much larger ``one`` is, in points."""
        return f"{100 * (self.rows[one][column][0] - self.rows[other][column][0]):.1f}"


def text_of(page):
    return " ".join((report.ROOT / "docs" / page).read_text(encoding="utf-8").split())


def nothing_helps(table, column):
    """Whether no setting is above plain training by more than its spread."""
    mean, spread = table.rows["plain"][column]
    return all(row[column][0] <= mean + spread for row in table.rows.values())


def options():
    a, law = Table("options_adult"), Table("options_law")
    balanced, warm = "plain, class-weighted loss", "IRW, warm-up"
    both = "IRW, warm-up, center 1, mix 0.5"
    race, lost = "worst label x race", "accuracy"
    assert nothing_helps(a, "worst race x sex")
    assert nothing_helps(law, "worst race x sex")
    assert law("IRW, class_balance") == law(f"{warm}, class_balance")
    yield f"from {a('plain')} to {a('plain, threshold moved')} % on Adult"
    yield f"from {law('plain')} to {law('plain, threshold moved')} % on Law School"
    yield f"a class-weighted loss to {a(balanced)} and {law(balanced)} %"
    yield f"IRW by itself gets to {a('IRW')} and {law('IRW')} %"
    yield (
        f"{law('plain', race)} % plain, {law('plain, threshold moved', race)} % with a moved "
        f"threshold, {law(balanced, race)} % with class weights, {law('IRW', race)} % with IRW, "
        f"{law(f'{warm}, class_balance', race)} % with warm-up and `class_balance`, "
        f"{law('IRW, center 1', race)} % with `center=1`"
    )
    yield (
        f"from {a('plain', 'tail loss')} to {a('IRW', 'tail loss')} and from "
        f"{law('plain', 'tail loss')} to {law('IRW', 'tail loss')} with IRW"
    )
    yield f"weights take it to {a(balanced, 'tail loss')} and {law(balanced, 'tail loss')}"
    yield (
        f"{a('IRW, center 1')} and {law('IRW, center 1')} % in the worst label x sex cell, at "
        f"{a.points('plain', 'IRW, center 1', lost)} and "
        f"{law.points('plain', 'IRW, center 1', lost)} points of accuracy"
    )
    half = f"{warm}, center 0.5"
    yield f"0.5 is the milder choice ({a(half)} and {law(half)} %)"
    yield f"another ({a(both)} and {law(both)} %)"
    yield f"an accuracy of {a(f'{warm}, center 2', lost)} and {law(f'{warm}, center 2', lost)} %"
    yield f"by itself on Adult ({a('IRW, class_balance')} %)"
    yield f"after a warm-up ({a(f'{warm}, class_balance')} %)"
    yield f"either way ({law('IRW, class_balance')} % both)"
    yield (
        f"gives back {law.points('IRW, mix 0.5', 'IRW', lost)} points of accuracy on Law School "
        f"for {law.points('IRW', 'IRW, mix 0.5', CELL)} of the worst cell"
    )
    yield f"as short as this one ({a(warm)} % and {law(warm)} %)"
    yield f"closer to plain training on both: {a('IRWO')} and {law('IRWO')} %"
    yield f"the lowest tail loss ({a('CVaR', 'tail loss')} and {law('CVaR', 'tail loss')})"
    yield f"worst label x sex cell ({a('CVaR')} and {law('CVaR')} %)"


def renewals():
    """The cost of a renewal, by model: at the loader's batch size and at larger ones."""
    rows = {row["model"]: row for row in rows_of(stored("cost")) if row["reading"] == "in memory"}
    own, larger = ([row[f"renewal, {k} x batch"] for row in rows.values()] for k in (1, 4))
    assert len(rows) == 6
    yield f"the six models take {min(own):.2f} to {max(own):.2f} epochs"
    yield f"the smallest down to {min(larger):.2f}"
    yield f"up to {max(larger):.2f}"
    assert min(larger) == rows["MLP 64-32"]["renewal, 4 x batch"]
    memory = rows_of(stored("cost_memory"))
    assert [row["N"] for row in memory] == [8_000, 32_000, 128_000]
    grown = max(row["growth of the peak, MiB"] for row in memory)
    assert grown < memory[-1]["N x P numbers, MiB"] / 1000
    yield f"grew by {grown:.0f} MiB"
    gib = [round(row["N x P numbers, MiB"] / 1024) for row in memory]
    yield f"would have taken {gib[0]} to {gib[-1]} GiB"


def factors(table, optimizers):
    return [
        row[f"{way}: variance"][0] / row["resampling: variance"][0]
        for row in table
        if row["optimizer"] in optimizers
        for way in ("reweighting", "normalised")
    ]


def distances(table, optimizers):
    return [
        row[f"{way}: distance of the mean"]
        for row in table
        if row["optimizer"] in optimizers
        for way in ("reweighting", "normalised")
    ]


def variances():
    result = stored("variance")
    table, exact = rows_of(result), result.attrs["closed_form_sgd"]
    linear, adaptive = ("SGD", "momentum"), ("Adam", "Adagrad")
    first = factors(table, linear)
    yield f"lower by a factor of {min(first):.0f} to {max(first):.0f}"
    second = factors(table, adaptive)
    yield f"the factor is {min(second):.1f} to {max(second):.1f}"
    yield f"({exact['resampling']:.4f} and {exact['reweighting']:.3f} for one SGD step)"
    far = distances(table, adaptive)
    yield f"they are {100 * min(far):.0f} to {100 * max(far):.0f} % apart"
    assert max(distances(table, linear)) < 0.02
    for way in ("resampling", "reweighting"):  # the draws agree with the closed form
        measured, error = table[0][f"{way}: variance"]
        assert abs(measured - exact[way]) < 3 * error


def alphas():
    a, law, flipped = Table("alpha_adult"), Table("alpha_law"), Table("alpha_adult_flips_0.2")
    of, lost = "IRW, alpha {}".format, "accuracy"
    errors = [100 * (1 - table.rows["plain"]["accuracy"][0]) for table in (a, law)]
    yield (
        f"{a(of(0.5))} % in the worst label x sex cell of Adult, and {law(of(0.5))} % on Law "
        f"School, which is below plain training's {law('plain')} %"
    )
    yield (
        f"above the error rates of {errors[0]:.1f} and {errors[1]:.1f} %, {a(of(0.3))} and "
        f"{law(of(0.3))} % for {a.points('plain', of(0.3), lost)} and "
        f"{law.points('plain', of(0.3), lost)} points of accuracy"
    )
    yield f"up to {a(of(0.02))} % on Adult and {law(of(0.02))} % on Law School"
    yield (
        f"by {a.points('plain', of(0.02), lost)} and {law.points('plain', of(0.02), lost)} points"
    )
    for table in (a, law):
        cells = {name: row[CELL][0] for name, row in table.rows.items()}
        assert max(cells, key=cells.get) == of(0.02)
        assert cells[of(1.0)] < cells["plain"]
        assert nothing_helps(table, "worst race x sex")
    assert all(45 <= float(law(of(x))) <= 48 for x in (0.02, 0.028, 0.05, 0.09, 0.1, 0.15, 0.2))
    shares = [
        stored(f"choosing_alpha_{data}").attrs["smallest_shares"]["label x sex"]
        for data in ("adult", "law")
    ]
    yield f"smallest label x sex group's share**, {shares[0]} and {shares[1]}"
    yield f"({a(of(shares[0]))} and {law(of(shares[1]))} %). Nothing marks"
    yield f"({flipped('plain', lost)} % accuracy), and IRW loses"
    yield (
        f"{flipped.points('plain', of(0.3), lost)} points of accuracy at $\\alpha = 0.3$ and "
        f"{flipped.points('plain', of(0.15), lost)} at 0.15"
    )
    yield f"({flipped(of(0.3))} % at 0.3)"


def scores():
    rows = {(row["model"], row["scores from"]): row for row in rows_of(stored("score_parameters"))}
    times = {
        (row["model"], row["scores from"]): row["step / full-score step"]
        for row in rows_of(stored("score_time"))
    }
    models = ("MLP", "transformer", "CNN")

    def between(way, what):
        seen = [
            rows[model, way][f"{what}, {point}"][0]
            for model in models
            for point in ("start", "third", "end")
        ]
        return f"{min(seen):.2f} to {max(seen):.2f}"

    def group(model, way):
        return 100 * rows[model, way]["worst group"][0]

    last = [times[model, "last"] for model in models]
    yield (
        f"rank correlations of {between('last', 'spearman')} with the full scores, "
        f"{between('last', 'overlap')} of the weight in common, and {min(last):.2f} to "
        f"{max(last):.2f} of the time"
    )
    yield f"({group('MLP', 'last'):.1f} against {group('MLP', 'all'):.1f} %)"
    yield f"The first layer agrees least** ({between('first', 'spearman')})"
    yield f"on average ({between('random third', 'spearman')})"
    yield f"cost the MLP {group('MLP', 'all') - group('MLP', 'middle'):.1f} points"
    ways = ("all", "first", "middle", "last", "random third")
    assert max(group("CNN", way) for way in ways) == group("CNN", "first")
    yield (
        f"from {group('CNN', 'plain'):.1f} % with plain training to {group('CNN', 'all'):.1f} % "
        f"with the full scores, and to {group('CNN', 'first'):.1f} % with the first layer's"
    )


def held():
    a, law = Table("schemes_adult"), Table("schemes_law")
    ten = "global, {}, every 10 steps"
    epoch = "global, {}, every 63 steps"
    means = [
        [table(ten.format(use)) for use in ("reweighting", "resampling")] for table in (a, law)
    ]
    yield (
        f"({means[0][0]} and {means[0][1]} % against {a('local')} % on Adult, {means[1][0]} and "
        f"{means[1][1]} % against {law('local')} % on Law School)"
    )
    yield (
        f"{a(epoch.format('reweighting'), 'accuracy')} and "
        f"{a(epoch.format('resampling'), 'accuracy')} % accuracy on Adult, where plain training "
        f"has {a('plain', 'accuracy')} %"
    )
    for table in (a, law):
        local = float(table.spread("local"))
        assert all(float(table.spread(ten.format(use))) < 3 * local for use in ("resampling",))
        for use in ("reweighting", "resampling"):
            assert float(table(f"global, {use}, every 189 steps")) < 5


def held_for_an_epoch():
    a, law = Table("held_adult"), Table("held_law")
    balanced = "global, resampling, every 63 steps, class_balance"
    mixed = "global, reweighting, every 63 steps, mix 0.5"
    yield f"brings back {a(balanced, 'accuracy')} % accuracy and {a(balanced)} % in the worst cell"
    yield f"`mix=0.5` with reweighting {a(mixed, 'accuracy')} and {a(mixed)} %"
    yield (
        f"({law(balanced)} and {law(mixed)} %, with spreads of {law.spread(balanced)} and "
        f"{law.spread(mixed)} points)"
    )


def held_in_short():
    a = Table("schemes_adult")
    yield f"({a('global, reweighting, every 10 steps')} against {a('local')} %"


CHOICES = sorted(path.stem for path in report.RESULTS.glob("schemes_choosing_*.csv"))


@pytest.mark.parametrize("name", CHOICES)
def test_the_tables_are_those_of_the_stored_runs(name):
    text = choosing.table_of(report.stored(name), name.split("_")[2])
    assert (report.RESULTS / f"{name}.md").read_text(encoding="utf-8") == text


CLAIMS = {
    "choosing.md": [alphas, options, held_in_short, scores],
    "schemes.md": [renewals, variances, held, held_for_an_epoch],
}


@pytest.mark.parametrize(
    ("page", "claims"), [(page, claims) for page, all_ in CLAIMS.items() for claims in all_]
)
def test_the_page_says_what_was_measured(page, claims):
    text = text_of(page)
    missing = [sentence for sentence in claims() if sentence not in text]
    assert not missing
