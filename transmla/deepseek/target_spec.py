"""A source's attention, with what the target keeps of it."""

from dataclasses import dataclass, fields

from transmla.arch.spec import AttentionSpec


@dataclass(frozen=True, eq=False)
class TargetSpec(AttentionSpec):
    """What the conversion needs to know of the source, and what of it the target has, too.

    Attributes:
        keep_biases: whether the target has the biases of queries, keys and values.
        keep_scaling: whether the target's slots are scaled as the source's pairs are; plain otherwise.
    """

    keep_biases: bool = True
    keep_scaling: bool = False

    @classmethod
    def of(cls, spec: AttentionSpec, *, keep_biases: bool, keep_scaling: bool) -> "TargetSpec":
        """Return a source's description with what the target keeps."""
        known = {field.name: getattr(spec, field.name) for field in fields(AttentionSpec)}
        return cls(**known, keep_biases=keep_biases, keep_scaling=keep_scaling)

    @property
    def biased(self) -> bool:
        """Whether the target has biases."""
        return self.keep_biases and bool(self.biases)

    @property
    def nonlinear(self) -> frozenset[str]:
        """Projections that the target cannot hold as they are: what they make of their input is no matrix times it."""
        return frozenset(self.family.head_norms) | (frozenset() if self.keep_biases else self.biases)

    @property
    def input_size(self) -> int:
        """Numbers in the input of attention, with a last one that is always 1 where the target has biases."""
        return self.hidden_size + self.biased
