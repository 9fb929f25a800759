"""Notices when a tokenizer's training collapses: a discriminator that is never wrong, or codes that few use."""

import collections

WINDOW = 20  # logged steps that must agree
CERTAIN = 0.98  # of the discriminator's verdicts are right
UNUSED = 0.05  # of the codes that could be in use are


class CollapseWatch:
    """Looks at the metrics of logged steps; says so once when a collapse begins, and again if it ended in between."""

    def __init__(self) -> None:
        self._recent: dict[str, collections.deque[float]] = {}
        self._reported: set[str] = set()

    def update(self, metrics: dict[str, float]) -> list[str]:
        """What has collapsed with this step, a sentence each."""
        signs = {
            "discriminator_accuracy": (
                lambda value: value >= CERTAIN,
                "the discriminator is right nearly always, so the tokenizer learns nothing from it: lower its weight "
                "(adversarial) or raise r1",
            ),
            "code_usage": (
                lambda value: value <= UNUSED,
                "hardly any codes are in use: raise the entropy weight (lfq) or lower the number of codes",
            ),
        }
        sentences = []
        for name, (collapsed, sentence) in signs.items():
            if name not in metrics:
                continue
            recent = self._recent.setdefault(name, collections.deque(maxlen=WINDOW))
            recent.append(metrics[name])
            mean = sum(recent) / len(recent)
            if len(recent) < WINDOW or not collapsed(mean):
                self._reported.discard(name)
            elif name not in self._reported:
                self._reported.add(name)
                sentences.append(f"{name} is {mean:.3f} on average: {sentence}.")
        return sentences
