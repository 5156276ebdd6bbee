"""What a decoder was trained for: to predict the next token, or something else that the target has no place for.

The class that config.json names tells, and the head that is stored; what neither tells, stock transformers does not
know either.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transmla.arch.families import Family
from transmla.errors import CheckpointError, UnsupportedModelError

# Parts of class names that say what a model puts out in the place of logits; completes "… is ".
_OTHER_PURPOSES = (
    (("SequenceClassification", "TokenClassification", "Classifier"), "a classifier or reward model"),
    (("Reward", "Score", "ValueHead", "ValueModel"), "a reward model"),
    (("QuestionAnswering",), "a model that marks answers in a text"),
    (("Embed", "Bidirectional", "BiModel", "ForEmbedding", "Retriev", "Sentence"), "an embedder"),
    (("Rerank", "CrossEncoder"), "a reranker"),
)
# First parts of the names of heads that put out something else.
_OTHER_HEADS = {
    **dict.fromkeys(("score", "classifier", "classification_head", "cls"), "a classifier or reward model"),
    **dict.fromkeys(
        ("v_head", "value_head", "reward_head", "regression_head", "rm_head", "r_head", "reward"), "a reward model"
    ),
    "qa_outputs": "a model that marks answers in a text",
}
_NO_PLACE = "and DeepSeek-V3 puts out logits of the next token alone"


def check_purpose(raw: Mapping[str, Any], family: Family) -> None:
    """Refuse a config whose class is none that predicts the next token.

    Raises:
        UnsupportedModelError: the class, and what it is.
    """
    named = raw.get("architectures")
    for name in named if isinstance(named, list) else [named]:
        if not isinstance(name, str) or _is_own(name, family):
            continue
        purpose = next((what for parts, what in _OTHER_PURPOSES if any(part in name for part in parts)), None)
        if purpose is not None:
            raise UnsupportedModelError(
                f"This {family.title} model cannot be converted: it is {purpose} (config.json: architectures = "
                f"[{name!r:.80}]), {_NO_PLACE}."
            )
        if not isinstance(named, list):
            continue  # Not as transformers writes it, so that a title may stand there.
        raise UnsupportedModelError(
            f"This {family.title} model cannot be converted: config.json names the class {name!r:.80} (architectures), "
            f"which is not {_causal(family)} and may compute something else; if the two compute the same, write "
            f"{_causal(family)} there."
        )


def _causal(family: Family) -> str:
    return f"{''.join(part for part in family.title if part.isalnum())}ForCausalLM"


def _is_own(name: str, family: Family) -> bool:
    # Whether a base model, or one whose class has no head, can be used is for its weights to tell.
    # A config of Mistral that has layer_types is read as a Ministral.
    name, causal = (spelling.casefold().replace("ministral", "mistral") for spelling in (name, _causal(family)))
    return name in (causal, causal.removesuffix("forcausallm") + "model")


def check_head(names: Iterable[str], family: Family, *, tied: bool) -> None:
    """Refuse weights with another head than that of a language model, or with none.

    Args:
        names: of the stored tensors, as the class names them.
        family: of the model.
        tied: whether the head is the embedding.

    Raises:
        UnsupportedModelError: a head that puts out something else.
        CheckpointError: the head was not saved.
    """
    stored = set(names)
    for name in sorted(stored):
        if (purpose := _OTHER_HEADS.get(name.partition(".")[0])) is not None:
            raise UnsupportedModelError(
                f"This {family.title} model cannot be converted: it is {purpose}, whose head is {name}, {_NO_PLACE}."
            )
    if not tied and family.head not in stored and family.embedding in stored:
        raise CheckpointError(
            f"The output head was not saved: tensor {family.head} is absent, and config.json does not tie it to the "
            "embedding (tie_word_embeddings = False); so it is with embedders and other base models. Convert the "
            "causal language model it was made from; only where the head is the embedding, set tie_word_embeddings to "
            "true in config.json."
        )
