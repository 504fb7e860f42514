"""A page of plain English that no model has read, for a short look at what a model makes of text."""

from __future__ import annotations

from typing import Final

from tgi_server.text.tokenizer import Tokenizer

SAMPLE: Final = """\
The bakery on the corner opened at six, an hour before the first train. By then the windows were white with steam, and \
the smell of bread had reached the platform on the other side of the street. People who were late for work stopped \
anyway. They bought a roll, put it into the pocket of their coat, and ran.

Anna had worked there for eleven years. She knew who took sugar in their coffee and who did not, whose children were \
ill, and which of the regular customers would pay at the end of the month. When a new machine was delivered in spring, \
she read the manual twice and then explained it to the owner, who had lost his glasses again.

"It is simple," she said. "You choose the temperature here and the time there. If the red lamp is on, the door is \
locked. Wait until it goes out before you open it, or the bread will fall."

"And if the lamp does not go out?"

"Then you call me."

In summer there were fewer people in the morning, because the schools were closed and many families had gone to the \
sea. On such days she used the quiet hours to count the bags of flour in the cellar, to write the orders for the \
coming week, and to clean the shelves. Sometimes it rained. Then she stood at the door with a cup of tea and watched \
the water run down the street, past the church and the post office, until it reached the river at the bottom of the \
hill.
"""


def sample_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The page as a model reads it."""
    (ids,) = tokenizer.encode_batch([SAMPLE])
    return tuple(ids)
