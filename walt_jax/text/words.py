"""The words of captions, to say which of a prompt's a model has never read."""

import re
from collections.abc import Iterable, Iterator


def words(text: str) -> list[str]:
    """Lower case, in order, each once; signs are no words."""
    return list(dict.fromkeys(re.findall(r"\w+(?:['’]\w+)*", text.lower())))


def of_captions(captions: Iterable[str]) -> set[str]:
    """All words of captions."""
    return {word for caption in set(captions) for word in words(caption)}


def warnings(prompts: Iterable[str], known: set[str]) -> Iterator[str]:
    """A sentence on each prompt with words that no caption of the training clips has."""
    for prompt in dict.fromkeys(prompts):
        unknown = [word for word in words(prompt) if word not in known]
        if unknown:
            listed = ", ".join(map(repr, unknown))
            verb = "is" if len(unknown) == 1 else "are"
            yield f"of the prompt {prompt[:60]!r} {listed} {verb} in no caption that the model was trained on."
