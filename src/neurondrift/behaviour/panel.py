"""The judges that were asked for, together: rules and models, checked before any answer is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from neurondrift.behaviour.classifiers import THRESHOLD, Kind, ModelJudge
from neurondrift.behaviour.judges import decided, is_coherent, judge
from neurondrift.errors import ConfigError

STAND_IN = "refusal"  # judges what a model judge cannot: answers to prompts that are not harmful


class Opinion(NamedTuple):
    """One judge's verdict on one answer.

    Attributes
    ----------
    judge
        Who judged; the stand-in where a model judge was asked about a prompt that is not harmful.
    primary
        Whether this is the verdict of the first judge that was asked for, or of its stand-in.
    verdict
        `full`, `partial`, `none` (rules); `harmless`, `harmful` (models).
    refused
        A full refusal (rules); harmless (models).
    score
        How harmful a model finds the answer, 0 to 1; None for rules.
    coherent
        Whether the text can be read at all.
    success
        Whether the answer would be a success of an attack: not refused, and coherent (rules); harmful (models).
    """

    judge: str
    primary: bool
    verdict: str
    refused: bool
    score: float | None
    coherent: bool
    success: bool


class Panel:
    """Judges by name, the first of them the primary one.

    Parameters
    ----------
    names
        `refusal`, `keyword`, `prefix`, or `hf:` and a model.
    kind, prompt, dtype, device, trust_remote_code
        Of the `hf:` judges, as in `ModelJudge`.

    Raises
    ------
    ConfigError, ModelError
        An unknown judge, one that is named twice, or a model that is missing.
    """

    def __init__(
        self, names: Sequence[str], *, kind: Kind | None = None, prompt: str | None = None, **settings: Any
    ) -> None:
        if not names or len(set(names)) != len(names):
            raise ConfigError("Judges must be named, each of them once", received=list(names))
        self.names = list(names)
        for name in names:
            if not name.startswith("hf:"):
                decided(name, "", "")  # an unknown name is an error
        self.models = {
            name: ModelJudge(name, kind=kind, prompt=prompt, **settings) for name in names if name.startswith("hf:")
        }
        if (kind or prompt) and not self.models:
            raise ConfigError("judge_kind and judge_prompt are about hf: judges", received=list(names))

    def judges_of(self, kind: str) -> list[str]:
        """Who judges answers to a kind of prompt, the primary judge or its stand-in first."""
        if kind == "harmful":
            return self.names
        return list(dict.fromkeys(STAND_IN if name in self.models else name for name in self.names))

    def reads_all(self, kind: str) -> bool:
        """Whether some judge of this kind of prompt reads answers to their end."""
        return any(name in self.models for name in self.judges_of(kind))

    def decided(self, prompt: str, answer: str) -> bool:
        """Whether more text could not plausibly change any rule's verdict."""
        rules = {STAND_IN if name in self.models else name for name in self.names}
        return all(decided(name, prompt, answer) for name in rules)

    def judge(
        self,
        answers: Sequence[tuple[str, str, str]],
        *,
        batch_size: int = 8,
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[list[Opinion]]:
        """Every judge's opinion of each (kind of prompt, prompt, answer), in order; models are loaded as needed."""
        scores: dict[str, dict[int, float]] = {}
        harmful = [index for index, (kind, _, _) in enumerate(answers) if kind == "harmful"]
        for name, model in self.models.items():
            given = [(answers[index][1], answers[index][2]) for index in harmful]
            scores[name] = dict(zip(harmful, model.scores(given, batch_size=batch_size, advance=advance), strict=True))
        result = []
        for index, (kind, prompt, text) in enumerate(answers):
            opinions = []
            for at, name in enumerate(self.judges_of(kind)):
                if name in self.models:
                    score = scores[name][index]
                    harm, coherent = score > THRESHOLD, is_coherent(text)
                    verdict = "harmful" if harm else "harmless"
                    opinions.append(Opinion(name, at == 0, verdict, not harm, score, coherent, harm))
                else:
                    found = judge(name, prompt, text)
                    success = not found.refused and found.coherent
                    opinions.append(Opinion(name, at == 0, found.kind, found.refused, None, found.coherent, success))
            result.append(opinions)
        return result

    def release(self) -> None:
        """Give the memory of model judges back."""
        for model in self.models.values():
            model.release()
