"""Several tokens of a sequence in one step: guesses are computed as if each were right, and kept as far as they are.

A guess is a work item of its own here, of one token, which sees those before it: keys and values of all tokens are
written before any are read. So a token gets the same bits as without guessing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from tgi_server.engine.plan import Plan, Sampled, Work

# Guesses what follows the tokens of a sequence; a step verifies all guesses at once.
Guess = Callable[[list[int]], list[int]]


def unrolled(plan: Plan) -> Plan:
    """`plan` with a work item for each guess, after the one whose next tokens are guessed."""
    if not any(work.guessed for work in plan.work):
        return plan
    return Plan([part for work in plan.work for part in _parts(work)])


def folded(plan: Plan, found: Sequence[Sampled]) -> list[Sampled]:
    """What each work item of `plan` got, of what those of `unrolled(plan)` got that sample or are scored.

    The tokens after a wrong guess, which were drawn in vain, are left out.
    """
    rest = iter(found)
    folds = []
    for work in plan.work:
        if not work.samples and not work.scored:
            continue
        whole = next(rest)
        right = True
        for guess in _guesses(work):
            part = next(rest)
            right = right and whole.token_ids[-1] == guess
            if right:
                whole.token_ids += part.token_ids
                whole.logprobs += part.logprobs
                whole.top += part.top
        folds.append(whole)
    return folds


def _guesses(work: Work) -> list[int]:
    return work.token_ids[work.count - work.guessed :]


def _parts(work: Work) -> Iterator[Work]:
    if not work.guessed:
        yield work
        return
    known = work.count - work.guessed
    yield msgspec.structs.replace(work, count=known, token_ids=work.token_ids[:known], guessed=0)
    for i, guess in enumerate(_guesses(work)):
        yield msgspec.structs.replace(
            work,
            start=work.start + known + i,
            count=1,
            token_ids=[guess],
            new_pages=[],  # the first item has brought them all
            asked=None,
            guessed=0,
        )
