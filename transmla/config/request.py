"""A request: frozen choices that read and write YAML recipes; flags win over the recipe, the recipe over defaults."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from transmla.errors import UsageError
from transmla.old_names import renamed

OutputDtype = Literal["auto", "float32", "bfloat16", "float16"]
ComputeDtype = Literal["float32", "bfloat16"]
Bos = Literal["auto", "always", "never", "once"]

BOS: Any = Field(
    "auto",
    description="The token that begins a text, in front of each window. auto: where the tokenizer puts one; always; "
    "never; once: in front of the whole text only, as GPTQ's tables have it.",
)


def as_tuple(value: Any) -> Any:
    """Take one word for a list of one."""
    return (value,) if isinstance(value, str) else value


def split_at_commas(value: Any) -> Any:
    """Take ``512,2048`` for two numbers, as one word or as one of several."""
    words = [value] if isinstance(value, str | int) else value
    if not isinstance(words, list | tuple):
        return value
    return tuple(part for word in words for part in (word.split(",") if isinstance(word, str) else [word]))


class Request(BaseModel):
    """A frozen set of choices; unknown keys are refused rather than ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The fields that are arguments on the command line, in their order; the others are flags.
    ARGUMENTS: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """Take what is said in the words of an earlier release."""
        return renamed(cls.__name__, values)

    @classmethod
    def spell(cls, field: str) -> str:
        """Spell a field as the command line does: an argument in capitals, a flag with hyphens."""
        return field.upper() if field in cls.ARGUMENTS else "--" + field.replace("_", "-")

    @classmethod
    def describe(cls, field: str) -> str:
        """Return the one description of ``field`` with its default, for help texts."""
        info = cls.model_fields[field]
        if info.default in (None, PydanticUndefined, False, ()):
            return f"{info.description}"
        return f"{info.description} (default {_spelled(info.default)})"

    @classmethod
    def build(cls, *, recipe: Path | None, flags: dict[str, Any]) -> Self:
        """Combine flags over a YAML recipe over the defaults.

        Args:
            recipe: the YAML file, if there is one.
            flags: the arguments of a command by name, where ``None`` and an empty list mean that nothing was said;
                those that are no field of the request are the command's own.

        Raises:
            UsageError: the recipe cannot be read, or a value is unknown or out of range; all problems at once.
        """
        given = {name: flags[name] for name in cls.model_fields if flags.get(name) not in (None, [])}
        values = {**(read_recipe(recipe) if recipe else {}), **given}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{cls.spell(str(item['loc'][0]))}: {item['msg']} (found {reprlib.repr(item['input'])})"
                if item["type"] != "missing"
                else f"{cls.spell(str(item['loc'][0]))} is missing"
                for item in error.errors()
            )
            raise UsageError(f"The request is not valid: {problems}.") from None

    def to_yaml(self) -> str:
        """Write every resolved choice as a recipe that runs again as it is."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _spelled(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _RecipeLoader(yaml.SafeLoader):
    """Plain values without aliases: ten lines of these can stand for more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read in recipes")
        return super().compose_node(parent, index)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe into plain keys.

    Raises:
        UsageError: absent, not YAML, or not a mapping of keys to values.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {path} cannot be read: {error}.") from None
    # A number may be longer than Python reads, and a date may not exist.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise UsageError(f"The recipe {path} must be a mapping of keys to values, found {type(values).__name__}.")
    return values


class SourceRequest(Request):
    """Where a source model comes from."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(description="Hub id, id@revision, or a folder with config.json and safetensors.")
    gguf_file: str | None = Field(None, description="Name of a GGUF file inside MODEL; it is dequantised first.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    token: str | None = Field(None, description="Hub token; the logged-in one is used by default.", exclude=True)
