"""An English text, for tests of real models: prompts of any lengths from it."""

from __future__ import annotations

from pathlib import Path

TEXT = """\
The harbour town had been built twice. The first houses stood close to the water, on the flat
ground where the river spreads out before it meets the sea, and every few winters a storm took some
of them away. After the great flood the families who were left moved their doors and windows, board
by board, up to the terrace behind the old lime kilns, and there they built again, this time in
stone. From the quay one can still see the line where the two towns meet: below it the walls are
dark and patched with brick, above it they are pale, and the streets run straight.

Bread is a simple thing, but it does not forgive impatience. Mix the flour with the water first and
leave it alone for half an hour; only then add the salt and the leaven. Fold the dough four times,
once every forty minutes, and keep it in a warm corner of the kitchen. It is ready when it has grown
by about one half, when the surface is smooth, and when a finger pressed into it leaves a mark that
comes back slowly. The oven must be as hot as it will go. Put a tray of water on its floor, so that
the crust stays soft for the first ten minutes, and then take the tray away.

To find out how old a tree is, one need not cut it down. A thin core, no wider than a pencil, is
taken from the trunk with a hollow drill, and the rings are counted under a lens. Wide rings tell of
wet summers, narrow rings of dry ones, and a dark scar on one side may be the mark of a fire that
nobody wrote down. Because the pattern of good and bad years is the same for all trees of a valley,
the beams of a house can be matched, ring by ring, with trees that are still alive, and so the year
in which they were felled is known exactly.

A good map leaves out almost everything. The mapmaker walks the land, measures what can be measured,
and then decides what the reader will need: the bridge but not the fence, the name of the village
but not the names of the farms. A sailor's chart shows the depth of the water and says nothing about
the hills, except for the three or four that can be seen from the sea. The same coast, drawn for a
geologist, has no lighthouses at all. Neither of the two is wrong, and neither could take the place
of the other.

The night train used to stop at every station, whether anybody waited there or not. The guard would
step down with his lamp, look along the empty platform, and wave to the driver, and the carriages
would begin to move again with a long soft knock that ran from the front of the train to its end.
Children who lived near the line learned to sleep through it. Only when the stops were given up, one
spring, did they wake: at ten past two, when nothing happened.
"""


def encode(model: Path) -> list[int]:
    """The text, twice, in the tokens of the model."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model).encode(TEXT)
    return tokens * 2


def cut(text: list[int], lengths: list[int]) -> list[list[int]]:
    """Prompts of these lengths, each from another place of the text."""
    return [text[37 * index : 37 * index + length] for index, length in enumerate(lengths)]
