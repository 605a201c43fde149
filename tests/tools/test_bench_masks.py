"""The suite "masks": families equal their functions, contenders compute the same, tables and targets read the records."""

from unittest import mock

import pytest
import torch

from flexdma.lowerings import attend, flex
from flexdma.tools.bench import mask_contenders, report
from flexdma.tools.bench.mask_contenders import (
    ALONE,
    CREATED,
    CREATED_COMPILED,
    DEFAULT,
    FAMILIES,
    FLEX,
    MASK_SIZES,
    OWN_ORDER,
    MaskSizes,
    mask_calls,
)
from flexdma.tools.bench.mask_sections import BUILDING, CALLS, measure_mask_building, measure_masks
from flexdma.tools.bench.sections import Setting, begun, planned
from flexdma.tools.bench.suites import SUITES
from flexdma.tools.mask_families import mask_families
from flexdma.tools.timing import Turns

SMALL = MaskSizes(128, 128, 4, 2, 16)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def uncompiled(function):
    return function


@pytest.mark.parametrize("name", FAMILIES)
def test_lifespans_and_mask_mod_are_the_same_mask(name):
    length = 300
    family = mask_families(length, 2)[name]
    query, key, zero = torch.arange(length)[:, None], torch.arange(length), torch.tensor(0)
    seen = torch.zeros(family.heads, length, length, dtype=torch.int64)
    for birth, death in family.intervals:  # disjoint, so no pair is counted twice
        seen += (birth[0, :, None] <= query) & (query < death[0, :, None])
    want = [family.mask_mod(zero, torch.tensor(head), query, key) for head in range(family.heads)]
    assert torch.equal(seen, torch.stack(want).expand(seen.shape).long())
    assert family.pairs() == seen.sum()


def test_the_suite_has_all_families():
    assert sorted(FAMILIES) == sorted(mask_families(128))
    titles = [case.title for case in planned(SUITES["masks"], "cpu") if case.section == CALLS]
    assert titles == list(FAMILIES)


def test_contenders_compute_the_same():
    calls = mask_calls(SMALL, "random eviction, cache of N / 16", "cpu", torch.float32, uncompiled)
    assert set(calls) == {ALONE, CREATED, CREATED_COMPILED, OWN_ORDER, FLEX, DEFAULT}
    with mock.patch.object(attend, "compiled_flex_attend", flex.flex_attend), torch.no_grad():
        want = calls[CREATED]()
        for call in calls.values():
            torch.testing.assert_close(call(), want, atol=1e-5, rtol=1e-5)


def test_records_become_tables_and_targets():
    setting = Setting("cpu", torch.float32, compiler=uncompiled)
    results = begun(SUITES["masks"], "masks", 1, setting)
    family = FAMILIES[0]
    with (
        mock.patch.dict(MASK_SIZES, {"cpu": SMALL}),
        mock.patch.object(attend, "compiled_flex_attend", flex.flex_attend),
    ):
        results.add(BUILDING, family, measure_mask_building(family, setting, Turns(1)))
        rows = [row for row in measure_masks(family, setting, Turns(1)) if row[1] != "seconds"]
    seconds = {ALONE: 9.0, CREATED: 4.0, CREATED_COMPILED: 2.0, OWN_ORDER: 3.0, FLEX: 0.5, DEFAULT: 2.5}
    results.add(CALLS, family, rows + [(name, "seconds", taken) for name, taken in seconds.items()])
    visited = {name: value for name, metric, value in rows if metric == "visited_over_ideal"}
    text = report.markdown(results)
    numbers = f"4.00 | 0.80 | {visited[OWN_ORDER]:.2f} | {visited[FLEX]:.2f} |"
    assert f"| {family} | 9,000.0 | 4,000.0 | 2,000.0 | 3,000.0 | 500.0 | 2,500.0 | {numbers}" in text
    assert "at least 0.95 times as fast | **missed**: 0.80" in text
    assert f"3 times faster, by flex | 4.00 ({family}, flex)" in text
    assert f"by the default on a CPU | **missed**: 0.80 ({family}, default)" in text


def test_a_mask_that_does_not_fit_is_a_row_with_the_reason():
    with mock.patch.object(mask_contenders, "free_bytes", return_value=1e5):
        calls = mask_calls(SMALL, "causal", "cpu", torch.float32, uncompiled)
        with pytest.raises(mask_contenders.UnavailableError, match="create_block_mask needs about"):
            calls[CREATED]()
