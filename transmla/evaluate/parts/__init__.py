"""The parts of an evaluation, one file each, and the registry that everything goes through."""

from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.parts.chat import ChatPart
from transmla.evaluate.parts.cost import CostPart
from transmla.evaluate.parts.greedy import GreedyPart
from transmla.evaluate.parts.layerwise import LayerwisePart
from transmla.evaluate.parts.long_context import LongContextPart
from transmla.evaluate.parts.other_probes import OtherProbesPart
from transmla.evaluate.parts.perplexity import PerplexityPart
from transmla.evaluate.parts.speed import SpeedPart
from transmla.evaluate.parts.tasks import TasksPart

__all__ = ["PARTS", "Part", "Setting"]

#: By the field of the report, in the order in which they are shown.
PARTS: dict[str, type[Part]] = {
    part.name: part
    for part in (
        PerplexityPart,
        TasksPart,
        LongContextPart,
        OtherProbesPart,
        GreedyPart,
        ChatPart,
        LayerwisePart,
        CostPart,
        SpeedPart,
    )
}
