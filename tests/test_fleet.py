"""The simulated fleet, against sums by hand and queueing theory."""

import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fleet  # noqa: E402
from fleet import Answer, Settings, measures, simulate  # noqa: E402
from servers import Clock, Price, Server  # noqa: E402

BASE = Price(forward=1.0, row=0.25, prompt_token=0.125)
PILOT = Price(forward=0.5, row=0.0, prompt_token=0.0)
ONE = Settings(bases=1, requests=1, prompt=16, chunk=8, trip=0.5)


def test_a_request_to_the_base_alone_is_the_sum_of_its_steps() -> None:
    [served] = simulate(ONE, [Answer(3, 9, True)], BASE, PILOT).served
    prefill = 0.25 + (1 + 16 * 0.125)
    assert served.first - served.came == pytest.approx(prefill + 0.25)
    assert served.done - served.came == pytest.approx(prefill + 8 * 1.25 + 0.25)


@pytest.mark.parametrize(("draft", "checks"), [(7, [8]), (8, [8]), (9, [8, 24])])
def test_a_switch_comes_after_the_check_that_holds_it(draft: int, checks: list[int]) -> None:
    run = simulate(replace(ONE, pilots=1), [Answer(draft, 20, True)], BASE, PILOT)
    [served], [base] = run.served, run.bases
    clock = 0.25  # the pilot's first token needs a step, as each further one does
    for checked in checks:
        clock = max(clock, 0.25 + 0.5 * checked) + 0.5  # the chunk is drafted, and on its way
        clock += 1 + (16 + checked) * 0.125 + 0.25  # checked, and on its way
        if checked == 8:
            assert served.first - served.came == pytest.approx(clock)
    rest = (16 + draft) % 16 or 16
    clock += 0.25 + 1 + rest * 0.125 + (20 - draft - 1) * 1.25 + 0.25
    assert served.done - served.came == pytest.approx(clock)
    assert base.read == sum(16 + checked for checked in checks) + rest
    assert base.written == len(checks) + 20 - draft


def test_a_pilot_that_ends_by_itself_is_checked_to_its_end() -> None:
    run = simulate(replace(ONE, pilots=1), [Answer(10, 10, False)], BASE, PILOT)
    assert run.pilots[0].written == 10
    assert run.bases[0].read == (16 + 8) + (16 + 10)
    assert run.bases[0].written == 2


def test_checks_that_read_the_prefix_cache_read_what_is_new_to_it() -> None:
    run = simulate(replace(ONE, pilots=1, cached=True), [Answer(20, 21, True)], BASE, PILOT)
    assert run.bases[0].read == 24 + (40 - 16) + (36 - 32)  # in blocks of 16


def test_rows_share_a_step_and_a_late_one_waits_for_it() -> None:
    clock = Clock()
    server = Server(clock, BASE, rows=8, budget=100)
    times: dict[str, float] = {}

    def submit(name: str) -> None:
        job = server.submit(prompt=8, tokens=2)
        server.when(job, 2, lambda: times.update({name: clock.now}))

    clock.after(0.0, lambda: submit("first"))
    clock.after(1.0, lambda: submit("second"))
    clock.run()
    assert times == {"first": 2 + 1.25 + 8 * 0.125, "second": 2 + 2.25 + 1.25}
    assert server.waited == 1.0
    assert server.busy == times["second"]


def test_a_long_prompt_is_read_in_several_steps() -> None:
    clock = Clock()
    server = Server(clock, BASE, rows=8, budget=100)
    server.submit(prompt=250, tokens=1)
    clock.run()
    assert server.steps == 3
    assert clock.now == pytest.approx(3 + 250 * 0.125)


@pytest.mark.parametrize("when", [0.5, 1.5, 2.5], ids=["waiting", "read", "writing"])
def test_a_cancelled_job_frees_its_row(when: float) -> None:
    clock = Clock()
    server = Server(clock, Price(1, 0, 0), rows=1, budget=100)
    server.submit(prompt=1, tokens=1)
    job = server.submit(prompt=1, tokens=50)
    ended: list[float] = []
    server.when(server.submit(prompt=1, tokens=1), 1, lambda: ended.append(clock.now))
    clock.after(when, lambda: server.close(job))
    clock.run()
    assert ended == [2.0 if when < 1 else when + 1.5]


@pytest.mark.parametrize(("lengths", "busy"), [([1], 0.5), ([1], 0.8), ([1, 5], 0.8)])
def test_one_row_waits_as_pollaczek_and_khinchine_say(lengths: list[int], busy: float) -> None:
    mean, square = (sum(length**power for length in lengths) / len(lengths) for power in (1, 2))
    load = busy / mean
    settings = Settings(bases=1, load=load, prompt=1, requests=20000, rows=1, trip=0.0)
    run = simulate(settings, [Answer(length, length, False) for length in lengths], Price(1, 0, 0), PILOT)
    waited = run.bases[0].waited / settings.requests
    assert waited == pytest.approx(load * square / (2 * (1 - busy)), rel=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_every_request_is_served_once_and_nothing_is_left(seed: int) -> None:
    chance = random.Random(seed)
    answers = [Answer(draft, draft + chance.randrange(30), chance.random() < 0.7) for draft in range(1, 60)]
    settings = Settings(
        bases=chance.randint(1, 3),
        pilots=chance.randint(0, 3),
        load=chance.choice([0.01, 1.0, 100.0]),
        prompt=chance.choice([1, 30, 300]),
        requests=200,
        rows=chance.choice([1, 4, 256]),
        budget=chance.choice([7, 2048]),
        chunk=chance.choice([1, 8, 64]),
        cached=chance.random() < 0.5,
        seed=seed,
    )
    run = simulate(settings, answers, BASE, PILOT)
    assert len(run.served) == 200
    assert all(one.came < one.first <= one.done for one in run.served)
    assert [server.requests for server in run.bases + run.pilots] == [0] * (settings.bases + settings.pilots)
    written = sum(server.written for server in run.bases)
    if not settings.pilots:
        assert written == sum(one.tokens for one in run.served)
        assert sum(server.read for server in run.bases) == 200 * settings.prompt


def test_a_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    answers = fleet.read_answers("relative confidence", longer=1)
    settings = Settings(pilots=2, load=50.0, requests=300)
    first, again, other = (
        measures(simulate(replace(settings, seed=seed), answers, *fleet.read_prices())) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_prices_are_found_again_in_times_made_of_them() -> None:
    rows = [
        {
            "method": "WSD fast",
            "agreement": 0.0,
            "ms_per_token": 1.0,
            "batch": batch,
            "prompt": prompt,
            "base_forwards": forwards,
            "base_ms_per_token": 1000 * (forwards * (3 + 0.5 * batch) + 0.01 * batch * prompt) / 128,
        }
        for batch, prompt, forwards in [(1, 64, 100), (1, 1024, 110), (8, 64, 120), (8, 1024, 90)]
    ]
    price = fleet.fit({"shape": {"new_tokens": 128}, "rows": rows}, "base")
    assert tuple(asdict(price).values()) == pytest.approx((3, 0.5, 0.01))


def test_prices_say_what_the_forwards_took() -> None:
    results = json.loads(fleet.FORWARDS.read_text("utf-8"))
    for role, price in zip(("base", "pilot"), fleet.read_prices(), strict=True):
        for row in results["rows"]:
            if row["method"] == "WSD fast" and row["agreement"] == 0 and row["ms_per_token"]:
                count = row[f"{role}_forwards"]
                said = count * price.seconds(row["batch"], 0) + row["batch"] * row["prompt"] * price.prompt_token
                assert 1000 * said / 128 == pytest.approx(row[f"{role}_ms_per_token"], rel=0.03)


def test_stored_answers_are_read_and_made_longer_after_the_draft() -> None:
    once, longer = (fleet.read_answers("relative confidence", factor) for factor in (1, 8))
    assert len(once) == 80
    assert all(answer.draft <= answer.tokens <= fleet.MOST for answer in once)
    assert [answer.tokens - answer.draft for answer in longer] == [8 * (answer.tokens - answer.draft) for answer in once]


def test_the_committed_curves_are_those_of_this_code() -> None:
    results = json.loads((ROOT / "benchmarks/results/fleet.json").read_text("utf-8"))
    assert results["assumptions"] == fleet.assumptions(Settings())
    row = next(row for row in results["curves"] if row["pilots"] and row["load"] == 100 and row["prompt"] == 64)
    found = fleet.run(Settings(**{name: row[name] for name in asdict(Settings())}))
    assert found == pytest.approx({name: row[name] for name in found})
