"""What reads a run's captions: a vocabulary of its own, a list of classes, or a published T5."""

import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from walt_jax.data.latents import Encoded
from walt_jax.errors import UserError
from walt_jax.text import t5_weights, vocabulary, words
from walt_jax.text.frozen import FrozenText, padded
from walt_jax.text.labels import Labels
from walt_jax.text.t5 import T5Encoder
from walt_jax.text.vocabulary import Vocabulary
from walt_jax.training.latent_batches import ReadCaptions
from walt_jax.training.run_config import RunConfig, only_published
from walt_jax.workdir import write_atomically

# What a workdir may have of a run's captions.
FILES = ("vocabulary.model", "vocabulary.model.sha256", "labels.json", "labels.json.sha256", "words.txt")


class RunText:
    """The captions' side of a run.

    Args:
        config: see `RunConfig`.
        workdir: where the vocabulary, or the list of classes, is kept.
    """

    def __init__(self, config: RunConfig, workdir: pathlib.Path):
        self._config, self._workdir = config, workdir
        self._words: set[str] | None = None  # of the captions, once `make` has read them

    def check(self) -> None:
        """Looks at the published T5, where there is one, without reading it.

        Raises:
            UserError: if it does not fit the config.
        """
        text = self._config.pretrained_text
        if text is None:
            return
        t5_weights.matched(text.pretrained, text.encoder, text.vocab_size)
        path = t5_weights.vocabulary_path(text.pretrained)
        pieces = Vocabulary.load(path, text.length).size
        if pieces > text.vocab_size:
            raise UserError(
                f"{path} has {pieces} pieces, and its folder's T5 embeds {text.vocab_size}; use that T5's own."
            )

    def make(self, trained: Iterable[str], unseen: Iterable[str]) -> bytes:
        """A vocabulary of the training clips' captions where the config has text; a list of all where they are classes.

        Raises:
            UserError: if `text.vocab_size` or `denoiser.classes` does not suit them.
        """
        config = self._config
        trained = list(trained)
        self._words = None if config.text is None else words.of_captions(trained)
        if config.pretrained_text is not None:
            return t5_weights.vocabulary_path(config.pretrained_text.pretrained).read_bytes()
        if config.text is not None:
            return vocabulary.train(trained, config.text.vocab_size)
        if not config.denoiser.classes:
            return Labels(()).dump()
        names = sorted({*trained, *unseen} - {""})
        if len(names) != config.denoiser.classes:
            raise UserError(
                f"The clips have {len(names)} distinct captions and config.denoiser.classes is "
                f"{config.denoiser.classes}; set it to that, or --config.data.captions to the column that "
                "names each clip's class."
            )
        return Labels(names).dump()

    def take(self, other: "RunText", trained: Iterable[str]) -> bytes:
        """Another run's vocabulary or list of classes, for training clips' captions.

        Raises:
            UserError: if a caption is no class of that list, or the file is damaged.
        """
        captions = other.captions()
        trained = list(trained)
        if isinstance(captions, Labels):
            captions.encode(trained)
        elif other._words_path.exists():
            self._words = words.of_captions(trained) | set(other._words_path.read_text(encoding="utf-8").split())
        return other._path.read_bytes()

    def keep(self, made: bytes | None) -> None:
        """Writes what `make` made and the captions' words, where there are none yet, and its digest."""
        if self._words is not None and not self._words_path.exists():
            write_atomically(self._words_path, "".join(f"{word}\n" for word in sorted(self._words)))
        if made is not None and not self._path.exists():
            write_atomically(self._digest_path, hashlib.sha256(made).hexdigest() + "\n")
            write_atomically(self._path, made)

    @property
    def _path(self) -> pathlib.Path:
        return self._workdir / ("labels.json" if self._config.text is None else "vocabulary.model")

    @property
    def _words_path(self) -> pathlib.Path:
        return self._workdir / "words.txt"

    @property
    def _digest_path(self) -> pathlib.Path:
        return self._path.with_name(f"{self._path.name}.sha256")

    def _check_digest(self) -> None:
        if not self._path.exists() or not self._digest_path.exists():
            return
        if hashlib.sha256(self._path.read_bytes()).hexdigest() != self._digest_path.read_text().strip():
            raise UserError(
                f"{self._path} is not the one that this run was trained with; restore it or use another --workdir."
            )

    def cut_captions(self, captions: Iterable[str]) -> list[str]:
        """A sentence on each caption of which only the first tokens are read."""
        if self._config.text is None:
            return []
        vocabulary, length = self.captions(), self._config.text.length
        counts = {caption: vocabulary.count(caption) for caption in captions}
        return [
            f"of the prompt {caption[:60]!r} the first {length - 1} tokens of {count} are read."
            for caption, count in counts.items()
            if count > length - 1
        ]

    def unknown_words(self, prompts: Iterable[str]) -> list[str]:
        """A sentence on each prompt with words that no caption of the training clips has; none of older runs."""
        if not self._words_path.exists():
            return []
        return list(words.warnings(prompts, set(self._words_path.read_text(encoding="utf-8").split("\n"))))

    def captions(self) -> Vocabulary | Labels:
        """What makes ids of captions; of published classes, which have no names, their numbers."""
        text = self._config.text
        if only_published(self._config, self._workdir):
            if text is None:
                return Labels(tuple(map(str, range(self._config.denoiser.classes))))
            return Vocabulary.load(t5_weights.vocabulary_path(text.pretrained), text.length)
        self._check_digest()
        return Labels.load(self._path) if text is None else Vocabulary.load(self._path, text.length)

    def same_vocabulary(self, other: "RunText") -> bool:
        """Whether ids mean the same in another run."""
        return self._path.exists() and other._path.exists() and self._path.read_bytes() == other._path.read_bytes()

    def vocab_size(self) -> int:
        """Rows of the table of embeddings; 0 without text."""
        if self._config.pretrained_text is not None:
            return self._config.pretrained_text.vocab_size
        return 0 if self._config.text is None else self.captions().size

    def frozen(self) -> FrozenText | None:
        """What reads captions where it is not trained."""
        text = self._config.pretrained_text
        if text is None:
            return None
        params = t5_weights.load(text.pretrained, text.encoder, text.vocab_size)
        return FrozenText(T5Encoder(text.encoder, text.vocab_size), params, self.captions())

    def digest(self) -> str | None:
        """Tells embeddings of this config's frozen encoder from any others."""
        text = self._config.pretrained_text
        if text is None:
            return None
        return f"{t5_weights.digest(text.pretrained)}, {text.length} tokens, {text.encoder.dtype}"

    def reader(self, empty: Float[ndarray, "n e"] | None) -> ReadCaptions:
        """Of clips that were encoded beforehand; `empty` is the empty caption as a frozen encoder has read it."""
        text = self._config.pretrained_text

        def choose(clips: Sequence[Encoded], dropped: Sequence[bool], part: str, instead: Any) -> list[Any]:
            return [instead if without else getattr(clip, part) for clip, without in zip(clips, dropped, strict=True)]

        if text is not None:
            return lambda clips, dropped: padded(choose(clips, dropped, "embeddings", empty), text.length)
        captions = self.captions()
        return lambda clips, dropped: captions.encode(choose(clips, dropped, "caption", ""))
