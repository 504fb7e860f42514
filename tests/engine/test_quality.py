"""`--quality-check`: a model that knows language is served, one that is garbled is not."""

from __future__ import annotations

import math

import pytest

from tgi_server.engine.quality import PageQuality, perplexity_by_frequency
from tgi_server.errors import StartupError
from tgi_server.text.sample import SAMPLE


def test_counting_has_the_perplexity_of_the_entropy_of_its_counts() -> None:
    assert perplexity_by_frequency([5] * 9) == pytest.approx(1)
    assert perplexity_by_frequency(list(range(50))) == pytest.approx(50)
    assert perplexity_by_frequency([1, 1, 2, 3]) == pytest.approx(2**1.5)


def test_a_page_foretold_better_than_by_counting_passes_and_a_worse_one_is_refused_with_both_numbers() -> (
    None
):
    PageQuality([-math.log(99.0)] * 10, 100.0).require_language()
    with pytest.raises(StartupError, match=r"garbled.* 101\.0; counting .* 10 tokens occurs gives 100\.0"):
        PageQuality([-math.log(101.0)] * 10, 100.0).require_language()


def test_a_token_that_cannot_be_is_no_language() -> None:
    with pytest.raises(StartupError, match=r"1 of 3 log-probabilities .* not finite"):
        PageQuality([-1.0, -math.inf, -1.0], 100.0).require_language()
    assert PageQuality([-800.0], 2.0).perplexity == math.inf


def test_the_page_is_of_many_words_so_that_counting_is_no_way_to_foretell_it() -> None:
    words = SAMPLE.split()
    assert len(words) > 250
    assert perplexity_by_frequency([hash(word) for word in words]) > 100
